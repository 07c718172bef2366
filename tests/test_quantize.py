"""FP8 tiles bit for bit: against torch, by hand, as published checkpoints have them, on Hopper."""

import inspect
import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dsjax.interop import fp8
from pallas_kernels.choose import Uncovered
from pallas_kernels.hopper import compat
from pallas_kernels.quantize import (
    exact,
    hopper,
    quantize,
    quantize_both,
    reference,
    rms_norm_quantize,
    swiglu_quantize,
)
from pallas_kernels.quantize.shapes import SHAPES
from pallas_kernels.tiled import TILE, Tiled, dequantize

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
PEER = ROOT / ".venv-oracle" / "bin" / "python"
CASES = ("normal", "tall", "wide", "ties", "edges")
DTYPES = ("float32", "bfloat16")
SCALES = ("float32", "power_of_two")
WAYS = {  # as in tests/oracle/make_quantize_golden.py
    "rows": {"tile": (1, TILE)},
    "columns": {"tile": (1, TILE), "orientation": "transposed"},
    "blocks": {"tile": (TILE, TILE)},
}


def assert_same_bits(got, wanted):
    """Any NaN equals any other: IEEE 754 leaves their signs open."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    of_bits = np.dtype(f"u{got.dtype.itemsize}")
    same = got.view(of_bits) == wanted.view(of_bits)
    same |= np.isnan(got.astype(np.float32)) & np.isnan(wanted.astype(np.float32))
    assert same.all(), f"{(~same).sum()} of {same.size}, first at {np.argwhere(~same)[0]}"


def assert_same_tiles(got, wanted):
    assert_same_bits(got.q, wanted.q)
    assert_same_bits(got.scale, wanted.scale)


def told(tensors, case, dtype, scale, way):
    """What the oracle says."""
    name = f"{case}/{dtype}/{scale}/{way}"
    return Tiled(tensors[f"{name}/q"].view(ml_dtypes.float8_e4m3fn), tensors[f"{name}/scale"])


def by_hand(x, tile, scale_format):
    """Tile by tile, in NumPy's float32."""
    (rows, cols), (height, width) = x.shape, tile
    q = np.zeros(x.shape, ml_dtypes.float8_e4m3fn)
    scales = np.zeros((-(-rows // height), -(-cols // width)), np.float32)
    for i, j in np.ndindex(scales.shape):
        here = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
        numbers = x[here].astype(np.float32)
        amax = np.abs(numbers).max()
        scale = np.float32(1)
        if not np.isfinite(numbers).all():
            scale = np.float32(np.nan)
        elif amax >= 2.0**-126:
            scale = max(amax / np.float32(448), np.float32(2.0**-116))
            if scale_format == "power_of_two":
                mantissa, exponent = np.frexp(scale)
                scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
        scales[i, j] = scale
        with np.errstate(invalid="ignore", under="ignore"):
            q[here] = np.clip(numbers / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return Tiled(q, scales)


def random_bits(rng, shape):
    """Float32 of every kind; some rows finite throughout."""
    bits = rng.integers(0, 2**32, shape, dtype=np.uint32)
    x = bits.view(np.float32)
    return np.where((np.arange(shape[0]) % 2 == 0)[:, None] & ~np.isfinite(x), 1.5, x)


# ---- the definition -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "quantize.safetensors")


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_every_bit_is_torchs(golden, case, dtype, jitted):
    x = jnp.asarray(golden[f"{case}/x"]).astype(dtype)
    for scale in SCALES:
        for way, arguments in WAYS.items():

            def of(x, arguments=arguments, scale=scale):
                return quantize(x, **arguments, scale=scale, implementation="reference")

            found = (jax.jit(of) if jitted else of)(x)
            assert_same_tiles(found, told(golden, case, dtype, scale, way))


def test_the_golden_file_would_tell_faults():
    facts = json.loads((GOLDEN / "quantize.json").read_text())["facts"]
    assert len(facts["wrong_under"]) >= 4
    assert min(facts["wrong_under"].values()) > 10


@pytest.mark.slow
@pytest.mark.skipif(not PEER.exists(), reason="no torch here: make oracle")
def test_every_bit_is_torchs_live(tmp_path):
    """The golden file again, and inputs that are not in it."""
    script = ROOT / "tests" / "oracle" / "make_quantize_golden.py"
    subprocess.run([PEER, script, "--check"], check=True)
    rng = np.random.default_rng()
    powers = 2.0 ** rng.uniform(-120, 118, (200, 1))
    inputs = {
        "bits/x": random_bits(rng, (130, 1000)),
        "normal/x": rng.standard_normal((300, 1000)).astype(np.float32),
        "powers/x": (rng.standard_normal((200, 1000)) * powers).astype(np.float32),
    }
    save_file(inputs, tmp_path / "in")
    paths = [f"--of={tmp_path / 'in'}", f"--out={tmp_path / 'out'}"]
    subprocess.run([PEER, script, *paths], check=True)
    outputs = load_file(tmp_path / "out")
    of = jax.jit(quantize, static_argnames=("tile", "scale", "orientation", "implementation"))
    for name, x in inputs.items():
        for dtype in DTYPES:
            for scale in SCALES:
                for way, arguments in WAYS.items():
                    found = of(
                        jnp.asarray(x).astype(dtype),
                        **arguments,
                        scale=scale,
                        implementation="reference",
                    )
                    wanted = told(outputs, name.removesuffix("/x"), dtype, scale, way)
                    assert_same_tiles(found, wanted)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 140),
    cols=st.integers(1, 300),
    power=st.integers(-130, 120),
    special=st.sampled_from([None, 0.0, -0.0, 1e-40, np.nan, np.inf, -np.inf]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from(SCALES),
    way=st.sampled_from(sorted(WAYS)),
    seed=st.integers(0, 99),
)
def test_by_hand(rows, cols, power, special, dtype, scale, way, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, cols)) * 2.0**power).astype(np.float32)
    if special is not None:
        x[rng.integers(rows), rng.integers(cols)] = special
    x = np.asarray(jnp.asarray(x).astype(dtype))
    found = quantize(jnp.asarray(x), **WAYS[way], scale=scale, implementation="reference")
    oriented = x.T if way == "columns" else x
    assert_same_tiles(found, by_hand(oriented, WAYS[way]["tile"], scale))


def test_nan_is_seen_wherever_it_is():
    """XLA's maximum along a dimension drops it on CPU."""
    x = np.ones((TILE, TILE), np.float32)
    np.fill_diagonal(x, np.nan)
    for orientation in ("as_is", "transposed"):
        found = quantize(jnp.asarray(x), orientation=orientation, implementation="reference")
        assert np.isnan(found.scale).all()
        assert np.isnan(np.asarray(found.q).astype(np.float32)).all()


@pytest.mark.parametrize("scale", SCALES)
def test_numbers_come_back_within_half_a_step(scale, rng):
    x = rng.standard_normal((200, 300)).astype(np.float32) * 2.0 ** rng.uniform(-9, 9, (200, 1))
    for way, arguments in WAYS.items():
        found = quantize(jnp.asarray(x), **arguments, scale=scale, implementation="reference")
        back, wanted = np.asarray(dequantize(found)), x.T if way == "columns" else x
        height = arguments["tile"][0]
        steps = np.repeat(np.repeat(found.scale, TILE, 1), height, 0)[: len(back), : len(back[0])]
        # Half of a step of three bits; of subnormal FP8, half of the smallest; and the product's.
        bound = np.maximum(np.abs(wanted) * 2**-4, steps * 2**-10) * (1 + 2**-20)
        assert (np.abs(back - wanted) <= bound).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_both_orientations(shape, rng):
    x = jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    for tile in ((1, TILE), (TILE, TILE)):
        both = quantize_both(x, tile=tile, implementation="reference")
        for found, orientation in zip(both, ("as_is", "transposed"), strict=True):
            wanted = quantize(x, tile=tile, orientation=orientation, implementation="reference")
            assert_same_tiles(found, wanted)


def test_matrices_side_by_side(rng):
    x = jnp.asarray(rng.standard_normal((2, 3, 130, 200)), jnp.float32)
    found = quantize(x, tile=(TILE, TILE), implementation="reference")
    assert found.scale.shape == (2, 3, 2, 2)
    for index in np.ndindex(2, 3):
        one = quantize(x[index], tile=(TILE, TILE), implementation="reference")
        assert_same_tiles(jax.tree.map(lambda part, index=index: part[index], found), one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_published_layout_and_training_agree(scale, dtype, rng):
    """Blocks as `dsjax.interop.fp8` writes checkpoints: the same scales, the same bytes."""
    powers = 2.0 ** np.repeat(np.repeat(rng.uniform(-135, 118, (3, 4)), TILE, 0), TILE, 1)
    x = rng.standard_normal((300, 500)) * powers[:300, :500]
    x[:TILE, :TILE] = 0
    x = np.asarray(jnp.asarray(x, jnp.float32).astype(dtype))
    scales = fp8.choose_scale(np.asarray(fp8.amax(x)), scale)
    found = quantize(jnp.asarray(x), tile=(TILE, TILE), scale=scale, implementation="reference")
    assert_same_tiles(found, Tiled(fp8.encode(x, scales), scales))


def test_what_is_refused():
    x = jnp.ones((4, 4))
    with pytest.raises(ValueError, match=r"unknown tile \(128, 1\)"):
        quantize(x, tile=(128, 1))
    with pytest.raises(ValueError, match="unknown scale 'e8m0'"):
        inspect.unwrap(quantize_both)(x, scale="e8m0")
    with pytest.raises(ValueError, match="unknown orientation 'both'"):
        inspect.unwrap(swiglu_quantize)(x, orientation="both")
    with pytest.raises(ValueError, match="unknown implementation 'pallas'; known: hopper"):
        quantize(x, implementation="pallas")


# ---- what is fused with it ----------------------------------------------------------------------


@pytest.mark.parametrize("orientation", ["as_is", "transposed"])
@pytest.mark.parametrize("gated", [False, True])
def test_swiglu(gated, orientation, rng):
    gate_up = jnp.asarray(rng.standard_normal((130, 400)), jnp.bfloat16)
    gates = jnp.asarray(rng.uniform(0, 1, 130), jnp.float32) if gated else None
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=1)
    wanted = gate / (1 + np.exp(-gate)) * up
    if gated:
        wanted = wanted * np.asarray(gates, np.float64)[:, None]
    hidden = reference.swiglu(gate_up, gates)
    assert hidden.dtype == jnp.bfloat16
    # Rounded to BF16 once, and with gates, themselves BF16, once more.
    bound = 2.0**-8 * (3 if gated else 1) * np.abs(wanted)
    assert (np.abs(np.asarray(hidden, np.float64) - wanted) <= bound).all()
    options = {"orientation": orientation, "implementation": "reference"}
    assert_same_tiles(swiglu_quantize(gate_up, gates, **options), quantize(hidden, **options))


def test_rms_norm(rng):
    x = jnp.asarray(rng.standard_normal((130, 200)), jnp.bfloat16)
    scale = jnp.asarray(rng.uniform(0.5, 2, 200), jnp.float32)
    normed, *both = rms_norm_quantize(x, scale, 1e-3, implementation="reference")
    wide = np.asarray(x, np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * np.asarray(scale)
    assert normed.dtype == jnp.bfloat16
    assert (np.abs(np.asarray(normed, np.float64) - wanted) <= 2.0**-8 * np.abs(wanted)).all()
    for found, one in zip(both, quantize_both(normed, implementation="reference"), strict=True):
        assert_same_tiles(found, one)


# ---- divisions without a division ---------------------------------------------------------------


def test_scales_and_reciprocals_of_every_significand():
    significands = (np.arange(2**23, dtype=np.uint32) | 0x3F800000).view(np.float32)
    wanted = significands / np.float32(448)
    assert_same_bits(jax.jit(exact.over_448)(jnp.asarray(significands)), wanted)
    found = jax.jit(lambda s: exact.divisor(s).reciprocal)(jnp.asarray(significands))
    assert_same_bits(found, 1 / significands)


def test_a_reciprocal_may_begin_two_units_off(monkeypatch):
    """As a GPU's division is."""
    significands = np.random.default_rng(0).integers(2**23, 2**24, 2**16).astype(np.float32)
    significands = np.append(significands * 2.0**-23, [1, 2 - 2.0**-23]).astype(np.float32)
    for off in (-2, -1, 1, 2):
        divided = exact.as_float(exact.as_bits(jnp.asarray(1 / significands)) + off)
        monkeypatch.setattr(exact, "_one_over", lambda _, divided=divided: divided)
        assert_same_bits(exact.divisor(jnp.asarray(significands)).reciprocal, 1 / significands)


# Times these, 16 to 31 hold the ties of normal e4m3, and those of subnormal.
TIES = (2.0**-5, 2.0**-11, 2.0**-12, 2.0**-13, 2.0**-14)


def beside_ties(significands):
    """(numbers, scales): of each, the numbers whose quotients lie around every tie of e4m3.

    A tie has at most five bits, so that all are a power of two times 16 to 31.
    """
    scales = np.repeat(significands, 16).astype(np.float32)
    ties = np.tile(np.arange(16, 32, dtype=np.float32), len(significands))
    near = (ties * scales).view(np.int32)
    numbers = np.stack([near + off for off in range(-2, 3)]).view(np.float32)
    return numbers, np.broadcast_to(scales, numbers.shape)


def assert_quotients_round_alike(numbers, scales):
    divide = jax.jit(lambda x, s: exact.divide(x, exact.divisor(s)))
    for power in TIES:
        x = numbers * np.float32(power)
        found = np.asarray(divide(jnp.asarray(x), jnp.asarray(scales)))
        found = found.astype(ml_dtypes.float8_e4m3fn)
        assert_same_bits(found, (x / scales).astype(ml_dtypes.float8_e4m3fn))


def test_quotients_beside_ties():
    significands = np.random.default_rng(0).integers(2**23, 2**24, 2**14)
    assert_quotients_round_alike(*beside_ties(significands * 2.0**-23))


def test_quotients_that_are_as_near_as_can_be_to_rounding_into_a_tie():
    """The float32 quotient becomes a tie within half a unit of it, and here misses by 2^-25."""
    hard = set()
    for tie in range(16, 32):
        for side in (-1, 1):
            for bits in (24, 25):
                inverse = pow(tie * 2**20 + side, -1, 2**bits)
                hard |= {s for s in (inverse, 2**bits - inverse) if 2**23 <= s < 2**24}
    # The one scale of all 2^23 for which the last product must be fused with its sum.
    hard.discard(0xCFFFFF)
    assert len(hard) == 15
    assert_quotients_round_alike(*beside_ties(np.array(sorted(hard)) * 2.0**-23))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_quotients_beside_every_tie_of_every_scale():
    """671 million pairs, for normal and for subnormal FP8."""

    @jax.jit
    def wrong(whole):
        scales = (whole.astype(jnp.float32) * 2.0**-23)[:, None, None]
        ties = jnp.arange(16.0, 32.0)[None, :, None]
        near = exact.as_bits(ties * scales) + jnp.arange(-2, 3)
        numbers = exact.as_float(near)
        scales = jnp.broadcast_to(scales, numbers.shape)
        found = False
        for power in TIES:
            x = numbers * power
            ours = exact.divide(x, exact.divisor(scales)).astype(jnp.float8_e4m3fn)
            theirs = reference.round_to_fp8(x, scales)
            bits = [jax.lax.bitcast_convert_type(q, jnp.uint8) for q in (ours, theirs)]
            found = found | (bits[0] != bits[1]).any(axis=(1, 2))
        return found

    count = 2**16
    for first in range(2**23, 2**24, count):
        whole = jnp.arange(first, first + count)
        found = np.asarray(whole)[np.asarray(wrong(whole))]
        assert set(found.tolist()) <= {0xCFFFFF}


def test_zeros_keep_their_signs():
    x, s = jnp.array([0.0, -0.0, 1e-40, -1e-40]), jnp.full(4, 3.0)
    found = np.asarray(exact.divide(x, exact.divisor(s))).astype(ml_dtypes.float8_e4m3fn)
    assert_same_bits(found, np.array([0.0, -0.0, 0.0, -0.0], ml_dtypes.float8_e4m3fn))


# ---- Hopper, interpreted ------------------------------------------------------------------------


def interpret(function, *arguments, detect_races=False, **keywords):
    with compat.interpreted(detect_races=detect_races):
        return jax.block_until_ready(function(*arguments, implementation="hopper", **keywords))


@pytest.mark.parametrize(
    ("case", "dtype", "scale"),
    [
        ("edges", "bfloat16", "float32"),
        ("edges", "float32", "power_of_two"),
        ("ties", "float32", "float32"),
        ("ties", "bfloat16", "power_of_two"),
        ("normal", "bfloat16", "float32"),
        ("tall", "float32", "float32"),
        ("wide", "bfloat16", "power_of_two"),
    ],
)
def test_hopper(golden, case, dtype, scale):
    """Zero numbers are off: the divisions are made of products and sums."""
    x = jnp.asarray(golden[f"{case}/x"]).astype(dtype)
    rows, columns = interpret(quantize_both, x, scale=scale)
    assert_same_tiles(rows, told(golden, case, dtype, scale, "rows"))
    assert_same_tiles(columns, told(golden, case, dtype, scale, "columns"))
    blocks = interpret(quantize, x, tile=(TILE, TILE), scale=scale)
    assert_same_tiles(blocks, told(golden, case, dtype, scale, "blocks"))


@pytest.mark.parametrize("orientation", ["as_is", "transposed"])
def test_hopper_one_orientation(golden, orientation):
    x = jnp.asarray(golden["normal/x"]).astype(jnp.bfloat16)
    way = {"as_is": "rows", "transposed": "columns"}[orientation]
    found = interpret(quantize, x, orientation=orientation)
    assert_same_tiles(found, told(golden, "normal", "bfloat16", "float32", way))


@settings(max_examples=3, deadline=None)
@given(
    rows=st.integers(1, 260),
    cols=st.integers(1, 260),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from(SCALES),
    seed=st.integers(0, 99),
)
def test_hopper_drawn(rows, cols, dtype, scale, seed):
    x = np.random.default_rng(seed).standard_normal((rows, cols))
    x = jnp.asarray(x, jnp.float32).astype(dtype)
    wanted = quantize_both(x, scale=scale, implementation="reference")
    for found, one in zip(interpret(quantize_both, x, scale=scale), wanted, strict=True):
        assert_same_tiles(found, one)


def test_hopper_matrices_side_by_side(rng):
    x = jnp.asarray(rng.standard_normal((2, 130, 100)), jnp.bfloat16)
    wanted = quantize_both(x, tile=(TILE, TILE), implementation="reference")
    found = interpret(quantize_both, x, tile=(TILE, TILE))
    for one, other in zip(found, wanted, strict=True):
        assert_same_tiles(one, other)


@pytest.mark.parametrize(
    ("hidden", "gated", "orientation"),
    [(256, True, "as_is"), (100, True, "transposed"), (128, False, "transposed")],
)
def test_hopper_swiglu(hidden, gated, orientation, rng):
    """The sigmoid is XLA's where it is interpreted."""
    gate_up = jnp.asarray(rng.standard_normal((130, 2 * hidden)), jnp.bfloat16)
    gates = jnp.asarray(rng.uniform(0, 1, 130), jnp.float32) if gated else None
    found = interpret(swiglu_quantize, gate_up, gates, orientation=orientation)
    wanted = swiglu_quantize(gate_up, gates, orientation=orientation, implementation="reference")
    assert_same_tiles(found, wanted)


def test_hopper_rms_norm(rng):
    x = jnp.asarray(rng.standard_normal((130, 200)), jnp.bfloat16)
    scale = jnp.asarray(rng.uniform(0.5, 2, 200), jnp.float32)
    normed, *both = interpret(rms_norm_quantize, x, scale, 1e-3)
    wanted, *_ = rms_norm_quantize(x, scale, 1e-3, implementation="reference")
    assert normed.dtype == jnp.bfloat16
    off = np.abs(np.asarray(normed, np.float64) - np.asarray(wanted, np.float64))
    assert (off <= 2.0**-7 * np.abs(np.asarray(wanted, np.float64))).all()  # a unit at most
    assert (off > 0).mean() < 0.01
    for found, one in zip(both, quantize_both(normed, implementation="reference"), strict=True):
        assert_same_tiles(found, one)


def test_hopper_does_not_race(monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((256, 256)), jnp.bfloat16)
    interpret(quantize_both, x, detect_races=True)
    assert not compat.races_found()
    with monkeypatch.context() as patch:  # TMA reads what threads may still be writing
        patch.setattr(hopper.plgpu, "commit_smem", lambda: None)
        interpret(quantize_both, x, detect_races=True)
        assert compat.races_found()
    interpret(quantize_both, x, detect_races=True)
    assert not compat.races_found()


def test_what_hopper_does_not_take():
    with pytest.raises(Uncovered, match="float16; float32 and bfloat16 are taken"):
        quantize(jnp.ones((4, 4), jnp.float16), implementation="hopper")
    with pytest.raises(Uncovered, match=r"shape \(2, 4, 4\) in tiles of 1x128; one matrix"):
        quantize(jnp.ones((2, 4, 4)), implementation="hopper")
    with pytest.raises(Uncovered, match=r"shape \(0, 4\) holds nothing"):
        quantize_both(jnp.ones((0, 4)), implementation="hopper")
