"""The kernels for TPUs, interpreted with race detection, against the definitions.

Interpreted, memory that nobody wrote is NaN, and reading past an array is an error.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import choose, tpu_blocks
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.grouped_matmul import (
    grouped_fp8_matmul,
    grouped_fp8_weight_gradient,
    grouped_matmul,
)
from pallas_kernels.grouped_matmul import tpu as grouped_tpu
from pallas_kernels.quantize import quantize, quantize_both, rms_norm_quantize, swiglu_quantize
from pallas_kernels.quantize import reference as quantize_reference
from pallas_kernels.tiled import Tiled

FLOAT32 = 2e-6  # rounding of float32 sums in another order, as a relative norm
BFLOAT16 = 4e-3  # one rounding to bfloat16 that falls the other way, likewise
RACE = "RACE DETECTED"  # what the interpreter prints
CHIPS = ("TPU7x", "TPU v6 lite")  # one multiplies FP8, the other bfloat16


@contextlib.contextmanager
def on_tpu(chip="TPU7x", cores=1):
    """Traces for a chip that is not there, and interprets."""
    # Copies that share a clock look ordered, and a race between them is missed.
    params = pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=cores, vector_clock_size=64
    )
    with traced_for(chip), pltpu.force_tpu_interpret_mode(params):
        yield


def traced_for(chip):
    device = jax.sharding.AbstractDevice(chip, 1, "tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.fixture(autouse=True)
def no_race(capfd):
    """A test of this file fails if a race was seen that it has not read itself."""
    yield
    assert RACE not in capfd.readouterr().out


def assert_near(got, wanted, tolerance=FLOAT32):
    assert got.dtype == wanted.dtype
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) <= tolerance * max(np.linalg.norm(wanted), 1e-3)


def assert_same(got, wanted):
    """Bit by bit, NaNs included."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def normal(seed, *shape, dtype=jnp.float32):
    """Normal numbers whose rows differ in size, so that scales matter."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.standard_normal((*shape[:-1], 1)))
    return jnp.asarray(rng.standard_normal(shape) * size, dtype)


def rounded(seed, *shape, tile=(1, 128)):
    return quantize(normal(seed, *shape), tile=tile, implementation="reference")


# ---- fp8_matmul ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "k", "tile", "out_dtype", "chip"),
    [
        (5, 7, 130, (128, 128), jnp.float32, CHIPS[0]),  # nothing is a multiple of anything
        (5, 7, 130, (1, 128), jnp.float32, CHIPS[1]),
        pytest.param(33, 200, 640, (1, 128), jnp.float32, CHIPS[0], marks=pytest.mark.nightly),
        pytest.param(64, 128, 512, (128, 128), jnp.bfloat16, CHIPS[1], marks=pytest.mark.nightly),
        pytest.param(1, 384, 1024, (128, 128), jnp.bfloat16, CHIPS[0], marks=pytest.mark.nightly),
        (1100, 1030, 384, (128, 128), jnp.float32, CHIPS[0]),  # blocks that pass the edges
    ],
)
def test_fp8_matmul(m, n, k, tile, out_dtype, chip):
    a, b = rounded(0, m, k), rounded(1, n, k, tile=tile)
    wanted = fp8_matmul(a, b, out_dtype=out_dtype, implementation="reference")
    with on_tpu(chip):
        got = fp8_matmul(a, b, out_dtype=out_dtype, implementation="tpu")
    assert_near(got, wanted, BFLOAT16 if out_dtype == jnp.bfloat16 else FLOAT32)


@settings(max_examples=3, deadline=None)
@given(m=st.integers(1, 70), n=st.integers(1, 300), k=st.integers(1, 700), seed=st.integers(0, 9))
def test_fp8_matmul_drawn(m, n, k, seed):
    a, b = rounded(seed, m, k), rounded(seed + 1, n, k, tile=(128, 128))
    wanted = fp8_matmul(a, b, out_dtype=jnp.float32, implementation="reference")
    with on_tpu():
        assert choose.target() == "tpu"
        assert_near(fp8_matmul(a, b, out_dtype=jnp.float32), wanted)


def test_fp8_is_multiplied_where_the_chip_can():
    chosen = {}
    for chip in CHIPS:
        with on_tpu(chip):
            chosen[chip] = jnp.dtype(tpu_blocks.multiplied_dtype()).name
    assert chosen == {"TPU7x": "float8_e4m3fn", "TPU v6 lite": "bfloat16"}


def test_a_scale_that_is_nan_reaches_its_row_alone():
    a, b = rounded(0, 40, 256), rounded(1, 24, 256, tile=(128, 128))
    a = Tiled(a.q, a.scale.at[3, 1].set(jnp.nan))
    with on_tpu():
        got = np.asarray(fp8_matmul(a, b, implementation="tpu"), np.float32)
    assert np.isnan(got[3]).all()
    assert np.isfinite(np.delete(got, 3, axis=0)).all()


# ---- grouped_matmul -----------------------------------------------------------------------------


def grouped_case(sizes, block, d, f, dtype=jnp.float32, unused=2):
    """Rows sorted by group in whole tiles, then unused tiles, whose rows are NaN."""
    tiles = [e for e, size in enumerate(sizes) for _ in range(-(-size // block))]
    tile_expert = jnp.asarray([*tiles, *[len(sizes)] * unused], jnp.int32)
    x = np.zeros((len(tile_expert) * block, d), np.float32)
    row = 0
    for e, size in enumerate(sizes):
        x[row : row + size] = normal(e, size, d)
        row += -(-size // block) * block
    used, x[row:] = row, np.nan
    return jnp.asarray(x, dtype), normal(99, len(sizes), d, f, dtype=dtype), tile_expert, used


@pytest.mark.parametrize(
    ("sizes", "block", "d", "f", "dtype"),
    [
        ((0, 0, 0, 9), 8, 16, 8, jnp.float32),  # one group gets everything
        ((0, 0), 16, 8, 8, jnp.bfloat16),  # nothing at all
        ((130, 70, 128, 0, 1, 60), 32, 64, 48, jnp.float32),
        ((7, 0, 20), 16, 130, 200, jnp.bfloat16),
    ],
)
def test_grouped_matmul(sizes, block, d, f, dtype):
    x, w, tile_expert, used = grouped_case(sizes, block, d, f, dtype)
    dy = normal(5, x.shape[0], f, dtype=dtype).at[used:].set(jnp.nan)

    def both(x, w, dy, implementation):
        def run(x, w):
            return grouped_matmul(x, w, tile_expert, implementation=implementation)

        y, backward = jax.vjp(run, x, w)
        return y, *backward(dy)

    # The definition multiplies what unused tiles hold with zeros.
    clean = (x.at[used:].set(0), w, dy.at[used:].set(0))
    with on_tpu():
        got = both(x, w, dy, "tpu")
    for a, b in zip(got, both(*clean, "reference"), strict=True):
        assert_near(a, b, FLOAT32 if dtype == jnp.float32 else BFLOAT16)
    assert not np.asarray(got[0][used:], np.float32).any()


FP8_GROUPED = pytest.mark.parametrize(
    ("sizes", "block", "d", "f", "chip"),
    [
        ((3, 0, 200, 128), 128, 130, 72, CHIPS[0]),
        ((0, 300), 256, 640, 130, CHIPS[1]),
        ((0, 0), 128, 128, 128, CHIPS[0]),
    ],
)


@FP8_GROUPED
def test_grouped_fp8_matmul(sizes, block, d, f, chip):
    x, w, tile_expert, used = grouped_case(sizes, block, d, f)
    clean = quantize(x.at[used:].set(0), implementation="reference")
    dirty = quantize(x, implementation="reference")
    w = quantize(jnp.swapaxes(w, 1, 2), tile=(128, 128), implementation="reference")
    how = {"tile_expert": tile_expert, "out_dtype": jnp.float32}
    wanted = grouped_fp8_matmul(clean, w, **how, implementation="reference")
    with on_tpu(chip):
        got = grouped_fp8_matmul(dirty, w, **how, implementation="tpu")
    assert_near(got, wanted)
    assert not np.asarray(got[used:]).any()


@FP8_GROUPED
def test_grouped_fp8_weight_gradient(sizes, block, d, f, chip):
    x, _, tile_expert, used = grouped_case(sizes, block, d, f)
    dy = normal(5, x.shape[0], f)
    clean, dirty = (
        [quantize(rows.at[used:].set(filled).T, implementation="reference") for rows in (x, dy)]
        for filled in (0, jnp.nan)
    )
    experts = len(sizes)
    wanted = grouped_fp8_weight_gradient(*clean, tile_expert, experts, implementation="reference")
    with on_tpu(chip):
        got = grouped_fp8_weight_gradient(*dirty, tile_expert, experts, implementation="tpu")
    assert_near(got, wanted)
    assert not np.asarray(got)[np.asarray(sizes) == 0].any()


@settings(max_examples=3, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    d=st.integers(1, 40),
    f=st.integers(1, 40),
    unused=st.integers(0, 3),
)
def test_grouped_matmul_drawn(sizes, d, f, unused):
    x, w, tile_expert, used = grouped_case((*sizes, 1), 16, d, f, unused=unused)
    wanted = grouped_matmul(x.at[used:].set(0), w, tile_expert, implementation="reference")
    with on_tpu():
        assert_near(grouped_matmul(x, w, tile_expert), wanted)


def test_a_tile_that_hardware_cannot_take_is_refused_or_run_elsewhere():
    x, w, tile_expert, used = grouped_case((5, 6), 4, 8, 8)
    x = x.at[used:].set(0)
    with on_tpu():
        with pytest.raises(choose.Uncovered, match="tiles of 4 rows; multiples of 8"):
            grouped_matmul(x, w, tile_expert, implementation="tpu")
        assert_near(
            grouped_matmul(x, w, tile_expert),
            grouped_matmul(x, w, tile_expert, implementation="reference"),
        )
        long = jnp.zeros((16, 40_000), jnp.float32)
        with pytest.raises(choose.Uncovered, match="rows of 40000 float32; up to 16384"):
            grouped_matmul(
                long, jnp.zeros((1, 40_000, 8)), jnp.zeros(1, jnp.int32), implementation="tpu"
            )
        a = rounded(0, 64, 128)
        with pytest.raises(choose.Uncovered, match="tiles of 64 rows; multiples of 128"):
            grouped_fp8_matmul(
                a,
                rounded(1, 1, 128, 128, tile=(128, 128)),
                jnp.zeros(1, jnp.int32),
                implementation="tpu",
            )


def test_a_race_that_is_planted_is_seen(monkeypatch, capfd):
    """Two cores that share out the steps of one sum."""
    x, _, tile_expert, _ = grouped_case((40,), 8, 8, 8, unused=0)
    compiler = tpu_blocks.compiler
    monkeypatch.setattr(
        tpu_blocks, "compiler", lambda parallel, sequential: compiler(parallel + sequential)
    )
    with on_tpu(cores=2):
        grouped_tpu.weight_gradient(x, x, tile_expert, 1)
    assert RACE in capfd.readouterr().out


# ---- quantize -----------------------------------------------------------------------------------


def awkward(seed, *shape, dtype):
    """Numbers with zeros, tiny and huge ones, NaN and infinity, each in a tile of its own."""
    x = np.array(normal(seed, *shape), np.float32)
    flat = x.reshape(-1, shape[-1])
    flat[0] = 0
    if len(flat) > 140:
        flat[130, 3], flat[131, -1], flat[132] = np.nan, np.inf, 1e-42
        flat[133], flat[134, 0] = 1e-30, 3e38
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize(
    ("shape", "tile", "scale", "dtype"),
    [
        ((3, 5), (1, 128), "float32", jnp.float32),
        ((200, 128), (1, 128), "float32", jnp.bfloat16),
        pytest.param((256, 1200), (1, 128), "power_of_two", jnp.float32, marks=pytest.mark.nightly),
        ((1300, 130), (1, 128), "float32", jnp.bfloat16),  # blocks that pass the edge
        pytest.param((130, 300), (128, 128), "float32", jnp.float32, marks=pytest.mark.nightly),
        ((3, 140, 260), (128, 128), "power_of_two", jnp.bfloat16),
    ],
)
def test_quantize(shape, tile, scale, dtype):
    x = awkward(0, *shape, dtype=dtype)
    how = {"tile": tile, "scale": scale}
    with on_tpu():
        both = quantize_both(x, **how, implementation="tpu")
        as_is = quantize(x, **how, implementation="tpu")
        transposed = quantize(x, **how, orientation="transposed", implementation="tpu")
    wanted = quantize_both(x, **how, implementation="reference")
    assert_same(both, wanted)
    assert_same((as_is, transposed), wanted)


@settings(max_examples=3, deadline=None)
@given(
    rows=st.integers(1, 300),
    cols=st.integers(1, 300),
    tile=st.sampled_from([(1, 128), (128, 128)]),
    scale=st.sampled_from(["float32", "power_of_two"]),
    seed=st.integers(0, 9),
)
def test_quantize_drawn(rows, cols, tile, scale, seed):
    x = awkward(seed, rows, cols, dtype=jnp.float32)
    wanted = quantize_both(x, tile=tile, scale=scale, implementation="reference")
    with on_tpu():
        got = quantize_both(x, tile=tile, scale=scale)
    assert_same(got, wanted)


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "gated", "orientation"),
    [
        (3, 5, jnp.float32, True, "as_is"),
        (256, 256, jnp.bfloat16, True, "as_is"),
        pytest.param(256, 256, jnp.bfloat16, False, "transposed", marks=pytest.mark.nightly),
        (130, 1152, jnp.bfloat16, True, "transposed"),
        pytest.param(256, 384, jnp.float32, False, "as_is", marks=pytest.mark.nightly),
    ],
)
def test_swiglu_quantize(rows, width, dtype, gated, orientation):
    gate_up = awkward(0, rows, 2 * width, dtype=dtype)
    gates = jnp.abs(normal(1, rows)) if gated else None
    how = {"scale": "power_of_two", "orientation": orientation}
    with on_tpu():
        got = swiglu_quantize(gate_up, gates, **how, implementation="tpu")
    assert_same(got, swiglu_quantize(gate_up, gates, **how, implementation="reference"))


@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [
        (3, 5, jnp.float32),
        pytest.param(300, 256, jnp.bfloat16, marks=pytest.mark.nightly),
        pytest.param(128, 1300, jnp.float32, marks=pytest.mark.nightly),
        (1100, 1000, jnp.bfloat16),
    ],
)
def test_rms_norm_quantize(rows, width, dtype):
    x, scale_D = awkward(0, rows, width, dtype=dtype), normal(1, width)
    with on_tpu():
        normed, *tiled = rms_norm_quantize(x, scale_D, 1e-6, implementation="tpu")
    wanted, *_ = rms_norm_quantize(x, scale_D, 1e-6, implementation="reference")
    finite = np.isfinite(np.asarray(wanted, np.float32))
    np.testing.assert_array_equal(np.isfinite(np.asarray(normed, np.float32)), finite)
    assert_near(
        jnp.where(finite, normed, 0),
        jnp.where(finite, wanted, 0),
        FLOAT32 if dtype == jnp.float32 else BFLOAT16,
    )
    # A mean that is summed in another order may move a number; what is rounded is what is returned.
    assert_same(tuple(tiled), quantize_reference.quantize_both(normed, (1, 128), "float32"))


def test_a_norm_that_does_not_fit_is_refused():
    with on_tpu():
        with pytest.raises(choose.Uncovered, match="rows of 20000; up to 16384"):
            rms_norm_quantize(jnp.zeros((8, 20_000)), jnp.ones(20_000), 1e-6, implementation="tpu")
        with pytest.raises(choose.Uncovered, match=r"eps 0\.0 with 3 rows"):
            rms_norm_quantize(jnp.ones((3, 128)), jnp.ones(128), 0.0, implementation="tpu")
        with pytest.raises(choose.Uncovered, match="an empty dimension"):
            quantize(jnp.zeros((0, 128)), implementation="tpu")


# ---- as compiled --------------------------------------------------------------------------------


def shaped(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def shaped_tiled(*shape, tile=(1, 128)):
    *lead, rows, cols = shape
    scales = (*lead, -(-rows // tile[0]), -(-cols // 128))
    return Tiled(shaped(*shape, dtype=jnp.float8_e4m3fn), shaped(*scales, dtype=jnp.float32))


LOWERED = {
    "fp8_matmul": (
        fp8_matmul,
        (shaped_tiled(4096, 7168), shaped_tiled(2112, 7168, tile=(128, 128))),
    ),
    "grouped_matmul": (
        jax.grad(lambda x, w, t: jnp.sum(grouped_matmul(x, w, t).astype(jnp.float32)), (0, 1)),
        (shaped(4096, 7168), shaped(8, 7168, 4096), shaped(32, dtype=jnp.int32)),
    ),
    "grouped_fp8_matmul": (
        grouped_fp8_matmul,
        (
            shaped_tiled(4096, 7168),
            shaped_tiled(8, 4096, 7168, tile=(128, 128)),
            shaped(32, dtype=jnp.int32),
        ),
    ),
    "grouped_fp8_weight_gradient": (
        lambda x, dy, t: grouped_fp8_weight_gradient(x, dy, t, 8),
        (shaped_tiled(7168, 4096), shaped_tiled(4096, 4096), shaped(32, dtype=jnp.int32)),
    ),
    "quantize_both": (quantize_both, (shaped(4096, 7168),)),
    "swiglu_quantize": (swiglu_quantize, (shaped(4096, 4096), shaped(4096, dtype=jnp.float32))),
    "rms_norm_quantize": (
        lambda x, scale: rms_norm_quantize(x, scale, 1e-6),
        (shaped(4096, 7168), shaped(7168)),
    ),
}


@pytest.mark.parametrize("name", LOWERED)
def test_the_kernels_of_real_sizes_lower_for_a_chip(name):
    call, arguments = LOWERED[name]
    with traced_for(CHIPS[0]):
        lowered = jax.jit(call).trace(*arguments).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()
