"""Dispatch across devices, against dispatch on one and against counts made by hand."""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from sharding.dispatch import BF16, PLAN, ROWS, Codec, block_rows, combine, dispatch
from sharding.mesh import MeshShape, make_mesh
from tests.helpers import FLOAT32_GRADIENT, assert_near

# One total of tokens and experts, so that one program on one device serves all layouts. With 2, 4
# and 8 devices a device has more experts than a token chooses, fewer, and one; tiles have two rows.
TOKENS, PER_TOKEN, EXPERTS, WIDTH = 192, 3, 8, 5
TOKEN_AXES = ("data", "fsdp", "expert")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Tokens lie over all axes of the mesh, experts over one or some."""

    mesh: MeshShape
    axis: str | tuple[str, ...] = "expert"

    @property
    def devices(self):
        return math.prod(dataclasses.astuple(self.mesh))

    @property
    def share(self):
        """Devices that share the experts, in groups of neighbours."""
        axes = (self.axis,) if isinstance(self.axis, str) else self.axis
        return math.prod(getattr(self.mesh, axis) for axis in axes)


TWO, FOUR, EIGHT = (Layout(MeshShape(expert=n)) for n in (2, 4, 8))
PAIR = Layout(MeshShape(fsdp=2, expert=2), ("fsdp", "expert"))
APART = Layout(MeshShape(data=2, expert=2))  # two sets of all experts
LAYOUTS = [TWO, FOUR, EIGHT, PAIR, APART]

# What a run tells: y_UD, (dx_UD, dgates_UK, dw_ED), and by `tell` what a caller sees beside.
Run = collections.namedtuple("Run", "y grads sizes overflow copies rows")


def toy(x_UD, gates_UK, w_ED, bend_UD, expert_UK, remat=(), **how):
    """Each row times its expert's vector, by dispatch and combine; and the gradients of a sum."""

    def of(x_UD, gates_UK, w_ED):
        x_XD, gates_X, sizes_E, plan = dispatch(
            x_UD, gates_UK, expert_UK, num_experts=EXPERTS, **how
        )
        block = x_XD.shape[0] // plan.tile_expert.shape[0]
        w_XD = jnp.repeat(jnp.pad(w_ED, ((0, 1), (0, 0)))[plan.tile_expert], block, axis=0)
        # As MoeAux keeps the product of the first matrix.
        kept_XD = checkpoint_name(jnp.sin(x_XD) * w_XD, "kept")
        y_UD = combine(kept_XD * gates_X[:, None], plan)
        return jnp.sum(y_UD * bend_UD), (y_UD, sizes_E, plan)

    if remat:
        policy = jax.checkpoint_policies.save_only_these_names(*remat)
        of = jax.checkpoint(of, policy=policy, prevent_cse=False)
    grads, (y_UD, sizes_E, plan) = jax.grad(of, (0, 1, 2), has_aux=True)(x_UD, gates_UK, w_ED)
    copies_U, rows = jnp.zeros(len(x_UD), jnp.int32), plan.token_X.shape[0]
    if plan.wire is not None:
        copies_U = jnp.sum(plan.wire.slot_UJ < plan.wire.token_Y.shape[0], axis=1)
    return Run(y_UD, grads, sizes_E, plan.overflow[None], copies_U, jnp.full(1, rows))


one_device = jax.jit(toy)


def on_mesh(layout, **how):
    """`toy` of each device's own tokens, with gradients taken on the device too."""

    def island(*arrays):
        got = toy(*arrays, axis=layout.axis, **how)
        dx_UD, dgates_UK, dw_ED = got.grads
        whole = tuple(a for a in TOKEN_AXES if a not in np.atleast_1d(layout.axis))
        grads = (dx_UD, dgates_UK, jax.lax.psum(dw_ED, whole))
        return got._replace(grads=grads, sizes=jax.lax.psum(got.sizes, TOKEN_AXES))

    mesh = make_mesh(layout.mesh)
    by_token, by_expert = PartitionSpec(TOKEN_AXES), PartitionSpec(layout.axis)
    given = (by_token, by_token, by_expert, by_token, by_token)
    grads = (by_token, by_token, by_expert)
    told = Run(by_token, grads, PartitionSpec(), by_token, by_token, by_token)
    run = jax.shard_map(island, mesh=mesh, in_specs=given, out_specs=told, check_vma=False)
    return lambda *arrays: run(*jax.reshard(arrays, tuple(NamedSharding(mesh, p) for p in given)))


@functools.cache
def compiled(layout, **how):
    return jax.jit(on_mesh(layout, **how))


