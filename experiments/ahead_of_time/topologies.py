"""Devices that are not there: their compilers, and what stands for them in a mesh.

Knows nothing about what is compiled for them. `make aot` installs the compilers.
"""

import os
import re
from pathlib import Path

import jax
from jax.experimental import topologies

from dsjax.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
AOT = REPOSITORY / ".aot"
# Written by hand from the data sheet; `experiments.bench_kernels` reads one off a device.
H100 = REPOSITORY / "experiments" / "kernels" / "h100_target.textproto"
TPUS = ("v5e", "v5p", "v6e", "tpu7x")


def environment(topology: str, aot: str | os.PathLike = AOT) -> dict[str, str]:
    """Of a process that can compile for a topology; it inherits everything else.

    Raises:
        InputError: for an unknown kind of device, or where there are no compilers.
    """
    kind = kind_of(topology)
    if not (Path(aot) / ".stamp").exists():
        raise InputError(f"no compilers at {aot}; `make aot` installs them")
    return os.environ | {
        "PATH": f"{aot}/nvidia/cu13/bin{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(aot)]),
        "JAX_PLATFORMS": "cpu",
        # What is taken from a cache is not compiled, and so says nothing.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        # Without a device nothing can be timed.
        "XLA_FLAGS": "--xla_gpu_autotune_level=0" if kind == "h100" else "",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def kind_of(topology: str) -> str:
    """`h100`, or a TPU's name.

    Raises:
        InputError: for another.
    """
    kind, _, shape = topology.partition(":")
    numbers = r"\d+x\d+" if kind == "h100" else r"\d+(x\d+)+"
    if kind not in ("h100", *TPUS) or not re.fullmatch(numbers, shape):
        known = "h100:NODESxDEVICES, v5p:4x4x8, tpu7x:2x2x1, v5e:4x4 or v6e:2x4, and their like"
        raise InputError(f"unknown topology '{topology}'; known: {known}")
    return kind


def devices(topology: str) -> list:
    """Of a topology, in such a process; of GPUs before JAX has done anything else in it.

    Raises:
        InputError: for an unknown one.
    """
    kind = kind_of(topology)
    if kind != "h100":
        try:
            return list(topologies.get_topology_desc(topology, "tpu").devices)
        except jax.errors.JaxRuntimeError as error:
            raise InputError(f"no topology '{topology}': {error}") from error
    nodes, each = topology.partition(":")[2].split("x")
    told = {"target_config": H100.read_text(encoding="utf-8"), "topology": f"{nodes}x{each}x1"}
    return list(topologies.get_topology_desc("", "cuda", **told).devices)


def mosaic_kernels(hlo: str) -> dict[str, int]:
    """How often each Pallas kernel is called in the text of a compiled program."""
    found: dict[str, int] = {}
    for line in hlo.splitlines():
        if re.search(r'custom_call_target="(tpu_custom_call|mosaic_gpu_v2|mosaic_gpu)"', line):
            name = re.search(r"%([\w\-]+?)(?:\.\d+)* = ", line)
            found[name[1] if name else "?"] = found.get(name[1] if name else "?", 0) + 1
    return found
