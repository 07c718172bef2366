"""Rules, meshes, arrays born sharded, and the dispatch of tokens to experts."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from dsjax.model.transformer import build, split
from dsjax.presets import preset
from sharding.dispatch import block_rows, combine, dispatch, plan_dispatch
from sharding.init import init, program
from sharding.mesh import MeshShape, make_mesh
from sharding.rules import PRESETS, AxisRules, LayoutError
from sharding.spread import check_parts
from tests.helpers import assert_near

# ---- rules and meshes ---------------------------------------------------------------------------

RULES = AxisRules(embed="fsdp", experts="expert", batch=("data", "fsdp"))


def test_an_unknown_axis_is_refused():
    with pytest.raises(ValueError, match=r"unknown logical axis 'embd'; known: act_embed, .*"):
        RULES.of("embd")


def test_a_mesh_axis_lays_out_one_dimension():
    sizes = {"data": 2, "fsdp": 2, "expert": 4}
    assert RULES.spec(("experts", "embed", None), (8, 6, 5), sizes) == PartitionSpec(
        "expert", "fsdp", None
    )
    assert RULES.spec(("embed", "embed"), (6, 6), sizes) == PartitionSpec("fsdp", None)
    assert AxisRules().spec(("embed",), (6,), sizes) == PartitionSpec(None)
    assert RULES.spec(("embed",), (5,), {"fsdp": 1}) == PartitionSpec(None)


@pytest.mark.parametrize("pages", ["expert", ("context", "data"), ("tensor", "tensor")])
def test_pages_and_sequences_are_not_cut_by_one_axis(pages):
    with pytest.raises(LayoutError, match="an axis cuts one of them, once"):
        dataclasses.replace(PRESETS["decode"], pages=pages)


def test_what_is_only_stored_in_parts_may_stay_whole():
    rules = AxisRules(heads=("tensor", "expert"), act_heads="tensor", embed="fsdp")
    sizes = {"tensor": 2, "expert": 4, "fsdp": 4}
    assert rules.spec(("heads",), (16,), sizes) == PartitionSpec(("tensor", "expert"))
    assert rules.spec(("heads",), (6,), sizes) == PartitionSpec("tensor")
    assert rules.kept("heads") == ("tensor",)
    with pytest.raises(LayoutError, match=r"'heads' of 5 does not divide over tensor=2"):
        rules.spec(("heads",), (5,), sizes)
    with pytest.raises(LayoutError, match=r"'embed' of 6 does not divide over fsdp=4"):
        rules.spec(("embed",), (6,), sizes)


def test_a_processs_border_cuts_no_rows():
    check_parts({0: {0, 1}, 1: {2, 3}})
    check_parts({0: {0}, 1: {0}, 2: {1}, 3: {1}})  # two processes a row
    for parts in ({0: {0, 1}, 1: {1, 2}}, {0: {0, 2}, 1: {1, 3}}, {0: {0, 1}, 1: {2}}):
        with pytest.raises(LayoutError, match=r"process 0 has the parts .*, and process"):
            check_parts(parts)


def test_rules_are_a_static_field():
    assert hash(RULES) == hash(dataclasses.replace(RULES))
    assert AxisRules() != RULES


def test_a_mesh_has_all_six_axes():
    mesh = make_mesh(MeshShape(fsdp=4, expert=2))
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor", "context", "stage")
    assert dict(mesh.shape) == dataclasses.asdict(MeshShape(fsdp=4, expert=2))
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert make_mesh(MeshShape(tensor=2)).devices.size == 2  # of the eight


def test_a_mesh_too_large_names_both_numbers():
    with pytest.raises(ValueError, match=r"fsdp=4.* needs 16 devices; there are 8"):
        make_mesh(MeshShape(fsdp=4, data=4))
    with pytest.raises(ValueError, match=r"needs 2 devices; there are 1"):
        make_mesh(MeshShape(context=2), jax.devices()[:1])


# ---- arrays born sharded ------------------------------------------------------------------------


def wide_nano():
    """`nano` with weights that outweigh what drawing them takes beside."""
    config = preset("nano")
    block = config.model.stacks[1].blocks[0]
    block = dataclasses.replace(block, ffn=dataclasses.replace(block.ffn, expert_dim=128))
    stack = dataclasses.replace(config.model.stacks[1], blocks=(block,))
    model = dataclasses.replace(config.model, embed_dim=256, stacks=(stack,), mtp=None)
    return dataclasses.replace(config, model=model)


def test_arrays_are_born_sharded_and_the_same():
    key, rules = jax.random.key(7), AxisRules(embed="fsdp", experts="expert")
    _, wanted, wanted_bias = split(init(build(wide_nano(), rules), key, rules))
    with jax.set_mesh(make_mesh(MeshShape(fsdp=4, expert=2))):
        make = build(wide_nano(), rules)
        memory = program(make, key, rules).lower(key).compile().memory_analysis()
        _, params, bias = split(init(make, key, rules))
    chex.assert_trees_all_equal(jax.device_get((params, bias)), (wanted, wanted_bias))

    experts = params["stacks"]["moe"][0]["ffn"]["w_in_ED2F"]
    assert experts.sharding.spec == PartitionSpec(None, "expert", "fsdp", None)
    assert experts.addressable_shards[0].data.nbytes == experts.nbytes // 8
    router = params["stacks"]["moe"][0]["ffn"]["w_router_DE"]
    assert router.sharding.spec == PartitionSpec(None, "fsdp", None)
    assert params["final_norm_D"].sharding.is_fully_replicated
    shard = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((params, bias)))
    whole = sum(x.nbytes for x in jax.tree.leaves((params, bias)))
    assert shard < 0.3 * whole
    assert memory.temp_size_in_bytes < 3 * shard


# ---- dispatch -----------------------------------------------------------------------------------

dispatch_jit = jax.jit(dispatch, static_argnames="num_experts")

# (tokens, experts a token, experts): few shapes, since each is compiled; draws decide the rest.
SHAPES = [(1, 1, 1), (2, 3, 8), (24, 2, 3), (300, 2, 4)]


@st.composite
def choices(draw):
    """Any experts, `num_experts` (nowhere) and ids past it among them, one a token or repeated."""
    tokens, per_token, experts = draw(st.sampled_from(SHAPES))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["any", "real", "one", "none", "two"]))
    shape = (tokens, per_token)
    expert_UK = {
        "any": rng.integers(0, experts + 3, shape),
        "real": rng.integers(0, experts, shape),
        "one": np.full(shape, rng.integers(experts)),
        "none": np.full(shape, experts),
        "two": rng.choice([rng.integers(experts), experts], shape),
    }[kind]
    return expert_UK.astype(np.int32), experts


@settings(max_examples=60, deadline=None)
@given(choices())
def test_every_assignment_has_one_row(case):
    """Rows are sorted by expert in whole tiles; nothing is dropped, nothing comes twice."""
    expert_UK, experts = case
    tokens = len(expert_UK)
    rng = np.random.default_rng(0)
    x_UD = rng.uniform(1.0, 2.0, (tokens, 3)).astype(np.float32)  # no row is 0
    gates_UK = rng.uniform(0.5, 1.0, expert_UK.shape).astype(np.float32)
    x_XD, gates_X, sizes_E, plan = jax.device_get(
        dispatch_jit(x_UD, gates_UK, expert_UK, num_experts=experts)
    )
    rows = len(x_XD)
    block = block_rows(expert_UK.size, experts)
    assert rows == block * len(plan.tile_expert)
    sent_UK = expert_UK < experts
    counts_E = np.bincount(expert_UK[sent_UK], minlength=experts)
    np.testing.assert_array_equal(sizes_E, counts_E)
    assert sizes_E.dtype == np.int32

    # Tiles come in the order of their experts, as many as their tokens need; the rest are unused.
    tiles = np.repeat(np.arange(experts), -(-counts_E // block))
    np.testing.assert_array_equal(plan.tile_expert[: len(tiles)], tiles)
    np.testing.assert_array_equal(plan.tile_expert[len(tiles) :], experts)

    np.testing.assert_array_equal(plan.slot_UK[~sent_UK], rows)
    slots = plan.slot_UK[sent_UK]
    assert len(set(slots.tolist())) == slots.size
    np.testing.assert_array_equal(np.repeat(plan.tile_expert, block)[slots], expert_UK[sent_UK])
    token_UK = np.broadcast_to(np.arange(tokens)[:, None], expert_UK.shape)
    np.testing.assert_array_equal(plan.token_X[slots], token_UK[sent_UK])
    np.testing.assert_array_equal(x_XD[slots], x_UD[token_UK[sent_UK]])
    np.testing.assert_array_equal(gates_X[slots], gates_UK[sent_UK])
    padding = np.setdiff1d(np.arange(rows), slots)
    np.testing.assert_array_equal(plan.token_X[padding], tokens)
    assert not x_XD[padding].any()
    assert not gates_X[padding].any()
    # An expert's tokens keep their order, so that results do not depend on the rest of the batch.
    for expert in range(experts):
        mine = np.sort(plan.slot_UK[expert_UK == expert])
        assert (np.diff(plan.token_X[mine]) >= 0).all()


@functools.partial(jax.jit, static_argnames="experts")
def through_experts(x_UD, gates_UK, w_ED, bend, expert_UK, experts):
    """Each row times its expert's vector, by dispatch and combine; and the gradients of a sum."""

    def of(x_UD, gates_UK, w_ED):
        x_XD, gates_X, _, plan = dispatch(x_UD, gates_UK, expert_UK, num_experts=experts)
        block = x_XD.shape[0] // plan.tile_expert.shape[0]
        w_XD = jnp.repeat(jnp.pad(w_ED, ((0, 1), (0, 0)))[plan.tile_expert], block, axis=0)
        y_UD = combine(jnp.sin(x_XD) * w_XD * gates_X[:, None], plan)
        return jnp.sum(y_UD * bend), y_UD

    grads, y_UD = jax.grad(of, (0, 1, 2), has_aux=True)(x_UD, gates_UK, w_ED)
    return y_UD, grads


