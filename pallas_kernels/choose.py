"""Which implementation of an op runs: the one that is named, or the best one for the hardware.

Implementations are modules of an op's package, imported when they are first used: those of one
kind of hardware need not be importable on another.
"""

import importlib
from collections.abc import Sequence
from typing import Any, Literal

import jax

Target = Literal["cpu", "gpu", "hopper", "tpu"]


class Uncovered(ValueError):
    """What an implementation does not take: a shape, a dtype; the message says what it takes."""


def target() -> Target:
    """The kind of device that the program being traced is for; `gpu` is one that is no Hopper.

    The devices of the mesh that is set come before those of this machine: a program may be compiled
    ahead of time for devices that are not there.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.device_kind if device is not None else jax.devices()[0].device_kind
    if kind.startswith("TPU"):
        return "tpu"
    if kind.lower() == "cpu":
        return "cpu"
    return "hopper" if any(name in kind for name in ("H100", "H200", "H800", "H20")) else "gpu"


def run(
    package: str,
    function: str,
    implementation: str | None,
    *arguments: Any,
    known: Sequence[str],
    **keywords: Any,
) -> Any:
    """Calls a function of the module of an op's package that implements it.

    Args:
        package: of the op.
        function: the same name in every module.
        implementation: a module's name; None takes that of the target's name if there is one and
            it covers the arguments, otherwise the last one known.
        arguments: of the function.
        known: the modules that there are.
        keywords: of the function.

    Raises:
        ValueError: for an implementation that is not known, or (`Uncovered`) does not take what it
            is given.
    """
    if implementation is not None and implementation not in known:
        raise ValueError(f"unknown implementation {implementation!r}; known: {', '.join(known)}")
    name = implementation or target()
    if name in known:
        chosen = importlib.import_module(f"{package}.{name}")
        try:
            return getattr(chosen, function)(*arguments, **keywords)
        except Uncovered:
            if implementation is not None:
                raise
    plain = importlib.import_module(f"{package}.{known[-1]}")
    return getattr(plain, function)(*arguments, **keywords)
