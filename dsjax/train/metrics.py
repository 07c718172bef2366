"""One schema of metrics, a JSONL file of them, and the picture people look at.

Knows nothing about how a number came about.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from dsjax.errors import nearest

METRICS_FILE = "metrics.jsonl"

# Name -> unit and meaning. Families end in "/": one entry a stack, [L] or [L, E] numbers.
SCHEMA = {
    "step": "optimizer steps taken",
    "tokens": "positions seen since the start of the run",
    "loss": "main next-token cross entropy, nats a token",
    "loss_mtp": "multi-token prediction cross entropy before lambda, nats a token",
    "loss_balance": "sequence-wise balance statistic before alpha, summed over layers",
    "loss_total": "what is minimised",
    "eval_loss": "held-out next-token cross entropy, nats a token",
    "bits_per_byte": "held-out bits a byte of text",
    "learning_rate": "of this step",
    "bias_speed": "gamma of this step",
    "grad_norm": "global norm before clipping",
    "param_norm": "global norm after the step",
    "update_norm": "global norm of the change",
    "tokens_per_s": "positions a second since the last line",
    "elapsed_s": "wall seconds of this process in the training loop",
    "router/": "router health by stack: max_violation, load_entropy, dead_experts, bias_spread",
    "load/": "tokens of each expert by stack",
}


class MetricsWriter:
    """Appends one JSON object a line; refuses names that the schema does not know."""

    def __init__(self, workdir: str | os.PathLike, *, after_step: int):
        """Opens `workdir/metrics.jsonl`.

        Lines past `after_step`, which a resumed run writes again, and a last line cut short go.
        """
        self._path = Path(workdir) / METRICS_FILE
        kept = [row for row in read_metrics(workdir) if row["step"] <= after_step]
        if self._path.exists():
            temporary = self._path.with_suffix(".jsonl.tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(temporary, self._path)
        self._kept = {(row["step"], name) for row in kept for name in row}
        self._file = self._path.open("a", encoding="utf-8")

    def has(self, step: int, name: str) -> bool:
        """Whether a row of that step and with that name was there when the file was opened."""
        return (step, name) in self._kept

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row, which must have a `step`.

        Raises:
            ValueError: for a name the schema does not know.
        """
        for name in row:
            family = name.split("/")[0] + "/"
            if name not in SCHEMA and not (family in SCHEMA and "/" in name):
                raise ValueError(f"unknown metric '{name}'{nearest(name, SCHEMA)}")
        self._file.write(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Every whole row of a run, oldest first; none if there is no file yet."""
    path = Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # a line cut short by a kill; whatever follows is written again
    return rows


def plot_loss(workdir: str | os.PathLike) -> Path | None:
    """Draws `loss.png`: training and held-out loss, and the router's maximum violation.

    Returns:
        The picture's path, or None where matplotlib (the `plot` extra) is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = read_metrics(workdir)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for name, label, style in (
        ("loss", "training", {"color": "tab:blue", "linewidth": 1.0}),
        ("loss_mtp", "MTP (second token)", {"color": "tab:gray", "linewidth": 0.8}),
        ("eval_loss", "held out", {"color": "tab:red", "marker": "o"}),
    ):
        points = [(row["tokens"], row[name]) for row in rows if name in row]
        if points:
            top.plot(*zip(*points, strict=True), label=label, **style)
    top.set_ylabel("cross entropy, nats a token")
    top.grid(alpha=0.3)
    if top.lines:
        top.legend()
    for name in sorted({n for row in rows for n in row if n.endswith("/max_violation")}):
        points = [(row["tokens"], max(row[name])) for row in rows if name in row]
        bottom.plot(*zip(*points, strict=True), label=name.split("/")[1], linewidth=0.8)
    bottom.set_ylabel("largest load / mean - 1\n(worst layer)")
    bottom.set_xlabel("tokens")
    bottom.grid(alpha=0.3)
    if bottom.lines:
        bottom.legend()
    path = Path(workdir) / "loss.png"
    figure.savefig(path, dpi=110)
    return path


def _plain(value: Any) -> Any:
    """Arrays to lists, NumPy scalars to Python's; a number that is not finite to null."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
