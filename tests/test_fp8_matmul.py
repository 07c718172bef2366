"""Products of FP8 tiles, dense and grouped, against float64 of what the FP8 numbers stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_matmul.shapes import SHAPES
from pallas_kernels.grouped_matmul import grouped_fp8_matmul, grouped_fp8_weight_gradient
from pallas_kernels.quantize import quantize
from pallas_kernels.tiled import TILE, Tiled, tiles

FLOAT32 = 2e-6  # rounding of float32 sums in another order, as a relative norm
BFLOAT16 = 1.01 * 2.0**-8  # a number of eight bits is off by half a unit at most, and FLOAT32
TOLERANCE = {jnp.float32: FLOAT32, jnp.bfloat16: BFLOAT16}
IMPLEMENTATIONS = ("reference", "xla")
ROWS, BLOCKS = (1, TILE), (TILE, TILE)


def assert_near(got, wanted, tolerance=FLOAT32):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) <= tolerance * max(np.linalg.norm(wanted), 1e-3)


def fp8(rng, *shape, tile=ROWS, scale="float32"):
    """Numbers of very different size from tile to tile, so that no scale goes unseen."""
    sizes = 2.0 ** rng.integers(-3, 4, (*shape[:-2], tiles(shape[-2]), tiles(shape[-1])))
    sizes = np.repeat(np.repeat(sizes, TILE, -2), TILE, -1)[..., : shape[-2], : shape[-1]]
    x = jnp.asarray(rng.standard_normal(shape) * sizes, jnp.float32)
    return quantize(x, tile=tile, scale=scale, implementation="reference")


def by_hand(x):
    """Float64, block by block."""
    q, scales = np.asarray(x.q, np.float64), np.asarray(x.scale, np.float64)
    wide = np.zeros_like(q)
    height = 1 if scales.shape[-2] == q.shape[-2] else TILE
    for i, j in np.ndindex(scales.shape[-2:]):
        rows, cols = slice(i * height, (i + 1) * height), slice(j * TILE, (j + 1) * TILE)
        wide[..., rows, cols] = q[..., rows, cols] * scales[..., i : i + 1, j : j + 1]
    return wide


# ---- dense --------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
@pytest.mark.parametrize("tile", [ROWS, BLOCKS])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_matmul(shape, tile, implementation, rng):
    a, b = fp8(rng, shape.m, shape.k), fp8(rng, shape.n, shape.k, tile=tile)
    for out_dtype, tolerance in TOLERANCE.items():
        y = fp8_matmul(a, b, out_dtype=out_dtype, implementation=implementation)
        assert y.dtype == out_dtype
        assert_near(y, by_hand(a) @ by_hand(b).T, tolerance)


@settings(max_examples=6, deadline=None)
@given(
    m=st.integers(1, 200),
    n=st.integers(1, 200),
    k=st.integers(1, 400),
    tile=st.sampled_from([ROWS, BLOCKS]),
    scale=st.sampled_from(["float32", "power_of_two"]),
    seed=st.integers(0, 99),
)
def test_fp8_matmul_drawn(m, n, k, tile, scale, seed):
    rng = np.random.default_rng(seed)
    a, b = fp8(rng, m, k, scale=scale), fp8(rng, n, k, tile=tile, scale=scale)
    for implementation in IMPLEMENTATIONS:
        y = fp8_matmul(a, b, out_dtype=jnp.float32, implementation=implementation)
        assert_near(y, by_hand(a) @ by_hand(b).T)


def test_a_tile_that_is_not_finite_spoils_its_row(rng):
    x = np.array(rng.standard_normal((4, 300)), np.float32)
    x[2, 140] = np.inf
    a = quantize(jnp.asarray(x), implementation="reference")
    for implementation in IMPLEMENTATIONS:
        y = fp8_matmul(a, fp8(rng, 3, 300, tile=BLOCKS), implementation=implementation)
        np.testing.assert_array_equal(
            np.isnan(np.asarray(y, np.float32)).all(axis=1), x[:, 140] > 9
        )


def test_products_of_all_tiles_are_never_there_at_once():
    m, n, k = 1024, 1024, 2048
    array = jax.ShapeDtypeStruct
    a = Tiled(array((m, k), jnp.float8_e4m3fn), array((m, k // TILE), jnp.float32))
    b = Tiled(array((n, k), jnp.float8_e4m3fn), array((n // TILE, k // TILE), jnp.float32))
    of = jax.jit(fp8_matmul, static_argnames="implementation")
    compiled = of.lower(a, b, implementation="xla").compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= 1.1 * 4 * (m * k + n * k + m * n)
    assert temporary < k // TILE * m * n * 4 / 2


def test_what_does_not_go_together_is_refused(rng):
    a, b = fp8(rng, 4, 300), fp8(rng, 200, 300, tile=BLOCKS)
    with pytest.raises(ValueError, match="contracts 300 with 200"):
        fp8_matmul(a, fp8(rng, 4, 200))
    with pytest.raises(ValueError, match=r"\(2, 3\) scales for \(200, 300\) in tiles of 1x128"):
        fp8_matmul(b, b)
    with pytest.raises(ValueError, match=r"\(4, 2\) scales for \(4, 300\) in tiles of 1x128"):
        fp8_matmul(Tiled(a.q, a.scale[:, :2]), b)
    with pytest.raises(ValueError, match=r"\(1, 3\) scales for \(200, 300\) .* or 128x128"):
        fp8_matmul(a, Tiled(b.q, b.scale[:1]))
    with pytest.raises(ValueError, match="unknown implementation 'pallas'; known: reference"):
        fp8_matmul(a, b, implementation="pallas")


# ---- grouped ------------------------------------------------------------------------------------

GROUPS = (  # tiles of each expert and unused, rows of a tile, K, N
    ((1, 0, 2), 1, 128, 300, 200),  # an expert without rows, one unused tile
    ((0, 0, 3), 0, 128, 128, 128),  # everything to one
    ((2, 1, 1, 0), 2, 256, 70, 130),
    ((0, 0), 2, 128, 128, 64),  # nothing at all
)


def tile_experts(used, unused):
    experts = [expert for expert, count in enumerate(used) for _ in range(count)]
    # Whatever is not an expert marks a tile as unused.
    return np.array([*experts, *range(len(used), len(used) + unused)], np.int32)


def without_padding(rng, rows, width, block, experts, num_experts):
    """[rows, width] random numbers; the end of each used tile and unused ones hold zeros."""
    x = rng.standard_normal((rows, width)).astype(np.float32)
    x[np.repeat(experts >= num_experts, block)] = 0
    x[np.arange(rows) % block > block - 10] = 0
    return jnp.asarray(x)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
@pytest.mark.parametrize("group", GROUPS)
def test_grouped_product(group, implementation, rng):
    used, unused, block, k, n = group
    experts = tile_experts(used, unused)
    x = fp8(rng, len(experts) * block, k)  # unused rows hold numbers, and still give zeros
    w = fp8(rng, len(used), n, k, tile=BLOCKS)
    wide, weights = by_hand(x), by_hand(w)
    wanted = np.zeros((len(wide), n))
    for row, expert in enumerate(np.repeat(experts, block)):
        if expert < len(used):
            wanted[row] = weights[expert] @ wide[row]
    for out_dtype, tolerance in TOLERANCE.items():
        y = grouped_fp8_matmul(
            x, w, jnp.asarray(experts), out_dtype=out_dtype, implementation=implementation
        )
        assert y.dtype == out_dtype
        assert_near(y, wanted, tolerance)
        assert not np.asarray(y)[np.repeat(experts >= len(used), block)].any()


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
@pytest.mark.parametrize("group", GROUPS)
def test_grouped_weight_gradient(group, implementation, rng):
    used, unused, block, d, f = group
    experts = tile_experts(used, unused)
    rows = len(experts) * block
    x, dy = (
        quantize(
            without_padding(rng, rows, width, block, experts, len(used)),
            orientation="transposed",
            implementation="reference",
        )
        for width in (d, f)
    )
    wide_x, wide_dy = by_hand(x), by_hand(dy)
    wanted = np.zeros((len(used), d, f))
    for tile, expert in enumerate(experts):
        if expert < len(used):
            here = slice(tile * block, (tile + 1) * block)
            wanted[expert] += wide_x[:, here] @ wide_dy[:, here].T
    dw = grouped_fp8_weight_gradient(
        x, dy, jnp.asarray(experts), len(used), implementation=implementation
    )
    assert dw.dtype == jnp.float32
    assert_near(dw, wanted)
    assert not np.asarray(dw)[np.array(used) == 0].any()


def test_what_does_not_go_together_in_groups_is_refused(rng):
    experts = jnp.array([0, 1], jnp.int32)
    x, w = fp8(rng, 256, 300), fp8(rng, 2, 200, 300, tile=BLOCKS)
    with pytest.raises(ValueError, match="256 rows do not divide into 3 tiles"):
        grouped_fp8_matmul(x, w, jnp.array([0, 0, 1], jnp.int32))
    with pytest.raises(ValueError, match=r"rows of width 200 against weights of shape \(2, 200"):
        grouped_fp8_matmul(fp8(rng, 256, 200), w, experts)
    with pytest.raises(ValueError, match=r"\(2, 3\) scales for \(256, 300\), not \(256, 3\)"):
        grouped_fp8_matmul(fp8(rng, 256, 300, tile=BLOCKS), w, experts)
    x, dy = fp8(rng, 30, 256), fp8(rng, 20, 256)
    with pytest.raises(ValueError, match="contracts 256 rows with 128"):
        grouped_fp8_weight_gradient(x, fp8(rng, 20, 128), experts, 2)
    with pytest.raises(ValueError, match="tiles of 64 rows; scales are shared by 128"):
        grouped_fp8_weight_gradient(x, dy, jnp.array([0, 0, 1, 1], jnp.int32), 2)
    with pytest.raises(ValueError, match=r"\(1, 2\) scales for \(20, 256\), not \(20, 2\)"):
        grouped_fp8_weight_gradient(x, fp8(rng, 20, 256, tile=BLOCKS), experts, 2)
