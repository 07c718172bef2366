"""Per-tensor FP8 with delayed scaling, a control: products by hand, histories, runs."""

import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsjax.errors import InputError
from dsjax.model import delayed
from dsjax.model.delayed import HISTORY, Delayed
from dsjax.model.transformer import build, merge
from dsjax.overrides import override
from dsjax.presets import preset
from dsjax.train.loop import pretrain
from dsjax.train.loss import PretrainLoss
from dsjax.train.metrics import read_metrics
from dsjax.train.state import blueprint, create
from dsjax.train.step import make_train_step
from sharding.rules import AxisRules
from tests.helpers import FLOAT32, assert_near, packed_batch

CONFIG = override(preset("nano"), "precision.recipe=fp8_per_tensor")


def rounded(x, amax, dtype):
    """In float64: what the FP8 numbers stand for."""
    largest = float(ml_dtypes.finfo(dtype).max)
    scale = np.float32(np.float32(amax) / np.float32(largest)) if amax > 0 else np.float32(1)
    q = np.clip(np.asarray(x, np.float32) / scale, -largest, largest).astype(dtype)
    return q.astype(np.float64) * scale


def case(rng, *, known):
    x, w, dy = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((6, 10), (10, 4), (6, 4))
    )
    amax = np.zeros((3, HISTORY), np.float32)
    amax[:, 5] = known
    return x, w, dy, amax


@pytest.mark.parametrize("known", [(0, 0, 0), (1.5, 4.0, 2.0), (0.7, 1.0, 0.1)])
def test_products_by_hand(rng, known):
    """With the scales of the history, 1 before there is one; what lies beyond is clipped."""
    x, w, dy, amax = case(rng, known=known)

    def product(x, w, amax):
        return delayed.linear(x, Delayed(w, amax), 1, dtype=jnp.dtype(jnp.float32))

    y, back = jax.vjp(product, *map(jnp.asarray, (x, w, amax)))
    dx, dw, seen = back(jnp.asarray(dy))
    e4m3, e5m2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
    x8, w8, dy8 = (
        rounded(x, known[0], e4m3),
        rounded(w, known[1], e4m3),
        rounded(dy, known[2], e5m2),
    )
    assert_near(y, x8 @ w8, FLOAT32)
    assert_near(dx, dy8 @ w8.T, FLOAT32)
    assert_near(dw, x8.T @ dy8, FLOAT32)
    np.testing.assert_array_equal(seen[:, 0], [np.abs(part).max() for part in (x, w, dy)])
    assert not np.any(seen[:, 1:])


def test_experts_share_a_scale(rng):
    x = jnp.asarray(rng.standard_normal((8, 10)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((2, 10, 4)), jnp.float32)
    amax = jnp.full((3, HISTORY), 3.0)
    tile_expert = jnp.array([0, 1])

    def product(x, w):
        dtype = jnp.dtype(jnp.float32)
        return delayed.linear(x, Delayed(w, amax), 1, dtype=dtype, tile_expert=tile_expert)

    def by_hand(x, w):
        dtype, parts = jnp.dtype(jnp.float32), (x[:4], x[4:])
        each = [
            delayed.linear(part, Delayed(w[e], amax), 1, dtype=dtype)
            for e, part in enumerate(parts)
        ]
        return jnp.concatenate(each)

    def total(of):
        return jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(of(x, w))), (0, 1))(x, w)

    for got, wanted in zip(*map(jax.tree.leaves, (total(product), total(by_hand))), strict=True):
        assert_near(got, wanted, FLOAT32)


def test_every_linear_layer_has_a_history():
    model = jax.eval_shape(build(CONFIG), jax.random.key(0))
    found = delayed.histories(model)
    names = {name.rsplit(".", 1)[1] for name in found}
    assert names == {
        *("w_dq_DQ", "w_uq_QNA", "w_dkvr_DZ", "w_ukv_CNY", "w_o_NHD"),
        *("w_in_D2F", "w_down_FD", "w_in_ED2F", "w_down_EFD"),
    }  # not the router, the embedding, the head, the norms and MTP's projection
    assert found["stacks.moe.0.ffn.w_in_ED2F"].shape == (2, 3, HISTORY)


