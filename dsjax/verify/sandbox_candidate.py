"""Loads a candidate's program and answers calls to it, line by line, within a sandbox.

`dsjax.verify.code` puts this file into the sandbox; it knows no test and no expected value, so that
a candidate which takes it over has gained nothing: it can only answer.
"""

import json
import os
import sys
import types
from collections.abc import Iterable
from typing import IO, Any

import sandbox_values  # pyrefly: ignore[missing-import]  # lies beside this file in the sandbox


class Candidate:
    """The program as a module, with the objects of it that others hold by number."""

    def __init__(self, path: str):
        self._objects: list[Any] = []
        self._module = sys.modules["solution"] = types.ModuleType("solution")
        with open(path, encoding="utf-8") as file:
            source = file.read()
        exec(compile(source, path, "exec"), self._module.__dict__)

    def answer(self, request: dict) -> Any:
        """Does what is asked with an object: gets, sets, calls, measures, lists."""
        target: Any = None if request["on"] is None else self._objects[request["on"]]
        args = sandbox_values.decode(request["args"], self._objects.__getitem__)
        match request["do"]:
            case "name":
                value = self._module.__dict__[args[0]]
            case "get":
                value = getattr(target, args[0])
            case "set":
                value = setattr(target, args[0], args[1])
            case "call":
                value = target(*args[0], **args[1])
            case "len":
                value = len(target)
            case "item":
                value = target[args[0]]
            case _:
                value = list(target)
        return sandbox_values.encode(value, self._keep)

    def _keep(self, value: Any) -> int:
        for number, kept in enumerate(self._objects):
            if kept is value:
                return number
        self._objects.append(value)
        return len(self._objects) - 1


def serve(path: str, requests: Iterable[bytes], answers: IO[bytes]) -> None:
    """One line for every line, an error's name where there is no value."""
    candidate, failure = None, ""
    try:
        candidate = Candidate(path)
    except BaseException as error:  # sys.exit among them
        failure = type(error).__name__
    for line in requests:
        try:
            if candidate is None:
                answer = json.dumps({"error": failure})
            else:
                answer = json.dumps({"value": candidate.answer(json.loads(line))})
        except BaseException as error:
            answer = json.dumps({"error": type(error).__name__})
        answers.write(answer.encode() + b"\n")
        answers.flush()


def main() -> None:
    """Takes standard input and output for itself: what a candidate prints is lost."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    serve("solution.py", requests, answers)


if __name__ == "__main__":
    main()
