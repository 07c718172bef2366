"""The FP8 recipe: what is kept, what crosses, what a step skips, and what decoding computes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.config import Config
from dsjax.model import fp8
from dsjax.model.transformer import build, merge, split
from dsjax.overrides import override
from dsjax.precision import Precision, Quantized
from dsjax.presets import preset
from dsjax.train.loss import PretrainLoss
from dsjax.train.state import blueprint, create
from dsjax.train.step import make_train_step
from pallas_kernels import e5m6
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.quantize import quantize
from sharding.dispatch import combine, dispatch
from sharding.mesh import MeshShape, make_mesh
from sharding.rules import AxisRules
from tests.helpers import assert_near, distance, packed_batch
from tests.reference import fp8 as slow

FLOAT32_SUMS = 2e-6  # a relative norm
FP8 = "precision.recipe=fp8"

# ---- twelve bits --------------------------------------------------------------------------------


def twelve_bits(rng):
    """Rows of many magnitudes, with ties, what is nearly too small, zeros, and odd widths."""
    x = rng.standard_normal((6, 201)) * np.exp2(rng.integers(-30, 30, (6, 201)))
    x[1] = rng.standard_normal(201)
    x[2, :128] = 0.0
    # Halfway between neighbours, to even in both directions; negative, too.
    x[3, :128] = (1 + (2 * np.arange(128) + 1) / 128) * rng.choice([-1, 1], 128)
    # Under a largest of 2^8: around 2^-14, where numbers end.
    edge = 2.0**-14 * (1 + np.linspace(-0.75, 1.0, 127))
    x[4, 0], x[4, 1:128] = 2.0**8, edge
    x[5] *= 2.0**60
    return x.astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_e5m6_rounds_to_twelve_bits(dtype, rng):
    x = jnp.asarray(twelve_bits(rng), dtype)
    packed = jax.jit(e5m6.pack)(x)
    assert (packed.bits.shape, packed.bits.dtype) == ((6, 3, 101), jnp.uint8)
    assert (packed.exponent.shape, packed.exponent.dtype) == ((6, 2), jnp.int8)
    got = np.asarray(e5m6.unpack(packed, 201, jnp.float32), np.float64)
    np.testing.assert_array_equal(got, slow.e5m6(np.asarray(x, np.float32)))
    # What comes back has its twelve bits already: in the dtype given, too.
    again = jax.jit(e5m6.rounded)(jnp.asarray(got, dtype))
    np.testing.assert_array_equal(np.asarray(again, np.float64), got)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_e5m6_of_what_is_not_finite_is_nan(wrong, rng):
    x = rng.standard_normal((2, 256)).astype(np.float32)
    x[0, 130] = wrong
    got = np.asarray(jax.jit(e5m6.rounded)(x))
    assert np.isnan(got[0, 128:]).all()
    assert np.isfinite(got[0, :128]).all()
    assert np.isfinite(got[1]).all()


def test_attention_sees_in_the_backward_pass_what_it_gave(rng):
    """Its gradient needs its result: that of twelve bits, which is all that is kept."""
    b, t, n, a, h = 2, 40, 2, 24, 16
    q, k = (jnp.asarray(rng.standard_normal((b, t, n, a)), jnp.float32) for _ in "qk")
    v, d_out = (jnp.asarray(rng.standard_normal((b, t, n, h)), jnp.float32) for _ in "vo")
    segments, positions = jnp.ones((b, t), jnp.int32), jnp.broadcast_to(jnp.arange(t), (b, t))

    def kept(q, k, v):
        return mla_attention(q, k, v, segments, positions, 0.2, kept="e5m6")

    def slowly(q, k, v):
        """By hand: sum(d_out * out) - the row's product - is of the rounded result."""
        scores = jnp.einsum("btna,bsna->bnts", q, k) * 0.2
        causal = jnp.arange(t)[:, None] >= jnp.arange(t)
        p = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        out = e5m6.rounded(jnp.einsum("bnts,bsnh->btnh", p, v))
        dp = jnp.einsum("btnh,bsnh->bnts", d_out, v)
        rows = jnp.einsum("btnh,btnh->bnt", d_out, out)[..., None]
        ds = p * (dp - rows) * 0.2
        dq, dk = jnp.einsum("bnts,bsna->btna", ds, k), jnp.einsum("bnts,btna->bsna", ds, q)
        return out, (dq, dk, jnp.einsum("bnts,btnh->bsnh", p, d_out))

    out, back = jax.vjp(kept, q, k, v)
    wanted, gradients = slowly(q, k, v)
    assert_near(out, wanted, 1e-4)  # a sum in another order rounds a few to their neighbours
    for got, value in zip(back(d_out), gradients, strict=True):
        assert_near(got, value, 1e-4)
    # To use what was not rounded would be this far off.
    plain = jax.vjp(lambda *a: mla_attention(*a, segments, positions, 0.2, kept="as_is"), q, k, v)[
        1
    ](d_out)
    assert distance(plain[0], gradients[0]) > 1e-3


