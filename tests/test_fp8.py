"""The FP8 recipe: what is rounded, how, where it travels, and what is kept of it.

Of a whole model float32 sums in another order are enough to round a few numbers the other way, all
that comes after sees it, and gradients soon differ by as much as FP8 rounds. So single layers are
compared strictly, and whole steps where rounding is taken out.
"""

import collections
import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import dsjax
import pallas_kernels.fp8_linear
from dsjax.config import BlockConfig, Config, InferConfig, MeshConfig
from dsjax.errors import InputError
from dsjax.infer.generate import generate, prepare
from dsjax.infer.sampler import Sampling
from dsjax.meshes import check_training, rules_of, spread_of
from dsjax.model import fp8
from dsjax.model.mla import MultiHeadLatentAttention
from dsjax.model.transformer import build, merge, split
from dsjax.overrides import override
from dsjax.plan.collectives import inner_jaxprs
from dsjax.precision import Precision
from dsjax.presets import preset
from dsjax.train.loss import PretrainLoss
from dsjax.train.state import TrainState, abstract_state, blueprint, create
from dsjax.train.step import make_train_step
from pallas_kernels.fp8_linear import (
    Here,
    How,
    fp8_linear,
    fp8_linears,
    fp8_norm_linears,
    fp8_swiglu_linear,
)
from pallas_kernels.quantize import quantize, reference
from pallas_kernels.tiled import Tiled, dequantize
from sharding.dispatch import IDENTITY
from sharding.mesh import MeshShape, make_mesh
from sharding.rules import PRESETS, AxisRules, LayoutError
from tests.helpers import (
    FLOAT32,
    FLOAT32_GRADIENT,
    assert_near,
    assert_trees_near,
    distance,
    packed_batch,
)
from tests.reference import fp8 as slow

FLOAT32_SUMS = 2e-6  # a relative norm
# Rounding the result, too. To round an operand another way is 2e-2.
BFLOAT16_RESULT = 3e-3
# SiLU in float32 is off by a unit or two, which rounds a number in 10^5 the other way.
SILU = 1e-3

# ---- the three products, against loops ----------------------------------------------------------


