"""The folder of a run: what it was configured with, and Orbax checkpoints by step.

Knows nothing about training: a state is a tree of arrays. Layout: `dsjax.json` (configuration,
seed, format), `tokenizer/`, `checkpoints/<step>/{state, data, meta}`, `metrics.jsonl`, `*.png`.
"""

import dataclasses
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dsjax.config import Config
from dsjax.errors import InputError
from dsjax.overrides import first_difference, fixed, from_json, to_json

FORMAT = 1
CONFIG_FILE = "dsjax.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """What `dsjax.json` holds."""

    config: Config
    seed: int


def read_run(workdir: str | os.PathLike) -> Run:
    """Reads a run's configuration.

    Raises:
        InputError: if the folder holds no run, or one of another format.
    """
    path = Path(workdir) / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise InputError(f"{path} is of format {found!r}; this version reads format {FORMAT}")
    try:
        return Run(
            config=from_json(Config, content.get("config")),
            seed=from_json(int, content.get("seed"), "seed"),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def write_run(workdir: str | os.PathLike, run: Run) -> None:
    """Writes `dsjax.json`, all of it or nothing; makes the folder."""
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "seed": run.seed, "config": to_json(run.config)}
    temporary = folder / f".{CONFIG_FILE}.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / CONFIG_FILE)


def check_workdir(workdir: str | os.PathLike, run: Run) -> bool:
    """Checks, writing nothing, that a run can use a folder.

    Returns:
        Whether the folder already holds this very run.

    Raises:
        InputError: if the folder cannot be written, holds files of something else, or a run of
            another configuration or seed, whose first differing field is named.
    """
    folder = Path(workdir)
    if not str(workdir).strip() or "\0" in str(workdir):
        raise InputError(f"workdir {str(workdir)!r} is no path")
    ancestor = folder
    try:
        while not os.path.lexists(ancestor):  # a link to nothing is in the way, too
            ancestor = ancestor.parent
        if not ancestor.is_dir():
            raise InputError(f"workdir {folder}: {ancestor} is not a folder")
        with tempfile.TemporaryFile(dir=ancestor):
            pass
        present = folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise InputError(f"workdir {folder} cannot be written: {error.strerror}") from error
    if (folder / CONFIG_FILE).exists():
        there = read_run(folder)
        here = {"seed": run.seed, **fixed(run.config)}
        difference = first_difference({"seed": there.seed, **fixed(there.config)}, here)
        if difference is not None:
            raise InputError(f"workdir {folder} holds another run; {difference}")
        return True
    if present:
        raise InputError(f"workdir {folder} is not empty and holds no {CONFIG_FILE}")
    return False


class Checkpoints:
    """Saves and restores the state of a run by step."""

    def __init__(self, workdir: str | os.PathLike, *, keep: int):
        """Opens `workdir/checkpoints`; `keep` newest steps stay."""
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every file it opens
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        folder = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(folder, options=options)

    def latest_step(self) -> int | None:
        """The newest saved step."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, *, data: dict, meta: dict) -> None:
        """Starts saving a step; returns once the arrays are copied.

        Args:
            step: optimizer steps taken.
            state: a tree of arrays.
            data: the data iterator's state, for JSON.
            meta: whatever else belongs to the run, for JSON.
        """
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            meta=ocp.args.JsonSave(meta),
        )
        self._manager.save(step, args=arguments)

    def restore(self, like: Any, step: int) -> tuple[Any, dict, dict]:
        """Reads a step back.

        Args:
            like: a tree of arrays or shapes, with the structure, shapes, dtypes and shardings
                wanted.
            step: which.

        Returns:
            (state, data, meta).
        """
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(target),
            data=ocp.args.JsonRestore(),
            meta=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(step, args=arguments)
        return restored["state"], restored["data"], restored["meta"]

    def close(self) -> None:
        """Waits until every save is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def read_params(workdir: str | os.PathLike, like: Any, step: int | None = None) -> tuple[Any, int]:
    """Reads a part of a saved state.

    Args:
        workdir: the run's folder.
        like: a tree with the part wanted, `{"params": ..., "bias": ...}` of shapes.
        step: which; None takes the newest.

    Returns:
        (the tree filled, the step).

    Raises:
        InputError: if there is no such step, or it holds other weights than those asked for.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    folder = Path(workdir).absolute() / "checkpoints"
    steps = []
    if folder.is_dir():
        steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    if not steps:
        raise InputError(f"{workdir} holds no checkpoint")
    if step is not None and step not in steps:
        raise InputError(f"{workdir} has no step {step}; it has {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            folder / str(step) / "state",
            args=ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            ),
        )
    _check_shapes(restored, target, f"step {step} of {workdir}")
    return jax.device_put(restored), step  # without a sharding in `like`, Orbax gives NumPy arrays


def _check_shapes(restored: Any, wanted: Any, where: str) -> None:
    """Orbax gives what it finds: arrays of another shape, and shapes where it finds nothing."""
    found = dict(jax.tree_util.tree_leaves_with_path(restored))
    for path, want in jax.tree_util.tree_leaves_with_path(wanted):
        name, got = jax.tree_util.keystr(path, simple=True, separator="."), found.get(path)
        if not isinstance(got, jax.Array | np.ndarray):
            raise InputError(f"{where} has no {name}")
        if got.shape != want.shape:
            raise InputError(f"{where}: {name} has shape {got.shape}, expected {want.shape}")
