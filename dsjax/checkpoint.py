"""Array checkpoints of a run by step: written in the background, read back, then relied on.

Knows nothing about training: a state is a tree of arrays, each named by its dotted path. Layout:
`checkpoints/<step>/{state, data, meta}`, all three Orbax's. A folder gets its bare number as a
name only after what lies on disk has been read back and agrees with the checksums that its arrays
had in memory. Others are `<step>.unverified` (not read back yet), `.deleted` (about to go),
`.damaged` (does not agree any more) and `.abandoned` (the run went back to before it).

Several processes (`sharding.distributed`) write one checkpoint, each its shards, and read back a
share of the arrays each. Process 0 alone makes, renames and deletes folders and tells what happens;
a save is good, or has failed, in all of them.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from dsjax.checksum import checksums, combined, host_checksum, part_sums
from dsjax.errors import InputError, RunError
from dsjax.workdir import check_path, one_line, sync
from sharding.distributed import Processes


class CheckpointError(RunError):
    """A checkpoint could not be written; those before it are still there."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
        step: optimizer steps taken.
        state: the tree that was asked for.
        data: the data iterator's state.
        meta: what else was saved.
    """

    step: int
    state: Any
    data: dict
    meta: dict


def print_to_stderr(line: str) -> None:
    """Tells a person something."""
    print(line, file=sys.stderr, flush=True)


class Checkpoints:
    """Saves and restores the state of a run by step.

    One run at a time may hold a folder (`dsjax.workdir.WorkdirLock`). With several processes each
    calls every method, in the same order, with the same arguments.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep: int,
        attempts: int = 3,
        retry_wait_s: float = 1.0,
        tell: Callable[[str], None] = print_to_stderr,
        processes: Processes | None = None,
        timeout_s: float = 1200.0,
    ):
        """Opens `workdir/checkpoints`; makes it.

        Args:
            workdir: the run's folder.
            keep: so many newest steps stay, at least 1.
            attempts: after so many failures in a row saving is given up.
            retry_wait_s: how long `wait` waits before it tries again; twice as long each time.
            tell: given one line on what a person should know, in process 0.
            processes: of the run; None for this one alone.
            timeout_s: how long the processes wait for each other while they write.

        Raises:
            InputError: if nothing can be saved under this path.
            RunError: if the folder cannot be made.
        """
        if keep < 1 or attempts < 1:
            raise ValueError(f"keep is {keep} and attempts {attempts}; both must be at least 1")
        check_path(workdir)
        _quiet()
        self._workdir, self._folder = workdir, _folder_of(workdir)
        self._processes, self._timeout_s = processes or Processes(), timeout_s
        self._is_first = self._processes.index == 0
        self._processes.first("checkpoints", self._make)
        self._keep, self._attempts, self._retry_wait_s = keep, attempts, retry_wait_s
        self._tell = tell if self._is_first else (lambda line: None)
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: _Save | None = None  # until it is known to be on disk
        self._outcome: concurrent.futures.Future[None] | None = None  # of `_last`, in the worker
        self._failures, self._why = 0, ""  # in a row, and what the last of them said
        self._good: int | None = None  # the step that this process saved or restored last
        self._started = 0  # so many saves

    def _make(self) -> None:
        with one_line(RunError, f"workdir {self._workdir} cannot be written"):
            self._folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: Any, *, data: dict, meta: dict) -> None:
        """Starts saving a step; returns once the arrays are copied.

        Waits for the save before it, and tells of its failure. A step that is saved already is
        left as it is.

        Args:
            step: optimizer steps taken.
            state: a tree of arrays.
            data: the data iterator's state, for JSON.
            meta: whatever else belongs to the run, for JSON.

        Raises:
            CheckpointError: if the `attempts` saves before this one have all failed.
        """
        self._settle()
        if self._failures >= self._attempts:
            raise self._processes.everywhere(
                CheckpointError(
                    f"{self._failures} checkpoints in a row could not be saved, the last one for: "
                    f"{self._why}; {self._newest()}"
                )
            )
        if step == self._good:
            return
        arrays = _by_name(state)
        self._start(
            _Save(
                step, arrays, _json_copy(data), _manifest(step, arrays, data, meta, self._processes)
            )
        )

    def poll(self) -> CheckpointError | None:
        """Returns, once, what the last save failed with, if it has ended and nobody was told.

        Of several processes one would know before the others, and save alone: there the next `save`
        tells it.
        """
        if self._processes.count > 1 or self._outcome is None or not self._outcome.done():
            return None
        return self._take_outcome()

    def wait(self) -> None:
        """Returns once the last save is on disk and verified; tries again if it fails.

        That takes arrays that were not donated since.

        Raises:
            CheckpointError: if it could not be saved.
        """
        self._settle()
        for attempt in range(1, self._attempts):
            if self._last is None or self._last.is_gone():
                break
            time.sleep(self._retry_wait_s * 2 ** (attempt - 1))
            self._start(self._last)
            self._settle()
        if self._last is not None:
            raise self._processes.everywhere(
                CheckpointError(
                    f"checkpoint {self._last.step} could not be saved ({self._why}); "
                    f"{self._newest()}"
                )
            )

    def close(self) -> None:
        """Waits until the last save has ended; tells of its failure, and raises nothing."""
        self._settle()
        self._worker.shutdown()

    def restore_newest(self, like: Any) -> Restored | None:
        """Reads back the newest step that is whole, and moves aside those that are damaged.

        Args:
            like: a tree of arrays or shapes: the names, shapes, dtypes and shardings wanted. The
                mesh need not be the one that the step was saved on.

        Returns:
            What it held, or None where nothing was ever saved.

        Raises:
            InputError: if every step is damaged, or the newest whole one holds other arrays than
                those wanted, the first of which is named, or a step cannot be read for a reason
                that says nothing about what it holds; that one keeps its name.
        """
        steps = self._processes.first("tidy", self._tidied)
        wanted = _by_name(like)
        for step, older in itertools.zip_longest(steps, steps[1:]):
            folder = self._folder / str(step)
            where = f"checkpoint {step} of {self._workdir}"
            restored, failure = None, None
            try:
                saved = _read_manifest(folder)
                _check_same(saved.arrays, wanted, where)
                state = self._restore(folder, saved.arrays, like)
                restored = Restored(step=step, state=state, data=saved.data, meta=saved.meta)
            except (_Unreadable, InputError) as error:
                failure = error
            failure = self._worst(failure)
            if isinstance(failure, _Damaged):
                told = f"checkpoint {step} {failure.says} ({failure})"
                self._processes.first("damage", functools.partial(self._damaged, folder, told))
                rest = "it is the last one" if older is None else f"going back to {older}"
                self._tell(f"{told}; {rest}")
                continue
            if isinstance(failure, _Unreadable):
                told = InputError(f"{where} {failure.says} ({failure})")
                raise self._processes.everywhere(told) from failure
            if failure is not None:
                raise self._processes.everywhere(failure)
            self._good = step
            self._processes.go_on = f"run it again to go on from checkpoint {step}"
            return restored
        if damaged := sorted(path.name for path in self._folder.glob("*.damaged*")):
            raise self._processes.everywhere(
                InputError(
                    f"{self._folder} holds damaged checkpoints alone ({', '.join(damaged)}); to "
                    "begin from step 0, move them elsewhere"
                )
            )
        return None

    def rewind(self, step: int) -> None:
        """Moves every later step aside, so that a run goes on from this one.

        Raises:
            InputError: if there is no such step, or it is damaged or cannot be read; nothing is
                moved then.
        """
        self._settle()
        self._processes.first("rewind", functools.partial(self._rewind, step))
        self._good = step

    def _rewind(self, step: int) -> None:
        _check_step(self._workdir, step)
        try:
            _read_back(self._folder / str(step))
        except _Unreadable as failure:
            raise InputError(f"checkpoint {step} {failure.says} ({failure})") from failure
        with one_line(InputError, f"steps in {self._folder} cannot be renamed"):
            for later in _steps(self._folder):
                if later > step:
                    _move_aside(self._folder / str(later), "abandoned")

    # ---------------------------------------------------------------------------------- restoring

    def _tidied(self) -> list[int]:
        with one_line(InputError, f"{self._folder} cannot be tidied"):
            self._tidy()
        return _steps(self._folder)

    def _damaged(self, folder: Path, told: str) -> None:
        with one_line(InputError, f"{told}, and it cannot be renamed"):
            _move_aside(folder, "damaged")

    def _restore(self, folder: Path, saved: dict[str, "_Array"], like: Any) -> Any:
        """Reads a whole step; of several processes each its shards, and verifies a share.

        Raises:
            _Damaged, _Unreadable: as `_read_arrays`.
        """
        if self._processes.count == 1:
            return _restore(folder, saved, like)
        for _ in _read_arrays(folder, saved, self._share(saved)):
            pass
        wanted, context = _by_name(like), ts.Context()
        leaves = [_read_shards(folder, name, saved[name], wanted[name], context) for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _share(self, saved: dict[str, "_Array"]) -> list[str]:
        """The arrays that this process verifies: about as much as any other."""
        large_first = sorted(saved, key=lambda name: (-math.prod(saved[name].shape), name))
        return large_first[self._processes.index :: self._processes.count]

    def _worst(self, failure: Exception | None) -> Exception | None:
        """What reading a step came to in all processes together."""
        kinds = {"_Unreadable": _Unreadable, "InputError": InputError, "_Damaged": _Damaged}
        if self._processes.count == 1:
            return failure
        mine = "" if failure is None else f"{type(failure).__name__}:{failure}"
        told = [text.partition(":") for text in self._processes.gather("restored", mine)]
        for name, kind in kinds.items():
            for found, _, text in told:
                if found == name:
                    return kind(text)
        return None

    # ------------------------------------------------------------------------------------- saving

    def _start(self, save: "_Save") -> None:
        self._started += 1
        attempt = f"checkpoint {save.step} ({self._started})"
        checkpointer = self._checkpointer(attempt)
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave({n: a for n, a in save.arrays.items() if 0 not in a.shape}),
            data=ocp.args.JsonSave(save.data),
            meta=ocp.args.JsonSave(save.manifest),
        )
        error: Exception | None = None
        try:
            # Again: after one array has failed, TensorStore goes on writing the others.
            self._clear()
            if self._processes.count > 1:
                self._processes.first("room", self._try_to_write)
            checkpointer.save(self._unverified(save.step), args=arguments)
        except Exception as refused:  # the disk already says no; it counts like a later failure
            error = refused
        self._last = save
        self._outcome = self._worker.submit(self._finish, save, checkpointer, attempt, error)

    def _checkpointer(self, attempt: str) -> ocp.AsyncCheckpointer:
        processes = self._processes
        if processes.count == 1:
            return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

        def meet(key: str, timeout_ms: int) -> None:
            processes.meet(f"{attempt}/{key}", attempt, timeout_ms / 1000)

        # Named one by one: for "all" Orbax meets through a collective on the devices, from threads
        # that know nothing of the collectives of the training step.
        together = ocp.options.MultiprocessingOptions(
            primary_host=0,
            active_processes=set(range(processes.count)),
            barrier_sync_key_prefix=f"dsjax-{self._started}",
        )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(multiprocessing_options=together),
            "data": ocp.JsonCheckpointHandler(multiprocessing_options=together),
            "meta": ocp.JsonCheckpointHandler(multiprocessing_options=together),
        }
        return ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(multiprocessing_options=together), **handlers
            ),
            async_options=ocp.AsyncOptions(
                timeout_secs=max(1, round(self._timeout_s)), barrier_sync_fn=meet
            ),
            multiprocessing_options=together,
        )

    def _try_to_write(self) -> None:
        """Finds a disk that refuses before the others wait for what Orbax makes in process 0."""
        told = one_line(RunError, f"{self._folder} cannot be written")
        with told, tempfile.TemporaryFile(dir=self._folder) as file:
            file.write(bytes(1 << 16))

    def _finish(
        self,
        save: "_Save",
        checkpointer: ocp.AsyncCheckpointer,
        attempt: str,
        error: Exception | None,
    ) -> None:
        """What the worker does: waits for Orbax, reads back, gives the name, deletes old steps."""
        unverified = self._unverified(save.step)
        try:
            self._together("written", attempt, functools.partial(_written, checkpointer, error))
            if len(set(self._processes.gather("digest", save.manifest["digest"]))) > 1:
                raise RunError("the processes have different things to save")
            self._together("synced", attempt, functools.partial(self._sync, unverified))
            self._together(
                "verified", attempt, functools.partial(_read_back, unverified, self._share)
            )
            self._together("named", attempt, functools.partial(self._name, save.step))
        except BaseException:
            self._clear()
            raise
        self._processes.go_on = f"run it again to go on from checkpoint {save.step}"
        if not self._is_first:
            return
        try:
            self._rotate(save.step)
        except (OSError, InputError) as failure:  # the next save tries again
            self._tell(f"old checkpoints in {self._folder} cannot be deleted: {_reason(failure)}")

    def _together(self, part: str, attempt: str, function: Callable[[], None]) -> None:
        """Does a part of a save; raises if it fails in any process."""
        error: BaseException | None = None
        try:
            function()
        except BaseException as failed:
            error = failed
            self._processes.give_up(attempt)
        if self._processes.count == 1:
            if error is not None:
                raise error
            return
        said = self._processes.gather(part, "" if error is None else _reason(error))
        # Who gave up because another did says nothing of its own.
        failed = [(i, text) for i, text in enumerate(said) if text]
        if failed:
            number, text = min(failed, key=lambda one: "has given up" in one[1])
            raise RunError(f"process {number}: {text}") from error

    def _sync(self, unverified: Path) -> None:
        """Brings to disk what this process has written; process 0, what is nobody's own."""
        count = self._processes.count
        own = f"ocdbt.process_{self._processes.index}"
        others = {f"ocdbt.process_{i}" for i in range(count)} - {own}
        for path in [*unverified.rglob("*"), unverified]:
            parts = set(path.parts)
            if own in parts or (self._is_first and not parts & others):
                sync(path)

    def _name(self, step: int) -> None:
        """Gives a step its number."""
        if not self._is_first:
            return
        final = self._folder / str(step)
        if os.path.lexists(final):
            _move_aside(final, "abandoned")
        os.rename(self._unverified(step), final)
        sync(self._folder)

    def _clear(self) -> None:
        """Deletes what saves that failed have left."""
        if not self._is_first:
            return
        for path in self._folder.glob("*.unverified*"):
            _delete(path, ignore_errors=True)

    def _unverified(self, step: int) -> Path:
        return self._folder / f"{step}.unverified"

    def _rotate(self, newest: int) -> None:
        """Deletes the oldest whole steps up to the newest, which has just been verified."""
        whole = [step for step in _steps(self._folder) if step <= newest and self._is_whole(step)]
        for step in whole[self._keep :]:
            # Renamed first: a process that ends meanwhile leaves no half step under its number.
            _delete(_move_aside(self._folder / str(step), "deleted"))

    def _is_whole(self, step: int) -> bool:
        """Whether a step says what it holds; its arrays are not read."""
        try:
            _read_manifest(self._folder / str(step))
        except _Unreadable:
            return False
        return True

    def _settle(self) -> None:
        """Waits for the last save, and tells of its failure."""
        if self._outcome is not None:
            concurrent.futures.wait([self._outcome])
            if (error := self._take_outcome()) is not None:
                self._tell(str(error))

    def _take_outcome(self) -> CheckpointError | None:
        """Takes note of how the last save ended."""
        assert self._outcome is not None
        assert self._last is not None
        cause, self._outcome = self._outcome.exception(), None
        if cause is None:
            self._good, self._last, self._failures = self._last.step, None, 0
            return None
        self._failures, self._why = self._failures + 1, _reason(cause)
        error = CheckpointError(
            f"checkpoint {self._last.step} was not saved ({self._why}); {self._newest()}"
        )
        error.__cause__ = cause
        return error

    def _newest(self) -> str:
        try:
            step = next(filter(self._is_whole, _steps(self._folder)), None)
        except InputError as error:
            return str(error)
        return "there is no older one" if step is None else f"the newest good one is {step}"

    def _tidy(self) -> None:
        """Puts away what a process that was ended has left."""
        for path in sorted(self._folder.iterdir()):
            name = path.name
            if not path.is_dir() and not path.is_symlink():
                self._tell(f"{path} is no checkpoint; it is left alone")
            elif ".orbax-checkpoint-tmp" in name or re.fullmatch(r"\d+\.deleted(-\d+)?", name):
                _delete(path)
            elif re.fullmatch(r"\d+\.unverified", name):
                # All of it was written; whether rightly is found out in restoring.
                final = path.with_suffix("")
                _delete(path) if os.path.lexists(final) else os.rename(path, final)
            elif not _is_step(path) and not re.fullmatch(r"\d+\.(damaged|abandoned)(-\d+)?", name):
                self._tell(f"{path} is no checkpoint; it is left alone")