def drawn(rng, *shape, dtype=np.float32):
    """Numbers whose tiles differ in size, some of them all zeros."""
    x = rng.standard_normal(shape) * np.exp(rng.standard_normal((*shape[:-1], 1)))
    x[..., : shape[-1] // 3] *= 30.0
    if len(shape) == 2:
        x[shape[0] // 2] = 0.0
    return jnp.asarray(x, dtype)


def gradients(function, dy, *arguments):
    """What a function gives, and its gradients."""

    @jax.jit
    def run(dy, *arguments):
        y, back = jax.vjp(function, *arguments)
        return y, back(dy)

    return run(dy, *arguments)


SCALES = ["float32", "power_of_two"]
SIZES = [(256, 384, 128), (130, 200, 72)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("gradient_scale", SCALES)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_the_products_of_a_linear_layer(m, k, n, scale, gradient_scale, rng):
    x_MK, w_KN, dy_MN = (drawn(rng, *shape) for shape in ((m, k), (k, n), (m, n)))
    weight_scale = scale  # weights' scales are the model's, as most activations' are
    how = How(scale, gradient_scale)
    y_MN, (dx_MK, dw_KN) = gradients(
        lambda x, w: fp8_linear(x, w, source=Here(weight_scale), how=how), dy_MN, x_MK, w_KN
    )
    is_power = {"scale": scale, "gradient_scale": gradient_scale, "weight_scale": weight_scale}
    is_power = {name: value == "power_of_two" for name, value in is_power.items()}
    wanted = slow.linear(x_MK, w_KN, dy_MN, **is_power)
    for got, value in zip((y_MN, dx_MK, dw_KN), wanted, strict=True):
        assert_near(got, value, FLOAT32_SUMS)


def test_weights_are_rounded_from_float32_masters(rng):
    """Where activations are BF16, too."""
    x_MK, dy_MN = (drawn(rng, *shape, dtype=jnp.bfloat16) for shape in ((256, 256), (256, 128)))
    w_KN = drawn(rng, 256, 128)
    y_MN, (dx_MK, dw_KN) = gradients(fp8_linear, dy_MN, x_MK, w_KN)
    assert (y_MN.dtype, dx_MK.dtype, dw_KN.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    wanted_y, wanted_dx, wanted_dw = slow.linear(*(np.float32(a) for a in (x_MK, w_KN, dy_MN)))
    assert_near(y_MN, wanted_y, BFLOAT16_RESULT)
    assert_near(dx_MK, wanted_dx, BFLOAT16_RESULT)
    assert_near(dw_KN, wanted_dw, FLOAT32_SUMS)


def test_several_weights_share_an_input(rng):
    """Each is rounded by itself, and parts of the input's gradient are added in float32."""
    x_MK = drawn(rng, 130, 200, dtype=jnp.bfloat16)
    weights = drawn(rng, 200, 72), drawn(rng, 200, 140)
    dys = tuple(drawn(rng, 130, w.shape[1], dtype=jnp.bfloat16) for w in weights)
    ys, (dx_MK, *dws) = gradients(
        lambda x, *ws: fp8_linears(x, ws, sources=(Here(), Here())), dys, x_MK, *weights
    )
    wanted = [
        slow.linear(*(np.float32(a) for a in (x_MK, w, dy)))
        for w, dy in zip(weights, dys, strict=True)
    ]
    for y, dw, (wanted_y, _, wanted_dw) in zip(ys, dws, wanted, strict=True):
        assert_near(y, wanted_y, BFLOAT16_RESULT)
        assert_near(dw, wanted_dw, FLOAT32_SUMS)
    exact = sum(dx for _, dx, _ in wanted)
    assert_near(dx_MK, exact, BFLOAT16_RESULT)
    # Rounded once: nearly all are the nearest BF16.
    assert np.mean(np.asarray(dx_MK) == exact.astype(ml_dtypes.bfloat16)) > 0.99


def test_a_norm_before_several_weights(rng):
    """Its result is what is rounded, and it is handed on, too; all gradients meet in its input."""
    x_MK, norm_K = drawn(rng, 130, 200), jnp.asarray(rng.uniform(0.5, 1.5, 200), jnp.float32)
    weights = drawn(rng, 200, 72), drawn(rng, 200, 140)
    dys = tuple(drawn(rng, 130, w.shape[1]) for w in weights)
    dnormed = drawn(rng, 130, 200)
    sources = Here(), Here()

    def together(x, norm, *ws):
        return fp8_norm_linears(x, norm, 1e-6, ws, sources=sources)

    def apart(x, norm, *ws):
        normed = reference.rms_norm(x, norm, 1e-6)
        return normed, fp8_linears(normed, ws, sources=sources)

    got, wanted = (
        gradients(function, (dnormed, dys), x_MK, norm_K, *weights)
        for function in (together, apart)
    )
    assert_trees_near(got, wanted, FLOAT32_SUMS)


def gate_up_of(rng, rows, width, *, decided):
    """SwiGLU's input; decided gates are so large, or zero, that SiLU rounds to one number."""
    gate = rng.standard_normal((rows, width)) * 2.0
    if decided:
        gate = rng.uniform(20, 40, (rows, width)) * rng.integers(0, 2, (rows, width))
    return np.concatenate([gate, rng.standard_normal((rows, width))], axis=1).astype(np.float32)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("decided", [True, False])
@pytest.mark.parametrize(("rows", "f", "n"), SIZES)
def test_swiglus_input_passes_through_fp8_on_the_way_back(rows, f, n, decided, scale, rng):
    """But not on the way forward; its output is rounded along its width, and along the rows."""
    gate_up_XF = gate_up_of(rng, rows, f, decided=decided)
    w_FN, dy_XN = drawn(rng, f, n), drawn(rng, rows, n)
    how = How(scale, "float32", kept="gate_up")
    got = gradients(lambda g, w: fp8_swiglu_linear(g, w, how=how), dy_XN, gate_up_XF, w_FN)
    y_XN, (dgate_up, dw) = got
    power = scale == "power_of_two"
    y, wanted_dgate_up, _, wanted_dw = slow.swiglu_linear(
        gate_up_XF, None, w_FN, dy_XN, np.float32, scale=power
    )
    tolerance = FLOAT32_SUMS if decided else SILU
    for mine, wanted in ((y_XN, y), (dgate_up, wanted_dgate_up), (dw, wanted_dw)):
        assert_near(mine, wanted, tolerance)


# ---- experts ------------------------------------------------------------------------------------

TILE_EXPERT = np.array([0, 2, 2, 3, 4], np.int32)  # of 4 experts: the second has no rows
EXPERTS, ROWS = 4, 128 * len(TILE_EXPERT)


def expert_rows(rng, width, dtype=np.float32):
    """Rows of a dispatch buffer, in which tiles end with zeros and the last is unused."""
    x = np.array(drawn(rng, ROWS, width))
    x[100:128] = x[300:384] = x[512:] = 0.0
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize(("k", "n"), [(256, 128), (200, 72)])
def test_the_products_of_experts(k, n, rng):
    x_XK, dy_XN = expert_rows(rng, k), expert_rows(rng, n)
    w_EKN = drawn(rng, EXPERTS, k, n)
    how = How("power_of_two", "float32")
    y, (dx, dw) = gradients(
        lambda x, w: fp8_linear(x, w, jnp.asarray(TILE_EXPERT), how=how), dy_XN, x_XK, w_EKN
    )
    told = {"scale": True}
    wanted = slow.grouped(
        lambda x, dy, w: slow.linear(x, w, dy, **told), TILE_EXPERT, (x_XK, dy_XN), w_EKN
    )
    for got, value in zip((y, dx, dw), wanted, strict=True):
        assert_near(got, value, FLOAT32_SUMS)
    assert not np.asarray(dw[1]).any()


@pytest.mark.parametrize(("f", "n"), [(256, 128), (200, 72)])
def test_swiglu_of_experts(f, n, rng):
    gate_up = gate_up_of(rng, ROWS, f, decided=True)
    dy_XN, w_EFN = expert_rows(rng, n), drawn(rng, EXPERTS, f, n)
    gates_X = rng.uniform(0.1, 2.0, ROWS).astype(np.float32)
    how = How("float32", "power_of_two")
    y, (dgate_up, dgates, dw) = gradients(
        lambda g, gates, w: fp8_swiglu_linear(g, w, gates, jnp.asarray(TILE_EXPERT), how=how),
        *(dy_XN, gate_up, gates_X, w_EFN),
    )
    wanted = slow.grouped(
        lambda g, gates, dy, w: slow.swiglu_linear(
            g, gates, w, dy, np.float32, gradient_scale=True
        ),
        *(TILE_EXPERT, (gate_up, gates_X, dy_XN), w_EFN),
    )
    for got, value in zip((y, dgate_up, dgates, dw), wanted, strict=True):
        assert_near(got, value, FLOAT32_SUMS)


# ---- weights that lie on several devices --------------------------------------------------------


class Weight(NamedTuple):
    """A parameter as a layer declares it: sizes of which no part is a multiple of 128."""

    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    in_dims: int = 1
    lead: int = 0
    parts: int = 1


# Cut in rows, in columns, in both; between heads; gates and ups in whole blocks, and not.
WEIGHTS = {
    "w_dq_DQ": Weight(("embed", "q_latent"), (192, 160)),
    "w_uq_QNA": Weight(("q_latent", "heads", None), (160, 8, 32)),
    "w_ukv_CNY": Weight(("kv_latent", "heads", None), (96, 8, 64)),
    "w_o_NHD": Weight(("heads", None, "embed"), (8, 32, 192), in_dims=2),
    "w_in_D2F": Weight(("embed", "mlp"), (192, 2 * 80), parts=2),
    "w_in of whole blocks": Weight(("embed", "mlp"), (192, 2 * 128), parts=2),
    "w_down_FD": Weight(("mlp", "embed"), (80, 192)),
    "w_in_ED2F": Weight(("experts", "embed", "expert_mlp"), (8, 192, 2 * 72), lead=1, parts=2),
    "w_down_EFD": Weight(("experts", "expert_mlp", "embed"), (8, 72, 192), lead=1),
}
MESHES = {
    "fsdp": MeshConfig(rules="fsdp", fsdp=8),
    "fsdp_ep": MeshConfig(rules="fsdp_ep", fsdp=2, expert=4),
    "fsdp_ep_tp": MeshConfig(rules="fsdp_ep_tp", fsdp=2, expert=2, tensor=2),
}
FLOAT = jnp.dtype("float32")
RECIPE = Precision(param_dtype=FLOAT, compute_dtype=FLOAT, recipe="fp8")


def variable_of(weight: Weight, w) -> nnx.Param:
    return nnx.Param(w, axes=weight.axes, whole=weight.shape)


def source_of(weight: Weight, w, rules: AxisRules) -> fp8.Parameter:
    how = {"in_dims": weight.in_dims, "lead": weight.lead, "parts": weight.parts}
    return fp8.parameter(variable_of(weight, w), rules=rules, precision=RECIPE, **how)


def matrix_of(weight: Weight, w):
    """[..., in, out], parts of the columns filled up to whole blocks."""
    lead = weight.shape[: weight.lead]
    rows = math.prod(weight.shape[weight.lead : weight.lead + weight.in_dims])
    w = w.reshape(*lead, rows, weight.parts, -1)
    w = np.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, -w.shape[-1] % 128 if weight.parts > 1 else 0)])
    return w.reshape(*lead, rows, -1)


def unfilled(weight: Weight, matrix):
    """The way back from `matrix_of`."""
    matrix = matrix.reshape(*matrix.shape[:-1], weight.parts, -1)
    width = math.prod(weight.shape[weight.lead + weight.in_dims :]) // weight.parts
    return matrix[..., :width].reshape(weight.shape)


class Place(NamedTuple):
    """A device of a mesh, by its coordinates."""

    at: dict[str, int]
    sizes: dict[str, int]

    def part(self, x, layout):
        """Of an array, what it has: mesh axes of each dimension, the outermost first."""
        for dim, axes in enumerate(layout):
            number, count = 0, 1
            for axis in axes:
                number, count = number * self.sizes[axis] + self.at[axis], count * self.sizes[axis]
            x = np.split(np.asarray(x), count, axis=dim)[number]
        return x


def places(mesh):
    """Of all devices."""
    sizes = dict(mesh.shape)
    return [
        Place(dict(zip(sizes, coordinates, strict=True)), sizes)
        for coordinates in np.ndindex(*sizes.values())
    ]


def kept_in(weight: Weight, layout, rules: AxisRules):
    """Mesh axes over which its matrix stays apart: of each leading dimension, rows and columns."""
    kept = [
        tuple(a for a in over if a in rules.kept(axis))
        for over, axis in zip(layout, weight.axes, strict=True)
    ]
    return [*kept[: weight.lead], kept[weight.lead], kept[weight.lead + weight.in_dims]]


def on_every_device(function, mesh, arguments):
    """What each device makes of its own: arguments and results begin with a dimension of them."""

    def run(arguments):
        out = function(jax.tree.map(lambda x: x[0], arguments))
        return jax.tree.map(lambda x: x[None], out)

    devices = P(mesh.axis_names)
    arguments = jax.tree.map(
        lambda x: jax.device_put(np.stack(x), NamedSharding(mesh, devices)),
        arguments,
        is_leaf=lambda x: isinstance(x, list) and isinstance(x[0], np.ndarray),
    )
    with jax.set_mesh(mesh):
        run = jax.shard_map(run, out_specs=devices, check_vma=False)
        return jax.device_get(jax.jit(run)(arguments))


@pytest.mark.parametrize("name", MESHES)
def test_weights_travel_in_fp8_and_gradients_in_float32(name, rng):
    """The same FP8 numbers on every mesh bit for bit, though borders cut blocks; whole sums."""
    rules, axes = PRESETS[name], MESHES[name].axes
    mesh = make_mesh(MeshShape(**axes))
    layouts = {
        name: rules.layout(weight.axes, weight.shape, axes) for name, weight in WEIGHTS.items()
    }
    whole = {
        name: rng.standard_normal(weight.shape).astype(np.float32)
        for name, weight in WEIGHTS.items()
    }
    # Whole numbers, of which sums are exact; different ones on every device.
    gradient = {
        name: rng.integers(-8, 9, matrix_of(weight, whole[name]).shape)
        for name, weight in WEIGHTS.items()
    }
    stored, given = {}, {}
    for name, weight in WEIGHTS.items():
        kept = kept_in(weight, layouts[name], rules)
        stored[name] = [place.part(whole[name], layouts[name]) for place in places(mesh)]
        given[name] = [
            np.float32(place.part(gradient[name], kept) * (1 + device))
            for device, place in enumerate(places(mesh))
        ]

    def pull_and_push(arguments):
        stored, given = arguments
        found = {}
        for name, weight in WEIGHTS.items():
            source = source_of(weight, stored[name], rules)
            found[name] = source.pull(stored[name]), source.push(given[name], stored[name])
        return found

    got = on_every_device(pull_and_push, mesh, (stored, given))
    numbers = np.arange(1, mesh.size + 1).reshape(tuple(mesh.shape.values()))
    for name, weight in WEIGHTS.items():
        wanted = quantize(jnp.asarray(matrix_of(weight, whole[name])), tile=(128, 128))
        kept, layout = kept_in(weight, layouts[name], rules), layouts[name]
        pulled, pushed = got[name]
        stays = {a for over in kept for a in over}
        summed = tuple(
            number
            for number, axis in enumerate(mesh.axis_names)
            if any(axis in over for over in layout) and axis not in stays
        )
        factors = np.broadcast_to(numbers.sum(summed, keepdims=True), numbers.shape).reshape(-1)
        dw = unfilled(weight, gradient[name])
        for device, place in enumerate(places(mesh)):
            told = f"{name} on {place.at}"
            q = place.part(np.asarray(wanted.q).view(np.uint8), kept)
            np.testing.assert_array_equal(pulled.q[device].view(np.uint8), q, err_msg=told)
            scale = place.part(wanted.scale, kept)
            np.testing.assert_array_equal(pulled.scale[device], scale, err_msg=told)
            mine = place.part(dw, layout) * factors[device]
            np.testing.assert_array_equal(pushed[device], mine, err_msg=told)


# ---- a model ------------------------------------------------------------------------------------

LENGTH, ROWS_OF_BATCH, VOCAB = 128, 8, 64
LENGTHS = [[100, 28], [128], [60, 60], [128], [30, 98], [128], [64, 64], [1, 127]]
FP8_LOSS = 1e-4  # of what rounds the same numbers, but for ties


def uneven(*changes) -> Config:
    """A V3 of one layer and MTP in widths that blocks of 128 do not divide, but heads do."""
    config = override(
        preset("nano"),
        f"model.vocab_size={VOCAB}",
        "model.embed_dim=192",
        f"train.seq_len={LENGTH}",
        f"train.batch_size={ROWS_OF_BATCH}",
        "train.balance_loss_weight=0.01",
        "precision.recipe=fp8",
        *changes,
    )
    block = config.model.stacks[1].blocks[0]
    sizes = {"q_latent_dim": 160, "kv_latent_dim": 96, "nope_dim": 32, "rope_dim": 32}
    attention = dataclasses.replace(block.attention, num_heads=8, value_dim=32, **sizes)
    ffn = dataclasses.replace(block.ffn, expert_dim=80)
    block = BlockConfig(attention=attention, ffn=ffn)
    stack = dataclasses.replace(config.model.stacks[1], repeats=1, blocks=(block,))
    mtp = dataclasses.replace(config.model.mtp, block=block)
    model = dataclasses.replace(config.model, stacks=(stack,), mtp=mtp)
    return dataclasses.replace(config, model=model)


def drawn_state(config: Config) -> TrainState:
    """As drawn on one device, whatever is computed in, moved to where a mesh has it."""
    spread = spread_of(config.mesh)
    like = abstract_state(config, spread.rules, spread.mesh)
    plain = override(config, "precision.recipe=plain", "train.remat=none")
    first = first_state(dataclasses.replace(plain, mesh=MeshConfig()))
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), first, like)


