"""Runs assertions about functions that live in another sandbox, and says which hold.

`dsjax.verify.code` puts this file into a sandbox of its own. It knows the assertions, and of the
candidate only what comes back from calls: values of builtin types, or objects that can be asked for
attributes but are equal to nothing except themselves.
"""

import ast
import builtins
import importlib
import json
import os
import sys
from collections.abc import Iterable
from typing import IO, Any

import sandbox_values  # pyrefly: ignore[missing-import]  # lies beside this file in the sandbox

MAX_ANSWER_BYTES = 2**24


class Gone(BaseException):
    """The candidate answers no more."""


class Candidate:
    """The other end of `sandbox_candidate`."""

    def __init__(self, answers: IO[bytes], requests: IO[bytes]):
        self._answers, self._requests = answers, requests
        self._remotes: dict[int, Remote] = {}

    def ask(self, do: str, on: "Remote | None", *args: Any) -> Any:
        """The value of an answer; raises its error, as far as it is one of Python's own."""
        coded = sandbox_values.encode(list(args), _number)
        request = {"do": do, "on": None if on is None else _number(on), "args": coded}
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            line = self._answers.readline(MAX_ANSWER_BYTES)
        except OSError:
            raise Gone from None
        if not line.endswith(b"\n"):
            raise Gone
        answer = json.loads(line)
        if "error" in answer:
            kind = getattr(builtins, str(answer["error"]), None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                raise kind("in the candidate")
            raise RuntimeError(f"in the candidate: {answer['error']}")
        return sandbox_values.decode(answer["value"], self._remote)

    def _remote(self, number: int) -> "Remote":
        if type(number) is not int:
            raise ValueError("an object's number is no number")
        if number not in self._remotes:
            self._remotes[number] = Remote(self, number)
        return self._remotes[number]


class Remote:
    """An object of the candidate's. Comparisons, truth, hash and type are ours, not its own."""

    __slots__ = ("_Remote__at",)

    def __init__(self, candidate: Candidate, number: int):
        object.__setattr__(self, "_Remote__at", (candidate, number))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__at[0].ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__at[0].ask("set", self, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls it over there."""
        return self.__at[0].ask("call", self, args, kwargs)

    def __len__(self) -> int:
        return self.__at[0].ask("len", self)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter(self.__at[0].ask("list", self))

    def __getitem__(self, key: Any) -> Any:
        return self.__at[0].ask("item", self, key)


def _number(value: Any) -> int:
    if type(value) is not Remote:
        raise TypeError(f"a {type(value).__name__} cannot be handed to the candidate")
    return value._Remote__at[1]


def missing(trees: Iterable[ast.AST], tested: str) -> tuple[set[str], set[str]]:
    """The names that the assertions use and do not bind: all of them, and those with a dot only.

    Builtins are bound, except for one that is `tested`.
    """
    nodes = [node for tree in trees for node in ast.walk(tree)]
    before_dots = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    read, bound, bare = set(), set(dir(builtins)) - {tested}, set()
    for node in nodes:
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                read.add(name)
                if id(node) not in before_dots:
                    bare.add(name)
            case ast.Name(id=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                bound.add(name)
            case ast.arg(arg=name):
                bound.add(name)
            case ast.alias(name=name, asname=other):
                bound.add(other or name.split(".")[0])
            case ast.ExceptHandler(name=str(name)):
                bound.add(name)
    return read - bound, read - bound - bare


def check(setup: str, tests: list[str], tested: str, candidate: Candidate) -> Iterable[bool]:
    """Whether each test runs without an exception; none of them do after a setup that fails.

    Raises:
        SyntaxError: if one is no Python.
    """
    trees = [ast.parse(code) for code in (setup, *tests)]
    namespace: dict[str, Any] = {"__name__": "tests"}
    names, dotted = missing(trees, tested)
    for name in sorted(names):
        if name in dotted and name in sys.stdlib_module_names:
            namespace[name] = importlib.import_module(name)
            continue
        try:
            namespace[name] = candidate.ask("name", None, name)
        except Exception:  # it has no such name: an error where it is used
            continue
    for index, tree in enumerate(trees):
        try:
            exec(compile(tree, "tests", "exec"), namespace)
        except Gone:
            return
        except BaseException:
            if index == 0:
                return
            yield False
        else:
            if index > 0:
                yield True


def main() -> None:
    """Reads the tests, asks the candidate, and writes a line for each test."""
    task = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 1)
    answers, requests = (int(descriptor) for descriptor in sys.argv[-2:])
    candidate = Candidate(os.fdopen(answers, "rb"), os.fdopen(requests, "wb", buffering=0))
    try:
        for holds in check(task["setup"], task["tests"], task["name"], candidate):
            out.write(f"{task['nonce']} {int(holds)}\n")
    except SyntaxError as error:
        out.write(f"{task['nonce']} {error}\n")


if __name__ == "__main__":
    main()