def arrays(seed):
    """x_UD, gates_UK, w_ED and the factors of the sum that is differentiated."""
    rng = np.random.default_rng(seed)
    shapes = ((TOKENS, WIDTH), (TOKENS, PER_TOKEN), (EXPERTS, WIDTH), (TOKENS, WIDTH))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def choose(kind, seed):
    """Choices of a kind; numbers from EXPERTS on are nowhere."""
    rng = np.random.default_rng(seed)
    shape = (TOKENS, PER_TOKEN)
    pair = 2 * rng.integers(EXPERTS // 2)
    expert_UK = {
        "any": lambda: rng.integers(0, EXPERTS + 3, shape),
        "top": lambda: rng.permuted(np.tile(np.arange(EXPERTS), (TOKENS, 1)), axis=1)[:, :3],
        "one": lambda: np.full(shape, rng.integers(EXPERTS)),
        "device": lambda: rng.integers(pair, pair + 2, shape),  # of two, four or eight devices
        "none": lambda: np.full(shape, EXPERTS),
    }[kind]()
    return expert_UK.astype(np.int32)


kinds = st.sampled_from(["any", "top", "one", "device", "none"])
seeds = st.integers(0, 2**32 - 1)


def count(expert_UK, layout, exchange="dense", factor=None):
    """Copies of each token, and what each device loses: dispatch in plain loops."""
    n, local = layout.share, EXPERTS // layout.share
    tokens = TOKENS // layout.devices
    room, capacity = tokens, tokens * n * min(PER_TOKEN, local)
    if factor is not None:
        room = min(tokens, math.ceil(factor * tokens * min(PER_TOKEN, n) / n))
        capacity = min(n * room * min(PER_TOKEN, local), math.ceil(factor * tokens * PER_TOKEN))
    block = block_rows(tokens * PER_TOKEN, local)
    tiles = math.ceil((capacity + local * (block - 1)) / block)
    copies_U, lost = np.zeros(TOKENS, np.int32), np.zeros(layout.devices, np.int32)
    for base in range(0, layout.devices, n):
        for to in range(n):
            came, sizes_e = 0, np.zeros(local, int)
            for source in range(base, base + n):
                sent = 0
                for u in range(source * tokens, (source + 1) * tokens):
                    mine = [
                        e - to * local for e in expert_UK[u] if e // local == to and e < EXPERTS
                    ]
                    if not mine:
                        continue
                    if sent == room if exchange == "dense" else came == n * room:
                        lost[source] += 1
                        continue
                    sent, came, copies_U[u] = sent + 1, came + 1, copies_U[u] + 1
                    for e in set(mine) if local < PER_TOKEN else mine:
                        sizes_e[e] += 1
            tiles_e = -(-sizes_e // block)
            first_e = block * (np.cumsum(tiles_e) - tiles_e)
            lost[base + to] += sum(sizes_e - np.clip(tiles * block - first_e, 0, sizes_e))
    return copies_U, lost


def assert_equals_one_device(got, inputs, expert_UK):
    wanted = one_device(*inputs, expert_UK)
    assert_near(got.y, wanted.y)
    for mine, theirs in zip(got.grads, wanted.grads, strict=True):
        assert_near(mine, theirs, FLOAT32_GRADIENT)


# ---- equal to one device ------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(LAYOUTS), kinds, seeds)
def test_devices_equal_one(layout, kind, seed):
    """Values, gradients, sizes; nothing lost; each token sent once to each device it needs."""
    inputs, expert_UK = arrays(seed), choose(kind, seed)
    got = compiled(layout)(*inputs, expert_UK)
    assert_equals_one_device(got, inputs, expert_UK)
    sizes_E = np.bincount(expert_UK[expert_UK < EXPERTS], minlength=EXPERTS)
    np.testing.assert_array_equal(got.sizes, sizes_E)
    assert got.sizes.dtype == got.overflow.dtype == jnp.int32
    copies_U, lost = count(expert_UK, layout)
    np.testing.assert_array_equal(got.copies, copies_U)
    np.testing.assert_array_equal(got.overflow, 0)
    np.testing.assert_array_equal(lost, 0)


def test_choices_among_two_groups_cross_twice_at_most():
    """Node-limited routing: 3 experts in at most 2 of 4 groups, a group a device."""
    rng = np.random.default_rng(0)
    groups_U2 = rng.permuted(np.tile(np.arange(4), (TOKENS, 1)), axis=1)[:, :2]
    known = (2 * groups_U2[:, :, None] + np.arange(2)).reshape(TOKENS, 4)
    expert_UK = rng.permuted(known, axis=1)[:, :PER_TOKEN].astype(np.int32)
    copies_U = compiled(FOUR)(*arrays(0), expert_UK).copies
    assert set(copies_U.tolist()) == {2}
    top = compiled(FOUR)(*arrays(0), choose("top", 0)).copies
    assert max(top.tolist()) == 3


# ---- bounded room -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([FOUR, APART]), kinds, seeds)
def test_overflow_is_counted(layout, kind, seed):
    """Rows for which there is no room are counted on the device that would have sent them."""
    inputs, expert_UK = arrays(seed), choose(kind, seed)
    got = compiled(layout, buffer_factor=1.0)(*inputs, expert_UK)
    copies_U, lost = count(expert_UK, layout, factor=1.0)
    np.testing.assert_array_equal(got.overflow, lost)
    np.testing.assert_array_equal(got.copies, copies_U)
    if not lost.any():
        assert_equals_one_device(got, inputs, expert_UK)


def test_a_factor_saves_rows_and_loses_none_of_an_even_router():
    u = np.arange(TOKENS)[:, None]
    device_UK = (u + np.arange(PER_TOKEN)) % 4
    inputs, expert_UK = arrays(0), (2 * device_UK + u // 4 % 2).astype(np.int32)
    got = compiled(FOUR, buffer_factor=1.0)(*inputs, expert_UK)
    assert not np.asarray(got.overflow).any()
    assert_equals_one_device(got, inputs, expert_UK)
    tokens = TOKENS // 4
    assert set(np.asarray(got.rows).tolist()) == {tokens * PER_TOKEN + 2}  # 2 for padding
    wide = compiled(FOUR)(*inputs, expert_UK)
    assert set(np.asarray(wide.rows).tolist()) == {4 * tokens * 2 + 2}  # two experts a device


# ---- on the wire --------------------------------------------------------------------------------


def test_bfloat16_rounds_the_rows_both_ways():
    """Each token needs one device, so that a row or gradient is rounded as it is."""

    def rounded(x):
        return np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32))

    x_UD, gates_UK, w_ED, bend_UD = arrays(0)
    expert_UK = choose("device", 0)
    both = compiled(FOUR, codec=BF16, combine_codec=BF16)
    got = both(x_UD, gates_UK, w_ED, bend_UD, expert_UK)
    wanted = one_device(rounded(x_UD), gates_UK, w_ED, rounded(bend_UD), expert_UK)
    # A sum in another order may fall on the other side of a rounding.
    for mine, theirs in ((got.y, wanted.y), (got.grads[0], wanted.grads[0])):
        assert mine.dtype == jnp.float32
        np.testing.assert_array_equal(mine, rounded(mine))
        assert_near(mine, rounded(theirs), 1e-3)
    assert_near(got.grads[1], wanted.grads[1], FLOAT32_GRADIENT)
    assert_near(got.grads[2], wanted.grads[2], FLOAT32_GRADIENT)


def scaled(factor):
    """Rows as two arrays of different widths; gradients come out `factor` times as large."""

    def encode(x_XD):
        scale_X1 = jnp.max(jnp.abs(x_XD), axis=1, keepdims=True) + 1.0
        return x_XD / scale_X1, scale_X1

    def decode(arrays, dtype):
        return (arrays[0] * arrays[1]).astype(dtype)

    def decode_gradient(arrays, dtype):
        return factor * decode(arrays, dtype)

    return Codec(f"scaled by {factor}", encode, decode, encode, decode_gradient)


def test_each_direction_has_its_own_form():
    inputs, expert_UK = arrays(0), choose("any", 0)
    run = compiled(FOUR, codec=scaled(3.0), combine_codec=scaled(5.0))
    got, wanted = run(*inputs, expert_UK), one_device(*inputs, expert_UK)
    assert_near(got.y, wanted.y)
    for mine, theirs, factor in zip(got.grads, wanted.grads, (15.0, 5.0, 5.0), strict=True):
        assert_near(mine, factor * theirs, FLOAT32_GRADIENT)


def crossings(layout, **how):
    """Shapes of the rows that all-to-all's of the lowered program bring."""
    inputs = (*arrays(0), choose("any", 0))
    run = on_mesh(layout, **how)
    text = jax.jit(run).lower(*inputs).as_text()
    operands = re.findall(r'"stablehlo.all_to_all".*: \(tensor<(\w+)>\)', text)
    return collections.Counter(operands)


def test_rows_cross_as_often_as_they_must():
    """Rows and their gradients go and return once each; again if not kept under a checkpoint."""
    rows, choices = f"{TOKENS}x{WIDTH}xf32", f"{TOKENS}x{PER_TOKEN}x"
    wanted = {rows: 4, choices + "i32": 1, choices + "f32": 2}
    assert crossings(FOUR) == wanted
    # What moe.py keeps: the rows received are wanted again, experts and gates are not.
    assert crossings(FOUR, remat=(PLAN, "kept")) == wanted | {rows: 5}
    assert crossings(FOUR, remat=(PLAN, ROWS, "kept")) == wanted
    room = math.ceil(1.5 * (TOKENS // 8) * PER_TOKEN / 8)
    assert crossings(EIGHT, buffer_factor=1.5)[f"{8 * room}x{WIDTH}xf32"] == 4
    narrow = crossings(FOUR, codec=BF16)
    assert (narrow[f"{TOKENS}x{WIDTH}xbf16"], narrow[rows]) == (2, 2)


def test_a_checkpoint_changes_nothing_and_sorts_once():
    inputs, expert_UK = arrays(0), choose("any", 0)
    assert_equals_one_device(
        compiled(FOUR, remat=(PLAN, ROWS, "kept"))(*inputs, expert_UK), inputs, expert_UK
    )

    def sorts(*names):
        run = jax.jit(on_mesh(FOUR, remat=names))
        return run.lower(*inputs, expert_UK).as_text().count('"stablehlo.sort"')

    assert sorts() == sorts(PLAN, "kept") < sorts("kept")


def test_an_axis_of_one_device_exchanges_nothing():
    assert not crossings(Layout(MeshShape()))


# ---- ragged -------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_ragged_lowers(platform):
    inputs = (*arrays(0), choose("any", 0))
    run = jax.jit(on_mesh(PAIR, exchange="ragged"))
    text = run.trace(*inputs).lower(lowering_platforms=(platform,)).as_text()
    assert len(re.findall(r"custom_call @ragged_all_to_all", text)) == 7  # 4 of rows, 3 of choices
    assert "stablehlo.all_to_all" not in text


def emulated(operand, output, starts, sizes, places, coming, *, axis_name):
    """`jax.lax.ragged_all_to_all` by its documentation, out of what CPU has."""
    me = jax.lax.axis_index(axis_name)
    operands, starts, sizes, places = jax.lax.all_gather(
        (operand, starts, sizes, places), axis_name
    )
    i = jnp.arange(output.shape[0])
    for source in range(operands.shape[0]):
        rank = i - places[source, me]
        real = (rank >= 0) & (rank < sizes[source, me])
        rows = operands[source, jnp.where(real, starts[source, me] + rank, 0)]
        output = jnp.where(real[:, None], rows, output)
    # Sizes on which the two sides do not agree are a fault that an accelerator may not tell.
    agreed = jnp.all(coming == sizes[:, me])
    fits = jnp.all(places[:, me] + sizes[:, me] <= output.shape[0])
    return jnp.where(agreed & fits, output, jnp.full_like(output, -(10**6)))


@pytest.mark.parametrize(("layout", "factor"), [(PAIR, None), (FOUR, 0.75), (APART, 1.0)])
def test_ragged_equals_one_device(layout, factor, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    run = jax.jit(on_mesh(layout, exchange="ragged", buffer_factor=factor))
    some_lost = False
    for seed, kind in enumerate(["any", "top", "one", "device", "none"]):
        inputs, expert_UK = arrays(seed), choose(kind, seed)
        got = run(*inputs, expert_UK)
        copies_U, lost = count(expert_UK, layout, "ragged", factor)
        np.testing.assert_array_equal(got.overflow, lost)
        np.testing.assert_array_equal(got.copies, copies_U)
        some_lost |= lost.any()
        if not lost.any():
            assert_equals_one_device(got, inputs, expert_UK)
    assert some_lost == (factor is not None)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "how", "told"),
    [
        (FOUR, {"exchange": "sparse"}, "unknown exchange 'sparse'; known: dense, ragged"),
        (FOUR, {"buffer_factor": 0.0}, "buffer_factor must be positive, not 0.0"),
        (Layout(MeshShape(expert=3)), {}, "8 experts do not divide among 3 devices of 'expert'"),
    ],
)
def test_errors(layout, how, told):
    inputs = [np.zeros((TOKENS, WIDTH), np.float32), np.zeros((TOKENS, PER_TOKEN), np.float32)]
    inputs += [np.zeros((24, WIDTH), np.float32), inputs[0], choose("none", 0)]
    with pytest.raises(ValueError, match=told):
        jax.eval_shape(on_mesh(layout, **how), *inputs)