@functools.partial(jax.jit, static_argnames="experts")
def dense(x_UD, gates_UK, w_ED, bend, expert_UK, experts):
    """The same with every expert on every token, and a weight of 0 where it was not chosen."""

    def of(x_UD, gates_UK, w_ED):
        chosen_UKE = expert_UK[..., None] == jnp.arange(experts)
        weight_UE = jnp.sum(jnp.where(chosen_UKE, gates_UK[..., None], 0.0), axis=1)
        y_UD = jnp.sin(x_UD) * (weight_UE @ w_ED)
        return jnp.sum(y_UD * bend), y_UD

    grads, y_UD = jax.grad(of, (0, 1, 2), has_aux=True)(x_UD, gates_UK, w_ED)
    return y_UD, grads


@settings(max_examples=60, deadline=None)
@given(choices())
def test_dispatch_equals_dense(case):
    """Values, and the gradients of rows, gates and experts."""
    expert_UK, experts = case
    rng = np.random.default_rng(1)
    shapes = ((len(expert_UK), 3), expert_UK.shape, (experts, 3), (len(expert_UK), 3))
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    got, got_grads = through_experts(*arrays, jnp.asarray(expert_UK), experts)
    wanted, wanted_grads = dense(*arrays, jnp.asarray(expert_UK), experts)
    assert_near(got, wanted)
    for mine, theirs in zip(got_grads, wanted_grads, strict=True):
        assert_near(mine, theirs)


