"""The calls that are compiled ahead of time and timed: the ops at DeepSeek-V3's sizes.

Shapes of products are those of DeepGEMM's published tables (its README of February 2025), so that
figures can be held against them. Knows nothing about compilers, devices or clocks.

M, N, K of a product, K contracted; E experts with X rows together, D and F the sizes of a weight.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.kernels.attention_cases import AttentionSizes, attention_cases
from experiments.kernels.case import Case, normal
from pallas_kernels import choose, quantize
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.grouped_matmul import (
    KNOWN,
    grouped_fp8_matmul,
    grouped_fp8_weight_gradient,
    grouped_matmul,
)
from pallas_kernels.tiled import Tiled


class Sizes(NamedTuple):
    """What there are cases of.

    Attributes:
        products: M, N, K.
        weight_gradients: M, N, K.
        groups: experts, and rows of each.
        experts: D, F of a weight.
        block: rows of a tile of `tile_expert`.
        matrix: rows and columns of what is quantised.
        hidden: rows and hidden width of a SwiGLU.
        attention: of attention's ops.
    """

    products: tuple[tuple[int, int, int], ...]
    weight_gradients: tuple[tuple[int, int, int], ...]
    groups: tuple[tuple[int, int], ...]
    experts: tuple[tuple[int, int], ...]
    block: int
    matrix: tuple[int, int]
    hidden: tuple[int, int]
    attention: AttentionSizes


# N, K of V3's projections: into the latents, out of the query's, out of the key's and value's,
# attention's output, and the dense layers and shared expert.
PROJECTIONS = (
    *((2112, 7168), (24576, 1536), (32768, 512)),
    *((7168, 16384), (4096, 7168), (7168, 2048)),
)
V3 = Sizes(
    products=tuple((m, n, k) for m in (4096, 128, 64) for n, k in PROJECTIONS),
    weight_gradients=((7168, 2112, 4096), (4096, 7168, 8192)),
    groups=((8, 4096), (4, 8192)),
    experts=((7168, 4096), (2048, 7168)),
    block=128,
    matrix=(4096, 7168),
    hidden=(32768, 2048),
    attention=AttentionSizes(),
)
SMOKE = Sizes(
    products=((128, 256, 384), (64, 192, 160)),
    weight_gradients=((256, 128, 256),),
    groups=((2, 256),),
    experts=((128, 256),),
    block=128,
    matrix=(256, 384),
    hidden=(256, 128),
    attention=AttentionSizes(
        widths=(128, 64),
        decodes=((2, 128), (1, 256)),
        two_queries=((2, 128),),
        fp8=((2, 128),),
        heads=(2,),
        sequences=((1, 256, 2, 1), (1, 256, 2, 2)),
    ),
)


def cases(sizes: Sizes = V3) -> tuple[Case, ...]:
    """All of them."""
    products = *_products(sizes), *_weight_gradients(sizes), *_grouped(sizes)
    return *products, *_quantized(sizes), *attention_cases(sizes.attention)


# ---- products of two matrices -------------------------------------------------------------------


def _products(sizes: Sizes) -> Iterator[Case]:
    most = max(m for m, _, _ in sizes.products)
    for m, n, k in sizes.products:
        yield Case(
            op="fp8_matmul",
            shape=f"{m}x{n}x{k}",
            part="product",
            sizes=(m, n, k),
            package="pallas_kernels.fp8_matmul",
            function="fp8_matmul",
            make=lambda key, m=m, n=n, k=k: _narrow(key, (m, k), (n, k), (128, 128)),
            call=lambda name, a, b: fp8_matmul(a, b, implementation=name),
            flops=2.0 * m * n * k,
            multiplies="e4m3",
            compiled=m == most or (m, n) == (64, 4096),  # one of a few rows stands for all
        )


def _weight_gradients(sizes: Sizes) -> Iterator[Case]:
    for m, n, k in sizes.weight_gradients:
        yield Case(
            op="fp8_matmul, 1x128 by 1x128",
            shape=f"{m}x{n}x{k}",
            part="weight_gradient",
            sizes=(m, n, k),
            package="pallas_kernels.fp8_matmul",
            function="fp8_matmul",
            make=lambda key, m=m, n=n, k=k: _narrow(key, (m, k), (n, k), (1, 128)),
            call=lambda name, a, b: fp8_matmul(a, b, out_dtype=jnp.float32, implementation=name),
            flops=2.0 * m * n * k,
            multiplies="e4m3",
        )


def _narrow(key, left, right, tile) -> tuple[Tiled, Tiled]:
    """Two random matrices in FP8, the second in another tile."""
    (x,), (y,) = normal(left)(key), normal(right)(jax.random.fold_in(key, 1))
    return (
        quantize.quantize(x, implementation="reference"),
        quantize.quantize(y, tile=tile, implementation="reference"),
    )


# ---- grouped products ---------------------------------------------------------------------------


def _grouped(sizes: Sizes) -> Iterator[Case]:
    for experts, rows in sizes.groups:
        for d, f in sizes.experts:
            yield from _grouped_of(sizes, experts, rows, d, f)


def _grouped_of(sizes: Sizes, experts: int, rows: int, d: int, f: int) -> Iterator[Case]:
    x = experts * rows
    package = "pallas_kernels.grouped_matmul"

    def tiles():
        return jnp.repeat(jnp.arange(experts, dtype=jnp.int32), rows // sizes.block)

    def case(op, function, shape, make, call, multiplies, peer_sizes=(experts, rows, d, f)):
        return Case(
            op=op,
            shape=f"{experts}x{rows}, {shape}",
            part="grouped",
            sizes=peer_sizes,
            package=package,
            function=function,
            make=lambda key: (*make(key), tiles()),
            call=call,
            flops=2.0 * x * d * f,
            multiplies=multiplies,
            compiled=(experts, rows) == sizes.groups[0],
        )

    def run(function, name, *arguments, **keywords):
        return choose.run(package, function, name, *arguments, known=KNOWN, **keywords)

    yield case(
        "grouped_matmul",
        "product",
        f"[X, {d}] by [E, {d}, {f}]",
        normal((x, d), (experts, d, f)),
        lambda name, x, w, tiles: grouped_matmul(x, w, tiles, implementation=name),
        "bf16",
    )
    yield case(
        "grouped_matmul, transposed",
        "product",
        f"[X, {f}] by [E, {d}, {f}]",
        normal((x, f), (experts, d, f)),
        lambda name, dy, w, tiles: run("product", name, dy, w, tiles, transposed=True),
        "bf16",
    )
    yield case(
        "grouped_matmul, weight gradient",
        "weight_gradient",
        f"[X, {d}] by [X, {f}]",
        normal((x, d), (x, f)),
        lambda name, x, dy, tiles: run("weight_gradient", name, x, dy, tiles, experts),
        "bf16",
    )
    for n, k in ((f, d), (d, f)):  # forward, and the gradient of the rows
        yield case(
            "grouped_fp8_matmul",
            "fp8_product",
            f"[X, {k}] by [E, {n}, {k}]",
            lambda key, n=n, k=k: _narrow(key, (x, k), (experts, n, k), (128, 128)),
            lambda name, x, w, tiles: grouped_fp8_matmul(x, w, tiles, implementation=name),
            "e4m3",
            (experts, rows, k, n),
        )
    yield case(
        "grouped_fp8_weight_gradient",
        "fp8_weight_gradient",
        f"[{d}, X] by [{f}, X]",
        lambda key: _narrow(key, (d, x), (f, x), (1, 128)),
        lambda name, x, dy, tiles: grouped_fp8_weight_gradient(
            x, dy, tiles, experts, implementation=name
        ),
        "e4m3",
    )


# ---- quantisation -------------------------------------------------------------------------------


def _quantized(sizes: Sizes) -> Iterator[Case]:
    (rows, width), (tokens, hidden) = sizes.matrix, sizes.hidden
    matrix, gate_up = f"{rows}x{width}", f"{tokens}x2x{hidden}"

    def case(op, function, shape, make, call):
        return Case(
            op=op,
            shape=shape,
            part="quantize",
            sizes=(rows, width) if shape == matrix else (tokens, hidden),
            package="pallas_kernels.quantize",
            function=function,
            make=make,
            call=call,
        )

    plain = normal((rows, width))
    transposed: dict[str, Any] = {"orientation": "transposed"}
    ways: dict[str, dict[str, Any]] = {
        "quantize, 1x128": {},
        "quantize, 1x128, transposed": transposed,
        "quantize, 128x128": {"tile": (128, 128)},
    }
    for op, how in ways.items():
        yield case(
            op,
            "quantize",
            matrix,
            plain,
            lambda name, x, how=how: quantize.quantize(x, **how, implementation=name),
        )
    yield case(
        "quantize_both",
        "quantize_both",
        matrix,
        plain,
        lambda name, x: quantize.quantize_both(x, implementation=name),
    )
    for op, how in {
        "swiglu_quantize": {},
        "swiglu_quantize, transposed": transposed,
    }.items():
        yield case(
            op,
            "swiglu_quantize",
            gate_up,
            lambda key: (
                *normal((tokens, 2 * hidden))(key),
                jax.random.uniform(key, (tokens,), jnp.float32),
            ),
            lambda name, x, gates, how=how: quantize.swiglu_quantize(
                x, gates, **how, implementation=name
            ),
        )
    yield case(
        "rms_norm_quantize",
        "rms_norm_quantize",
        matrix,
        lambda key: (*plain(key), jnp.ones((width,), jnp.float32)),
        lambda name, x, scale: quantize.rms_norm_quantize(x, scale, 1e-6, implementation=name),
    )