# ---- what the backward pass keeps ---------------------------------------------------------------


def kept_arrays(config: Config, rows=32) -> list[jax.ShapeDtypeStruct]:
    """What the layers' forward pass hands to the backward pass, weights apart."""
    graphdef, params, bias = split(jax.eval_shape(build(config), jax.random.key(0)))
    bias = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), bias)
    shape = rows, config.train.seq_len
    tokens_BT, where_BT = (jnp.zeros(shape, jnp.int32), jnp.ones(shape, jnp.int32))

    def forward(params):
        model = merge(graphdef, params, bias)
        return model(tokens_BT, positions_BT=where_BT, segments_BT=where_BT).hidden_BTD

    saved = jax.eval_shape(lambda params: jax.vjp(forward, params)[1], params)
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    return [leaf for leaf in jax.tree.leaves(saved) if leaf.shape not in weights]


def test_fp8_keeps_less(capsys):
    """Bytes a token and layer; of a layer of each kind, in widths that are multiples of 128."""
    tokens, kept = 32 * preset("tiny_wide").train.seq_len, {}
    for recipe in ("plain", "fp8"):
        for remat in ("none", "selective", "full"):
            changes = f"precision.recipe={recipe}", f"train.remat={remat}"
            arrays = kept_arrays(override(preset("tiny_wide"), *changes))
            size = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays) / tokens / 2
            kept[recipe, remat] = size
            with capsys.disabled():
                print(f"\n{recipe}, remat={remat}: {size:,.0f} bytes a token and layer")
            if changes == (FP8, "train.remat=selective"):
                # In BF16 only a layer's input and latents, 256 and 256 + 32 wide.
                wide = {x.shape[-1] for x in arrays if x.dtype == jnp.bfloat16}
                assert wide == {256, 288}
                bytes_ = {x.shape[-2:] for x in arrays if x.dtype == jnp.uint8}
                assert (3, 32) in bytes_  # attention's result, 64 wide a head
    assert kept["fp8", "none"] < 0.8 * kept["plain", "none"]
    assert kept["fp8", "selective"] < 0.75 * kept["plain", "selective"]
    assert kept["fp8", "selective"] < 0.5 * kept["fp8", "none"]
    assert kept["fp8", "full"] <= kept["plain", "full"]  # layers hand over nothing but their input


# ---- what crosses to experts --------------------------------------------------------------------


def crossing_case(rng, tokens=64, width=200, experts=8):
    x_UD = jnp.asarray(rng.standard_normal((tokens, width)) * 3.0, jnp.float32)
    first_U, step_U = rng.integers(0, experts, tokens), rng.integers(1, experts, tokens)
    expert_UK = np.stack([first_U, (first_U + step_U) % experts], axis=1)  # two others
    expert_UK = jnp.asarray(expert_UK, jnp.int32)
    return x_UD, jnp.ones((tokens, 2), jnp.float32), expert_UK


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_to_be_sent_twice_rounds_once(dtype, rng):
    """Powers of two lose nothing more, whichever way the tiles lie then."""
    x_UD = jnp.asarray(
        rng.standard_normal((256, 200)) * np.exp(rng.standard_normal((256, 1))), dtype
    )
    once = fp8.as_sent(x_UD)
    assert distance(once, x_UD) > 1e-2
    np.testing.assert_array_equal(fp8.as_sent(once), once)
    for codec in (fp8.TO_EXPERTS.encode, fp8.FROM_EXPERTS.encode_gradient):
        assert [array.dtype for array in codec(once)] == [jnp.uint8, jnp.float32]
    back = fp8.TO_EXPERTS.decode(fp8.TO_EXPERTS.encode(once), dtype)
    np.testing.assert_array_equal(back, once)


def test_rows_are_the_same_whether_they_cross_or_not(rng):
    """Bit for bit: on eight devices, each with experts of its own, and on one; gradients, too."""
    x_UD, gates_UK, expert_UK = crossing_case(rng)
    dy_UD = jnp.asarray(rng.standard_normal(x_UD.shape), jnp.float32)

    def through(axis):
        codecs = {"codec": fp8.TO_EXPERTS, "combine_codec": fp8.FROM_EXPERTS, "block": 128}

        def run(x_UD, gates_UK, expert_UK, dy_UD):
            def there_and_back(x_UD):
                x_XD, _, _, plan = dispatch(
                    fp8.as_sent(x_UD), gates_UK, expert_UK, num_experts=8, axis=axis, **codecs
                )
                return fp8.gradient_as_sent(combine(x_XD * 3.0, plan))

            y_UD, back = jax.vjp(there_and_back, x_UD)
            return y_UD, back(dy_UD)[0]

        return run

    arguments = x_UD, gates_UK, expert_UK, dy_UD
    wanted = jax.jit(through(None))(*arguments)
    mesh = make_mesh(MeshShape(expert=8))
    with jax.set_mesh(mesh):
        cut = [jax.device_put(x, NamedSharding(mesh, P("expert"))) for x in arguments]
        run = jax.shard_map(through("expert"), out_specs=P("expert"), check_vma=False)
        got = jax.jit(run)(*cut)
    for mine, value in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(value))
    sent = fp8.as_sent(x_UD)
    np.testing.assert_array_equal(wanted[0], 6.0 * sent)  # two choices each
    np.testing.assert_array_equal(wanted[1], 6.0 * fp8.as_sent(dy_UD))


