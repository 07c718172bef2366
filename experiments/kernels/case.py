"""What a case of a kernel's op is: a call that is compiled ahead of time, and timed.

Knows nothing about which ops there are.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Part = Literal["product", "weight_gradient", "grouped", "quantize", "decode", "attention"]


class Case(NamedTuple):
    """One call of an op.

    Attributes:
        op: what is called, and how; the name of its rows in tables.
        shape: its sizes, as a person reads them.
        part: of the benchmark.
        sizes: what a peer needs to make the same call.
        package: of the op.
        function: what an implementation's module has if it implements this.
        make: a key to random arguments.
        call: an implementation's name and the arguments to the result.
        flops: floating-point operations.
        multiplies: the type that tensor cores multiply; None where they have no part.
        compiled: whether the table of resources has it; the others differ in a size that kernels
            are not made for.
    """

    op: str
    shape: str
    part: Part
    sizes: tuple[int, ...]
    package: str
    function: str
    make: Callable[[jax.Array], tuple]
    call: Callable[..., Any]
    flops: float = 0.0
    multiplies: Literal["e4m3", "bf16"] | None = None
    compiled: bool = True

    @property
    def name(self) -> str:
        """What it is called in tables and flags."""
        return f"{self.op} {self.shape}"

    def arguments(self) -> tuple:
        """Shapes and dtypes of what `make` makes."""
        return jax.eval_shape(lambda: self.make(jax.random.key(0)))

    def least_bytes(self) -> int:
        """Bytes of all arguments and results, each moved once."""
        arguments = self.arguments()
        result = jax.eval_shape(lambda *x: self.call("reference", *x), *arguments)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arguments, result)))


def normal(*shapes):
    """A key to arrays of such shapes, random and BF16."""

    def make(key):
        keys = jax.random.split(key, len(shapes))
        return tuple(
            jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)
        )

    return make
