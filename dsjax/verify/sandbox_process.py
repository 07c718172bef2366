"""One program under way in a sandbox: started, read, and killed with all that it has started.

Knows nothing of how the sandbox is made (`dsjax.verify.sandbox_bwrap`), nor what it is for.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO

from dsjax.errors import InputError
from dsjax.verify.sandbox_bwrap import ENVIRONMENT, START_SECONDS, Limits, Way, command

_DEATH_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Text files by name, and which of them Python runs with which arguments."""

    files: Mapping[str, str]
    argv: Sequence[str] = ("main.py",)

    def __post_init__(self):
        for name in self.files:
            if name != os.path.basename(name) or name in ("", ".", "..") or "\0" in name:
                raise InputError(f"{name!r} is no name for a file of a program")
        if not self.argv or self.argv[0] not in self.files:
            raise InputError("the first of argv names a file of the program")


class Running:
    """A started program; leaving the `with` kills all that is in its sandbox, and waits for it.

    `failed` tells at the end whether the sandbox ended by itself without running the program.
    """

    def __init__(
        self,
        way: Way | None,
        program: Program,
        limits: Limits,
        *,
        stdin: IO[bytes],
        stdout: IO[bytes],
        stderr: IO[bytes] | int = subprocess.DEVNULL,
        passed: Sequence[IO[bytes]] = (),
    ):
        self.failed = False
        self._way = way
        self._stack = contextlib.ExitStack()
        self._first: int | None = None  # a pidfd of the first process within
        self._status = b""
        self._ended = False
        argv = [*program.argv, *(str(file.fileno()) for file in passed)]
        start = functools.partial(
            subprocess.Popen, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
        )
        descriptors = [file.fileno() for file in passed]
        # What is ours is closed if it does not start, and by `end` if it does.
        with contextlib.ExitStack() as undo:
            undo.callback(self._stack.close)
            if way is None:
                folder = self._stack.enter_context(tempfile.TemporaryDirectory())
                for name, text in program.files.items():
                    Path(folder, name).write_bytes(_bytes(text))
                words = command(sys.executable, limits, argv, sandboxed=False)
                self._process = start(words, cwd=folder, env=ENVIRONMENT, pass_fds=descriptors)
                undo.pop_all()
                return
            self._status_end, status = pipe(self._stack)
            with contextlib.ExitStack() as files, status:
                copied = {
                    name: files.enter_context(memory_file(name, text)).fileno()
                    for name, text in program.files.items()
                }
                self._process = start(
                    way.command(copied, status.fileno(), limits, argv),
                    env={},
                    pass_fds=[*descriptors, *copied.values(), status.fileno()],
                    **way.user(),
                )
            undo.callback(self.end)
            self._meet()
            undo.pop_all()

    def _meet(self) -> None:
        """Takes hold of the first process within, with which all others end."""
        self._status = _line(self._status_end.fileno(), time.monotonic() + START_SECONDS)
        if self._status:
            with contextlib.suppress(ProcessLookupError):
                self._first = os.pidfd_open(json.loads(self._status)["child-pid"])

    @property
    def pid(self) -> int:
        """Of the process that ends with the program."""
        return self._process.pid

    @property
    def returncode(self) -> int:
        """As a shell has it; known after the end."""
        code = self._process.returncode
        return 128 - code if code < 0 else code

    def kill(self) -> None:
        """Kills all that is in the sandbox."""
        with contextlib.suppress(ProcessLookupError):
            if self._way is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            elif self._first is not None:
                signal.pidfd_send_signal(self._first, signal.SIGKILL)
            else:
                self._process.kill()

    def end(self) -> None:
        """Kills what is left, waits until it is gone, and closes what is ours."""
        if self._ended:
            return
        self._ended = True
        with self._stack:
            if self._way is None:
                self.kill()
                self._process.wait()
                return
            by_itself = self._process.poll() is not None
            self.kill()
            if self._first is not None:
                _ready([self._first], _DEATH_SECONDS)
                os.close(self._first)
            self._process.kill()
            self._process.wait()
            if by_itself:
                self._status += _line(self._status_end.fileno(), time.monotonic())
                self.failed = b'"exit-code"' not in self._status

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def read(running: Running, streams: dict[int, bytearray], most_bytes: int, deadline: float) -> str:
    """Reads until the program ends; returns why it has to be killed, or nothing."""
    ended = os.pidfd_open(running.pid)
    try:
        waiting = {ended, *streams}
        while waiting:
            left = deadline - time.monotonic()
            if left <= 0 or not (ready := _ready(waiting, left)):
                return "time"
            for descriptor in ready:
                if descriptor == ended:
                    running.kill()  # what the program has left may still hold its pipes
                    waiting.remove(ended)
                    continue
                stream = streams[descriptor]
                data = os.read(descriptor, 1 << 16)
                stream += data
                if not data:
                    waiting.remove(descriptor)
                elif len(stream) > most_bytes:
                    del stream[most_bytes:]
                    return "output"
    finally:
        os.close(ended)
    return ""


def _ready(descriptors: Iterable[int], seconds: float) -> list[int]:
    """Those that can be read, or have ended; none of them when the time is over."""
    poll = select.poll()  # not select, which knows no descriptor above 1023
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(max(math.ceil(1000 * seconds), 0))]


def _line(descriptor: int, deadline: float) -> bytes:
    """What can be read until there is a whole line, the end, or no time left."""
    line = b""
    while not line.endswith(b"\n"):
        if not _ready([descriptor], deadline - time.monotonic()):
            break
        if not (data := os.read(descriptor, 4096)):
            break
        line += data
    return line


def memory_file(name: str, text: str) -> IO[bytes]:
    """A text as a file that no file system has, at its beginning."""
    file = os.fdopen(os.memfd_create(name), "w+b")
    file.write(_bytes(text))
    file.seek(0)
    return file


def _bytes(text: str) -> bytes:
    return text.encode(errors="replace")  # half a surrogate pair


def pipe(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """The end to read from and the end to write to, closed with the stack if not before."""
    source, sink = os.pipe()
    return (
        stack.enter_context(os.fdopen(source, "rb", buffering=0)),
        stack.enter_context(os.fdopen(sink, "wb", buffering=0)),
    )
