"""Hopper's weight gradients, interpreted, against their definitions; no race, or one planted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_matmul import reference as fp8_reference
from pallas_kernels.grouped_matmul import grouped_fp8_weight_gradient
from pallas_kernels.grouped_matmul import hopper as grouped_hopper
from pallas_kernels.hopper import compat, weight_gradient
from pallas_kernels.hopper.groups import find_groups
from pallas_kernels.quantize.reference import quantize
from pallas_kernels.tiled import Tiled, dequantize

FLOAT32 = 2e-6  # rounding of float32 sums in another order, as a relative norm
BFLOAT16 = 2**-8  # rounding of a result


def assert_near(got, wanted, tolerance=FLOAT32):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) <= tolerance * max(np.linalg.norm(wanted), 1e-3)


@pytest.fixture
def few_sms(monkeypatch):
    """Fewer CTAs than tiles, so that they have several each."""

    def few(count):
        monkeypatch.setattr(compat, "num_sms", lambda: count)

    few(2)
    return few


def interpreted(function, *arguments):
    """What the kernel returns, which must have had no race."""
    with compat.interpreted(detect_races=True):
        result = jax.block_until_ready(jax.jit(function)(*arguments))
    assert not compat.races_found()
    return result


def draw_tiled(rng, rows, cols):
    """Rows of quite different sizes in tiles of 1x128."""
    x = rng.standard_normal((rows, cols)) * np.exp(rng.standard_normal((rows, 1)))
    return quantize(jnp.asarray(x, jnp.float32), (1, 128), "float32", "as_is")


def tiles_of(counts, spare=1):
    """The expert of each tile, given how many each has, and tiles of none at the end."""
    used = [expert for expert, count in enumerate(counts) for _ in range(count)]
    return jnp.asarray([*used, *[len(counts)] * spare], jnp.int32)


def gradient_by_hand(x_XD, dy_XF, tile_expert, num_experts):
    """Tile after tile in float64."""
    block = len(x_XD) // len(tile_expert)
    total = np.zeros((num_experts, x_XD.shape[1], dy_XF.shape[1]))
    for tile, expert in enumerate(np.asarray(tile_expert)):
        if expert < num_experts:
            rows = slice(tile * block, (tile + 1) * block)
            total[expert] += x_XD[rows].T @ dy_XF[rows]
    return total


GROUPED = (  # tiles an expert, rows a tile, D, F, CTAs
    ((1, 0, 2), 128, 136, 72, 2),  # an expert without rows, edges
    ((0, 6, 1), 128, 72, 200, 4),  # two column tiles, a ring that goes round
    ((2,), 256, 264, 40, 2),  # two row tiles, one expert has everything
)


@pytest.mark.parametrize(("counts", "block", "d", "f", "sms"), GROUPED)
def test_fp8_weight_gradient(few_sms, counts, block, d, f, sms):
    few_sms(sms)
    rng, tile_expert = np.random.default_rng(0), tiles_of(counts)
    rows = len(tile_expert) * block
    x, dy = draw_tiled(rng, d, rows), draw_tiled(rng, f, rows)

    def gradient(x, dy, tile_expert):
        return grouped_fp8_weight_gradient(x, dy, tile_expert, len(counts), implementation="hopper")

    got = interpreted(gradient, x, dy, tile_expert)
    wide = (np.asarray(dequantize(operand), np.float64).T for operand in (x, dy))
    assert_near(got, gradient_by_hand(*wide, tile_expert, len(counts)))
    empty = [expert for expert, count in enumerate(counts) if count == 0]
    assert not np.asarray(got)[empty].any()


@pytest.mark.parametrize(("counts", "block", "d", "f", "sms"), GROUPED)
def test_bf16_weight_gradient(few_sms, counts, block, d, f, sms):
    few_sms(sms)
    rng, tile_expert = np.random.default_rng(0), tiles_of(counts)
    block //= 2
    rows = len(tile_expert) * block
    x, dy = (jnp.asarray(rng.standard_normal((rows, width)), jnp.bfloat16) for width in (d, f))

    def gradient(x, dy, tile_expert):
        return grouped_hopper.weight_gradient(x, dy, tile_expert, len(counts))

    got = interpreted(gradient, x, dy, tile_expert)
    assert got.dtype == jnp.float32
    wide = (np.asarray(operand, np.float64) for operand in (x, dy))
    assert_near(got, gradient_by_hand(*wide, tile_expert, len(counts)))


@pytest.mark.parametrize(
    ("m", "n", "k", "out_dtype", "tolerance"),
    [(264, 64, 600, jnp.float32, FLOAT32), (64, 200, 128, jnp.bfloat16, BFLOAT16)],
)
def test_fp8_matmul_of_two_activations(few_sms, m, n, k, out_dtype, tolerance):
    rng = np.random.default_rng(0)
    a, b = draw_tiled(rng, m, k), draw_tiled(rng, n, k)
    # What was not finite is told by its scale, and spoils its row alone.
    a = Tiled(a.q, a.scale.at[3, 0].set(jnp.nan))

    def product(a, b):
        return fp8_matmul(a, b, out_dtype=out_dtype, implementation="hopper")

    got = interpreted(product, a, b)
    wanted = fp8_reference.fp8_matmul(a, b, jnp.float32)
    assert got.dtype == out_dtype
    assert np.isnan(np.asarray(got[3], np.float32)).all()
    others = np.arange(m) != 3
    assert_near(got[others], wanted[others], tolerance)


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_a_planted_race_is_found(few_sms, kind, monkeypatch):
    """Without the fence results leave shared memory, and scales are overwritten, unordered."""
    monkeypatch.setattr(weight_gradient.plgpu, "commit_smem", lambda: None)
    x = jnp.ones((64, 64), jnp.bfloat16)
    with compat.interpreted(detect_races=True):
        if kind == "fp8":
            a = quantize(x, (1, 128), "float32", "as_is")
            jax.block_until_ready(weight_gradient.fp8(a, a))
        else:
            groups = find_groups(jnp.zeros((1,), jnp.int32), 1, 1)
            jax.block_until_ready(weight_gradient.bf16(x, x, groups))
    assert compat.races_found()


def test_groups_come_longest_first():
    tile_expert = tiles_of((1, 0, 3, 2), spare=2)
    groups = find_groups(tile_expert, 4, 2)
    assert groups.group_E.tolist() == [2, 3, 0, 1]
    assert groups.first_E.tolist() == [2, 8, 0, 2]
    assert groups.steps_E.tolist() == [6, 4, 2, 0]


@pytest.mark.parametrize("seed", range(5))
def test_tiles_dealt_in_turn_are_balanced(seed):
    counts = np.random.default_rng(seed).integers(0, 40, 12)
    groups = find_groups(tiles_of(counts), 12, 1)
    steps = np.repeat(np.asarray(groups.steps_E), 37)  # 37 tiles a group
    loads = [steps[worker::10].sum() for worker in range(10)]
    assert max(loads) - min(loads) <= counts.max()


def test_what_is_not_taken_is_refused():
    x, tile = jnp.ones((96, 64), jnp.bfloat16), jnp.zeros((1,), jnp.int32)
    with pytest.raises(ValueError, match="tiles of 96 rows; multiples of 64 are taken"):
        grouped_hopper.weight_gradient(x, x, tile, 1)
    groups = find_groups(tile, 1, 1)
    with pytest.raises(ValueError, match="float32 and bfloat16: bfloat16 only"):
        weight_gradient.bf16(x.astype(jnp.float32), x, groups)
    with pytest.raises(ValueError, match="nothing to multiply"):
        weight_gradient.bf16(x[:, :0], x, groups)
    a = quantize(x, (1, 128), "float32", "as_is")
    with pytest.raises(ValueError, match="a result in float16"):
        weight_gradient.fp8(a, a, out_dtype=jnp.float16)
    with pytest.raises(ValueError, match="float8_e4m3fn only"):
        weight_gradient.fp8(Tiled(a.q.astype(jnp.float8_e5m2), a.scale), a)
