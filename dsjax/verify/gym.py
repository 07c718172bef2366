"""reasoning_gym's problems as records, and its scores of answers.

Knows nothing of prompts or tags: an answer comes here extracted. Some of its scorers evaluate what
a model wrote as Python; here they get an evaluator of arithmetic and of literals instead.
"""

import ast
import functools
import importlib
import importlib.util
import json
import re
import sys
import types
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dsjax.errors import InputError, nearest
from dsjax.verify import maths

_NAMES = re.compile(r"[^\W\d]\w*")
_FRACTION = re.compile(r"/|frac")
_FUNCTIONS = frozenset(
    {
        "Abs",
        "E",
        "I",
        "Integral",
        "acos",
        "asin",
        "atan",
        "cos",
        "cosh",
        "exp",
        "log",
        "pi",
        "sin",
        "sinh",
    }
    | {"sqrt", "tan", "tanh"}
)
_NODES = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator, ast.unaryop),
    *(ast.List, ast.Tuple, ast.Set, ast.Dict, ast.expr_context),
)
_APART = 2_654_435_761  # 2**32 over the golden ratio: multiples of it lie far from each other
_SPARE = 4  # draws for each problem wanted
_FRUITLESS = 200  # draws without a new question, and as many again as there are, are enough


def problems(
    family: str, *, seed: int, size: int, config: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The first problems of a seed, as records.

    Args:
        family: reasoning_gym's name of a data set.
        seed: the same seed gives the same problems.
        size: how many.
        config: fields of the family's own configuration.

    Returns:
        Records with `question`, `answer`, `verify` ("reasoning_gym"), `family`, `config`, `entry`
        (reasoning_gym's own), and `by_equality`: whether the family knows nothing better than
        comparing texts.

    Raises:
        InputError: for an unknown family or configuration, for a family without right answers, or
            if the package is not there.
    """
    return list(_drawn(family, seed, size, config))


def train_and_held_out(
    family: str,
    *,
    seed: int,
    train: int,
    held_out: int,
    config: Mapping[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Two sets of problems without a question in common, and without one that occurs twice.

    Args:
        family: reasoning_gym's name of a data set.
        seed: the same seed gives the same sets.
        train: how many to train on; fewer where drawing brings nothing new any more.
        held_out: how many to measure on.
        config: fields of the family's own configuration.

    Returns:
        (training records, held-out records).

    Raises:
        InputError: as `problems`, and if less is left to train on than is held out.
    """
    wanted = train + held_out
    different: dict[str, dict[str, Any]] = {}
    newest = 0
    for draw, record in enumerate(_drawn(family, seed, _SPARE * wanted + _FRUITLESS, config)):
        if len(different) == wanted or draw - newest > len(different) + _FRUITLESS:
            break
        if record["question"] not in different:
            different[record["question"]] = record
            newest = draw
    if len(different) - held_out < min(train, held_out):
        raise InputError(
            f"{family!r}, as it is configured, has about {len(different)} different questions: "
            f"too few to hold {held_out} out"
        )
    records = list(different.values())
    return records[held_out:], records[:held_out]


def without_questions(
    records: list[dict[str, Any]], others: Collection[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The records whose question is that of none of the others."""
    known = {other["question"] for other in others}
    return [record for record in records if record["question"] not in known]


def score_quickly(given: str, record: Mapping[str, Any]) -> float | None:
    """1.0 or 0.0 where the texts decide, or the numbers; None where the family has to be asked.

    Where the right answer is a number, right is that number, and nothing beside it.
    """
    gold = str(record["entry"]["answer"])
    if given == gold:
        return 1.0
    if record.get("partial"):
        return None
    if record.get("by_equality"):
        return 0.0
    if gold in ("True", "False"):
        return float(given.capitalize() == gold)
    if (number := maths.number(gold)) is not None:
        if (other := maths.number(given)) is None:
            return 0.0
        if not _FRACTION.search(gold + given):  # of which a family may want the lowest terms
            return float(other == number)
    return None


def score(given: str, record: Mapping[str, Any]) -> float:
    """1.0 for what the family's scorer gives full marks, else 0.0; with `partial`, its own score.

    A part of the marks goes to any text with the right answer among others, in many families: it
    would teach a policy to hedge, and is only given to records with `"partial": true`.

    The scorer is third-party code on text of a model, and unbounded in time: it is to run in a
    process that may be killed. An answer that it fails on has 0.
    """
    if (quick := score_quickly(given, record)) is not None:
        return quick
    data = prepare(record)
    try:
        marks = float(data.score_answer(given, entry=dict(record["entry"])))
    except Exception:
        return 0.0
    return min(1.0, max(0.0, marks)) if record.get("partial") else float(marks >= 1)


def prepare(record: Mapping[str, Any]) -> Any:
    """The data set whose scorer judges a record; it is kept."""
    return _scorer(record["family"], json.dumps(record.get("config") or {}, sort_keys=True))


def calculate(text: str, *_: Any) -> Any:
    """The value of arithmetic and of literals; names, calls and attributes are refused.

    Raises:
        ValueError: for anything else.
    """
    tree = ast.parse(text.strip(), mode="eval")
    if not all(isinstance(node, _NODES) for node in ast.walk(tree)):
        raise ValueError("this is not arithmetic")
    return eval(compile(tree, "answer", "eval"), {"__builtins__": {}})


def _drawn(
    family: str, seed: int, size: int, config: Mapping[str, Any] | None
) -> Iterator[dict[str, Any]]:
    # Item i of a seed is that of seed + i: neighbouring seeds would have the same problems.
    first = seed * _APART % 2**31
    data = _data(family, json.dumps({**(config or {}), "seed": first, "size": size}))
    by_equality = "score_answer" not in vars(type(data))
    for place in range(size):
        entry = data[place]
        if entry["answer"] is None:
            raise InputError(f"{family!r} of reasoning_gym has no right answers")
        yield {
            "question": entry["question"],
            "answer": str(entry["answer"]),
            "verify": "reasoning_gym",
            "family": family,
            "config": dict(config or {}),
            "by_equality": by_equality,
            "entry": entry,
        }


def _data(family: str, config: str) -> Any:
    factory = _factory()
    if family not in factory.DATASETS:
        raise InputError(f"unknown family {family!r}{nearest(family, factory.DATASETS)}")
    try:
        return factory.create_dataset(family, **json.loads(config))
    except Exception as error:
        raise InputError(f"the configuration of {family!r} is wrong: {error}") from error


@functools.lru_cache(maxsize=64)
def _scorer(family: str, config: str) -> Any:
    """A data set whose own module evaluates nothing but arithmetic from now on."""
    import sympy

    data = _data(family, config)
    own = sys.modules[type(data).__module__]
    guarded: dict[str, Any] = {"eval": calculate}
    for name, value in vars(own).items():
        if value is sympy.parse_expr:
            guarded[name] = _parse_formula
        elif value is sympy:
            guarded[name] = types.ModuleType("sympy")
            vars(guarded[name]).update(vars(sympy), parse_expr=_parse_formula)
    vars(own).update(guarded)
    return data


def _parse_formula(text: str, *arguments: Any, **named: Any) -> Any:
    """`sympy.parse_expr`, which is an `eval`, of formulas alone."""
    import sympy

    names = set(_NAMES.findall(text)) - _FUNCTIONS
    if not set("\"'[]{}:;=\\").isdisjoint(text) or any(len(name) > 1 for name in names):
        raise ValueError("this is not a formula")
    return sympy.parse_expr(text, *arguments, **named)


def _factory() -> types.ModuleType:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise InputError("reasoning_gym is not installed: pip install 'dsjax[rl]'")
    # It imports this for one family, zebra_puzzles, and building it takes a C compiler.
    absent = importlib.util.find_spec("pycosat") is None
    if absent and "reasoning_gym" not in sys.modules:
        stand_in = types.ModuleType("pycosat")
        vars(stand_in).update(itersolve=_no_pycosat, solve=_no_pycosat)
        sys.modules["pycosat"] = stand_in
    try:
        return importlib.import_module("reasoning_gym.factory")
    finally:
        if absent:
            sys.modules.pop("pycosat", None)


def _no_pycosat(*_: Any) -> None:
    raise InputError("this family needs the package pycosat: pip install pycosat")
