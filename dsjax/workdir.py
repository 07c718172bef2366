"""The folder of a run: whose it is, what it was configured with, and who is working in it.

Knows nothing about training or arrays. Layout: `dsjax.json` (configuration, seed, where the first
weights came from), `tokenizer/`, `checkpoints/` (`dsjax.checkpoint`), `metrics.jsonl`, `*.png`;
`.lock` while a process works in it, `.preparing/` while it is not complete.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsjax.config import Config
from dsjax.errors import InputError, RunError
from dsjax.overrides import first_difference, fixed, from_json, to_json

FORMAT = 1
CONFIG_FILE = "dsjax.json"
LOCK_FILE = ".lock"
_PREPARING = ".preparing"
_TOKENIZER = "tokenizer"
COMPILED = "compiled"  # programs that jax keeps; reading first weights may make it early
_TEMPORARY = f".{CONFIG_FILE}.tmp"
# What TensorStore or Orbax reads otherwise, and how. A URL has lost one slash once it is a path.
_NOT_IN_A_PATH = {
    ":/": "as in a URL",
    "[": "which begins a pattern",
    "]": "which ends a pattern",
    "\\": "which counts as a slash",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What `dsjax.json` holds.

    Attributes:
        config: what is trained, and on what.
        seed: decides the parameters and the order of the text.
        init: the folder that the first weights came from; None for random ones.
    """

    config: Config
    seed: int
    init: str | None = None


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
            init=from_json(str | None, content.get("init"), "init"),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def write_run(workdir: str | os.PathLike, run: Run) -> None:
    """Writes `dsjax.json`, all of it or nothing, and on disk on return; makes the folder.

    Raises:
        RunError: if the disk refuses.
    """
    folder = Path(workdir)
    content = {
        "format": FORMAT,
        "seed": run.seed,
        "init": run.init,
        "config": to_json(run.config),
    }
    temporary = folder / _TEMPORARY
    with one_line(RunError, f"workdir {folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        sync(temporary)
        os.replace(temporary, folder / CONFIG_FILE)
        sync(folder)


def check_path(workdir: str | os.PathLike) -> None:
    """Refuses a path under which Orbax and TensorStore cannot write, or not read it back.

    Raises:
        InputError: naming what is in the way.
    """
    path = os.path.realpath(workdir)
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = path.encode(errors="backslashreplace").decode()
        raise InputError(
            f"workdir {shown}: the path is not UTF-8, so no checkpoint fits"
        ) from error
    for mark, why in _NOT_IN_A_PATH.items():
        if mark in f"{path}/":
            raise InputError(
                f"workdir {workdir}: there is a {mark} in {path}, {why}; no checkpoint can be "
                "kept there"
            )


def check_workdir(workdir: str | os.PathLike, run: Run) -> bool:
    """Checks, writing nothing, that a run can use a folder.

    Returns:
        Whether the folder already holds this very run.

    Raises:
        InputError: if the folder or its checkpoints cannot be written, or it holds files of
            something else, or a run of another configuration or seed, whose first differing
            field is named.
    """
    folder = Path(workdir)
    if not str(workdir).strip() or "\0" in str(workdir):
        raise InputError(f"workdir {str(workdir)!r} is no path")
    check_path(workdir)
    _check_writable(folder, folder)
    if (folder / CONFIG_FILE).exists():
        there = _identity(read_run(folder))
        if (difference := first_difference(there, _identity(run))) is not None:
            raise InputError(f"workdir {folder} holds another run; {difference}")
        _check_writable(folder, folder / "checkpoints")
        return True
    present = {path.name for path in folder.iterdir()} if folder.exists() else set()
    ours = {LOCK_FILE, COMPILED}
    if _PREPARING in present:  # a process was ended while it prepared the folder
        ours |= {_PREPARING, _TOKENIZER, _TEMPORARY}
    if present - ours:
        raise InputError(f"workdir {folder} is not empty and holds no {CONFIG_FILE}")
    return False


def _identity(run: Run) -> dict[str, Any]:
    named: dict[str, Any] = {"seed": run.seed, "init": run.init, **fixed(run.config)}
    if (train := run.config.train).batch_ramp is not None:  # it grows by whole micro-batches
        named["train.micro_batch_size"] = train.micro_batch_size
    return named


def _check_writable(workdir: Path, folder: Path) -> None:
    """Checks that a file can be made in the folder, or where it would be made."""
    ancestor = folder
    try:
        while not os.path.lexists(ancestor):  # a link to nothing is in the way, too
            ancestor = ancestor.parent
        if not ancestor.is_dir():
            raise InputError(f"workdir {workdir}: {ancestor} is not a folder")
        with tempfile.TemporaryFile(dir=ancestor):
            pass
        if ancestor == folder:
            os.listdir(folder)
        folder.exists()  # raises for a name that no folder can have
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be written: {error.strerror}") from error


def prepare_workdir(
    workdir: str | os.PathLike, run: Run, save_tokenizer: Callable[[Path], Any]
) -> bool:
    """Makes a folder that of a run, or brings the free fields of its `dsjax.json` up to date.

    A process may be ended at any point: `dsjax.json` comes last, and until it is there a folder
    `.preparing` says that what else lies here may be thrown away.

    Args:
        workdir: the folder, which the caller has locked.
        run: whose it is to be.
        save_tokenizer: writes the tokenizer into the folder it is given; not called for a run
            that goes on.

    Returns:
        Whether the folder held this very run before.

    Raises:
        InputError: as `check_workdir`.
        RunError: if the disk refuses.
    """
    folder = Path(workdir)
    preparing = folder / _PREPARING
    known = check_workdir(folder, run)
    with one_line(RunError, f"workdir {folder} cannot be written"):
        if known:
            if read_run(folder) != run:
                write_run(folder, run)
        else:
            if preparing.exists():
                shutil.rmtree(folder / _TOKENIZER, ignore_errors=True)
            preparing.mkdir(parents=True, exist_ok=True)
            save_tokenizer(folder / _TOKENIZER)
            for path in sorted((folder / _TOKENIZER).rglob("*")):
                sync(path)
            write_run(folder, run)
        if preparing.exists():
            preparing.rmdir()
    return known


class WorkdirLock:
    """While entered, no other process, nor another lock of this one, can enter the same folder.

    The kernel holds the lock, so it is free however its holder ends; `.lock` says who that is. A
    folder that had to be made, and in which nothing was written, is gone again on leaving.
    """

    def __init__(self, workdir: str | os.PathLike):
        self._folder = Path(workdir)
        self._path = self._folder / LOCK_FILE
        self._file: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> "WorkdirLock":
        """Locks the folder; makes it where it is missing.

        Raises:
            InputError: if another holds the lock, naming process and host, or if the folder
                cannot be locked.
        """
        try:
            self._made = [p for p in (self._folder, *self._folder.parents) if not p.exists()]
            self._folder.mkdir(parents=True, exist_ok=True)
            while self._file is None:
                self._file = self._lock()
        except OSError as error:
            raise InputError(
                f"workdir {self._folder} cannot be locked: {error.strerror}"
            ) from error
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        with contextlib.suppress(OSError):  # on a full disk the lock still holds, without a name
            os.truncate(self._file, 0)
            os.pwrite(self._file, json.dumps(holder).encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._file)
        self._file = None
        with contextlib.suppress(OSError):  # not empty: there is a run now
            for path in self._made:
                path.rmdir()

    def _lock(self) -> int | None:
        """Opens and locks the file; None if its last holder removed it meanwhile."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(self._path) and os.path.samestat(os.fstat(file), self._path.stat()):
                return file
        except BlockingIOError:
            who = _holder(os.pread(file, 4096, 0))
            os.close(file)
            raise InputError(f"workdir {self._folder} is in use by {who}") from None
        except OSError:
            os.close(file)
            raise
        os.close(file)
        return None


def _holder(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
    except (ValueError, KeyError, TypeError):  # it has only just locked
        return "another process"


@contextlib.contextmanager
def one_line(kind: type[InputError | RunError], what: str) -> Iterator[None]:
    """Tells what the operating system refuses as an error of ours: `<what>: <reason>`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Returns once a file, or the names in a folder, are on disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
