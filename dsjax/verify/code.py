"""The reward of a program: hidden tests, run in sandboxes, against the last block of code.

Knows nothing of how a sandbox is made, nor of batches. A test's form decides who knows what:

* `stdin`: a program gets one input a run; what it should print stays in this process.
* `function`: the program's process gets arguments and sends values back; what they should be stays
  in this process, which compares plain values of its own making.
* `asserts`: lines of Python about functions of the program. They run in a second sandbox, in which
  the functions are stand-ins that ask the first one; the program never sees the lines, and its
  `__eq__`, `assert`, builtins, exit codes and prints are not those that the lines meet.

So a program wins by giving right values, whatever else it does. What stays possible: to remember
answers that training has shown, and to meet weak tests with weak means, such as an object where a
test asks for truth. Arguments are copies, so that a test of what a function does to its argument
fails, as does one that hands over a function.
"""

import dataclasses
import itertools
import json
import math
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsjax.errors import InputError, nearest
from dsjax.verify import extract, sandbox
from dsjax.verify.sandbox_bwrap import Limits
from dsjax.verify.sandbox_process import Program
from dsjax.verify.sandbox_values import decode, encode

SECONDS = 30.0
FLOAT_TOLERANCE = 1e-9  # relative and absolute: the last digits of a sum depend on its order
KINDS = ("stdin", "function", "asserts")

_FENCE = re.compile(r"[ \t]{0,3}(`{3,})[ \t]*([^`\s]*)[^`]*")
_PYTHON = ("", "python", "python3", "py")
_HERE = Path(__file__).parent


def check(
    completion: str,
    record: Mapping[str, Any],
    *,
    partial: bool = False,
    limits: Limits | None = None,
    seconds: float = SECONDS,
    allow_unsafe: bool = False,
) -> float:
    """1.0 if the program in a completion passes all tests of a record, else 0.0.

    All or nothing is DeepSeek-R1's accuracy reward for code (arXiv:2501.12948, section 2.2.2:
    a compiler's feedback on predefined tests).

    Args:
        completion: whose last complete block of Python after the thinking is the program.
        record: has `tests`, one of
            `{"kind": "stdin", "cases": [{"stdin": text, "stdout": text}, ...]}`, compared line by
            line without white space at the ends of lines and of the text;
            `{"kind": "function", "name": name, "cases": [{"args": [...], "expected": value}, ...]}`
            with values of JSON, where a tuple counts as a list and floats may differ by
            `FLOAT_TOLERANCE`;
            `{"kind": "asserts", "code": [lines, ...], "setup": lines, "name": name}`, each of
            `code` a test, with what they share in `setup`; `name` is the tested function's, needed
            where it is that of a builtin. The last two may be left out.
        partial: give the share of tests that pass.
        limits: of one run: of each case of `stdin`, of all cases together otherwise.
        seconds: for all runs together; tests that have not run by then fail.
        allow_unsafe: see `sandbox.run`.

    Raises:
        InputError: if the record has no such tests.
        SandboxUnavailable: see `sandbox.run`.
        RunError: see `sandbox.run`.
    """
    tests = _tests(record)
    program = extract_program(completion)
    if program is None:
        return 0.0
    runs = _Runs(limits or Limits(), time.monotonic() + seconds, allow_unsafe)
    match tests["kind"]:
        case "stdin":
            number, passed = len(tests["cases"]), _stdin(program, tests["cases"], runs)
        case "function":
            number, passed = len(tests["cases"]), _function(program, tests, runs)
        case _:
            number, passed = len(tests["code"]), _asserts(program, tests, runs)
    if partial:
        return sum(passed) / number
    return float(sum(itertools.takewhile(bool, passed)) == number)


def extract_program(completion: str) -> str | None:
    """The last complete fenced block of Python, or of no named language, after the thinking."""
    text = extract.final_part("", completion)
    program, fence, is_python, lines = None, "", False, []
    for line in (text or "").splitlines():
        match = _FENCE.fullmatch(line.rstrip())
        if fence:
            if match and len(match[1]) >= len(fence) and not match[2]:
                if is_python:
                    program = "\n".join(lines) + "\n"
                fence = ""
            else:
                lines.append(line)
        elif match:
            fence, is_python, lines = match[1], match[2].lower() in _PYTHON, []
    return program


class _Runs:
    """Runs programs until the time for all of them is over."""

    def __init__(self, limits: Limits, deadline: float, allow_unsafe: bool):
        self._limits, self._deadline, self._allow_unsafe = limits, deadline, allow_unsafe

    def run(
        self, program: Program, stdin: str, peer: Program | None = None
    ) -> sandbox.Result | None:
        """None if no time is left."""
        if (left := self._deadline - time.monotonic()) <= 0:
            return None
        limits = dataclasses.replace(self._limits, seconds=min(self._limits.seconds, left))
        return sandbox.run(
            program, stdin, peer=peer, limits=limits, allow_unsafe=self._allow_unsafe
        )


