"""Compiles the cases for devices that are not there, and reads what the compilers say of them.

python -m experiments.kernels.ahead cuda h100 --only=NAME ...

A process of its own, made by `experiments.kernel_resources`: of one platform, because a description
of CUDA devices must be the first thing that JAX makes. One line of JSON to stdout. Knows nothing
about what the figures should be.
"""

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.ahead_of_time import topologies
from experiments.kernels.cases import Case, cases
from pallas_kernels import choose

TOPOLOGIES = {"h100": "h100:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
FEWER = ("v5p", "v6e")  # one call of each op; tpu7x, which multiplies FP8, has them all
# Where no kernel is: what XLA makes of the plain form for an H100, one of a kind.
PLAIN = (
    *("fp8_matmul 4096x4096x7168", "quantize_both 4096x7168"),
    *("mla_decode 128x8192, 128 heads, 1 new", "mla_attention, both passes 1x4096"),
    *("grouped_matmul 8x4096, [X, 7168]", "grouped_fp8_matmul 8x4096, [X, 7168] by [E, 4096"),
)


def _compiler(platform: str) -> str:
    """What the figures depend on, to the digit."""
    versions = f"jax {jax.__version__}"
    if platform == "tpu":
        return f"{versions}, libtpu {importlib.metadata.version('libtpu')}"
    told = subprocess.run(["ptxas", "--version"], capture_output=True, text=True, check=True)
    ptxas = re.search(r"V(\d+\.\d+\.\d+)", told.stdout)
    plugin = importlib.metadata.version("jax-cuda13-plugin")
    return f"{versions}, jax-cuda13-plugin {plugin}, ptxas {ptxas[1] if ptxas else told.stdout}"


def _compile(case: Case, implementation: str, mesh: Mesh, dumps: Path) -> dict:
    """What one implementation of a case is compiled to, or why it is not."""
    module = f"{case.package}.{implementation}"
    if importlib.util.find_spec(module) is None or not hasattr(
        importlib.import_module(module), case.function
    ):
        return {"status": "absent"}
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(x):
        # A cache lies as its owner pins it: left alone, TPUs would copy it all at every call.
        order = Format(Layout(tuple(range(x.ndim))), whole) if case.part == "decode" else whole
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=order)

    arguments = jax.tree.map(placed, case.arguments())
    for left in dumps.iterdir():
        left.unlink()
    try:
        with jax.set_mesh(mesh):
            call = jax.jit(lambda *x: case.call(implementation, *x))
            compiled = call.lower(*arguments).compile()
    except choose.Uncovered as error:
        return {"status": "not covered", "why": _line(error)}
    except Exception as error:
        return {"status": "failed", "why": f"{type(error).__name__}: {_line(error)}"}
    memory = compiled.memory_analysis()
    found = {"status": "compiled", "temp_bytes": memory.temp_size_in_bytes if memory else None}
    if implementation == "hopper":
        found["kernels"] = [read_kernel(path) for path in sorted(dumps.glob("*.ptx"))]
    elif implementation == "tpu":
        found["kernels"] = read_tpu_kernels(compiled.as_text() or "")
    return found


def read_kernel(ptx: Path) -> dict:
    """What ptxas said of a kernel, its launch, and which of Hopper's instructions its PTX has."""
    told = ptx.with_suffix(".ptxas").read_text(encoding="utf-8")
    launch = ptx.with_suffix(".before_layout_inference.txt").read_text(encoding="utf-8")
    code = ptx.read_text(encoding="utf-8")
    shared = re.search(r"dynamic_shared_memory_size %(\w+)", launch)
    size = re.search(rf"%{shared[1]} = arith.constant (\d+)", launch) if shared else None
    threads = re.search(r"\.maxntid (\d+), (\d+), (\d+)", code)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", told)
    wgmma = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m\w+)\.f32\.(\w+)\.(\w+)", code)
    return {
        "name": re.sub(r"_\d+$", "", ptx.stem),
        "threads": int(threads[1]) * int(threads[2]) * int(threads[3]) if threads else None,
        "registers": max(map(int, re.findall(r"Used (\d+) registers", told)), default=None),
        "spill_bytes": sum(int(stores) + int(loads) for _, stores, loads in frames),
        "stack_bytes": sum(int(stack) for stack, _, _ in frames),
        "shared_bytes": int(size[1]) if size else 0,
        "wgmma": sorted({f"{shape} {a}" for shape, a, b in wgmma if a == b}),
        "setmaxnreg": sorted(
            {f"{way} {count}" for way, count in re.findall(r"setmaxnreg\.(\w+)\S* (\d+)", code)}
        ),
        # Without the line and the name of the function.
        "advice": sorted(
            {
                f"{code} {text}"
                for code, text in re.findall(
                    r"\((C7\d{3})\) (.*?)(?: in (?:around|the )|$)", told, re.M
                )
            }
        ),
    }


def read_tpu_kernels(hlo: str) -> list[dict]:
    """The Mosaic kernels of a compiled program, and the VMEM that each was given."""
    kernels = []
    for line in hlo.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            scoped = re.search(r'"used_scoped_memory_configs":(\[[^\]]*\])', line)
            spaces = json.loads(scoped[1]) if scoped else []
            vmem = sum(int(s["size"]) for s in spaces if s["memory_space"] == "1")
            name = re.search(r"%([\w\-]+?)(?:\.\d+)* = ", line)
            kernels.append({"name": name[1] if name else "", "vmem_bytes": vmem})
    return kernels


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _cases(target: str, only: list[str], brief: bool) -> list[Case]:
    """Those of a target, or of them those named by op or by call."""
    wanted = [case for case in cases() if case.compiled]
    if brief or target in FEWER:
        first: dict[str, Case] = {}
        for case in wanted:
            first.setdefault(case.op, case)
        wanted = list(first.values())
    return [case for case in wanted if not only or case.name in only or case.op in only]


def main(argv: list[str]) -> int:
    """Compiles what is asked for."""
    platform, *rest = argv
    only = [word.removeprefix("--only=") for word in rest if word.startswith("--only=")]
    targets = [word for word in rest if not word.startswith("--")]
    # Compilers print to stdout, which is for the result.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    devices = {target: topologies.devices(TOPOLOGIES[target])[0] for target in targets}
    result: dict = {"compiler": _compiler(platform)}
    dumps = Path(os.environ.get("MOSAIC_GPU_DUMP_TO") or tempfile.mkdtemp())
    for target, device in devices.items():
        mesh = Mesh([device], ("x",))
        with jax.set_mesh(mesh):
            kernel = choose.target()  # what a caller who names none gets
        found = result[target] = {}
        for case in _cases(target, only, "--brief" in rest):
            names = [kernel]
            if target == "h100" and case.name.startswith(PLAIN):
                names += ["reference"] if case.part == "quantize" else ["xla"]
            for name in names:
                began = time.monotonic()
                found[f"{case.name} ({name})"] = _compile(case, name, mesh, dumps)
                took = f"{time.monotonic() - began:5.1f} s"
                print(f"{took} {target}: {case.name} ({name})", file=sys.stderr, flush=True)
    shutil.rmtree(dumps, ignore_errors=True)
    print(json.dumps(result), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
