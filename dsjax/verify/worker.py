"""Runs rewards in a process of its own, which may be killed at any moment.

`dsjax.verify.pool` runs this file as a script: it knows nothing of batches or deadlines. A request
is a length and a pickle of the parent's; answers are lines of JSON, first that the reward is
loaded, then its score. What a reward prints goes nowhere.
"""

import contextlib
import importlib
import json
import math
import numbers
import os
import pickle
import resource
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

MISTAKES = ("InputError", "RunError")  # of dsjax.errors
MAX_MESSAGE = 300  # characters of an error, part of which a model can write
MAX_MEMORY_BYTES = 4 * 2**30  # of address space, for what evaluates a model's text
SPARE_SECONDS = 5  # past the deadline, for a parent that is no longer there to kill us


def as_score(value: Any) -> float:
    """What a reward returned, as a finite number.

    Raises:
        TypeError: for what is no number.
        ValueError: for NaN and infinity.
    """
    if not isinstance(value, numbers.Real):
        raise TypeError(f"the reward returned {type(value).__name__}, not a number")
    if not math.isfinite(value):
        raise ValueError(f"the reward returned {float(value)}")
    return float(value)


def one_line(error: BaseException) -> str:
    """An exception's type and message, short and printable."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:
        text = type(error).__name__
    return " ".join(text.split())[:MAX_MESSAGE].encode("ascii", "backslashreplace").decode()


def _prepare_ours() -> None:
    """For verifiers of dsjax: bounded memory, and no jax, which `import dsjax` would bring."""
    package = types.ModuleType("dsjax")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["dsjax"] = package
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MAX_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MAX_MEMORY_BYTES, hard)
    with contextlib.suppress(ValueError, OSError):  # a system that knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _load(target: str | bytes) -> Callable:
    if isinstance(target, bytes):
        return pickle.loads(target)
    module, _, name = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{target} cannot be called")
    return found


def _score(reward: Callable, request: dict[str, Any]) -> dict[str, Any]:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is busy with
    signal.alarm(math.ceil(request["seconds"]) + SPARE_SECONDS)
    try:
        return {"value": as_score(reward(*request["sample"]))}
    except BaseException as error:  # a reward may also exit
        # A mistake of the caller's, in a record or with an absent package, stops the run.
        if request["ours"] and any(kind.__name__ in MISTAKES for kind in type(error).__mro__):
            return {"mistake": str(error)}
        return {"error": one_line(error)}
    finally:
        signal.alarm(0)


def _serve(requests: IO[bytes], answers: IO[str]) -> None:
    loaded: dict[str | bytes, Callable] = {}
    while header := requests.read(8):
        request = pickle.loads(requests.read(int.from_bytes(header, "big")))
        target = request["target"]
        try:
            if target not in loaded:
                loaded[target] = _load(target)
            if request["ours"]:
                importlib.import_module("dsjax.verify.accuracy").prepare(request["sample"][2])
            answer = {"loaded": True}
        except BaseException as error:
            answer = {"mistake": f"{request['name']} cannot be loaded: {one_line(error)}"}
        print(json.dumps(answer), file=answers, flush=True)
        if "loaded" in answer:
            print(json.dumps(_score(loaded[target], request)), file=answers, flush=True)


def main() -> None:
    """Answers until its standard input ends."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    if sys.argv[1] == "ours":
        _prepare_ours()
    with contextlib.suppress(BrokenPipeError):
        _serve(requests, answers)


if __name__ == "__main__":
    main()
