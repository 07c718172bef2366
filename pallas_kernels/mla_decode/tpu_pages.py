"""The stream of a cache's pages through the memory of a TPU's core, ahead of the arithmetic.

A core has units of work, each a run of steps of some pages. Copies go through the steps of all
units in order and are always as many ahead; what is done with the pages follows in the same order.
Knows nothing about attention.

U tiles of queries, of all sequences; X pages of a sequence's table.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SLOTS = 4  # steps that there is memory for
# Steps on their way while one is attended to: of 512 positions 2 MB, about what a core's share of
# the memory's bandwidth brings in the time that a copy takes to begin.
AHEAD = SLOTS - 1

STARTED, DONE = range(2)  # places of `Stream.count`


class Work(NamedTuple):
    """Who does what. A unit is a tile of a sequence's queries and a part of the keys it sees.

    Attributes:
        cores: they take the units in turn.
        units: a multiple of `cores`.
        tiles: of queries, a sequence.
        parts: of the keys.
        table_width: X.
        page_size: positions a page.
        pages: of a step.
    """

    cores: int
    units: int
    tiles: int
    parts: int
    table_width: int
    page_size: int
    pages: int

    def unit(self, core: jax.Array, nth: jax.Array) -> jax.Array:
        """The nth unit of a core."""
        return nth * self.cores + core

    def place(self, core: jax.Array, nth: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(part, sequence, tile) of the nth unit of a core."""
        tile, part = _divide(self.unit(core, nth), self.parts)
        return part, *_divide(tile, self.tiles)


class Stream(NamedTuple):
    """What a core sees of it, inside a kernel; references but for `work` and `layer`.

    Attributes:
        work: who does what.
        layer: int32.
        keys_U: int32, the positions that a tile's queries see, from the first.
        table: int32 [B * X].
        arrays: [L, pages, ...] each, in the device's memory.
        buffers: [SLOTS, pages a step, ...] each.
        next: int32 [3], of the step to be copied next: its unit, number, and its unit's end.
        count: int32 [2], steps copied (or being so), and done with.
        arrived: a semaphore a slot.
    """

    work: Work
    layer: jax.Array
    keys_U: Any
    table: Any
    arrays: Sequence[Any]
    buffers: Sequence[Any]
    next: Any
    count: Any
    arrived: Any

    @staticmethod
    def scratch(work: Work, arrays: Sequence[jax.Array]) -> tuple:
        """What a kernel sets aside for `buffers` and the attributes that follow."""
        return (
            [pltpu.VMEM((SLOTS, work.pages, *x.shape[2:]), x.dtype) for x in arrays],
            pltpu.SMEM((3,), jnp.int32),
            pltpu.SMEM((2,), jnp.int32),
            pltpu.SemaphoreType.DMA((SLOTS,)),
        )

    def begin(self, core: jax.Array) -> None:
        """Before a core's first unit: sets the first copies off."""
        # Pages that no copy has written yet are multiplied, too, if only by zero.
        for buffer in self.buffers:
            buffer[...] = jnp.zeros_like(buffer)
        self.count[STARTED] = 0
        self.count[DONE] = 0
        self._seek(core, *self._steps(core))
        for _ in range(AHEAD):
            self._copy_next()

    def each_step(self, unit: jax.Array, do: Callable[[jax.Array, list], None]) -> None:
        """Calls `do(position of the step's first key, its pages)` for each step of a unit.

        The pages are references [pages, ...]; those past the last key hold other pages or zeros.
        """
        first, end = self._steps(unit)

        @pl.loop(first, end)
        def _(step):
            self._copy_next()
            slot = jax.lax.rem(self.count[DONE], SLOTS)
            self._each_copy(unit, step, slot, lambda copy: copy.wait())
            position = step * (self.work.pages * self.work.page_size)
            do(position, [buffer.at[slot] for buffer in self.buffers])
            self.count[DONE] += 1

    def _steps(self, unit):
        """(first step of a unit, the one after its last)."""
        work = self.work
        tile, part = _divide(unit, work.parts)
        steps = pl.cdiv(self.keys_U[tile], work.pages * work.page_size)
        of_part = pl.cdiv(steps, work.parts)
        first = part * of_part
        return first, jnp.minimum(first + of_part, steps)

    def _seek(self, unit, step, end):
        """Copies go on with a step, or, where its unit has ended, with the next that there is."""
        last = self.work.units - 1

        def ended(at):
            unit, step, end = at
            return (step >= end) & (unit <= last)

        def following(at):
            unit = at[0] + self.work.cores
            return unit, *self._steps(jnp.minimum(unit, last))

        for place, value in enumerate(jax.lax.while_loop(ended, following, (unit, step, end))):
            self.next[place] = value

    def _copy_next(self):
        unit, step, end = (self.next[place] for place in range(3))

        @pl.when(unit < self.work.units)
        def _():
            slot = jax.lax.rem(self.count[STARTED], SLOTS)
            self._each_copy(unit, step, slot, lambda copy: copy.start())
            self.count[STARTED] += 1
            self._seek(unit, step + 1, end)

    def _each_copy(self, unit, step, slot, do):
        """Starts, or awaits, the copies of a step's pages that are in use."""
        work = self.work
        tile, _ = _divide(unit, work.parts)
        sequence, _ = _divide(tile, work.tiles)
        first = step * work.pages
        used = pl.cdiv(self.keys_U[tile], work.page_size) - first

        @pl.loop(0, jnp.minimum(used, work.pages))
        def _(nth):
            page = self.table[sequence * work.table_width + first + nth]
            for array, buffer in zip(self.arrays, self.buffers, strict=True):
                source, target = array.at[self.layer, page], buffer.at[slot, nth]
                do(pltpu.make_async_copy(source, target, self.arrived.at[slot]))


def _divide(x, y):
    """(quotient, remainder) of numbers that are not negative."""
    return jax.lax.div(x, y), jax.lax.rem(x, y)
