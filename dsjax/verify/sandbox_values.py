"""Python values as JSON and back: what crosses from a sandbox by value, never by code.

Knows nothing of who asks. It runs within sandboxes and in our own process, so that it imports only
the standard library. What comes back is made of builtin types alone, however it called itself.
"""

import builtins
from collections.abc import Callable
from typing import Any

_LARGEST = 2**53  # of what every reader of JSON keeps exact; beyond, in hexadecimal: linear in time


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """What `json.dumps` can write; `keep` numbers what is no plain value."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        value = int.__int__(value)
        return value if abs(value) < _LARGEST else {"int": hex(value)}
    if isinstance(value, float):
        return {"float": float.hex(value)}
    if isinstance(value, complex):
        return {"complex": [float.hex(value.real), float.hex(value.imag)]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, list):
        return [encode(item, keep) for item in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, keep) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, keep), encode(v, keep)] for k, v in value.items()]}
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return {"type": value.__name__}
    return {"object": keep(value)}


def decode(value: Any, remote: Callable[[int], Any]) -> Any:
    """The value again; `remote` makes something of a number that `keep` gave.

    Raises:
        ValueError: for what `encode` does not write; also TypeError, such as for a list in a set.
    """
    if isinstance(value, list):
        return [decode(item, remote) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "int":
            return int(content, 16)
        case "float":
            return float.fromhex(content)
        case "complex":
            return complex(*map(float.fromhex, content))
        case "bytes":
            return bytes.fromhex(content)
        case "tuple":
            return tuple(decode(item, remote) for item in content)
        case "set":
            return {decode(item, remote) for item in content}
        case "frozenset":
            return frozenset(decode(item, remote) for item in content)
        case "dict":
            return {decode(k, remote): decode(v, remote) for k, v in content}
        case "type" if isinstance(found := getattr(builtins, content, None), type):
            return found
        case "object":
            return remote(content)
    raise ValueError(f"a value of no known kind: {kind[:40]!r}")
