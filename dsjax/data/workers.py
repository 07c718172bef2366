"""Processes that make things ahead of the training step, and whose death is noticed.

Knows nothing about text. Each worker sits behind a pipe of its own and answers its questions in
order; no lock or memory is shared, so that one that is killed at any moment leaves nothing behind
that another process would wait for, and its end of the pipe closes.

Differs from `grain.IterDataset.mp_prefetch`, which can only run through one stream a process, leaks
the shared memory of a worker that is killed, and needs absl's flags to be parsed.
"""

import collections
import multiprocessing
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from dsjax.data import DataError

_PATIENCE_S = 600.0  # without an answer, before a worker that lives is given up
_FOR_TRAINER = (signal.SIGINT, signal.SIGTERM)  # it ends its workers when it has saved


class Workers:
    """A fixed number of processes that all apply one function.

    Question n goes to worker n modulo their number, so which one answers changes nothing.
    """

    def __init__(self, make: Callable[[Any], Any], count: int):
        """Starts the processes; `make` and what it answers must be fit for pickle."""
        context = multiprocessing.get_context("spawn")  # threads of JAX do not survive a fork
        self._pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        self._asked = 0
        self._waiting = [collections.deque[int]() for _ in range(count)]
        self._answers: dict[int, Any] = {}
        # At exit this runs before multiprocessing waits for processes that still read.
        self._end = multiprocessing.util.Finalize(
            self, _end, (self._pipes, self.processes), exitpriority=10
        )
        # The first process would start it, and unblock the signals.
        multiprocessing.resource_tracker.ensure_running()
        # A worker inherits the mask; it needs seconds to get as far as ignoring signals itself.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_TRAINER)
        try:
            for number in range(count):
                ours, theirs = context.Pipe()
                self._pipes.append(ours)
                process = context.Process(
                    target=_serve, args=(theirs, make), daemon=True, name=f"dsjax-data-{number}"
                )
                process.start()
                theirs.close()  # or its end would stay open when the worker dies
                self.processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def ask(self, question: Any) -> int:
        """Hands a question to a worker; returns the number by which to fetch the answer."""
        number = self._asked
        worker = number % len(self._pipes)
        try:
            self._pipes[worker].send(question)
        except OSError as error:
            raise self._dead(worker) from error
        self._waiting[worker].append(number)
        self._asked += 1
        return number

    def answer(self, number: int) -> Any:
        """Waits for an answer, which can be fetched once; raises what `make` raised.

        Raises:
            DataError: if the worker has died or stands still; all are ended then.
        """
        worker = number % len(self._pipes)
        while number not in self._answers:
            try:
                if not self._pipes[worker].poll(_PATIENCE_S):
                    self.close()
                    raise DataError(f"data worker {worker} gave nothing for {_PATIENCE_S:.0f} s")
                answer = self._pipes[worker].recv()
            except (EOFError, OSError) as error:
                raise self._dead(worker) from error
            self._answers[self._waiting[worker].popleft()] = answer
        answer = self._answers.pop(number)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the processes; may be called again."""
        self._end()

    def _dead(self, worker: int) -> DataError:
        process = self.processes[worker]
        process.join(5.0)
        error = DataError(
            f"data worker {worker} (process {process.pid}) ended with code {process.exitcode}: "
            "it was killed, or could not start; run again to go on"
        )
        self.close()
        return error


def _end(pipes: Sequence[Connection], processes: Sequence[BaseProcess]) -> None:
    for pipe in pipes:
        pipe.close()  # a worker ends when it reads or writes
    for process in processes:
        process.join(0.2)
        process.kill()
        process.join()


def _serve(pipe: Connection, make: Callable[[Any], Any]) -> None:
    for number in _FOR_TRAINER:
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    try:
        while True:
            question = pipe.recv()
            try:
                answer = make(question)
            except Exception as error:
                answer = error
            pipe.send(answer)
    except (EOFError, OSError):
        pass  # the trainer has closed the pipe, or is gone
