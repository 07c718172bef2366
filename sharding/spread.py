"""Rows of the host onto the devices of a mesh, each device its own part.

Knows nothing about what a row holds. With several processes each has some of the rows: those that
its devices need.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.distributed import Processes
from sharding.island import CONTEXT, row_order
from sharding.rules import AxisRules, LayoutError


@dataclasses.dataclass(frozen=True)
class Spread:
    """Where rows go.

    Attributes:
        mesh: None for one device: everything stays as it is.
        rules: `batch` spreads rows, `seq` the positions of each.
        processes: those that share the mesh; None for one.
    """

    mesh: Mesh | None = None
    rules: AxisRules = AxisRules()
    processes: Processes | None = None

    def mesh_set(self) -> contextlib.AbstractContextManager:
        """While entered, programs run on the mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def sharding(self, ndim: int) -> NamedSharding:
        """Of an array [B, T, ...] or [B]."""
        assert self.mesh is not None
        axes = [self.rules.of("batch"), self.rules.of("seq")][:ndim]
        return NamedSharding(self.mesh, PartitionSpec(*(a or None for a in axes)))

    def check_processes(self) -> None:
        """Checks that processes have rows that can be read apart; all of them find the same.

        Raises:
            LayoutError: naming two processes and their rows.
        """
        if self.mesh is None:
            return
        names, batch = self.mesh.axis_names, self.rules.of("batch")
        parts: dict[int, set[int]] = {}
        for place, device in np.ndenumerate(self.mesh.devices):
            at = dict(zip(names, place, strict=True))
            part = 0
            for axis in batch:
                part = part * self.mesh.shape[axis] + at[axis]
            parts.setdefault(device.process_index, set()).add(part)
        check_parts(parts)

    def own_range(self, rows: int) -> range:
        """Which of so many rows this process needs."""
        if self.mesh is None:
            return range(rows)
        indices = self.sharding(1).addressable_devices_indices_map((rows,)).values()
        found = {index[0].indices(rows)[:2] for index in indices if index is not None}
        return range(min(found)[0], max(found)[1])

    def own_rows(self, rows: int) -> int:
        """How many of so many rows this process needs."""
        return len(self.own_range(rows))

    def readers(self, rows: int) -> tuple[int, int]:
        """(which part of the rows this process needs, of how many parts)."""
        own = self.own_range(rows)
        return own.start // len(own), rows // len(own)

    def __call__(
        self, batch: Mapping[str, np.ndarray], rows: int, *, whole: bool = False
    ) -> dict[str, jax.Array | np.ndarray]:
        """Puts a batch onto the devices.

        Args:
            batch: arrays of [B, T] or [B], of this process's rows.
            rows: of the batch over all processes.
            whole: every process has all rows.
        """
        if self.mesh is None:
            return dict(batch)
        first = 0 if whole else self.own_range(rows).start
        parts = self.mesh.shape[CONTEXT] if CONTEXT in self.rules.of("seq") else 1
        placed: dict[str, jax.Array | np.ndarray] = {}
        for name, value in batch.items():
            if parts > 1 and value.ndim > 1:
                value = value[:, row_order(value.shape[1], parts)]

            def part(index, value=value):
                start, stop, _ = index[0].indices(rows)
                return value[(slice(start - first, stop - first), *index[1:])]

            placed[name] = jax.make_array_from_callback(
                (rows, *value.shape[1:]), self.sharding(value.ndim), part
            )
        return placed

    def over_processes(self, counts: np.ndarray) -> np.ndarray:
        """Adds up what each process has counted in its own rows; rows of several count once.

        On the hosts: a sum over devices that depends on no step may run beside one, and then meets
        it in another order elsewhere.
        """
        if self.mesh is None or self.processes is None or self.processes.count == 1:
            return counts
        part, _ = self.readers(self.row_devices())
        said = self.processes.gather("counts", json.dumps([part, counts.tolist()]))
        by_part = dict(map(json.loads, said))
        return np.sum([by_part[part] for part in sorted(by_part)], axis=0)

    def row_devices(self) -> int:
        """Into how many parts rows are spread."""
        if self.mesh is None:
            return 1
        return int(np.prod([self.mesh.shape[a] for a in self.rules.of("batch")]))


def check_parts(parts: Mapping[int, set[int]]) -> None:
    """Checks that each process has as many parts of a batch as any, next to each other.

    Args:
        parts: of each process, the numbers of the parts that its devices need.

    Raises:
        LayoutError: naming two processes and their parts.
    """
    first = min(parts)
    count = len(parts[first])
    for process, own in sorted(parts.items()):
        low = min(own)
        if len(own) != count or max(own) - low + 1 != count or low % count:
            raise LayoutError(
                f"process {first} has the parts {sorted(parts[first])} of each batch's rows, and "
                f"process {process} {sorted(own)}: a process's border must not cut rows; choose "
                "context x tensor so that it divides a process's devices, or is a multiple of them"
            )