# ---- steps that are not taken -------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_skipped():
    """One number among the activations: FP8 hides it nowhere."""
    config = override(
        preset("nano"), FP8, "model.mtp=null", "model.stacks.moe.repeats=1", "train.batch_size=2"
    )
    config = dataclasses.replace(  # without the dense layer
        config, model=dataclasses.replace(config.model, stacks=config.model.stacks[1:])
    )
    graphdef, optimizer = blueprint(config, AxisRules())
    step = make_train_step(
        graphdef, PretrainLoss.of(config), optimizer, bias_speed=config.train.bias_speed
    )
    fine = jax.device_get(create(config, jax.random.key(0), AxisRules()))
    batch = packed_batch(np.random.default_rng(0), 512, [[64], [64]])
    token = int(batch["tokens_BT"][0, 20])
    for wrong in (np.nan, np.inf):
        embedding = np.array(fine.params["embed_VD"])
        embedding[token, 3] = wrong
        before = dataclasses.replace(fine, params=fine.params | {"embed_VD": embedding})
        state = jax.tree.map(jnp.asarray, before)
        after, metrics = jax.device_get(step(state, batch, progress=0.5, micro_batch_size=2))
        assert not np.isfinite(metrics["loss_total"])
        assert after.extra["skipped"] == 1
        for name in ("params", "bias", "opt"):
            pairs = (jax.tree.leaves(getattr(x, name)) for x in (after, before))
            for a, b in zip(*pairs, strict=True):
                np.testing.assert_array_equal(a, b)
    state, metrics = step(jax.tree.map(jnp.asarray, fine), batch, progress=0.5, micro_batch_size=2)
    assert np.isfinite(metrics["loss_total"])
    assert state.extra["skipped"] == 0


# ---- decoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["masters", "fp8"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_few_experts_are_those_of_training(kept, dtype, rng):
    """The same rows in small tiles and in large ones, of weights that come in either form."""
    e, d, f, block = 8, 200, 72, 4
    w_in = jnp.asarray(rng.standard_normal((e, d, 2 * f)), jnp.float32)
    w_down = jnp.asarray(rng.standard_normal((e, f, d)), jnp.float32)
    tile_expert = jnp.asarray([1, 4, 4, 7, 8], jnp.int32)
    rows = rng.standard_normal((5, block, d)) * np.asarray(tile_expert < e)[:, None, None]
    gates = rng.uniform(0.1, 1.0, (5, block))
    x = fp8.as_sent(jnp.asarray(rows.reshape(-1, d), dtype))
    precision = Precision(
        param_dtype=jnp.dtype("float32"), compute_dtype=jnp.dtype(dtype), recipe="fp8"
    )

    def of(w, parts):
        if kept == "masters":
            return w
        columns = jnp.split(w, parts, axis=-1)
        q, scale = zip(*(quantize(part, tile=(128, 128)) for part in columns), strict=True)
        q, scale = jnp.concatenate(q, axis=-1), jnp.concatenate(scale, axis=-1)
        return Quantized(q, scale, parts=parts)

    few = jax.jit(lambda *a: fp8.few_experts(*a, of(w_in, 2), of(w_down, 1), precision=precision))
    got = few(x, jnp.asarray(gates.reshape(-1), jnp.float32), tile_expert)

    def padded(array):  # each tile of its own, as training has them
        array = np.asarray(array, np.float32).reshape(5, block, -1)
        return jnp.asarray(np.pad(array, ((0, 0), (0, 128 - block), (0, 0))).reshape(5 * 128, -1))

    variables = [nnx.Param(w, axes=("experts", None, None), whole=w.shape) for w in (w_in, w_down)]
    wanted = jax.jit(
        lambda x, gates: fp8.experts(
            *(x, gates, tile_expert, *variables), rules=AxisRules(), precision=precision
        )
    )(padded(x).astype(dtype), padded(gates)[:, 0])
    wanted = np.asarray(wanted).reshape(5, 128, d)[:, :block].reshape(-1, d)
    assert_near(got, wanted, FLOAT32_SUMS if dtype == jnp.float32 else 1e-3)
    assert not np.asarray(got[-block:]).any()