def _stdin(program: str, cases: list[dict[str, str]], runs: _Runs) -> Iterator[bool]:
    for case in cases:
        result = runs.run(Program(files={"main.py": program}), case["stdin"])
        yield bool(result and result.ok and _lines(result.stdout) == _lines(case["stdout"]))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _function(program: str, tests: Mapping[str, Any], runs: _Runs) -> Iterator[bool]:
    requests: list[dict[str, Any]] = [{"do": "name", "on": None, "args": [tests["name"]]}]
    for case in tests["cases"]:
        args = encode([case["args"], {}], _no_object)
        requests.append({"do": "call", "on": 0, "args": args})
    result = runs.run(_candidate(program), "".join(json.dumps(line) + "\n" for line in requests))
    answers = result.stdout.splitlines()[1:] if result else []
    for case, answer in itertools.zip_longest(tests["cases"], answers[: len(tests["cases"])]):
        try:
            value = decode(json.loads(answer)["value"], _no_value)
            yield _same(value, case["expected"])
        # Whatever a program has written there: no line, no value, one nested too deeply.
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            yield False


def _asserts(program: str, tests: Mapping[str, Any], runs: _Runs) -> Iterator[bool]:
    nonce = secrets.token_hex(16)
    task = {"nonce": nonce, "tests": tests["code"]}
    task |= {name: tests.get(name, "") for name in ("setup", "name")}
    checker = Program(files=_files("sandbox_checker.py"), argv=("sandbox_checker.py",))
    result = runs.run(checker, json.dumps(task), peer=_candidate(program))
    for line in result.stdout.splitlines() if result else []:
        mark, _, verdict = line.partition(" ")
        if mark == nonce and verdict not in ("0", "1"):
            raise InputError(f"a test is no Python: {verdict}")
        if mark == nonce:
            yield verdict == "1"


def _candidate(program: str) -> Program:
    files = _files("sandbox_candidate.py") | {"solution.py": program}
    return Program(files=files, argv=("sandbox_candidate.py",))


def _files(main: str) -> dict[str, str]:
    return {name: (_HERE / name).read_text() for name in (main, "sandbox_values.py")}


def _no_object(value: Any) -> int:
    raise InputError(f"an argument of a test is a {type(value).__name__}, not a value of JSON")


def _no_value(number: int) -> Any:
    raise ValueError("an object that is no plain value")


def _same(value: Any, expected: Any) -> bool:
    """Whether a decoded value is the expected one; types count, but a tuple is a list."""
    if isinstance(expected, bool) or expected is None or isinstance(expected, str):
        return type(value) is type(expected) and value == expected
    if isinstance(expected, (int, float)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if isinstance(value, int) and isinstance(expected, int):
            return value == expected
        return value == expected or math.isclose(
            value, expected, rel_tol=FLOAT_TOLERANCE, abs_tol=FLOAT_TOLERANCE
        )
    if isinstance(expected, list):
        return (
            isinstance(value, (list, tuple))
            and len(value) == len(expected)
            and all(map(_same, value, expected))
        )
    return (
        isinstance(value, dict)
        and len(value) == len(expected)
        # JSON has no other keys than texts.
        and {str(key) for key in value} == set(expected)
        and all(_same(item, expected[str(key)]) for key, item in value.items())
    )


def _tests(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record's tests, with the fields of their kind."""
    tests = record.get("tests")
    if not isinstance(tests, Mapping):
        raise InputError("a record of code has no tests: an object with a kind and its cases")
    kind = tests.get("kind")
    if kind not in KINDS:
        raise InputError(f"tests of no known kind {kind!r}{nearest(str(kind), KINDS)}")
    field = "code" if kind == "asserts" else "cases"
    if not isinstance(tests.get(field), list) or not tests[field]:
        raise InputError(f"tests of kind {kind} have no {field}")
    if kind == "asserts":
        good = all(
            isinstance(code, str)
            for code in [*tests["code"], *(tests.get(name, "") for name in ("setup", "name"))]
        )
    else:
        fields = ("stdin", "stdout") if kind == "stdin" else ("args", "expected")
        good = all(
            isinstance(case, Mapping) and set(fields) <= set(case) for case in tests["cases"]
        )
        if good and kind == "stdin":
            good = all(isinstance(case[field], str) for case in tests["cases"] for field in fields)
        elif good:
            good = isinstance(tests.get("name"), str)
            good = good and all(isinstance(case["args"], list) for case in tests["cases"])
    if not good:
        raise InputError(f"tests of kind {kind} lack a field, or it is of the wrong type")
    return tests