def read_params(
    workdir: str | os.PathLike,
    like: Any,
    step: int | None = None,
    *,
    tell: Callable[[str], None] = print_to_stderr,
) -> tuple[Any, int]:
    """Reads a part of a saved state, and changes nothing: the run may be going on.

    Args:
        workdir: the run's folder.
        like: a tree with the part wanted, of arrays or shapes: `{"params": ..., "bias": ...}`, or
            `{"extra": {"ema": ...}, "bias": ...}`.
        step: which; None takes the newest whose part is whole.
        tell: given one line on each step that is not.

    Returns:
        (the tree filled, the step).

    Raises:
        InputError: if there is no such step, it is damaged or cannot be read, or it holds other
            arrays than those asked for, the first of which is named.
    """
    check_path(workdir)
    folder = _folder_of(workdir)
    if step is not None:
        _check_step(workdir, step)
    wanted, damaged = _by_name(like), {}
    # Listed anew each time: a run that goes on deletes old steps and adds new ones.
    while True:
        left = [s for s in _steps(folder) if s not in damaged] if step is None else [step]
        if not left:
            break
        here = left[0]
        try:
            saved = _read_manifest(folder / str(here))
            _check_part(saved.arrays, wanted, f"checkpoint {here} of {workdir}")
            tree = _restore(folder / str(here), saved.arrays, like)
        except _Unreadable as failure:
            damaged[here] = f"checkpoint {here} of {workdir} {failure.says} ({failure})"
            there = os.path.lexists(folder / str(here))  # or the run has deleted it meanwhile
            if step is not None or (there and not isinstance(failure, _Damaged)):
                raise InputError(damaged[here]) from failure
            if there:
                tell(f"{damaged[here]}; going back to an older one")
            continue
        return tree, here
    if damaged:
        raise InputError(f"{next(iter(damaged.values()))}, and there is no older one")
    raise InputError(f"{workdir} holds no checkpoint")