def test_combine_of_dispatch_is_the_sum_of_the_gates():
    """The identity as expert: every token comes back times the gates of what was sent."""
    rng = np.random.default_rng(2)
    expert_UK = rng.integers(0, 5, (40, 3)).astype(np.int32)  # 4 is nowhere
    gates_UK = rng.random((40, 3)).astype(np.float32)
    x_UD = rng.standard_normal((40, 2)).astype(np.float32)
    x_XD, gates_X, _, plan = dispatch_jit(x_UD, gates_UK, expert_UK, num_experts=4)
    wanted = x_UD * np.where(expert_UK < 4, gates_UK, 0.0).sum(axis=1, keepdims=True)
    assert_near(combine(x_XD * gates_X[:, None], plan), wanted)


def test_rows_keep_their_dtype_and_gates_theirs():
    x_UD = jnp.ones((4, 2), jnp.bfloat16)
    expert_UK = jnp.array([[0], [1], [2], [0]])
    x_XD, gates_X, _, plan = dispatch_jit(x_UD, jnp.ones((4, 1)), expert_UK, num_experts=2)
    assert x_XD.dtype == jnp.bfloat16
    assert gates_X.dtype == jnp.float32
    assert combine(x_XD, plan).dtype == jnp.bfloat16


def test_the_buffer_is_the_worst_case_and_no_more():
    for tokens, per_token, experts, block in ((300, 2, 4, 4), (3, 2, 64, 1), (64, 8, 16, 2)):
        expert_UK = jax.ShapeDtypeStruct((tokens, per_token), jnp.int32)
        plan = jax.eval_shape(
            functools.partial(plan_dispatch, num_experts=experts, block=block), expert_UK
        )
        assignments = tokens * per_token
        bound = assignments + min(experts, assignments) * (block - 1)
        assert bound <= plan.token_X.shape[0] < bound + block


def test_block_rows():
    for assignments, experts, wanted in (
        (1, 1, 1),
        (63, 1, 1),
        (64, 1, 2),
        (8 * 512 * 4, 32, 16),
        (8 * 512 * 4 - 1, 32, 8),
        (4 * 4, 32, 1),
        (1 << 20, 256, 128),
        (1 << 30, 1, 128),
    ):
        assert block_rows(assignments, experts) == wanted
