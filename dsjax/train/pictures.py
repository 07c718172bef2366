"""The pictures of a run: losses, routers, and the recipe's schedules.

Knows nothing about training: it draws the rows of `metrics.jsonl`, or of a recipe. matplotlib (the
`plot` extra) is imported when a picture is drawn; without it there is none.
"""

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from dsjax.errors import InputError
from dsjax.train.metrics import read_metrics

_BLUE, _RED, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#777777"  # Okabe and Ito's
_COLUMNS = 300  # of a heat map at most; neighbouring rows are averaged
_FEW_LAYERS = 4  # drawn one by one
_SUFFIXES = (".png", ".pdf", ".svg")

Points = tuple[np.ndarray, np.ndarray]  # x, y


def check_picture(path: str | os.PathLike) -> None:
    """Refuses the path of a picture that could not be drawn; a folder may stand for one in it.

    Raises:
        InputError: if it is empty, its folder is not there or cannot be written to, or it ends in
            something else than .png, .pdf or .svg.
    """
    if not os.fspath(path):
        raise InputError("the path of the picture is empty")
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise InputError(f"cannot draw {str(path)!r}: there is no folder {str(folder)!r}")
    if folder != path and path.suffix.lower() not in _SUFFIXES:
        raise InputError(f"cannot draw {str(path)!r}: a picture ends in {', '.join(_SUFFIXES)}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cannot draw {str(path)!r}: the folder {str(folder)!r} is not writable")


# ---- losses -------------------------------------------------------------------------------------


def plot_loss(workdir: str | os.PathLike) -> Path | None:
    """Draws `loss.png`: losses, gradient norm, learning rate and the routers' balance.

    Dashed lines mark where the sequence length changes, triangles where steps were skipped.

    Returns:
        The picture's path, or None where matplotlib is not installed or the disk is full.
    """
    rows = _placed_rows(workdir)
    scale, unit = _unit(max((row["tokens"] for row in rows), default=0))
    violations = _families(rows, "router/", "/max_violation")
    names = ["loss", "grad_norm", "learning_rate"] + ["violation"] * bool(violations)
    figure = new_figure(10.0, 3.4 + 1.7 * (len(names) - 1))
    if figure is None:
        return None
    heights = [3.0 if name == "loss" else 1.3 for name in names]
    panels = figure.subplots(len(names), 1, sharex=True, height_ratios=heights)
    axes = dict(zip(names, panels, strict=True))

    top = axes["loss"]
    noisy(top, _points(rows, "loss", scale), _BLUE, "training")
    noisy(top, _points(rows, "loss_mtp", scale), _GREY, "MTP (second token)")
    for name, label, style in (
        ("eval_loss", "held out", {"color": _RED, "marker": "o", "markersize": 4}),
        (
            "eval_loss_ema",
            "held out, averaged weights",
            {"color": _GREEN, "marker": "D", "markersize": 4, "linestyle": "--"},
        ),
    ):
        x, y = _points(rows, name, scale)
        if x.size:
            top.plot(x, y, label=label, linewidth=1.4, **style)
    top.set_ylabel("cross entropy\nnats a token")

    noisy(axes["grad_norm"], _points(rows, "grad_norm", scale), _BLUE, None)
    axes["grad_norm"].set_ylabel("gradient norm\nbefore clipping")
    if any((row.get("grad_norm") or 0) > 0 for row in rows):
        axes["grad_norm"].set_yscale("log")
    axes["learning_rate"].plot(*_points(rows, "learning_rate", scale), color=_BLUE)
    axes["learning_rate"].set_ylabel("learning rate")
    axes["learning_rate"].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for (stack, name), color in zip(
        violations.items(), (_BLUE, _RED, _GREEN, _GREY) * len(violations), strict=False
    ):
        x = np.array([row["tokens"] for row in rows if name in row]) / scale
        y = np.array([_largest(row[name]) for row in rows if name in row])
        noisy(axes["violation"], (x, y), color, stack)
        axes["violation"].set_ylabel("largest load / mean - 1\n(worst layer)")

    for axis in panels:
        plain_axes(axis)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, ncols=2)
        for x, _ in _length_changes(rows, scale):
            axis.axvline(x, color=_GREY, linestyle="--", linewidth=0.9)
    for x, seq_len in _length_changes(rows, scale):
        top.annotate(
            f"{_short(seq_len)} context",
            (x, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-3, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            rotation=90,
            fontsize=8,
            color=_GREY,
        )
    skipped = _skips(rows, scale)
    if skipped.size:
        marks = np.full(skipped.shape, 0.03)
        top.plot(
            *(skipped, marks),
            "^",
            color="black",
            markersize=6,
            transform=top.get_xaxis_transform(),
            label="step skipped",
        )
        top.legend(frameon=False, ncols=2)
    panels[-1].set_xlabel(unit)
    figure.align_ylabels(panels)
    return save_figure(figure, Path(workdir) / "loss.png")


def noisy(axis: Any, points: Points, color: str, label: str | None) -> None:
    """A pale line of every step, and its running mean where there are enough of them."""
    x, y = points
    if not x.size:
        return
    window = x.size // 60
    if window < 3:
        axis.plot(x, y, color=color, linewidth=1.2, label=label)
        return
    axis.plot(x, y, color=color, linewidth=0.6, alpha=0.3)
    known, kernel = np.isfinite(y), np.ones(window)
    total = np.convolve(np.where(known, y, 0.0), kernel, "same")
    count = np.convolve(known, kernel, "same")  # fewer at both ends
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0.5)
    axis.plot(x, mean, color=color, linewidth=1.5, label=label)


