"""The Hopper product kernel, interpreted on the CPU: its numbers, and that nothing races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.choose import Uncovered
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.grouped_matmul import grouped_fp8_matmul, grouped_matmul
from pallas_kernels.grouped_matmul import hopper as grouped_hopper
from pallas_kernels.grouped_matmul import reference as grouped_reference
from pallas_kernels.hopper import compat, product, product_kernel
from pallas_kernels.hopper.tiling import ROWS, Tiling, choose_tiling
from pallas_kernels.quantize import quantize
from pallas_kernels.tiled import Tiled, dequantize

FLOAT32 = 2e-6  # rounding of float32 sums in another order, as a relative norm
BFLOAT16 = 1.01 * 2.0**-9  # half a unit in the last place of every number, and FLOAT32
LIMITED = {"max_examples": 3, "deadline": None}  # a case takes seconds


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def fp8(*shape, tile=(1, 128), seed=0):
    return quantize(normal(*shape, seed=seed), tile=tile, implementation="reference")


def assert_near(got, wanted, tolerance):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)


def by_hand(a_MK, b_ENK, expert_m=None):
    """In float64, tile of rows by tile of rows."""
    a, b = np.asarray(a_MK, np.float64), np.asarray(b_ENK, np.float64)
    y = np.zeros((len(a), b.shape[1]))
    for m, row in enumerate(range(0, len(a), ROWS)):
        expert = 0 if expert_m is None else int(expert_m[m])
        if expert < len(b):
            y[row : row + ROWS] = a[row : row + ROWS] @ b[expert].T
    return y


def fp8_by_hand(a, b, expert_m=None):
    return by_hand(dequantize(a), dequantize(b), expert_m)


def interpret(function, *arguments, detect_races=False, **keywords):
    with compat.interpreted(detect_races=detect_races):
        return jax.block_until_ready(function(*arguments, **keywords))


# ---- FP8 ----------------------------------------------------------------------------------------

DENSE = (  # M, N, K, tiling, CTAs, dtype of the result
    (128, 128, 256, Tiling(128, 4, False), 1, jnp.float32),
    (200, 328, 272, Tiling(192, 4, True), 2, jnp.float32),  # no whole tiles; pairs
    pytest.param(
        (300, 192, 400, Tiling(64, 4, False), 2, jnp.float32), marks=pytest.mark.nightly
    ),  # nine tiles, more than CTAs
    (130, 300, 144, Tiling(96, 5, True), 4, jnp.bfloat16),  # tiles with columns of two blocks
    pytest.param(
        (10, 320, 128, Tiling(160, 4, True), 2, jnp.bfloat16), marks=pytest.mark.nightly
    ),  # one step
    pytest.param(
        (128, 100, 1200, Tiling(128, 4, False), 1, jnp.float32), marks=pytest.mark.nightly
    ),  # more steps than twice the stages
    (64, 30, 50, Tiling(64, 4, True), 2, jnp.bfloat16),  # rows that TMA cannot take; half a pair
)


@pytest.mark.parametrize("case", DENSE)
def test_fp8(case):
    m, n, k, tiling, ctas, out_dtype = case
    a, b = fp8(m, k), fp8(1, n, k, tile=(128, 128), seed=1)
    y = interpret(product.fp8, a, b, out_dtype=out_dtype, tiling=tiling, num_sms=ctas)
    assert y.dtype == out_dtype
    assert_near(y, fp8_by_hand(a, b), FLOAT32 if out_dtype == jnp.float32 else BFLOAT16)


GROUPED = (  # the expert of each 128 rows, of 3; N, K, tiling, CTAs
    ([0, 2, 2, 3], 192, 200, Tiling(96, 4, True), 2),  # an expert without rows, an unused tile
    ([1, 3, 3], 64, 144, Tiling(64, 4, False), 1),
    ([3, 3], 64, 128, Tiling(64, 4, False), 2),  # nothing at all
)


@pytest.mark.parametrize("case", GROUPED)
def test_grouped_fp8(case):
    experts, n, k, tiling, ctas = case
    a, b = fp8(len(experts) * ROWS, k), fp8(3, n, k, tile=(128, 128), seed=1)
    unused = jnp.repeat(jnp.array(experts) == 3, ROWS)
    a = Tiled(a.q, jnp.where(unused[:, None], jnp.nan, a.scale))  # never to be looked at
    options = {"out_dtype": jnp.float32, "tiling": tiling, "num_sms": ctas}
    y = interpret(product.fp8, a, b, jnp.array(experts, jnp.int32), **options)
    assert_near(y, fp8_by_hand(a, b, experts), FLOAT32)


@settings(**LIMITED)
@given(
    experts=st.lists(st.integers(0, 3), min_size=1, max_size=3).map(sorted),
    n=st.integers(1, 200),
    k=st.integers(1, 400),
    cols=st.sampled_from([64, 96, 128]),
    ctas=st.integers(1, 3),
)
def test_grouped_fp8_drawn(experts, n, k, cols, ctas):
    a, b = fp8(len(experts) * ROWS, k), fp8(3, n, k, tile=(128, 128), seed=1)
    options = {"out_dtype": jnp.float32, "tiling": Tiling(cols, 4, False), "num_sms": ctas}
    y = interpret(product.fp8, a, b, jnp.array(experts, jnp.int32), **options)
    assert_near(y, fp8_by_hand(a, b, experts), FLOAT32)


def test_sums_stay_finite_where_scales_are_not_used():
    """A block of b past the edge, and the whole of an unused tile, have no scale to read."""
    a, b = fp8(130, 100), fp8(1, 64, 100, tile=(128, 128), seed=1)
    y = interpret(product.fp8, a, b, out_dtype=jnp.float32, tiling=Tiling(192, 4, False), num_sms=2)
    assert np.isfinite(np.asarray(y)).all()


@pytest.mark.filterwarnings("error")
def test_products_too_large_are_infinite():
    """As on the device; a kernel with a planted fault multiplies whatever it finds."""
    large = jnp.full((64, 128), 1e38, jnp.bfloat16)
    options = {"k_major": True, "tiling": Tiling(64, 4, False), "num_sms": 1}
    y = interpret(product.bf16, large, large[None], **options)
    assert np.isposinf(np.asarray(y, np.float32)).all()


# ---- BF16 ---------------------------------------------------------------------------------------

BF16 = (  # experts of each 128 rows, of 3; N, K, tiling, CTAs, contraction last in b
    pytest.param(
        ([0, 2, 2, 3], 192, 200, Tiling(64, 4, False), 3, True), marks=pytest.mark.nightly
    ),
    ([0, 2, 2, 3], 192, 200, Tiling(64, 4, False), 3, False),
    pytest.param(([1, 3, 1], 328, 72, Tiling(128, 4, False), 2, False), marks=pytest.mark.nightly),
    ([1, 2], 250, 328, Tiling(64, 4, True), 2, False),
    ([3], 64, 64, Tiling(64, 4, False), 1, True),
    (None, 30, 50, Tiling(64, 4, False), 1, False),
)


@pytest.mark.parametrize("case", BF16)
def test_bf16(case):
    experts, n, k, tiling, ctas, k_major = case
    m = ROWS * len(experts) if experts else 77
    a, b = (x.astype(jnp.bfloat16) for x in (normal(m, k), normal(3, n, k, seed=1)))
    wanted = by_hand(a, b, experts)
    expert_m = None if experts is None else jnp.array(experts, jnp.int32)
    b = b if k_major else jnp.swapaxes(b, 1, 2)
    options = {"k_major": k_major, "tiling": tiling, "num_sms": ctas}
    assert_near(interpret(product.bf16, a, b, expert_m, **options), wanted, BFLOAT16)


# ---- the ops ------------------------------------------------------------------------------------


def test_fp8_matmul():
    a, b = fp8(70, 272), fp8(72, 272, tile=(128, 128), seed=1)
    y = interpret(fp8_matmul, a, b, implementation="hopper")
    assert_near(y, fp8_matmul(a, b, implementation="reference"), 2 * BFLOAT16)  # both are rounded


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_matmul(transposed):
    """Tiles of 256 rows, the last of them unused."""
    x, w = (normal(*shape).astype(jnp.bfloat16) for shape in ((512, 72), (2, 72, 72)))
    arguments = x, w, jnp.array([1, 2], jnp.int32)
    y = interpret(grouped_hopper.product, *arguments, transposed=transposed)
    wanted = grouped_reference.product(*arguments, transposed=transposed)
    assert_near(y, wanted, 2 * BFLOAT16)  # both are rounded


def test_grouped_fp8_matmul():
    arguments = fp8(256, 72), fp8(2, 64, 72, tile=(128, 128)), jnp.array([1, 2], jnp.int32)
    y = interpret(grouped_fp8_matmul, *arguments, implementation="hopper")
    assert_near(y, grouped_fp8_matmul(*arguments, implementation="reference"), 2 * BFLOAT16)


def test_what_is_not_covered_is_said():
    x, w, tile_expert = jnp.ones((192, 64)), jnp.ones((2, 64, 64)), jnp.zeros(3, jnp.int32)
    with pytest.raises(Uncovered, match="tiles of 64 rows; multiples of 128 are taken"):
        grouped_matmul(x, w, tile_expert, implementation="hopper")
    with pytest.raises(Uncovered, match="products of float32 and float32: bfloat16 only"):
        product.bf16(x, w, k_major=True)
    a, b = fp8(10, 64), fp8(1, 10, 64, tile=(128, 128))
    with pytest.raises(Uncovered, match="a result in float16: float32 or bfloat16 only"):
        product.fp8(a, b, out_dtype=jnp.float16)
    with pytest.raises(Uncovered, match="FP8 products of float8_e5m2 and float8_e4m3fn"):
        product.fp8(Tiled(a.q.astype(jnp.float8_e5m2), a.scale), b, out_dtype=jnp.float32)
    with pytest.raises(Uncovered, match="nothing to multiply"):
        product.fp8(Tiled(a.q[:0], a.scale[:0]), b, out_dtype=jnp.float32)


# ---- races --------------------------------------------------------------------------------------


def races(*, pair=False, ctas=2):
    """Whether four tiles of six steps race."""
    a, b = fp8(256, 768), fp8(1, 128, 768, tile=(128, 128), seed=1)
    options = {"out_dtype": jnp.bfloat16, "tiling": Tiling(64, 4, pair), "num_sms": ctas}
    interpret(product.fp8, a, b, detect_races=True, **options)
    return compat.races_found()


@pytest.mark.parametrize("pair", [False, True])
def test_nothing_races(pair):
    assert not races(pair=pair)


def test_bf16_does_not_race():
    a, b = (x.astype(jnp.bfloat16) for x in (normal(256, 384), normal(1, 128, 384, seed=1)))
    options = {"k_major": True, "tiling": Tiling(64, 4, False), "num_sms": 2}
    interpret(product.bf16, a, b, detect_races=True, **options)
    assert not compat.races_found()


def test_a_result_that_is_not_committed_races(monkeypatch):
    monkeypatch.setattr(product_kernel.plgpu, "commit_smem", lambda: None)
    assert races()


def test_a_result_that_is_overwritten_races(monkeypatch):
    wait = product_kernel.plgpu.wait_smem_to_gmem

    def careless(n, wait_read_only=False):
        if not wait_read_only:
            wait(n)

    monkeypatch.setattr(product_kernel.plgpu, "wait_smem_to_gmem", careless)
    assert races(ctas=1)


def test_a_stage_that_is_filled_too_early_races(monkeypatch):
    load = product_kernel.Product.load

    def careless(self, at):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(product_kernel.plgpu, "barrier_wait", lambda barrier: None)
            load(self, at)

    monkeypatch.setattr(product_kernel.Product, "load", careless)
    # Which it is depends on whether the copy or its reader sees it first.
    with pytest.raises(Exception, match=r"no threads observed phase|is already at phase"):
        races()


def test_two_ctas_on_one_tile_race(monkeypatch):
    monkeypatch.setattr(product_kernel.plgpu, "planar_snake", lambda index, *_: (index * 0,) * 2)
    assert races()


# ---- the choice of a tile -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "cols", "wanted"),
    [
        (4096, 2112, Tiling(192, 4, False)),  # three rounds of 352 tiles
        (4096, 7168, Tiling(128, 5, True)),
        (64, 7168, Tiling(64, 8, True)),  # one tile a CTA
    ],
)
def test_choice(rows, cols, wanted):
    assert choose_tiling(rows, cols, out_bytes=2, num_sms=132) == wanted


@given(
    rows=st.integers(1, 100_000),
    cols=st.integers(1, 30_000),
    out_bytes=st.sampled_from([2, 4]),
    num_sms=st.integers(1, 200),
    k_major=st.booleans(),
)
def test_every_choice_fits(rows, cols, out_bytes, num_sms, k_major):
    shape = {"out_bytes": out_bytes, "num_sms": num_sms, "k_major": k_major}
    tiling = choose_tiling(rows, cols, **shape)
    assert tiling.cols % (32 if k_major else 64) == 0
    assert 64 <= tiling.cols <= 192
    assert tiling.stages >= 4
    staged = tiling.stages * (ROWS + tiling.cols) * 128 + ROWS * tiling.cols * out_bytes
    assert staged + 1024 <= 227 * 1024
    if tiling.pair:
        assert num_sms % 2 == 0
        assert -(-cols // tiling.cols) % 2 == 0
