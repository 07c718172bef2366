"""Questions to the recipe: the same short run with one thing changed, several seeds each.

Knows nothing about how a run is trained or measured beyond the functions it calls. A study is a
folder of runs, each of which can be stopped and goes on, and a `results.json`.
"""

import dataclasses
import json
import os
import statistics
import sys
from pathlib import Path

import numpy as np

from dsjax.config import Config
from dsjax.data.corpus import open_corpus
from dsjax.data.sources import read_documents, split_held_out
from dsjax.errors import InputError, nearest
from dsjax.evaluate.acceptance import second_token_acceptance
from dsjax.evaluate.infilling import infilling_loss
from dsjax.language_model import LanguageModel, load_pretrained
from dsjax.overrides import override
from dsjax.train.loop import pretrain
from dsjax.train.metrics import read_metrics
from dsjax.train.pictures import plot_study
from dsjax.workdir import read_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A question.

    Attributes:
        question: in one line.
        common: overrides of every variant.
        variants: name -> overrides.
        measures: which of `measure`'s figures answer it.
    """

    question: str
    variants: dict[str, tuple[str, ...]]
    measures: tuple[str, ...]
    common: tuple[str, ...] = ()


LATE_STEPS = 200
_BIAS = "model.stacks.moe.blocks.0.ffn.balance_bias"
_MTP_BIAS = "model.mtp.block.ffn.balance_bias"
_FUNCTIONS = 'data.sources=[{"path": "builtin:functions"}]'


def studies() -> dict[str, Study]:
    """Every study by name."""
    return {
        "balance": Study(
            question="Does the bias even the load, and at what cost, against an auxiliary loss?",
            variants={
                "bias": (),
                "auxiliary loss": (
                    f"{_BIAS}=false",
                    f"{_MTP_BIAS}=false",
                    "train.balance_loss_weight=0.01",
                ),
                "none": (
                    f"{_BIAS}=false",
                    f"{_MTP_BIAS}=false",
                    "train.balance_loss_weight=0.0",
                ),
            },
            measures=("eval_loss", "max_violation", "worst_violation"),
        ),
        "mtp": Study(
            question="Does multi-token prediction help the main loss, and could it draft?",
            variants={"with MTP": (), "without MTP": ("model.mtp=null",)},
            measures=("eval_loss", "second_token_acceptance"),
        ),
        "fim": Study(
            question="Does fill-in-the-middle teach infilling, and leave the next token unharmed?",
            common=(_FUNCTIONS,),
            variants={
                "rate 0": ("data.fim_rate=0.0",),
                "rate 0.1": ("data.fim_rate=0.1",),
                "rate 0.5": ("data.fim_rate=0.5",),
            },
            measures=("eval_loss", "infilling_with_suffix", "infilling_prefix_only"),
        ),
        "fp8": Study(
            question="What does FP8 cost the loss, in tiles of 128 and with a scale a tensor?",
            common=("precision.compute_dtype=bfloat16",),
            variants={
                "BF16": ("precision.recipe=plain",),
                "FP8": ("precision.recipe=fp8",),
                "FP8 a tensor": ("precision.recipe=fp8_per_tensor",),
            },
            measures=("late_loss", "eval_loss"),
        ),
    }


def study_named(name: str) -> Study:
    """Returns the study of that name.

    Raises:
        InputError: for an unknown name, with the nearest known one.
    """
    known = studies()
    if name not in known:
        raise InputError(f"unknown study '{name}'{nearest(name, known)}")
    return known[name]


def run_study(
    study: Study, config: Config, folder: str | os.PathLike, *, seeds: int
) -> dict[str, dict[str, list[float]]] | None:
    """Trains what is not trained yet, measures it, and writes `results.json` and `study.png`.

    Args:
        study: the question.
        config: what its overrides are applied to.
        folder: a run's folder for each variant and seed goes here.
        seeds: how many, from 0.

    Returns:
        {variant: {measure: a value a seed}}; None if a signal stopped it.

    Raises:
        InputError: as `pretrain`.
    """
    folder = Path(folder)
    variants = {name: _variant(study, name, config) for name in study.variants}
    results: dict[str, dict[str, list[float]]] = {}
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    for name, changed in variants.items():
        results[name], curves[name] = {measure: [] for measure in study.measures}, []
        for seed in range(seeds):
            workdir = folder / f"{name.replace(' ', '_')}-{seed}"
            print(f"--- {name}, seed {seed}", file=sys.stderr)
            if pretrain(changed, workdir, seed=seed).stopped_by is not None:
                return None
            figures = measure(workdir)
            for wanted in study.measures:
                if wanted in figures:
                    results[name][wanted].append(figures[wanted])
            rows = [row for row in read_metrics(workdir) if "eval_loss" in row]
            curves[name].append([(float(row["tokens"]), row["eval_loss"]) for row in rows])
            text = json.dumps(results, indent=1) + "\n"
            (folder / "results.json").write_text(text, encoding="utf-8")
    plot_study(folder / "study.png", study.question, curves, results)
    return results


def _variant(study: Study, name: str, config: Config) -> Config:
    assignments = [*study.common, *study.variants[name]]
    if config.model.mtp is None:  # what is changed in it need not be
        assignments = [a for a in assignments if not a.startswith("model.mtp.")]
    return override(config, *assignments)


def measure(workdir: str | os.PathLike) -> dict[str, float]:
    """What can be said of a finished run.

    Returns:
        `eval_loss` and `bits_per_byte` of the whole held-out split; `late_loss`, the mean training
        loss of the last 200 steps; `max_violation` (largest load
        over the mean, minus 1; the mean of the layers) and `worst_violation` (the worst layer's),
        means over the last quarter of the steps; with MTP `second_token_acceptance`; where the
        tokenizer has sentinels `infilling_with_suffix` and `infilling_prefix_only`, nats a token.
    """
    run, lm = read_run(workdir), load_pretrained(workdir)
    rows = read_metrics(workdir)
    last = [row for row in rows if "eval_loss" in row][-1]
    figures = {name: last[name] for name in ("eval_loss", "bits_per_byte")}
    losses = [row["loss"] for row in rows if "loss" in row]
    figures["late_loss"] = statistics.fmean(losses[-LATE_STEPS:])
    taken = [row for row in rows if "router/moe/max_violation" in row]
    late = [row["router/moe/max_violation"] for row in taken[-max(len(taken) // 4, 1) :]]
    if late:
        figures["max_violation"] = statistics.fmean(statistics.fmean(row) for row in late)
        figures["worst_violation"] = statistics.fmean(max(row) for row in late)
    return figures | _of_model(lm, run.config, run.seed)


def _of_model(lm: LanguageModel, config: Config, seed: int) -> dict[str, float]:
    assert lm.tokenizer is not None  # every run has one
    train, figures = config.train, {}
    if config.model.mtp is not None:
        batch_size = train.micro_batch_size or train.batch_size
        corpus = open_corpus(
            config.data,
            lm.tokenizer,
            seq_len=train.seq_len,
            micro_batch_size=batch_size,
            eval_batch_size=batch_size,
            seed=seed,
        )
        figures["second_token_acceptance"] = second_token_acceptance(
            lm.graphdef, lm.params, lm.bias, corpus.held_out
        )
        corpus.train.close()
    if lm.tokenizer.fim is not None:
        _, held_out = split_held_out(read_documents(config.data), config.data.held_out_fraction)
        losses = infilling_loss(
            lambda tokens: np.asarray(lm.logits(tokens)),
            lm.tokenizer,
            [document.text for document in held_out],
            length=train.seq_len,
        )
        figures |= {f"infilling_{setting}": loss for setting, loss in losses.items()}
    return figures


def summary(results: dict[str, dict[str, list[float]]]) -> str:
    """A table: a line a variant, mean and range over the seeds of each measure.

    Below it how far each variant's mean is from the first's, and how far that one's seeds lie from
    each other: what is less than the second is not known to be anything.
    """
    names = list(dict.fromkeys(name for figures in results.values() for name in figures))
    lines = ["  ".join([f"{'':<16}", *(f"{name:>28}" for name in names)])]
    for variant, figures in results.items():
        cells = [_cell(figures.get(name, [])) for name in names]
        lines.append("  ".join([f"{variant:<16}", *(f"{cell:>28}" for cell in cells)]))
    first, *others = results
    for name in names:
        if not (base := results[first].get(name)):
            continue
        mean = statistics.fmean(base)
        gaps = [
            f"{variant} {statistics.fmean(values) / mean - 1:+.2%}"
            for variant in others
            if (values := results[variant].get(name))
        ]
        if mean and gaps:
            spread = (max(base) - min(base)) / abs(mean)
            lines.append(
                f"{name} against {first}: {', '.join(gaps)} "
                f"(the seeds of {first} lie {spread:.2%} apart)"
            )
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