def _length_changes(rows: list[dict], scale: float) -> list[tuple[float, int]]:
    """(tokens before the first step of another sequence length, that length)."""
    steps = [row for row in rows if "seq_len" in row]
    return [
        (before["tokens"] / scale, after["seq_len"])
        for before, after in itertools.pairwise(steps)
        if before["seq_len"] != after["seq_len"]
    ]


def _skips(rows: list[dict], scale: float) -> np.ndarray:
    steps = [row for row in rows if "skipped_steps" in row]
    counts = [0, *(row["skipped_steps"] for row in steps)]
    return np.array(
        [
            row["tokens"] / scale
            for row, n in zip(steps, counts, strict=False)
            if row["skipped_steps"] > n
        ]
    )


# ---- routers ------------------------------------------------------------------------------------


def plot_router(workdir: str | os.PathLike) -> Path | None:
    """Draws `router.png`: who gets the tokens, and what the balancing biases do about it.

    Of every stack: the load of each expert over time in a few layers, the maximum violation and the
    spread of the biases by layer, and the biases of the layer where they spread most.

    Returns:
        The picture's path, or None where matplotlib is not installed or no row has loads.
    """
    rows = _placed_rows(workdir)
    stacks = _families(rows, "load/", "")
    if not stacks:
        return None
    num_experts = [np.shape(_first(rows, name))[1] for name in stacks.values()]
    heights = [2.3 + min(3.2, 1.6 + count / 100) for count in num_experts]
    figure = new_figure(13.0, sum(heights) + 0.5 * len(heights))
    if figure is None:
        return None
    scale, unit = _unit(max(row["tokens"] for row in rows))
    parts = figure.subfigures(len(stacks), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (stack, name), height in zip(parts, stacks.items(), heights, strict=True):
        _draw_stack(part, rows, stack, name, scale, unit, height)
    return save_figure(figure, Path(workdir) / "router.png")


def _draw_stack(
    part: Any, rows: list[dict], stack: str, name: str, scale: float, unit: str, height: float
) -> None:
    x, load_RLE = _series(rows, name, scale)
    _, num_layers, num_experts = load_RLE.shape
    layers = "1 layer" if num_layers == 1 else f"{num_layers} layers"
    part.suptitle(f"{stack}: {layers} of {num_experts} experts", fontsize=13, fontweight="bold")
    upper, lower = part.subfigures(2, 1, height_ratios=(height - 2.3, 2.3))

    shown = range(num_layers)
    if num_layers > _FEW_LAYERS:
        shown = (0, num_layers // 2, num_layers - 1)
    axes = upper.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    mesh = None
    for axis, layer in zip(axes, shown, strict=True):
        load_RE = load_RLE[:, layer]
        over_mean_RE = load_RE / np.maximum(load_RE.mean(axis=-1, keepdims=True), 1e-20)
        edges, cells = _thinned(x, np.log2(np.maximum(over_mean_RE, 2.0**-9)))
        mesh = axis.pcolormesh(
            edges, np.arange(num_experts + 1) - 0.5, cells.T, cmap="RdBu_r", vmin=-2, vmax=2
        )
        axis.set_title(f"layer {layer}", fontsize=10)
        axis.set_xlabel(unit)
        axis.locator_params(axis="y", integer=True)
    axes[0].set_ylabel("expert")
    bar = upper.colorbar(mesh, ax=list(axes), ticks=[-2, -1, 0, 1, 2], pad=0.01, extend="both")
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    bar.set_label("load / mean")

    wanted = [
        (f"router/{stack}/max_violation", "maximum violation\nlargest load / mean - 1"),
        (f"router/{stack}/bias_spread", "bias spread\nlargest - smallest"),
        (f"bias/{stack}", None),
    ]
    wanted = [(name, label) for name, label in wanted if any(name in row for row in rows)]
    if not wanted:
        return
    for axis, (name, label) in zip(
        lower.subplots(1, len(wanted), squeeze=False)[0], wanted, strict=True
    ):
        x, values = _series(rows, name, scale)
        if label is None:
            _draw_biases(axis, x, values)
        else:
            _draw_layers(lower, axis, x, values, label)
        axis.set_xlabel(unit)


def _draw_layers(
    part: Any,
    axis: Any,
    x: Float[np.ndarray, " R"],
    values_RL: Float[np.ndarray, "R L"],
    label: str,
) -> None:
    """A line a layer if they are few, else a heat map."""
    num_layers = values_RL.shape[1]
    title, _, unit = label.partition("\n")
    axis.set_title(f"{title} by layer", fontsize=10)
    if num_layers <= _FEW_LAYERS:
        for layer, color in zip(range(num_layers), (_BLUE, _RED, _GREEN, _GREY), strict=False):
            noisy(axis, (x, values_RL[:, layer]), color, f"layer {layer}")
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0.0)
        axis.margins(x=0.0)
        plain_axes(axis)
        if num_layers > 1:
            axis.legend(frameon=False, fontsize=8, ncols=2)
        return
    edges, cells = _thinned(x, values_RL)
    # One wild start would leave the rest of the run in a single colour.
    finite = cells[np.isfinite(cells)]
    top = float(np.quantile(finite, 0.98)) if finite.size else 1.0
    mesh = axis.pcolormesh(
        edges, np.arange(num_layers + 1) - 0.5, cells.T, cmap="cividis", vmin=0.0, vmax=top or 1.0
    )
    axis.set_ylabel("layer")
    part.colorbar(mesh, ax=axis, pad=0.01, extend="max").set_label(unit)


def _draw_biases(
    axis: Any, x: Float[np.ndarray, " R"], bias_RLE: Float[np.ndarray, "R L E"]
) -> None:
    """A line an expert, coloured by where it ends, of the layer that spreads most at the end."""
    import matplotlib

    layer = int(np.argmax(np.ptp(np.nan_to_num(bias_RLE[-1]), axis=-1)))
    bias_RE = bias_RLE[:, layer]
    order = np.argsort(bias_RE[-1])
    colors = matplotlib.colormaps["cividis"](np.linspace(0.0, 0.92, len(order)))
    few = len(order) <= 32
    for rank, expert in enumerate(order):
        axis.plot(
            x, bias_RE[:, expert], color=colors[rank], linewidth=1.1 if few else 0.5, alpha=0.9
        )
    axis.axhline(0.0, color="black", linewidth=0.6)
    axis.set_title(f"biases of layer {layer}, a line an expert", fontsize=10)
    axis.set_ylabel("bias")
    axis.margins(x=0.0)
    plain_axes(axis)


def _families(rows: list[dict], prefix: str, suffix: str) -> dict[str, str]:
    """Stack -> metric, of those with this prefix and suffix; MTP last."""
    names = {n for row in rows for n in row if n.startswith(prefix) and n.endswith(suffix)}
    stacks = {name[len(prefix) : len(name) - len(suffix)]: name for name in names}
    return dict(sorted(stacks.items(), key=lambda item: (item[0] == "mtp", item[0])))


def _series(rows: list[dict], name: str, scale: float) -> Points:
    """Tokens, and the metric as float64 [rows, ...]; null becomes nan."""
    found = [row for row in rows if name in row]
    x = np.array([row["tokens"] for row in found], np.float64) / scale
    return x, np.array([row[name] for row in found], np.float64)


def _thinned(x: np.ndarray, values: np.ndarray) -> Points:
    """(edges of the columns [n + 1], their means [n, ...]) of at most `_COLUMNS` columns."""
    groups = np.array_split(np.arange(x.size), min(x.size, _COLUMNS))
    ends = np.array([x[group[-1]] for group in groups])
    # A row speaks for the tokens before it; the first one for as many as the second.
    first = 2 * ends[0] - ends[1] if ends.size > 1 else 0.0
    means = np.array([values[group].mean(axis=0) for group in groups])
    return np.concatenate([[max(first, 0.0)], ends]), means


# ---- schedules ----------------------------------------------------------------------------------


def plot_schedule(path: str | os.PathLike, rows: Sequence[dict[str, Any]]) -> Path | None:
    """Draws a recipe: learning rate, batch, sequence length, gamma and lambda over tokens.

    Stages after the main one that would be too narrow to see get a second column of their own.

    Args:
        path: the picture, or a folder, where it is `schedule.png`; see `check_picture`.
        rows: `dsjax.train.recipe.schedule_rows`.

    Returns:
        The picture's path, or None where matplotlib is not installed, there is no row, or the disk
        is full.
    """
    if not rows:
        return None
    figure = new_figure(12.0, 9.5)
    if figure is None:
        return None
    start_of = {}  # tokens before each stage
    for row in rows:
        start_of.setdefault(row["stage"], row["tokens"])
    last = rows[-1]
    end = last["tokens"] + last["batch_size"] * last["seq_len"]
    main_end = sorted(start_of.values())[1] if len(start_of) > 1 else end
    zoomed = 0 < end - main_end < 0.2 * end
    panels = (
        ("learning_rate", "learning rate"),
        ("batch_size", "batch size\nsequences"),
        ("seq_len", "sequence length\ntokens"),
        ("bias_speed", "bias speed\n$\\gamma$"),
        ("mtp_loss_weight", "MTP weight\n$\\lambda$"),
    )
    grid = figure.subplots(
        len(panels),
        1 + zoomed,
        sharex="col",
        squeeze=False,
        width_ratios=(2, 1) if zoomed else (1,),
    )
    views = [(0, 0, end, "")]
    if zoomed:
        # A little of what came before shows what changes.
        views.append((main_end, main_end - (end - main_end) // 20, end, " after the main stage"))
    for column, (origin, left, right, after) in enumerate(views):
        scale, unit = _unit(right - left)
        tokens = np.array([row["tokens"] for row in rows] + [end], np.float64)
        x = (tokens - origin) / scale
        for axis, (name, label) in zip(grid[:, column], panels, strict=True):
            y = np.array([row[name] for row in [*rows, last]], np.float64)
            style = "default" if name == "learning_rate" else "steps-post"
            axis.plot(x, y, color=_BLUE, linewidth=1.8, drawstyle=style)
            axis.set_xlim((left - origin) / scale, (right - origin) / scale)
            # The rates of later stages are small; the rest keeps its scale from column to column.
            inside = (tokens >= left) | (name != "learning_rate")
            _set_y(axis, name, y[inside])
            plain_axes(axis)
            for start in list(start_of.values())[1:]:
                axis.axvline((start - origin) / scale, color=_GREY, linestyle="--", linewidth=0.9)
            if column == 0:
                axis.set_ylabel(label)
        grid[-1, column].set_xlabel(unit + after)
    grid[0, 0].set_title(f"the whole run: {last['step'] + 1:,} steps, {_short(end, 1000)} tokens")
    if zoomed:
        first = next(row["step"] for row in rows if row["tokens"] >= main_end)
        grid[0, 1].set_title(f"the last {last['step'] + 1 - first:,} steps")
    figure.align_ylabels(grid[:, 0])
    path = Path(path)
    return save_figure(figure, path / "schedule.png" if path.is_dir() else path)


def _set_y(axis: Any, name: str, values: np.ndarray) -> None:
    """From zero, with room at both ends; sequence lengths in powers of two."""
    if name == "seq_len":
        axis.set_yscale("log", base=2)
        ticks = sorted(set(values.astype(int).tolist()))
        axis.set_yticks(ticks, [_short(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(min(ticks) / 1.5, max(ticks) * 1.5)
        return
    top = 1.12 * float(values.max()) or 1.0
    axis.set_ylim(-0.04 * top, top)
    if name in ("learning_rate", "bias_speed"):
        axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if name == "batch_size":
        axis.yaxis.set_major_formatter("{x:,.0f}")


# ---- studies ------------------------------------------------------------------------------------


def plot_study(
    path: str | os.PathLike,
    question: str,
    curves: dict[str, list[list[tuple[float, float]]]],
    results: dict[str, dict[str, list[float]]],
) -> Path | None:
    """Draws a study: held-out loss of every run, and each measure, a dot a seed and their mean.

    Args:
        path: of the picture.
        question: its title.
        curves: variant -> (tokens, loss) of each seed.
        results: variant -> measure -> a value a seed.

    Returns:
        The path, or None where matplotlib is not installed or the disk is full.
    """
    measures = list(dict.fromkeys(name for figures in results.values() for name in figures))
    figure = new_figure(5.0 + 2.6 * len(measures), 4.2)
    if figure is None:
        return None
    figure.suptitle(question)
    axes = figure.subplots(1, 1 + len(measures), width_ratios=[2.0] + [1.0] * len(measures))
    axes = list(axes) if measures else [axes]
    last = max((int(c[-1][0]) for seeds in curves.values() for c in seeds), default=0)
    scale, unit = _unit(last)
    colors = dict(zip(curves, (_BLUE, _RED, _GREEN, _GREY), strict=False))
    for name, seeds in curves.items():
        for number, curve in enumerate(seeds):
            axes[0].plot(
                [tokens / scale for tokens, _ in curve],
                [loss for _, loss in curve],
                color=colors[name],
                label=None if number else name,
                alpha=0.8,
            )
    axes[0].set(xlabel=unit, ylabel="held-out loss, nats a token")
    axes[0].legend()
    plain_axes(axes[0])
    for axis, measure in zip(axes[1:], measures, strict=True):
        for place, (name, figures) in enumerate(results.items()):
            values = figures.get(measure, [])
            axis.scatter([place] * len(values), values, color=colors[name], zorder=3)
            if values:
                mean = sum(values) / len(values)
                axis.hlines(mean, place - 0.25, place + 0.25, color=colors[name])
        axis.set(title=measure.replace("_", " "), xlim=(-0.6, len(results) - 0.4))
        axis.set_xticks(range(len(results)), [n.replace(" ", "\n") for n in results])
        plain_axes(axis)
    return save_figure(figure, Path(path))


# ---- what they share ----------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Any | None:
    """An empty figure, in inches; None without matplotlib. pyplot, which keeps state, stays out."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> Path | None:
    """Writes beside and renames, so that a viewer never sees half a picture.

    Returns:
        `path`, or None where it cannot be written: no picture is worth a run.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(temporary, dpi=120, format=path.suffix.lstrip(".") or "png")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        tqdm.write(f"{path.name} is not drawn: {error}", file=sys.stderr)
        return None
    return path


def _placed_rows(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows that have a place on an axis of tokens."""
    return [row for row in read_metrics(workdir) if isinstance(row.get("tokens"), int)]


def plain_axes(axis: Any) -> None:
    """A faint grid, and no frame above and beside."""
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _points(rows: list[dict], name: str, scale: float) -> Points:
    """Tokens and a metric; null becomes nan, which leaves a gap."""
    found = [row for row in rows if name in row]
    x = np.array([row["tokens"] for row in found], np.float64) / scale
    return x, np.array([row[name] for row in found], np.float64)


def _largest(values: list) -> float:
    return max((value for value in values if value is not None), default=float("nan"))


def _first(rows: list[dict], name: str) -> Any:
    return next(row[name] for row in rows if name in row)


def _unit(tokens: int) -> tuple[float, str]:
    """What to divide tokens by, and the axis's label."""
    for scale, word in (
        (1e12, "trillion "),
        (1e9, "billion "),
        (1e6, "million "),
        (1e3, "thousand "),
    ):
        if tokens >= 1.5 * scale:
            return scale, f"{word}tokens"
    return 1.0, "tokens"


def _short(count: int, base: int = 1024) -> str:
    """4K for 4,096; in thousands if `base` says so."""
    for power, letter in ((4, "T"), (3, "B"), (2, "M"), (1, "K")):
        if count >= base**power:
            return f"{count / base**power:.3g}{letter}"
    return str(count)
