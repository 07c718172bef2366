"""A model of the FP8 recipe, handed over in the published layout and read again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsjax
from dsjax.errors import InputError
from dsjax.overrides import override
from dsjax.precision import Quantized
from dsjax.presets import preset
from dsjax.train.loop import pretrain
from experiments import convert

RECIPE = ["precision.recipe=fp8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`nano` after a few steps; none of its sizes is a multiple of 128."""
    config = override(
        preset("nano"),
        *RECIPE,
        "precision.compute_dtype=bfloat16",
        "train.total_tokens=2048",
        "data.max_bytes_per_source=60000",
        "data.held_out_fraction=0.2",
    )
    folder = tmp_path_factory.mktemp("fp8") / "run"
    pretrain(config, folder, seed=0)
    return folder


@pytest.fixture
def ids(rng):
    return rng.integers(0, 512, (2, 40))


@pytest.mark.parametrize(
    "scale", ["float32", pytest.param("power_of_two", marks=pytest.mark.nightly)]
)
def test_a_trained_model_comes_back_with_the_same_logits(trained, ids, scale, tmp_path, capsys):
    """Bit for bit: the export's FP8 numbers are those that training computes with."""
    changes = [f"precision.scale={scale}"]
    lm = dsjax.load_pretrained(trained, overrides=changes)
    arguments = ["--dtype=fp8", "--wide=float32", f"--scale_format={scale}"]
    folder = str(tmp_path / "hf")
    assert convert.main(["convert", f"--source={trained}", f"--target={folder}", *arguments]) == 0
    again = dsjax.load_pretrained(folder, overrides=[*RECIPE, *changes])
    leaves = jax.tree.leaves(again.params, is_leaf=lambda x: isinstance(x, Quantized))
    # Five of attention and two of each feed-forward layer, shared experts apart, in three stacks.
    assert sum(isinstance(leaf, Quantized) for leaf in leaves) == 7 + 9 + 9
    np.testing.assert_array_equal(again.logits(ids), lm.logits(ids))
    # Without the recipe the numbers are the same, the products not.
    wide = dsjax.load_pretrained(folder)
    assert np.any(np.asarray(wide.logits(ids)) != np.asarray(lm.logits(ids)))


def test_in_the_published_types_all_but_their_rounding_is_the_same(trained, ids, tmp_path):
    """V3 publishes in BF16 what is not in FP8: a model that has so few bits there is unchanged."""
    lm = dsjax.load_pretrained(trained)

    def published(path, leaf):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        kept = name.startswith("w_") and name not in ("w_router_DE", "w_proj_2DD")
        return leaf if kept else leaf.astype(jnp.bfloat16).astype(leaf.dtype)

    lm.params = jax.tree_util.tree_map_with_path(published, lm.params)
    lm.save_pretrained(tmp_path / "hf", dtype="fp8")
    again = dsjax.load_pretrained(tmp_path / "hf", overrides=RECIPE)
    np.testing.assert_array_equal(again.logits(ids), lm.logits(ids))


def test_scales_are_those_of_the_recipe_unasked(ids, tmp_path):
    """Powers of two on the way out; and known as such on the way in, for activations, too."""
    config = override(preset("nano"), *RECIPE, "precision.scale=power_of_two", "model.mtp=null")
    lm = dsjax.init(config)
    lm.save_pretrained(tmp_path / "hf", dtype="fp8", wide="float32")
    again = dsjax.load_pretrained(tmp_path / "hf", overrides=RECIPE)
    assert again.config.precision.scale == "power_of_two"
    again = dsjax.load_pretrained(
        tmp_path / "hf", overrides=[*RECIPE, "precision.compute_dtype=float32"]
    )
    np.testing.assert_array_equal(again.logits(ids), lm.logits(ids))


def test_wide_goes_with_fp8(trained, tmp_path, capsys):
    lm = dsjax.load_pretrained(trained)
    with pytest.raises(InputError, match="goes with dtype='fp8'"):
        lm.save_pretrained(tmp_path / "hf", dtype="bfloat16", wide="float32")
    target = f"--target={tmp_path / 'hf'}"
    assert convert.main(["convert", f"--source={trained}", target, "--wide=float32"]) == 2
    assert "--wide goes with --dtype=fp8" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
