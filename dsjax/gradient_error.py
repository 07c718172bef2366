"""How far a recipe's gradients are from float32's, layer by layer, at the weights of a run.

Knows nothing about how a recipe rounds.
"""

import dataclasses
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import Config, MeshConfig
from dsjax.data.corpus import open_corpus
from dsjax.language_model import load_pretrained
from dsjax.model.transformer import merge
from dsjax.overrides import override
from dsjax.train.loss import PretrainLoss
from dsjax.train.state import blueprint
from dsjax.workdir import read_run
from sharding.rules import AxisRules

EXACT = ("precision.recipe=plain", "precision.compute_dtype=float32", "train.remat=none")
# A scale a tensor is taken from what is there: a single batch has no steps before it.
RECIPES = {
    "BF16": ("precision.recipe=plain", "precision.compute_dtype=bfloat16"),
    "FP8": ("precision.recipe=fp8", "precision.compute_dtype=bfloat16"),
    "FP8, powers of two": (
        "precision.recipe=fp8",
        "precision.scale=power_of_two",
        "precision.compute_dtype=bfloat16",
    ),
    "FP8 a tensor": ("precision.recipe=fp8_per_tensor", "precision.compute_dtype=bfloat16"),
}


def gradient_errors(
    workdir: str | os.PathLike, recipes: Mapping[str, tuple[str, ...]] = RECIPES
) -> dict[str, dict[str, float]]:
    """Compares the gradients of one training batch.

    Args:
        workdir: a finished run, whose weights, text and batch are taken.
        recipes: name -> overrides of the run's configuration.

    Returns:
        {recipe: {parameter, a stacked one by its layer: norm of the difference over the norm of
        float32's gradient}}; those without a gradient are left out.

    Raises:
        InputError: as `load_pretrained`.
    """
    run, lm = read_run(workdir), load_pretrained(workdir)
    assert lm.tokenizer is not None  # every run has one
    config = _one_batch(run.config)
    configs = {name: override(config, *changes) for name, changes in recipes.items()}
    params = jax.tree.map(lambda w: w.astype(jnp.float32), lm.params)
    train = config.train
    corpus = open_corpus(
        config.data,
        lm.tokenizer,
        seq_len=train.seq_len,
        micro_batch_size=train.batch_size,
        eval_batch_size=train.batch_size,
        seed=run.seed,
    )
    corpus.train.close()
    batch = corpus.held_out[0]
    exact = _gradients(override(config, *EXACT), params, lm.bias, batch)
    found = {}
    for name, changed in configs.items():
        rounded = _gradients(changed, params, lm.bias, batch)
        found[name] = {
            path: float(np.linalg.norm(rounded[path] - wanted) / np.linalg.norm(wanted))
            for path, wanted in exact.items()
            if wanted.any()
        }
    return found


def _one_batch(config: Config) -> Config:
    """As on one device, in whole batches, from float32 weights."""
    train = dataclasses.replace(
        config.train, micro_batch_size=None, batch_ramp=None, context_stages=()
    )
    precision = dataclasses.replace(config.precision, param_dtype="float32")
    return dataclasses.replace(config, train=train, mesh=MeshConfig(), precision=precision)


def _gradients(config: Config, params, bias, batch) -> dict[str, np.ndarray]:
    """By path; of a stack each layer's apart."""
    graphdef, _ = blueprint(config, AxisRules())
    loss = PretrainLoss.of(config)
    totals = loss.totals(batch, 1.0)

    @jax.jit
    def gradients(params, bias, batch):
        def of_params(params):
            return loss(merge(graphdef, params, bias), batch, totals)[0]

        return jax.grad(of_params)(params)

    found = {}
    arrays = {key: jnp.asarray(value) for key, value in batch.items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients(params, bias, arrays)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        leaf = np.asarray(leaf, np.float64)
        if name.startswith("stacks."):
            found |= {f"{name}[{layer}]": part for layer, part in enumerate(leaf)}
        else:
            found[name] = leaf
    return found


def table(errors: Mapping[str, Mapping[str, float]]) -> str:
    """A line a parameter, a column a recipe; the medians last."""
    names = list(errors)
    lines = [
        f"| parameter | {' | '.join(names)} |",
        "|---|" + "--:|" * len(names),
    ]
    for path in next(iter(errors.values())):
        cells = [f"{errors[name][path]:.4f}" for name in names]
        lines.append(f"| `{path}` | {' | '.join(cells)} |")
    medians = [f"{np.median(list(errors[name].values())):.4f}" for name in names]
    return "\n".join([*lines, f"| median | {' | '.join(medians)} |"])
