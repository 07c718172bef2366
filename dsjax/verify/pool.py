"""Processes that run rewards: a deadline for each sample, and none of them waits for another.

Knows nothing of what is rewarded. A process that hangs, dies or has done its number of tasks is
killed, and another one is started when it is needed.
"""

import contextlib
import json
import math
import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from dsjax.errors import InputError, RunError

START_SECONDS = 120.0  # for a process to start and import what a reward needs
_MAX_ANSWER_BYTES = 1 << 16
_WORKER = Path(__file__).with_name("worker.py")
# A reward that trains or generates would otherwise take the run's own device.
_HIDDEN = {
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ROCR_VISIBLE_DEVICES": "",
    "TPU_VISIBLE_CHIPS": "",
}


@dataclass(frozen=True)
class Task:
    """One call of one reward: `module:name`, or its pickle; its name for messages; arguments."""

    target: str | bytes
    name: str
    sample: tuple[str, str, Any]


@dataclass(frozen=True)
class Outcome:
    """A score, or NaN and why there is none."""

    value: float
    kind: Literal["score", "error", "timeout", "died"] = "score"
    message: str = ""


class Pool:
    """At most so many processes, started when there is work; `close` kills them.

    Args:
        ours: whether the tasks are verifiers of dsjax, which need no jax and get bounded memory.
        workers: how many processes.
        timeout_s: how long a task may take, once its reward is loaded.
        recycle_after: tasks after which a process is replaced.
    """

    def __init__(self, *, ours: bool, workers: int, timeout_s: float, recycle_after: int):
        self._ours, self._timeout_s, self._recycle_after = ours, timeout_s, recycle_after
        self._size = workers
        self._idle: list[_Worker] = []

    def run(self, tasks: Sequence[Task]) -> list[Outcome]:
        """Outcomes in the order of the tasks.

        Raises:
            InputError: if a reward cannot be loaded, or a verifier finds a mistake of the caller's.
            RunError: if a process does not start.
        """
        outcomes: list[Outcome | None] = [None] * len(tasks)
        waiting = list(range(len(tasks)))[::-1]
        busy: dict[_Worker, int] = {}
        again: set[int] = set()
        try:
            with selectors.DefaultSelector() as selector:
                while waiting or busy:
                    while waiting and len(busy) < self._size:
                        worker = self._next()
                        busy[worker] = place = waiting.pop()
                        selector.register(worker.source, selectors.EVENT_READ, worker)
                        worker.send(tasks[place], self._timeout_s, self._ours)
                    for worker, outcome in _ended(busy, selector):
                        selector.unregister(worker.source)
                        place = busy.pop(worker)
                        # A process that somebody killed while it waited has not begun with it.
                        if outcome.kind == "died" and not worker.loaded and place not in again:
                            again.add(place)
                            waiting.append(place)
                        else:
                            outcomes[place] = outcome
                        self._leave(worker, outcome)
        finally:  # left early: these are in the middle of something
            for worker in busy:
                worker.kill()
        return [outcome for outcome in outcomes if outcome is not None]

    def _leave(self, worker: "_Worker", outcome: Outcome) -> None:
        if outcome.kind in ("timeout", "died") or worker.done >= self._recycle_after:
            worker.kill()
        else:
            self._idle.append(worker)

    def _next(self) -> "_Worker":
        while self._idle:
            if (worker := self._idle.pop()).alive():
                return worker
            worker.kill()
        return _Worker(self._ours)

    def close(self) -> None:
        """Kills the processes; the next `run` starts others."""
        while self._idle:
            self._idle.pop().kill()


class _Worker:
    """A process, the task that it is at, and when that has to be over."""

    def __init__(self, ours: bool):
        paths = [path or os.getcwd() for path in sys.path]
        self._process = subprocess.Popen(
            # -P: the folder of the worker has a module `code`, which is not Python's.
            [sys.executable, "-P", str(_WORKER), "ours" if ours else "theirs"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_HIDDEN, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for us; and what a reward starts dies with it
        )
        self._stop = weakref.finalize(self, _end, self._process, os.getpid())
        self.source, self.done, self.deadline = _pipe(self._process.stdout), 0, math.inf
        self.loaded, self._timeout_s, self._name, self._answer = False, 0.0, "", b""

    def send(self, task: Task, timeout_s: float, ours: bool) -> None:
        """Begins a task; a process that is no longer there shows when its answer is read."""
        self.loaded, self._timeout_s, self._name, self._answer = False, timeout_s, task.name, b""
        self.deadline = time.monotonic() + START_SECONDS
        request = pickle.dumps({**vars(task), "seconds": timeout_s, "ours": ours})
        with contextlib.suppress(BrokenPipeError):
            sink = _pipe(self._process.stdin)
            sink.write(len(request).to_bytes(8, "big") + request)
            sink.flush()

    def receive(self) -> Outcome | None:
        """What the process says, if that ends the task."""
        data = os.read(self.source.fileno(), 1 << 16)
        self._answer += data
        while b"\n" in self._answer:
            line, _, self._answer = self._answer.partition(b"\n")
            outcome = self._understood(json.loads(line))
            if outcome is not None:
                return outcome
        if not data or len(self._answer) > _MAX_ANSWER_BYTES:
            return Outcome(math.nan, "died", "the process that ran it ended")
        return None

    def overdue(self) -> Outcome | None:
        """The end of a task that has taken too long."""
        if time.monotonic() < self.deadline:
            return None
        if not self.loaded:
            raise RunError(f"{self._name} is not loaded within {START_SECONDS:g} s")
        return Outcome(math.nan, "timeout", f"it took more than {self._timeout_s:g} s")

    def alive(self) -> bool:
        """Whether the process is there; one that waits for work may have been killed by others."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the process, and what it started."""
        self._stop()

    def _understood(self, answer: dict[str, Any]) -> Outcome | None:
        if "mistake" in answer:
            raise InputError(answer["mistake"])
        if "loaded" in answer:
            self.loaded, self.deadline = True, time.monotonic() + self._timeout_s
            return None
        self.done += 1
        if "error" in answer:
            return Outcome(math.nan, "error", answer["error"])
        return Outcome(answer["value"])


def _ended(
    busy: Iterable[_Worker], selector: selectors.BaseSelector
) -> list[tuple[_Worker, Outcome]]:
    """Waits until a process says something or is late; those whose task is over."""
    left = min(worker.deadline for worker in busy) - time.monotonic()
    answered = {key.data for key, _ in selector.select(max(0.0, left))}
    outcomes = [
        (worker, worker.receive() if worker in answered else worker.overdue()) for worker in busy
    ]
    return [(worker, outcome) for worker, outcome in outcomes if outcome is not None]


def _end(process: subprocess.Popen, owner: int) -> None:
    if os.getpid() != owner:  # a fork's copy of what belongs to its parent
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            _pipe(pipe).close()
    process.wait()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # it was asked for
    return pipe
