"""What `experiments.bench_kernels` measures: each case by our kernel, the plain form and the peers.

Figures are seconds; shares and ratios are made of them in `figures`. A result is a dictionary for
JSON: {"seconds": ..., ...}, {"wrong": why} or {"absent": why}.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.kernels import measure
from experiments.kernels.cases import SMOKE, V3, Case, cases
from pallas_kernels import choose

PEER = Path(__file__).parents[1] / "peers" / "torch_kernels.py"
CEILING = 8192  # rows, columns and contraction of the products that are the ceilings
COPIED_BYTES = 1 << 30
# For how many inputs a program needs; figures are never made of these.
ROUGH_FLOPS, ROUGH_BYTES = 1e15, 3e12

# How far a block may be off. Results are rounded to BF16 on each side, by 2^-9 at most. Tensor
# cores keep some 14 bits of a sum of FP8 within 128: 2^-13. A BF16 hidden vector that is rounded
# the other way moves a few FP8 numbers a step, of 2^-4. A scale left out is off by over a tenth.
# Attention rounds its weights, and backward what it multiplies again, to BF16 on each side.
BOUNDS = {
    **{"bfloat16": 4e-3, "float32, of e4m3": 1e-3, "float32, of bf16": 1e-4, "quantized": 5e-3},
    **{"decode": 8e-3, "attention": 1.5e-2},
}


def run(
    parts: Sequence[str], *, smoke: bool, torch: str, minutes: float, seed: int
) -> dict[str, object]:
    """Measures ceilings and the cases of some parts."""
    began = time.monotonic()
    key = jax.random.key(seed)
    chosen = [case for case in cases(SMOKE if smoke else V3) if case.part in parts]
    found, left = [], []
    with _peer(torch) as peer:
        greeting = peer({"what": "hello"})
        ceilings = _ceilings(peer, smoke)
        for case in chosen:
            if time.monotonic() - began > 60 * minutes:
                left.append(case.name)
                continue
            print(case.name, file=sys.stderr, flush=True)
            found.append(_case(case, key, peer, smoke))
    return {"torch": greeting, "ceilings": ceilings, "cases": found, "not reached": left}


def _case(case: Case, key: jax.Array, peer: Callable[[dict], dict], smoke: bool) -> dict:
    num_bytes = case.least_bytes()
    rough_s = max(case.flops / ROUGH_FLOPS, num_bytes / ROUGH_BYTES)
    count = 2 if smoke else measure.copies(num_bytes, rough_s)
    make = jax.jit(case.make)
    inputs = [jax.block_until_ready(make(jax.random.fold_in(key, i))) for i in range(count)]
    plain = "reference" if case.part == "quantize" else "xla"
    kernel = choose.target() if choose.target() in ("hopper", "tpu") else None
    # The definition of a grouped product takes a weight a tile, and loops compile for long.
    definition = "reference" if smoke else plain
    with jax.default_matmul_precision("highest"):
        wanted = jax.block_until_ready(jax.jit(lambda *x: case.call(definition, *x))(*inputs[0]))
    off, bound = None, _bound(case, wanted)
    if case.op.startswith("fp8_matmul"):
        a_MK, b_NK = inputs[0]
        off = measure.sampled_error(a_MK, b_NK, wanted)
    by = {}
    others = ["tokamax"] if case.part == "attention" and kernel == "hopper" else []
    for name in filter(None, (kernel, plain, *others)):
        if off is not None and not off <= bound:
            by[name] = {"wrong": f"what it is held against is off float64 by {off:.2e}"}
        else:
            by[name] = _ours(case, name, inputs, wanted, bound, smoke)
    del wanted
    for name, call, convert in _xla_peers(case):
        by[name] = _timed(call, [convert(*x) for x in inputs], smoke)
    del inputs
    for name, request in _torch_peers(case):
        by[name] = peer({"sizes": case.sizes, "calls": count, "smoke": smoke, **request})
    return {
        **{"op": case.op, "shape": case.shape, "part": case.part},
        **{"flops": case.flops, "least_bytes": num_bytes, "multiplies": case.multiplies},
        **{"kernel": kernel, "plain": plain, "definition's error": off, "by": by},
    }


def _ours(case: Case, name: str, inputs: list[tuple], wanted, bound: float, smoke: bool) -> dict:
    """Is it right, and if so, how fast."""

    def call(*arguments):
        return case.call(name, *arguments)

    try:
        got = jax.block_until_ready(jax.jit(call)(*inputs[0]))
    except (ImportError, AttributeError, choose.Uncovered) as error:
        return {"absent": _line(error)}
    except Exception as error:
        return {"wrong": f"{type(error).__name__}: {_line(error)}"}
    off = measure.error(got, wanted)
    del got
    if not off <= bound:  # NaN too
        return {"wrong": f"a block is off by {off:.2e}, over {bound:.0e}"}
    return {"error": off, **_timed(call, inputs, smoke)}


def _bound(case: Case, wanted) -> float:
    if case.part == "quantize":
        return BOUNDS["quantized"]
    if case.part in BOUNDS:
        return BOUNDS[case.part]
    dtype = str(wanted.dtype)
    return BOUNDS[dtype if dtype == "bfloat16" else f"{dtype}, of {case.multiplies}"]


def _timed(call: Callable, inputs: list[tuple], smoke: bool) -> dict:
    try:
        timing = measure.timed(
            call, inputs, repeats=2 if smoke else 9, least_s=0.0 if smoke else 0.02
        )
    except Exception as error:
        return {"absent": f"{type(error).__name__}: {_line(error)}"}
    return timing._asdict()


# ---- ceilings -----------------------------------------------------------------------------------


def _ceilings(peer: Callable[[dict], dict], smoke: bool) -> dict:
    """Seconds of what a device does best, and the operations or bytes that it then does."""
    size = 256 if smoke else CEILING
    copied = 1 << 20 if smoke else COPIED_BYTES
    keys = jax.random.split(jax.random.key(0), 4)
    pairs = [jax.random.normal(k, (2, size, size), jnp.bfloat16) for k in keys]
    wide = [(pair[0], pair[1]) for pair in pairs]
    narrow = [tuple(x.astype(jnp.float8_e4m3fn) for x in pair) for pair in wide]
    row = [(jax.random.normal(k, (copied // 2,), jnp.bfloat16),) for k in keys]
    asked = {"sizes": (size, size, size), "calls": 4, "smoke": smoke}
    return {
        "bf16": {
            "flops": 2.0 * size**3,
            "xla": _timed(_bf16_product, wide, smoke),
            "torch": peer({"what": "bf16", **asked}),
        },
        "fp8": {
            "flops": 2.0 * size**3,
            "xla": _timed(_fp8_product, narrow, smoke),
            "torch": peer({"what": "fp8 per tensor", **asked}),
        },
        "copy": {
            "bytes": 2 * copied,
            # Plus one: XLA would leave a plain copy out.
            "xla": _timed(lambda x: x + jnp.bfloat16(1), row, smoke),
            "torch": peer({"what": "copy", **asked, "sizes": (copied,)}),
        },
    }


# ---- peers --------------------------------------------------------------------------------------

_ALONG_LAST = (((1,), (1,)), ((), ()))


def _bf16_product(a_MK: jax.Array, b_NK: jax.Array) -> jax.Array:
    return jax.lax.dot_general(a_MK, b_NK, _ALONG_LAST, preferred_element_type=jnp.bfloat16)


def _fp8_product(a_MK: jax.Array, b_NK: jax.Array) -> jax.Array:
    y_MN = jax.lax.dot_general(a_MK, b_NK, _ALONG_LAST, preferred_element_type=jnp.float32)
    return y_MN.astype(jnp.bfloat16)


def _xla_peers(case: Case) -> Iterator[tuple[str, Callable, Callable]]:
    """(name, call, what makes its arguments of the case's)."""
    if case.part in ("product", "weight_gradient"):
        yield (
            "XLA bf16 dot",
            _bf16_product,
            lambda a, b: (a.q.astype(jnp.bfloat16), b.q.astype(jnp.bfloat16)),
        )
        yield "XLA fp8 dot, no scales", _fp8_product, lambda a, b: (a.q, b.q)
    if case.op == "mla_attention":
        yield (
            "cuDNN through JAX, values padded",  # it takes none narrower than keys
            lambda q, k, v: jax.nn.dot_product_attention(
                q, k, v, scale=0.07, is_causal=True, implementation="cudnn"
            ),
            lambda q, k, v, *rest: (
                q,
                k,
                jnp.pad(v, [(0, 0)] * 3 + [(0, q.shape[3] - v.shape[3])]),
            ),
        )
    if case.op == "grouped_matmul":
        experts, rows, *_ = case.sizes
        sizes_E = jnp.full((experts,), rows, jnp.int32)
        yield (
            "XLA ragged_dot",
            lambda x, w: jax.lax.ragged_dot(x, w, sizes_E),
            lambda x, w, tiles: (x, w),
        )


def _torch_peers(case: Case) -> Iterator[tuple[str, dict]]:
    """(name, what is asked of the peer)."""
    match case.op:
        case "fp8_matmul":
            yield "torch scaled_mm, 1x128 by 128x128", {"what": "1x128 by 128x128"}
            yield "torch bf16 matmul", {"what": "bf16"}
        case "fp8_matmul, 1x128 by 1x128":
            yield "torch scaled_mm, 1x128 by 1x128", {"what": "1x128 by 1x128"}
            yield "torch bf16 matmul", {"what": "bf16"}
        case "grouped_matmul":
            yield "torch _grouped_mm", {"what": "grouped product"}
        case "grouped_matmul, transposed":
            yield "torch _grouped_mm", {"what": "grouped product, transposed"}
        case "grouped_matmul, weight gradient":
            yield "torch _grouped_mm", {"what": "grouped weight gradient"}
        case "grouped_fp8_matmul":
            what = "grouped fp8 product, a scale a row"
            yield "torch _scaled_grouped_mm, a scale a row", {"what": what}
        case "mla_decode":
            yield "torch matmuls, no pages", {"what": "absorbed attention by matmuls"}
            yield "torch SDPA, no pages", {"what": "absorbed attention by SDPA"}
        case "mla_attention" | "mla_attention, both passes" if case.sizes[-1] == 1:
            passes = ", both passes" if "both" in case.op else ""
            for backend in ("flash", "cuDNN", "efficient", "its choice"):
                yield f"torch SDPA, {backend}", {"what": f"attention by {backend}{passes}"}


@contextlib.contextmanager
def _peer(python: str) -> Iterator[Callable[[dict], dict]]:
    """A warm torch process that measures what it is asked for; silent while it is not."""
    if not python:
        yield lambda request: {"absent": "no interpreter given"}
        return
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([python, str(PEER)], text=True, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        to, from_ = process.stdin, process.stdout

        def ask(request: dict) -> dict:
            try:
                to.write(json.dumps(request) + "\n")
                to.flush()
                answer = from_.readline()
            except BrokenPipeError:
                answer = ""
            return json.loads(answer) if answer else {"absent": "the peer has ended"}

        yield ask
        with contextlib.suppress(BrokenPipeError):
            to.close()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
