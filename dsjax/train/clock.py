"""Where a run's wall time goes, which of it was productive, and traces of single steps.

Knows nothing about what a step computes. `Clock` keeps two sums, over all processes of a run:

- wall time: everything since each process started: importing, reading text, compiling, steps, data
  waits, evaluations, saving. The time between two processes is nobody's, and what a process does
  after the last row that it wrote is lost if it is killed.
- productive time: inside training steps that are part of the run's final curve. Not: steps that
  compile (the first of a process and of each stage), skipped ones, steps that a kill undid, data
  waits, evaluations, saving, starting and ending traces.

Goodput is productive over wall time.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

import jax
from tqdm import tqdm

_IMPORTED_S = time.monotonic()

_KINDS = (
    *("starting", "compiling", "training", "skipped"),
    *("waiting", "evaluating", "saving", "profiling"),
)


def process_age_s() -> float:
    """Seconds since this process started; since this module's import, where /proc is missing."""
    try:
        with open("/proc/self/stat", "rb") as file:
            # The second field, a name in parentheses, may hold spaces; this is the 22nd.
            started_ticks = int(file.read().rpartition(b")")[2].split()[19])
        since_boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        return since_boot_s - started_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.monotonic() - _IMPORTED_S


class Clock:
    """Books a process's time by kind; what lies between two calls belongs to the step under way.

    The blocks of `waiting`, `saving`, `pause` and `profiling` do not nest.
    """

    def __init__(
        self,
        wall_s_before: float = 0.0,
        productive_s_before: float = 0.0,
        *,
        age_s: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        """Starts with what earlier processes took.

        Args:
            wall_s_before: `MetricsWriter.wall_s_before`.
            productive_s_before: `MetricsWriter.productive_s_before`.
            age_s: seconds that the process has spent on the run already; None for all of its life.
            now: a clock that never goes back, in seconds.
        """
        self._wall_s_before, self._productive_s_before = wall_s_before, productive_s_before
        self._now = now
        self._spent_s = dict.fromkeys(_KINDS, 0.0)
        self._under_way_s = process_age_s() if age_s is None else age_s
        self._mark = now()  # time before it is booked, or under way
        self._at_row = dict(self._spent_s)
        self._compiles = True
        self._counted_s, self._counted_tokens = 0.0, 0

    def begin_stage(self) -> None:
        """Call before the first step of a process and of a stage, which compiles.

        What went before, since the last step, was not part of it but start-up.
        """
        self._book("starting")
        self._compiles = True

    @contextlib.contextmanager
    def _aside(self, kind: str) -> Iterator[None]:
        self._under_way_s += self._lap_s()
        try:
            yield
        finally:
            self._spent_s[kind] += self._lap_s()

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """`with clock.waiting(): batch = next(batches)`."""
        return self._aside("waiting")

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """`with clock.saving(): checkpoints.save(...)`."""
        return self._aside("saving")

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """`with clock.pause(): evaluate(...)`."""
        return self._aside("evaluating")

    def profiling(self) -> contextlib.AbstractContextManager[None]:
        """`with clock.profiling(): profiler.before(step)`, and the same around `after`."""
        return self._aside("profiling")

    def step(self, tokens: int, *, skipped: bool = False) -> dict[str, float]:
        """Ends a step, whose result must have arrived.

        Args:
            tokens: positions that it saw.
            skipped: whether it changed nothing, so that its time is not productive.

        Returns:
            `data_wait_s` and `save_s` since the last step, the sums `wall_s`, `productive_s` and
            `goodput`, and, unless the step compiled, `tokens_per_s`; its time holds data waits, but
            no evaluation, no saving and no starting or ending of traces.
        """
        kind = "compiling" if self._compiles else "skipped" if skipped else "training"
        waited_s = self._spent_s["waiting"] - self._at_row["waiting"]
        step_s = self._book(kind) + waited_s
        row = {"data_wait_s": waited_s, "save_s": self._spent_s["saving"] - self._at_row["saving"]}
        if not self._compiles and step_s > 0.0:
            self._counted_s += step_s
            self._counted_tokens += tokens
            row["tokens_per_s"] = tokens / step_s
        self._at_row = dict(self._spent_s)
        self._compiles = False
        return row | self.totals()

    def totals(self) -> dict[str, float]:
        """`wall_s`, `productive_s` and `goodput` of the run so far: for rows without a step."""
        wall_s = self._wall_s_before + self._process_s()
        productive_s = self._productive_s_before + self._spent_s["training"]
        goodput = productive_s / wall_s if wall_s else 0.0
        return {"wall_s": wall_s, "productive_s": productive_s, "goodput": goodput}

    def tokens_per_s(self) -> float | None:
        """Positions a second, the mean over the process's steps that did not compile, if any."""
        return self._counted_tokens / self._counted_s if self._counted_s else None

    def shares(self) -> dict[str, float]:
        """Shares of this process's wall time by kind, those that took any; they add up to 1.

        Kinds: starting, compiling, training, skipped, waiting (for data), evaluating, saving,
        profiling, and other: since the last step.
        """
        total_s = self._process_s()
        spent_s = self._spent_s | {"other": total_s - sum(self._spent_s.values())}
        return {kind: s / total_s for kind, s in spent_s.items() if s > 1e-9}

    def _book(self, kind: str) -> float:
        """Ends what is under way; returns its seconds."""
        took_s = self._under_way_s + self._lap_s()
        self._spent_s[kind] += took_s
        self._under_way_s = 0.0
        return took_s

    def _lap_s(self) -> float:
        now = self._now()
        lap_s, self._mark = now - self._mark, now
        return lap_s

    def _process_s(self) -> float:
        return sum(self._spent_s.values()) + self._under_way_s + self._now() - self._mark


class Profiler:
    """Traces chosen steps into `workdir/profile/`; a profiler that fails does not stop a run.

    Starting and ending a trace takes seconds, so both calls belong into `Clock.profiling`.

    Steps that follow each other share a trace, in `profile/plugins/profile/steps_<first>-<last>/`:
    `perfetto_trace.json.gz` opens in https://ui.perfetto.dev, and `tensorboard --logdir
    WORKDIR/profile`, with the package xprof, shows `*.xplane.pb`. Python's own calls are left out.
    """

    def __init__(self, workdir: str | os.PathLike, steps: tuple[int, ...]):
        """Takes steps as they count after they are taken: the first of a run is 1."""
        self._folder = os.path.join(workdir, "profile")
        self._steps = frozenset(steps)
        self._tracing = False
        self._step: contextlib.ExitStack | None = None

    def before(self, step: int) -> None:
        """Call before the step that will be the `step`-th."""
        if step not in self._steps:
            return
        try:
            if not self._tracing:
                last = step
                while last + 1 in self._steps:
                    last += 1
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0
                options.session_id = f"steps_{step}-{last}"
                jax.profiler.start_trace(
                    self._folder, create_perfetto_trace=True, profiler_options=options
                )
                self._tracing = True
            self._step = contextlib.ExitStack()
            self._step.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))
        except Exception as error:  # whatever a profiler may throw
            tqdm.write(f"step {step} is not profiled: {error}", file=sys.stderr)

    def after(self, step: int) -> None:
        """Call after the step, when its result has arrived."""
        if self._step is not None:
            self._step.close()
            self._step = None
        if self._tracing and step + 1 not in self._steps:
            self.close()

    def close(self) -> None:
        """Ends a trace that a run's end or an error cut short."""
        if not self._tracing:
            return
        self._tracing = False
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            tqdm.write(f"the profile in {self._folder} is not complete: {error}", file=sys.stderr)
