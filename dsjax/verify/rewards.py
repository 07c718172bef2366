"""Rewards by name or by function, over a batch of samples: a number for each, or NaN.

Knows nothing of models or of what is done with the numbers.
"""

import importlib.util
import math
import pickle
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from dsjax.errors import InputError, RunError, nearest
from dsjax.verify import accuracy, form, language
from dsjax.verify.pool import Outcome, Pool, Task
from dsjax.verify.worker import as_score, one_line

MAX_ABANDONED = 8  # threads that never came back

type Record = Mapping[str, Any]
type _Quick = Callable[[str, str, Record], float | None]


@runtime_checkable
class Reward(Protocol):
    """A number for one completion; None, NaN and infinity leave the sample out."""

    def __call__(self, prompt: str, completion: str, record: Record) -> float | None:
        """The score of what the model wrote behind the prompt."""
        ...


@dataclass(frozen=True)
class Sample:
    """The rendered text that the model continued, what it wrote, and what is known of the task."""

    prompt: str
    completion: str
    record: Record


@dataclass(frozen=True)
class Scores:
    """For each reward its scores, NaN where masked; how often it failed, and how at first."""

    values: dict[str, list[float]]
    errors: dict[str, int] = field(default_factory=dict)
    timeouts: dict[str, int] = field(default_factory=dict)
    first_error: dict[str, str] = field(default_factory=dict)


def _accuracy(prompt: str, completion: str, record: Record) -> float | None:
    return accuracy.quickly(prompt, completion, record)


def _boxed(prompt: str, completion: str, record: Record) -> float | None:
    return accuracy.boxed(prompt, completion)


def _exact(prompt: str, completion: str, record: Record) -> float | None:
    return accuracy.quickly(prompt, completion, {**record, "verify": "exact"})


def _format(prompt: str, completion: str, record: Record) -> float | None:
    return form.tagged(prompt, completion)


def _format_think(prompt: str, completion: str, record: Record) -> float | None:
    return form.thought_first(prompt, completion)


def _language(prompt: str, completion: str, record: Record) -> float | None:
    return language.consistency(prompt, completion, record.get("language", "en"))


# Each runs in this process; only accuracy leaves, with None, what it cannot decide to a worker.
BUILT_IN: Mapping[str, _Quick] = {
    "accuracy": _accuracy,
    "boxed": _boxed,
    "exact": _exact,
    "format": _format,
    "format_think": _format_think,
    "language": _language,
}
_SLOW_ACCURACY = ("dsjax.verify.accuracy:slowly", "dsjax.verify.accuracy:slowly_and_unsafe")