# ------------------------------------------------------------------------------ what lies on disk


class _Unreadable(Exception):
    """A step could not be read, whatever it holds; the message says why, without the step."""

    says = "cannot be read"


class _Damaged(_Unreadable):
    """A step does not hold what was saved: that is certain."""

    says = "is damaged"


@dataclasses.dataclass(frozen=True)
class _Array:
    """What a saved array is known by."""

    shape: tuple[int, ...]
    dtype: str
    checksum: str


@dataclasses.dataclass(frozen=True)
class _Saved:
    """What a step says that it holds."""

    arrays: dict[str, _Array]
    data: dict
    meta: dict


@dataclasses.dataclass(frozen=True)
class _Save:
    """What is being saved."""

    step: int
    arrays: dict[str, Any]
    data: dict
    manifest: dict

    def is_gone(self) -> bool:
        """Whether the arrays were given to another computation since, and cannot be saved."""
        return any(isinstance(a, jax.Array) and a.is_deleted() for a in self.arrays.values())


def _manifest(
    step: int, arrays: dict[str, Any], data: dict, meta: dict, processes: Processes
) -> dict:
    """The item `meta`: the caller's, and how to tell that nothing has changed on disk."""
    sums = _sums(arrays, processes)
    told = {
        name: {"shape": list(array.shape), "dtype": str(array.dtype), "checksum": sums[name]}
        for name, array in arrays.items()
    }
    content = {"step": step, "meta": meta, "arrays": told, "data_digest": _digest(data)}
    return _json_copy({"content": content, "digest": _digest(content)})


