"""Configurations to JSON and back without loss, dotted overrides, and the first difference of two.

Knows nothing about what fields mean: it reads the dataclasses' annotations. An override is a path
and a value (`train.batch_size=4`).
"""

import dataclasses
import json
import math
import sys
import types
import typing
from typing import Any, Literal

from dsjax.errors import InputError, nearest


def to_json(config: Any) -> Any:
    """Turns a configuration into dicts, lists and scalars; a dataclass has its class as `kind`."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"kind": type(config).__name__, **fields}
    if isinstance(config, tuple):
        return [to_json(item) for item in config]
    return config


def fixed(config: Any) -> Any:
    """`to_json` without the fields that may change when a run goes on (`config.free`)."""
    if dataclasses.is_dataclass(config):
        kept = [f for f in dataclasses.fields(config) if not f.metadata.get("free")]
        fields = {f.name: fixed(getattr(config, f.name)) for f in kept}
        return {"kind": type(config).__name__, **fields}
    if isinstance(config, tuple):
        return [fixed(item) for item in config]
    return config


def from_json(kind: Any, value: Any, where: str = "") -> Any:
    """Builds a value of type `kind` from `to_json`'s form.

    Args:
        kind: a configuration class, or any annotation used in one.
        value: dicts, lists and scalars. `kind` keys may be left out where only one class fits.
        where: dotted path for messages.

    Raises:
        InputError: for unknown or missing keys and wrong types, naming the path.
    """
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value in choices:
            return value
        hint = nearest(str(value), [str(c) for c in choices])
        raise InputError(
            f"{where} must be one of {', '.join(map(str, choices))}, not {value!r}{hint}"
        )
    if origin in (typing.Union, types.UnionType):
        return _union_from_json(typing.get_args(kind), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} must be a list, not {value!r}")
        item = typing.get_args(kind)[0]
        return tuple(from_json(item, v, f"{where}.{i}") for i, v in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_json(kind, value, where)
    return _scalar_from_json(kind, value, where)


def _union_from_json(options: tuple, value: Any, where: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    options = tuple(o for o in options if o is not types.NoneType)
    if len(options) == 1:
        return from_json(options[0], value, where)
    if dataclasses.is_dataclass(value):
        value = to_json(value)
    names = {o.__name__: o for o in options}
    name = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in names:
        raise InputError(f"{where} needs a 'kind', one of {', '.join(names)}; got {name!r}")
    return from_json(names[name], value, where)


def _dataclass_from_json(kind: Any, value: Any, where: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise InputError(
            f"{where or kind.__name__} must be an object with the fields of {kind.__name__}, "
            f"not {value!r}"
        )
    value = dict(value)
    name = value.pop("kind", kind.__name__)
    if name != kind.__name__:
        raise InputError(
            f"{where or 'configuration'} is of kind {name!r}, expected {kind.__name__}"
        )
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in hints:
            raise InputError(f"unknown key '{prefix}{key}'{nearest(key, hints)}")
    for field in dataclasses.fields(kind):
        if field.name not in value and field.default is dataclasses.MISSING:
            raise InputError(f"missing key '{prefix}{field.name}'")
    return kind(**{k: from_json(hints[k], v, prefix + k) for k, v in value.items()})


def _scalar_from_json(kind: Any, value: Any, where: str) -> Any:
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e9 is how a person writes a token count
    if type(value) is not kind:
        raise InputError(f"{where} must be {kind.__name__}, not {value!r}")
    if kind is float and not math.isfinite(value):
        raise InputError(f"{where} must be finite, not {value!r}")
    return value


def override[C](config: C, *assignments: str) -> C:
    """Applies `dotted.path=value` assignments to a dataclass, in order, and then checks the whole.

    A path goes through fields, tuple indices and stack names
    (`model.stacks.moe.blocks.0.ffn.num_experts=8`); a value is JSON, or a bare string where it is
    not. Sizes need to go together only at the end.

    Raises:
        InputError: for a path that does not exist (with the nearest name), a value of another
            type, or sizes that do not go together.
    """
    tree = to_json(config)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"'{assignment}' is not of the form path=value")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):  # a bare string, or a number or nesting without end
            value = text
        tree = _assigned(tree, type(config), path.strip().split("."), value, "")
    return from_json(type(config), tree)


def _assigned(tree: Any, kind: Any, path: list[str], value: Any, where: str) -> Any:
    """`to_json`'s form with one value replaced; the value alone is checked."""
    if not path:
        return to_json(from_json(kind, value, where))
    head, rest = path[0], path[1:]
    here = f"{where}.{head}" if where else head
    if isinstance(tree, dict):
        options = [kind, *typing.get_args(kind)]
        kind = next(o for o in options if getattr(o, "__name__", None) == tree["kind"])
        hints = typing.get_type_hints(kind)
        if head not in hints:
            raise InputError(f"unknown key '{here}'{nearest(head, hints)}")
        return tree | {head: _assigned(tree[head], hints[head], rest, value, here)}
    if isinstance(tree, list):
        names = {
            item["name"] if isinstance(item, dict) and "name" in item else str(i): i
            for i, item in enumerate(tree)
        }
        names |= {str(i): i for i in range(len(tree))}
        if head not in names:
            raise InputError(f"unknown key '{here}'{nearest(head, names)}")
        index = names[head]
        item = _assigned(tree[index], typing.get_args(kind)[0], rest, value, here)
        return [*tree[:index], item, *tree[index + 1 :]]
    raise InputError(f"'{where}' is {tree!r} and has no field '{head}'")


def first_difference(a: Any, b: Any, where: str = "") -> str | None:
    """Names the first field in which two `to_json` forms differ, with both values, or None."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            path = f"{where}.{key}" if where else key
            if key not in a or key not in b:
                there, here = ("present" if key in side else "absent" for side in (a, b))
                return f"{path}: {there} there, {here} here"
            if (found := first_difference(a[key], b[key], path)) is not None:
                return found
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if (found := first_difference(x, y, f"{where}.{i}")) is not None:
                return found
        return None
    return None if a == b and type(a) is type(b) else f"{where}: {a!r} there, {b!r} here"