@functools.cache
def first_state(config: Config) -> TrainState:
    return jax.device_get(create(config, jax.random.key(0), AxisRules()))


class Step(NamedTuple):
    """What a step gave: sums over the batch, and what came of them."""

    grads: Any
    metrics: dict[str, jax.Array]
    state: TrainState


def take_step(config: Config, *, micro=ROWS_OF_BATCH, change=lambda params: params) -> Step:
    """One step on a batch of packed documents; `change` is made to the weights before."""
    check_training(config)
    spread, seen = spread_of(config.mesh), []
    graphdef, optimizer = blueprint(config, rules_of(config.mesh))
    told = {"bias_speed": config.train.bias_speed, "spread": spread}
    step = make_train_step(graphdef, PretrainLoss.of(config), optimizer, **told)

    def apply(state, sums, progress):
        seen.append(jax.device_get(sums["grads"]))
        return step.apply(state, sums, progress)

    state = drawn_state(config)
    state = dataclasses.replace(state, params=change(state.params))
    batch = packed_batch(np.random.default_rng(0), VOCAB, LENGTHS)
    state, metrics = dataclasses.replace(step, apply=apply)(
        state, batch, progress=0.0, micro_batch_size=micro
    )
    return Step(seen[0], *jax.device_get((metrics, state)))