def _sums(arrays: dict[str, Any], processes: Processes) -> dict[str, str]:
    """Sums up arrays where they lie: what lies in the host's memory without compiling anything.

    A program for each of 42 shapes took 2.3 s of the first save of `tiny`; NumPy takes 0.05 s of
    every save.
    """
    if processes.count > 1:
        parts = processes.gather("checksums", json.dumps(part_sums(arrays)))
        return combined(map(json.loads, parts))
    on_host = all(
        all(device.platform == "cpu" for device in array.devices())
        for array in arrays.values()
        if isinstance(array, jax.Array)
    )
    if on_host:
        return {name: host_checksum(np.asarray(array)) for name, array in arrays.items()}
    return checksums(arrays)


def _read_manifest(folder: Path) -> _Saved:
    """Reads what a step says that it holds.

    Raises:
        _Damaged: if it does not say so, or not what it said when it was saved, or where.
        _Unreadable: if nobody can know.
    """
    items: dict[str, Any] = {}
    for name in ("state", "data", "meta"):
        try:
            os.listdir(folder / name)
            if name != "state":
                items[name] = json.loads((folder / name / "metadata").read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _Damaged(f"{name} is missing") from error
        except OSError as error:
            raise _Unreadable(f"{name}: {_reason(error)}") from error
        except (ValueError, RecursionError) as error:
            raise _Damaged(f"{name} cannot be read: {_reason(error)}") from error
    named = int(folder.name.partition(".")[0])
    try:
        content = items["meta"]["content"]
        if _digest(content) != items["meta"]["digest"]:
            raise _Damaged("meta: checksum differs")
        if _digest(items["data"]) != content["data_digest"]:
            raise _Damaged("data: checksum differs")
        # Those that were saved before steps were written down do not say.
        if (step := content.get("step", named)) != named:
            raise _Damaged(f"holds step {step}")
    except (KeyError, TypeError) as error:
        raise _Damaged("meta is not what was saved") from error
    arrays = {
        name: _Array(tuple(told["shape"]), told["dtype"], told["checksum"])
        for name, told in content["arrays"].items()
    }
    return _Saved(arrays=arrays, data=items["data"], meta=content["meta"])


def _read_arrays(
    folder: Path, saved: dict[str, _Array], names: Iterable[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Reads arrays of a step into the host's memory, one after the other, and verifies them.

    Not through Orbax, whose reading ends, where a file is damaged, in pages of tracebacks of the
    tasks that it gave up.

    Raises:
        _Damaged: naming the first that differs from what was saved, or is not there.
        _Unreadable: naming the first that cannot be read for another reason.
    """
    context = ts.Context()  # a new one: nothing comes from the memory of an earlier reading
    for name in names:
        told = saved[name]
        if 0 in told.shape:  # Orbax takes none without elements
            yield name, np.zeros(told.shape, told.dtype)
            continue
        with _telling(name):
            array = _open(folder, name, told, context).read().result()
        if host_checksum(array) != told.checksum:
            raise _Damaged(f"{name}: checksum differs")
        yield name, array


def _open(folder: Path, name: str, told: _Array, context: ts.Context) -> ts.TensorStore:
    """Opens an array of a step; call it within `_telling`."""
    files = {"driver": "file", "path": f"{folder / 'state'}/"}
    store = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
    on_disk = ts.open({"driver": "auto", "kvstore": store}, context=context, read=True).result()
    if (found := f"{on_disk.dtype.name} {list(on_disk.shape)}") != _describe(told):
        raise _Damaged(f"{name} is {found} instead of {_describe(told)}")
    return on_disk


@contextlib.contextmanager
def _telling(name: str) -> Iterator[None]:
    """Tells what TensorStore says of an array as `_Damaged` or `_Unreadable`."""
    try:
        yield
    except _Damaged:
        raise
    except Exception as error:
        kind = _Damaged if _is_damage(error) else _Unreadable
        raise kind(f"{name}: {_reason(error)}") from error


def _read_shards(
    folder: Path, name: str, told: _Array, like: Any, context: ts.Context
) -> jax.Array:
    """Reads what this process's devices need of an array; another reading verifies it.

    Raises:
        _Damaged, _Unreadable: as `_read_arrays`.
    """
    sharding = getattr(like, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if 0 in told.shape:
        empty = np.zeros(told.shape, told.dtype)
        return jax.make_array_from_callback(told.shape, sharding, lambda index: empty[index])
    with _telling(name):
        on_disk = _open(folder, name, told, context)
        return jax.make_array_from_callback(
            told.shape, sharding, lambda index: on_disk[index].read().result()
        )


def _is_damage(error: Exception) -> bool:
    """Whether an error of TensorStore's proves that a file is missing or does not hold an array.

    All else, like no permission, too many open files or no memory, may be gone the next time.
    """
    text = str(error)
    if (system := re.search(r"os_error_code='(\d+)'", text)) is not None:
        return int(system[1]) == errno.ENOENT
    if (code := re.match("[A-Z_]+(?=: )", text)) is None:  # INVALID_ARGUMENT, for one
        return "Error decoding" in text
    # The third for a file cut short, the last for what is no compressed data or no known format.
    return code[0] in ("NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE", "FAILED_PRECONDITION")


def _read_back(folder: Path, share: Callable[[dict[str, _Array]], Iterable[str]] = iter) -> None:
    """Reads a step, or a share of its arrays, and keeps nothing of them.

    Raises:
        _Damaged: if it is not what was saved.
        _Unreadable: if nobody can know.
    """
    saved = _read_manifest(folder).arrays
    for _ in _read_arrays(folder, saved, share(saved)):
        pass


def _restore(folder: Path, saved: dict[str, _Array], like: Any) -> Any:
    """Reads the tree `like` onto the devices where it is wanted.

    Raises:
        _Damaged, _Unreadable: as `_read_arrays`.
    """
    wanted = _by_name(like)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaves = [
        _place(array, getattr(wanted[name], "sharding", None) or default)
        for name, array in _read_arrays(folder, saved, wanted)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Brings an array that every process has to the devices of all."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _written(checkpointer: ocp.AsyncCheckpointer, error: Exception | None) -> None:
    """Waits until Orbax has written, or given up."""
    try:
        if error is not None:
            raise error
    finally:
        checkpointer.close()


# -------------------------------------------------------------------------------- what is the same


def _check_same(saved: dict[str, _Array], wanted: dict[str, Any], where: str) -> None:
    """Refuses a whole step that is not of this run."""
    groups = {name.split(".")[0] for name in saved}
    missing = {name.split(".")[0] for name in wanted} - groups
    _check_part(saved, {n: a for n, a in wanted.items() if n.split(".")[0] not in missing}, where)
    if missing:
        raise InputError(
            f"{where} holds {' and '.join(sorted(groups))} alone; it cannot be resumed, but "
            "--init can start from it"
        )
    for name in saved:
        if name not in wanted:
            raise InputError(
                f"{where} has {name} ({_describe(saved[name])}), which this run has not"
            )


def _check_part(saved: dict[str, _Array], wanted: dict[str, Any], where: str) -> None:
    """Refuses a step that has not got the arrays wanted; Orbax would cast without a word."""
    for name, like in wanted.items():
        if name not in saved:
            raise InputError(f"{where} has no {name}, expected {_describe(like)}")
        if saved[name].shape != tuple(like.shape):
            shape = tuple(like.shape)
            raise InputError(f"{where}: {name} has shape {saved[name].shape}, expected {shape}")
        if saved[name].dtype != str(like.dtype):
            raise InputError(f"{where}: {name} is {saved[name].dtype}, expected {like.dtype}")


def _describe(array: Any) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves have the same dotted path")
    return named


def _json_copy(content: Any) -> Any:
    """As it will be read; what the caller changes later is not in it."""
    return json.loads(json.dumps(content))


def _digest(content: Any) -> str:
    text = json.dumps(_json_copy(content), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------ folders


def _folder_of(workdir: str | os.PathLike) -> Path:
    return Path(os.path.realpath(workdir)) / "checkpoints"  # TensorStore refuses ".."


def _steps(folder: Path) -> list[int]:
    """The steps of a folder by their names, newest first."""
    try:
        with os.scandir(folder) as found:
            return sorted((int(path.name) for path in found if _is_step(path)), reverse=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error


def _is_step(path: Path | os.DirEntry[str]) -> bool:
    return re.fullmatch(r"0|[1-9][0-9]*", path.name) is not None and path.is_dir()


def _check_step(workdir: str | os.PathLike, step: int) -> None:
    steps = _steps(_folder_of(workdir))
    if not steps:
        raise InputError(f"{workdir} holds no checkpoint")
    if step not in steps:
        has = ", ".join(map(str, reversed(steps)))
        raise InputError(f"{workdir} has no step {step}; it has {has}")


def _move_aside(path: Path, suffix: str) -> Path:
    """Renames to `<name>.<suffix>`, or `-2`, `-3` ... where that is taken; returns the new path."""
    target, number = path.with_name(f"{path.name}.{suffix}"), 2
    while os.path.lexists(target):
        target, number = path.with_name(f"{path.name}.{suffix}-{number}"), number + 1
    os.rename(path, target)
    return target


def _delete(path: Path, *, ignore_errors: bool = False) -> None:
    """Deletes a folder; of a link, the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=ignore_errors)


# --------------------------------------------------------------------------------- what is told


def _reason(error: BaseException) -> str:
    """What an error says in its first line, without what TensorStore puts around it."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    text = re.split(r" \[\w+='", text.splitlines()[0])[0]
    return text.rsplit('": ', 1)[-1][:200]


@functools.cache  # once in a process
def _quiet() -> None:
    """Leaves it to us to tell what fails, in one line: Orbax prints pages."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    others = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # TensorStore ends a write that Orbax gave up, with its loop, when another had failed.
        if str(unraisable.exc_value) != "Event loop is closed":
            others(unraisable)

    sys.unraisablehook = hook