class Scorer:
    """Rewards for batches of samples, with deadlines; a context manager.

    Built-in rewards compare texts here. What remains, maths, code, and puzzles with many answers,
    runs in processes, as do users' functions; these are started when they are first needed, and
    killed with what they started when a sample takes too long. A function that cannot be sent to a
    process (a lambda, a closure, one of `__main__`) runs in a thread here: one that does not come
    back can only be abandoned.

    A call takes at most `ceil(samples / workers) * timeout_s` for each reward that uses processes,
    apart from their starting.

    Args:
        rewards: names of your own for a built-in reward's name, `"module:function"`, or a callable.
        workers: processes for verifiers, and as many for users' functions.
        timeout_s: for one sample and one reward.
        recycle_after: samples after which a process is replaced.
        allow_unsafe_code: lets records of the verifier "code" run what a model wrote without a
            sandbox where none works; otherwise that is an InputError.

    Raises:
        InputError: for an unknown name, or a number that makes no sense.
    """

    def __init__(
        self,
        rewards: Mapping[str, str | Reward],
        *,
        workers: int = 2,
        timeout_s: float = 10.0,
        recycle_after: int = 100,
        allow_unsafe_code: bool = False,
    ):
        if not rewards:
            raise InputError("there is no reward")
        if workers < 1 or recycle_after < 1 or not 0 < timeout_s < math.inf:
            raise InputError(
                "workers, timeout_s and recycle_after have to be positive: "
                f"{workers}, {timeout_s}, {recycle_after}"
            )
        self._quick: dict[str, _Quick] = {}
        self._sent: dict[str, str | bytes] = {}
        self._threaded: dict[str, Callable] = {}
        for name, reward in rewards.items():
            if isinstance(reward, str) and reward in BUILT_IN:
                self._quick[name] = BUILT_IN[reward]
            elif isinstance(reward, str):
                self._sent[name] = _reference(reward)
            elif (pickled := _pickled(reward)) is not None:
                self._sent[name] = pickled
            else:
                self._threaded[name] = reward
        self._names = list(rewards)
        self._slow_accuracy = _SLOW_ACCURACY[allow_unsafe_code]
        self._timeout_s, self._abandoned, self._lock = timeout_s, 0, threading.Lock()
        self._ours, self._theirs = (
            Pool(ours=ours, workers=workers, timeout_s=timeout_s, recycle_after=recycle_after)
            for ours in (True, False)
        )

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the processes."""
        self._ours.close()
        self._theirs.close()

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        """Scores of the samples, in their order.

        Raises:
            InputError: for a record that its verifier cannot use, an extra that is not installed,
                or a function that cannot be imported.
            RunError: if a process does not start, or too many threads had to be abandoned.
        """
        with self._lock:
            outcomes: dict[tuple[str, int], Outcome] = {}
            unsettled: list[tuple[str, int]] = []
            for name, quick in self._quick.items():
                for place, sample in enumerate(samples):
                    value = quick(sample.prompt, sample.completion, sample.record)
                    if value is None:
                        unsettled.append((name, place))
                    else:
                        outcomes[name, place] = Outcome(value)
            theirs = [(name, place) for name in self._sent for place in range(len(samples))]
            for (name, place), outcome in self._in(self._ours, unsettled, samples):
                # What a model wrote was more than its verifier could take: that is no right answer.
                failed = outcome.kind in ("timeout", "died")
                kept = Outcome(0.0, outcome.kind, outcome.message) if failed else outcome
                outcomes[name, place] = kept
            outcomes.update(self._in(self._theirs, theirs, samples))
            for name, reward in self._threaded.items():
                for place, sample in enumerate(samples):
                    outcomes[name, place] = self._in_thread(name, reward, sample)
            return self._scores(outcomes, len(samples))

    def _in(
        self, pool: Pool, places: list[tuple[str, int]], samples: Sequence[Sample]
    ) -> list[tuple[tuple[str, int], Outcome]]:
        tasks = [
            Task(
                self._sent.get(name, self._slow_accuracy),
                f"the reward {name!r}",
                (samples[place].prompt, samples[place].completion, samples[place].record),
            )
            for name, place in places
        ]
        return list(zip(places, pool.run(tasks), strict=True))

    def _in_thread(self, name: str, reward: Callable, sample: Sample) -> Outcome:
        results: list[Outcome] = []

        def call() -> None:
            try:
                value = as_score(reward(sample.prompt, sample.completion, sample.record))
                results.append(Outcome(value))
            except BaseException as error:
                results.append(Outcome(math.nan, "error", one_line(error)))

        thread = threading.Thread(target=call, name=f"reward {name}", daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if results:
            return results[0]
        self._abandoned += 1
        if self._abandoned >= MAX_ABANDONED:
            raise RunError(
                f"{self._abandoned} calls of rewards such as {name!r} never came back, and threads "
                "cannot be ended: put the function into a module and name it module:function"
            )
        return Outcome(math.nan, "timeout", f"it took more than {self._timeout_s:g} s")

    def _scores(self, outcomes: dict[tuple[str, int], Outcome], size: int) -> Scores:
        scores = Scores({})
        for name in self._names:
            own = [outcomes[name, place] for place in range(size)]
            failed = [outcome for outcome in own if outcome.kind != "score"]
            scores.values[name] = [outcome.value for outcome in own]
            scores.timeouts[name] = sum(outcome.kind == "timeout" for outcome in own)
            scores.errors[name] = len(failed) - scores.timeouts[name]
            if failed:
                scores.first_error[name] = failed[0].message
        return scores


def _reference(text: str) -> str:
    module, separator, name = text.partition(":")
    if not separator:
        raise InputError(
            f"unknown reward {text!r}{nearest(text, BUILT_IN)}; yours are module:function"
        )
    try:
        found = importlib.util.find_spec(module) if module and name else None
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise InputError(f"the reward {text!r} names no module that can be imported")
    return text


def _pickled(reward: Callable) -> bytes | None:
    """The callable as a reference for another process, if one can import it."""
    try:
        pickled = pickle.dumps(reward)
        module = getattr(reward, "__module__", None) or type(reward).__module__
        found = importlib.util.find_spec(module)
    except Exception:  # whatever a user's `__reduce__` raises
        return None
    loaded = getattr(sys.modules.get(module), "__file__", None)
    return pickled if found and found.origin == loaded and module != "__main__" else None