@functools.cache
def one_device(*changes, micro=ROWS_OF_BATCH) -> Step:
    return take_step(uneven(*changes), micro=micro)


@pytest.fixture
def unrounded(monkeypatch):
    """FP8 that rounds nothing: what is left of the recipe is where numbers come from and go to."""

    def quantize(x, *, tile=(1, 128), orientation="as_is", **_):
        x = jnp.swapaxes(x, -1, -2) if orientation == "transposed" else x
        rows = x.shape[-2] if tile[0] == 1 else -(-x.shape[-2] // 128)
        ones = jnp.ones((*x.shape[:-2], rows, -(-x.shape[-1] // 128)), jnp.float32)
        return Tiled(x.astype(jnp.float32), ones)

    def both(x, **how):
        return quantize(x, **how), quantize(x, orientation="transposed", **how)

    def of_swiglu(gate_up, gates=None, **how):
        return quantize(reference.swiglu(gate_up, gates), **how)

    def of_norm(x, scale_D, eps, **how):
        normed = reference.rms_norm(x, scale_D, eps)
        return normed, *both(normed, **how)

    def gather(w, row_axes, column_axes, scale):
        for dim, over in ((-2, row_axes), (-1, column_axes)):
            if over:
                w = jax.lax.all_gather(w, over, axis=w.ndim + dim, tiled=True)
        return quantize(w, tile=(128, 128))

    jax.clear_caches()  # of what was traced with rounding
    for name, function in {
        "quantize": quantize,
        "quantize_both": both,
        "swiglu_quantize": of_swiglu,
        "rms_norm_quantize": of_norm,
    }.items():
        monkeypatch.setattr(pallas_kernels.fp8_linear, name, function)
    for name, value in {
        "quantize": quantize,
        "_gather_blocks": gather,
        "as_sent": lambda x: x,
        "gradient_as_sent": lambda y: y,
        "TO_EXPERTS": IDENTITY,
        "FROM_EXPERTS": IDENTITY,
    }.items():
        monkeypatch.setattr(fp8, name, value)
    monkeypatch.setattr(Precision, "attention_kept", "as_is")
    yield
    jax.clear_caches()


def assert_steps_equal(got: Step, wanted: Step):
    assert_trees_near(got.grads, wanted.grads, FLOAT32_GRADIENT)
    for name in ("loss", "loss_mtp", "loss_balance"):
        assert distance(got.metrics[name], wanted.metrics[name]) <= FLOAT32, name
    assert got.metrics["dispatch_overflow"] == 0


def test_without_rounding_the_recipe_is_the_plain_one(unrounded):
    """So its gradients, which nothing differentiates, are those of what it computes."""
    got = take_step(uneven())
    assert_steps_equal(got, one_device("precision.recipe=plain"))


def meshed(mesh: MeshConfig, *changes) -> Config:
    return dataclasses.replace(uneven(*changes), mesh=mesh)


REMAT = {"fsdp_ep_tp": "selective", "fsdp_ep": "full", "fsdp": "none"}


def on_meshes(quick):
    """All presets, of which one need not wait for the night."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=pytest.mark.slow if name == quick else pytest.mark.nightly)
            for name in MESHES
        ],
    )


@on_meshes("fsdp_ep_tp")
def test_meshes_and_remat_move_the_same_numbers(name, unrounded):
    """Without rounding, which would blur it: every gradient of the step, as on one device."""
    got = take_step(meshed(MESHES[name], f"train.remat={REMAT[name]}"))
    assert_steps_equal(got, one_device("precision.recipe=plain"))


@on_meshes(None)
def test_a_mesh_rounds_no_more_than_one_device_does(name):
    """Tiles are of a device's own tokens, and ties fall as float32 sums do."""
    got = take_step(meshed(MESHES[name], f"train.remat={REMAT[name]}"))
    single, exact = one_device(), one_device("precision.recipe=plain")
    for loss in ("loss", "loss_mtp"):
        assert distance(got.metrics[loss], single.metrics[loss]) <= FP8_LOSS
    leaves = zip(*(jax.tree.leaves(step.grads) for step in (got, single, exact)), strict=True)
    for mine, theirs, wanted in leaves:
        rounding = distance(theirs, wanted)
        assert distance(mine, theirs) <= 1.5 * rounding
        assert distance(mine, wanted) <= 1.5 * rounding


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("model.stacks.moe.blocks.0.attention.value_dim=16",), "64 of 128 numbers along heads"),
        (("model.mtp.block.attention.nope_dim=24",), "224 of 448 numbers along heads"),
    ],
)
def test_blocks_that_would_be_cut_for_good_are_refused(changes, told):
    config = override(meshed(MESHES["fsdp_ep_tp"]), *changes)
    with pytest.raises(InputError, match=told):
        check_training(config)
    check_training(override(config, "precision.recipe=plain"))


def test_not_even_a_traced_layer_takes_cut_blocks():
    """Whatever asked before: never silence."""
    weight = Weight(("heads", None, "embed"), (8, 16, 192), in_dims=2)
    rules, axes = PRESETS["fsdp_ep_tp"], MESHES["fsdp_ep_tp"].axes
    w = jnp.zeros((2, 16, 96))

    def run(w):
        return source_of(weight, w, rules).pull(w).scale

    with (
        jax.set_mesh(make_mesh(MeshShape(**axes))),
        pytest.raises(LayoutError, match="64 rows of a weight; FP8 needs whole blocks of 128"),
    ):
        jax.eval_shape(jax.shard_map(run, out_specs=P(), check_vma=False), w)


# ---- micro-batches ------------------------------------------------------------------------------


def test_micro_batches_of_whole_tiles_change_nothing(rng):
    """Of 128 tokens share a scale in the gradient of a weight: so many, or the tiles are others."""
    x_MK, w_KN, dy_MN = drawn(rng, 256, 200), drawn(rng, 200, 72), drawn(rng, 256, 72)

    def summed(rows):
        parts = [
            gradients(fp8_linear, dy_MN[i : i + rows], x_MK[i : i + rows], w_KN)
            for i in range(0, 256, rows)
        ]
        ys, dxs, dws = zip(*((y, dx, np.asarray(dw)) for y, (dx, dw) in parts), strict=True)
        return np.concatenate(ys), np.concatenate(dxs), sum(dws)

    whole, tiles, halves = summed(256), summed(128), summed(64)
    for got, wanted in zip(tiles, whole, strict=True):
        assert_near(got, wanted, FLOAT32_SUMS)
    for got, wanted in zip(halves[:2], whole[:2], strict=True):
        assert_near(got, wanted, FLOAT32_SUMS)
    assert distance(halves[2], whole[2]) > 1e-3


# ---- what is in FP8, and what is not ------------------------------------------------------------

LINEARS = {  # leading dimensions, contracted dimensions, parts
    **dict.fromkeys(("w_dq_DQ", "w_uq_QNA", "w_dkvr_DZ", "w_ukv_CNY", "w_down_FD"), (0, 1, 1)),
    "w_o_NHD": (0, 2, 1),
    "w_in_D2F": (0, 1, 2),
    "w_in_ED2F": (1, 1, 2),
    "w_down_EFD": (1, 1, 1),
}
OTHERS = {"embed_VD", "head_DV", "w_router_DE", "w_proj_2DD"}


def rounded_leaf(path, leaf, scale="power_of_two"):
    """A parameter's values in FP8; of what is no linear layer's, as if it were."""
    keys = [getattr(key, "key", getattr(key, "idx", None)) for key in path]
    lead, in_dims, parts = LINEARS.get(keys[-1], (0, 1, 1))
    lead += keys[0] == "stacks"
    x = leaf.reshape(*leaf.shape[:lead], -1, 1) if leaf.ndim == lead + 1 else leaf
    rows = math.prod(x.shape[lead : lead + in_dims])
    x = x.reshape(*x.shape[:lead], rows, parts, -1)
    x = jnp.moveaxis(x, -2, 0)  # each part by itself
    x = dequantize(quantize(x, tile=(128, 128), scale=scale))
    return jnp.moveaxis(x, 0, -2).reshape(leaf.shape)


def test_linear_layers_are_in_fp8_and_nothing_else():
    """A weight on FP8's grid is what the forward pass sees already; other weights it sees whole."""
    config = override(preset("nano"), "precision.recipe=fp8", "precision.scale=power_of_two")
    graphdef, params, bias = split(jax.jit(build(config))(jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(  # norms, too, have many values
        lambda x: jnp.asarray(x * rng.uniform(0.5, 1.5, x.shape), jnp.float32), params
    )
    tokens_BT = jnp.asarray(rng.integers(0, 512, (1, 32)), jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(32), tokens_BT.shape)
    where = {"positions_BT": positions_BT, "segments_BT": jnp.ones_like(tokens_BT)}

    @jax.jit
    def forward(params):
        model = merge(graphdef, params, bias)
        hidden_BTD = model(tokens_BT, **where).hidden_BTD
        further_BTD, _ = model.mtp(0, hidden_BTD, jnp.roll(tokens_BT, -1, axis=1), **where)
        return model.logits(hidden_BTD), model.logits(further_BTD)

    on_grid = jax.jit(lambda params: jax.tree_util.tree_map_with_path(rounded_leaf, params))(params)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path[-1:], simple=True) for path, _ in leaves]
    values, rounded = [leaf for _, leaf in leaves], jax.tree.leaves(on_grid)
    before = forward(params)
    for changed in sorted(set(names)):
        here = [name == changed for name in names]
        mixed = [b if h else a for a, b, h in zip(values, rounded, here, strict=True)]
        # There is something to round.
        pairs = itertools.compress(zip(values, rounded, strict=True), here)
        assert all(distance(a, b) > 1e-3 for a, b in pairs)
        after = forward(jax.tree.unflatten(tree, mixed))
        same = all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))
        assert same == (changed in LINEARS), changed
        assert changed in LINEARS or changed in OTHERS or "norm" in changed
    assert set(names) >= set(LINEARS) | OTHERS


