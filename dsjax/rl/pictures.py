"""What people look at while a policy learns: curves of a run, and what it wrote.

Knows nothing about training: it draws the rows of `metrics.jsonl`.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.durable import write_durably
from dsjax.rl.rollout import Shown
from dsjax.train.metrics import read_metrics
from dsjax.train.pictures import new_figure, noisy, plain_axes, save_figure

_BLUE, _RED, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#777777"
_SHOWN_CHARACTERS = 4000  # of a prompt or a completion


def plot_reinforcement(workdir: str | os.PathLike) -> Path | None:
    """Draws `reinforcement.png`: reward and held-out accuracy, length, entropy, KL, over steps.

    Returns:
        The picture's path, or None where matplotlib is not installed or the disk is full.
    """
    rows = read_metrics(workdir)
    figure = new_figure(10.0, 8.0)
    if figure is None or not rows:
        return None
    panels = figure.subplots(4, 1, sharex=True, height_ratios=[3.0, 1.5, 1.2, 1.2])

    def points(name):
        found = [row for row in rows if row.get(name) is not None]
        return (
            np.array([row["step"] for row in found], np.float64),
            np.array([row[name] for row in found], np.float64),
        )

    rewards = sorted({n for row in rows for n in row if n.startswith("reward/")})
    noisy(panels[0], points("reward"), _GREY, "sum of rewards")
    for name, color in zip(rewards, (_BLUE, _GREEN, "#cc79a7", "#56b4e9") * 4, strict=False):
        noisy(panels[0], points(name), color, name.removeprefix("reward/"))
    held_out = points("eval/accuracy")
    if held_out[0].size:
        panels[0].plot(
            *held_out, color=_RED, marker="o", markersize=4, label="held-out accuracy, greedy"
        )
    panels[0].set_ylabel("mean over\ncompletions")
    noisy(panels[1], points("completion_tokens"), _BLUE, "sampled")
    lengths = points("eval/tokens")
    if lengths[0].size:
        panels[1].plot(*lengths, color=_RED, marker="o", markersize=4, label="held out, greedy")
    panels[1].set_ylabel("tokens of a\ncompletion")
    noisy(panels[2], points("entropy"), _BLUE, None)
    panels[2].set_ylabel("entropy\nnats a token")
    noisy(panels[3], points("kl"), _BLUE, None)
    panels[3].set_ylabel("KL to reference\nnats a token")
    panels[3].set_xlabel("optimizer steps")
    for axis in panels:
        plain_axes(axis)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, ncols=3)
    figure.align_ylabels(panels)
    return save_figure(figure, Path(workdir) / "reinforcement.png")


def plot_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path | None:
    """Draws held-out greedy accuracy and the length of sampled completions of several runs.

    Args:
        runs: rows of metrics by the name of their run; those called "seed ..." are drawn alike.
        path: of the picture.

    Returns:
        `path`, or None where matplotlib is not installed or the disk is full.
    """
    figure = new_figure(10.0, 4.0)
    if figure is None:
        return None
    panels = figure.subplots(1, 2)
    others = iter((_RED, _GREY, _GREEN) * len(runs))
    for name, rows in runs.items():
        is_seed = name.startswith("seed")
        style = {"color": _BLUE if is_seed else next(others), "alpha": 0.8 if is_seed else 1.0}
        style |= {"linewidth": 1.5, "label": name}
        for panel, metric in zip(panels, ("eval/accuracy", "completion_tokens"), strict=True):
            known = [row for row in rows if row.get(metric) is not None]
            x, y = [row["step"] for row in known], [row[metric] for row in known]
            panel.plot(x, y, **style, linestyle="-" if is_seed else "--")
    panels[0].set_ylabel("held-out accuracy, greedy")
    panels[0].set_ylim(-0.02, 1.02)
    panels[1].set_ylabel("tokens of a sampled completion")
    for panel in panels:
        panel.set_xlabel("optimizer steps")
        plain_axes(panel)
    panels[0].legend(frameon=False)
    return save_figure(figure, path)


def write_samples(workdir: str | os.PathLike, step: int, shown: Sequence[Shown]) -> None:
    """Writes what was sampled after so many steps, as `samples/<step>.md`."""
    if not shown:
        return
    folder = Path(workdir) / "samples"
    folder.mkdir(exist_ok=True)
    names = [name.replace("|", "\\|") for name in shown[0].rewards]
    lines = [f"# Completions after {step} steps", ""]
    lines += ["| # | " + " | ".join(names) + " | advantage | tokens | ended |"]
    lines += ["|" + "---|" * (len(names) + 4)]
    for i, sample in enumerate(shown, 1):
        values = ["masked" if math.isnan(v) else f"{v:g}" for v in sample.rewards.values()]
        ended = "yes" if sample.stopped else "no"
        cells = [str(i), *values, f"{sample.advantage:+.2f}", str(sample.tokens), ended]
        lines.append("| " + " | ".join(cells) + " |")
    for i, sample in enumerate(shown, 1):
        fence = "`" * (3 + max(_longest_run(sample.prompt), _longest_run(sample.completion)))
        lines += ["", f"## {i}", "", fence, _short(sample.prompt), fence, ""]
        lines += [fence, _short(sample.completion), fence]
    write_durably(folder / f"{step:06d}.md", ("\n".join(lines) + "\n").encode())


def _longest_run(text: str) -> int:
    """Of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def _short(text: str) -> str:
    text = text.encode(errors="replace").decode().replace("\0", "\N{SYMBOL FOR NULL}")
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"