def test_a_step_moves_the_histories(rng):
    """By what it has seen, the weights' by their magnitudes; a step not taken moves nothing."""
    graphdef, optimizer = blueprint(CONFIG, AxisRules())
    state = create(CONFIG, jax.random.key(0), AxisRules())
    weights = state.params["stacks"]["moe"][0]["attention"]["w_o_NHD"]
    largest = np.abs(np.asarray(weights)).max(axis=(1, 2, 3))
    name = "stacks.moe.0.attention.w_o_NHD"
    loss = PretrainLoss.of(CONFIG)
    step = make_train_step(graphdef, loss, optimizer, bias_speed=CONFIG.train.bias_speed)
    batch = packed_batch(rng, CONFIG.model.vocab_size, [(20, 12), (32,)])
    state, metrics = step(state, batch, progress=0.5, micro_batch_size=2)
    assert int(metrics["skipped_steps"]) == 0
    first = {key: np.asarray(value) for key, value in state.extra["amax"].items()}
    np.testing.assert_array_equal(first[name][:, 1, 0], largest)
    assert all((value[..., 0] > 0).all() for value in first.values())
    assert not any(value[..., 1:].any() for value in first.values())

    state, _ = step(state, batch, progress=0.5, micro_batch_size=2)
    for key, value in state.extra["amax"].items():
        np.testing.assert_array_equal(value[..., 1], first[key][..., 0])
    second = jax.tree.map(np.asarray, state.extra["amax"])
    bad = batch | {"weights_BT": np.where(batch["weights_BT"] > 0, np.nan, 0).astype(np.float32)}
    state, metrics = step(state, bad, progress=0.5, micro_batch_size=2)
    assert int(metrics["skipped_steps"]) == 1
    jax.tree.map(np.testing.assert_array_equal, state.extra["amax"], second)


def test_bare_weights_take_scales_from_what_they_are_given(rng):
    """As held-out losses and a loaded model do."""
    config = override(CONFIG, "model.mtp=null")
    state = create(config, jax.random.key(0), AxisRules())
    batch = packed_batch(rng, config.model.vocab_size, [(20, 12), (32,)])
    where = {key: jnp.asarray(batch[key]) for key in ("positions_BT", "segments_BT")}

    def hidden(recipe):
        graph = blueprint(override(config, f"precision.recipe={recipe}"), AxisRules())[0]
        model = merge(graph, state.params, state.bias)
        return model(jnp.asarray(batch["tokens_BT"]), **where).hidden_BTD

    plain, low = hidden("plain"), hidden("fp8_per_tensor")
    error = np.linalg.norm(low - plain) / np.linalg.norm(plain)
    assert 1e-3 < error < 0.2


def test_refuses_what_it_cannot_do():
    for change in (
        "train.micro_batch_size=4",
        'mesh={"rules": "fsdp", "fsdp": 2}',
    ):
        with pytest.raises(InputError, match="whole batches on one device"):
            override(CONFIG, change)
    with pytest.raises(InputError, match="wire bfloat16 has no effect"):
        override(CONFIG, "precision.recipe=fp8", "mesh.wire=bfloat16")


@pytest.mark.nightly
def test_a_run_goes_on_bit_for_bit(tmp_path):
    """From its histories, too: the last three of six steps, taken again from the third's state."""
    config = override(
        CONFIG,
        "train.save_every_steps=3",
        "train.eval_every_steps=100",
        "data.max_bytes_per_source=60000",
        "data.held_out_fraction=0.2",
        f"train.total_tokens={6 * 8 * 64}",
    )
    pretrain(config, tmp_path, seed=0)
    whole = [row["loss"] for row in read_metrics(tmp_path) if "loss" in row]
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    pretrain(config, tmp_path, seed=0)
    again = [row["loss"] for row in read_metrics(tmp_path) if "loss" in row]
    assert (tmp_path / "checkpoints" / "6").exists()
    assert len(whole) == 6
    assert again == whole