def dots(jaxpr):
    """(dtype, the three sizes in order, without batches) of every product of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted, batched = equation.params["dimension_numbers"]
            x, w = (v.aval for v in equation.invars)
            free = [
                math.prod(n for d, n in enumerate(side.shape) if d not in (*inner, *outer))
                for side, inner, outer in zip((x, w), contracted, batched, strict=True)
            ]
            inner = math.prod(x.shape[d] for d in contracted[0])
            yield str(x.dtype), tuple(sorted((inner, *free)))
        for inner in inner_jaxprs(equation):
            yield from dots(inner)


def test_no_linear_layer_is_computed_in_bfloat16():
    """In no pass of a step; what FP8 multiplies is seen as float32 where there is no kernel."""
    config = uneven("precision.compute_dtype=bfloat16", "model.mtp.depth=1")
    graphdef, params, bias = split(jax.eval_shape(build(config), jax.random.key(0)))
    batch, loss = packed_batch(np.random.default_rng(0), VOCAB, LENGTHS), PretrainLoss.of(config)
    totals, batch = loss.totals(batch, 0.5), jax.tree.map(jnp.asarray, batch)

    def of_params(params):
        return loss(merge(graphdef, params, bias), batch, totals)[0]

    bias = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), bias)
    program = jax.make_jaxpr(jax.value_and_grad(of_params))(params)
    found = collections.Counter(dots(program.jaxpr))
    tokens = ROWS_OF_BATCH * LENGTH

    def count(dtype, inner, outer):
        return found[dtype, tuple(sorted((tokens, inner, outer)))]

    d, heads = 192, 8
    for inner, outer in (
        *((d, 160), (160, heads * 64), (d, 96 + 32), (96, heads * 64), (heads * 32, d)),
        *((d, 2 * 80), (80, d)),
    ):
        assert count("bfloat16", inner, outer) == 0
        assert count("float32", inner, outer) >= 3  # forward, and its two gradients
    assert count("bfloat16", 2 * d, d) == 3  # MTP's projection, published in BF16
    wide = {sizes for dtype, sizes in found if dtype == "bfloat16"}
    assert not any({80, d} <= set(sizes) or {2 * 80, d} <= set(sizes) for sizes in wide)  # experts


# ---- generation ---------------------------------------------------------------------------------

ALLOWED, NEW = 512, 24


@pytest.fixture(scope="module")
def talker():
    """`nano` without its dense layer, with weights so large that its choices are decided."""
    config = override(preset("nano"), "precision.recipe=fp8", "model.mtp=null")
    model = dataclasses.replace(config.model, stacks=config.model.stacks[1:])
    config = dataclasses.replace(config, model=model)
    lm = dsjax.init(config)
    params = jax.tree.map(lambda w: w * 2.0 if w.ndim > 1 else w, lm.params)
    return dsjax.LanguageModel(config, lm.graphdef, params, lm.bias, None)


def anew(lm, *changes):
    """The same weights under another configuration, or traced anew."""
    config = override(lm.config, *changes)
    graphdef = split(jax.eval_shape(build(config), jax.random.key(0)))[0]
    return dsjax.LanguageModel(config, graphdef, lm.params, lm.bias, None)


PROMPTS = np.random.default_rng(1).integers(0, ALLOWED, (2, 40)).tolist()


def said(lm):
    """Tokens and their log probabilities, drawn one by one over the cache."""
    told = {"max_tokens": NEW, "allowed": ALLOWED, "seed": 0}
    sampling = Sampling(temperature=1.0)
    return generate(lm._by_row, lm.params, lm.bias, PROMPTS, sampling=sampling, **told)


def log_probs(lm, result):
    """The same by one full forward."""
    rows = np.concatenate([np.asarray(PROMPTS), result.tokens_BG], axis=1)
    log_BGV = np.asarray(jax.nn.log_softmax(lm.logits(rows)))[:, len(PROMPTS[0]) - 1 : -1]
    return np.take_along_axis(log_BGV, result.tokens_BG[..., None], axis=-1)[..., 0]


def test_masters_stay_masters_when_bfloat16_is_computed_in(talker):
    """FP8 made of what BF16 has rounded would not be the FP8 of training."""
    cast, _ = prepare(talker.params, talker.bias, jnp.dtype("bfloat16"), recipe="fp8")
    for path, leaf in jax.tree_util.tree_leaves_with_path(cast):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        wide = name not in ("embed_VD", "head_DV")
        assert leaf.dtype == (jnp.float32 if wide else jnp.bfloat16), name


def test_decoding_without_rounding_is_exact(talker, unrounded):
    """Over the cache, with the few experts that a token chose read out of the stack."""
    lm = anew(talker)
    result = said(lm)
    np.testing.assert_allclose(result.log_probs_BG, log_probs(lm, result), atol=1e-4)


def test_decoding_rounds_less(talker):
    """W^UK and W^UV, absorbed, meet no rounded latents: off by no more than FP8 is altogether."""
    result = said(talker)
    full = log_probs(talker, result)
    rounding = full - log_probs(anew(talker, "precision.recipe=plain"), result)
    assert full.min() < -1.0  # not all certain
    off = np.linalg.norm(result.log_probs_BG - full)
    assert 0 < off < np.linalg.norm(rounding)


def test_a_prefill_in_pieces_rounds_what_a_whole_one_does(talker, monkeypatch):
    """Where pieces are expanded; the first token is drawn of what they give."""
    monkeypatch.setattr(MultiHeadLatentAttention, "_worth_expanding", 0)
    whole, pieces = (
        generate(
            *(anew(talker)._by_row, talker.params, talker.bias, PROMPTS),
            **{"max_tokens": 1, "allowed": ALLOWED, "seed": 0},
            sampling=Sampling(temperature=1.0),
            infer=InferConfig(prefill_chunk=chunk),
        )
        for chunk in (None, 16)
    )
    np.testing.assert_array_equal(pieces.tokens_BG, whole.tokens_BG)
    np.testing.assert_allclose(pieces.log_probs_BG, whole.log_probs_BG, atol=1e-5)


@pytest.mark.slow
def test_generation_on_a_mesh_says_the_same(talker):
    got = said(talker.with_rules("decode", make_mesh(MeshShape(expert=2))))
    wanted = said(talker)
    np.testing.assert_array_equal(got.tokens_BG, wanted.tokens_BG)
    np.testing.assert_allclose(got.log_probs_BG, wanted.log_probs_BG, atol=1e-4)


def test_heads_and_hidden_units_of_several_devices(talker, unrounded):
    """Decoding's rules keep both apart: exact where each device has whole blocks."""
    changes = (
        "model.stacks.moe.blocks.0.attention.num_heads=4",
        "model.stacks.moe.blocks.0.attention.nope_dim=64",
        "model.stacks.moe.blocks.0.attention.rope_dim=64",
        "model.stacks.moe.blocks.0.attention.value_dim=64",
        "model.stacks.moe.blocks.0.ffn.expert_dim=256",
        "model.stacks.moe.repeats=1",
    )
    lm = dsjax.init(override(talker.config, *changes))
    mesh = make_mesh(MeshShape(tensor=2))
    wanted = lm.logits(PROMPTS)
    assert_near(lm.with_rules("decode", mesh).logits(PROMPTS), wanted)


def test_rules_that_cut_blocks_are_refused_for_generation_too(talker):
    with pytest.raises(InputError, match="16 of 32 numbers along heads"):
        talker.with_rules("decode", make_mesh(MeshShape(tensor=2)))
    config = override(
        talker.config,
        "model.stacks.moe.blocks.0.attention.num_heads=32",
        "model.stacks.moe.blocks.0.ffn.expert_dim=192",
    )
    with pytest.raises(InputError, match="96 of 192 numbers along mlp"):
        dsjax.init(config).with_rules("decode", make_mesh(MeshShape(tensor=2)))
