"""One schema of metrics, and the two files that they are written to: JSONL and TensorBoard events.

Knows nothing about how a number came about, nor how it is drawn.
"""

import collections
import contextlib
import json
import math
import os
import re
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore
from tensorboardX.proto.summary_pb2 import HistogramProto, Summary  # pyrefly: ignore
from tensorboardX.record_writer import masked_crc32c
from tqdm import tqdm

from dsjax.errors import InputError, nearest

METRICS_FILE = "metrics.jsonl"

# Name -> unit and meaning. Families end in "/": one entry a stack, [L] or [L, E] numbers.
_TRAINING = {
    "step": "optimizer steps taken",
    "tokens": "positions seen since the start of the run",
    "batch_size": "sequences of this step",
    "seq_len": "positions of a sequence of this step",
    "loss": "main next-token cross entropy, nats a token",
    "loss_mtp": "multi-token prediction cross entropy before lambda, nats a token",
    "loss_balance": "sequence-wise balance statistic before alpha, summed over layers",
    "loss_balance_device": "the same by device group, before alpha_2 (V2)",
    "loss_balance_communication": "the same by tokens received, before alpha_3 (V2)",
    "loss_total": "what is minimised",
    "eval_loss": "held-out next-token cross entropy, nats a token",
    "eval_loss_ema": "the same of the moving average of the weights",
    "eval_overflow": "held-out tokens without room in a bounded exchange; then no loss",
    "bits_per_byte": "held-out bits a byte of text",
    "bits_per_byte_ema": "the same of the moving average of the weights",
    "learning_rate": "of this step",
    "bias_speed": "gamma of this step",
    "mtp_loss_weight": "lambda of this step",
    "grad_norm": "global norm before clipping",
    "param_norm": "global norm after the step",
    "update_norm": "global norm of the change",
    "skipped_steps": "steps so far without a finite loss and gradient",
    "dispatch_overflow": "tokens that a bounded exchange had no room for; the step is skipped",
    "tokens_per_s": "positions a second of this step, waiting for data included",
    "share_of_peak": "the model's operations a second over what the devices could do",
    "memory_bytes": "most memory ever in use: of a device, or of the process on CPU",
    "data_wait_s": "seconds since the last row spent waiting for data",
    "save_s": "seconds since the last row that saving held the loop",
    "wall_s": "seconds that all processes of the run have taken so far",
    "productive_s": "seconds of them in steps that count",
    "goodput": "productive_s / wall_s",
    "router/": "router health by stack: max_violation, load_entropy, dead_experts, bias_spread",
    "load/": "tokens of each expert by stack",
    "bias/": "balancing bias of each expert by stack",
}
# What reinforcement learning tells beside that; families are numbers by name.
REINFORCEMENT = {
    "loss_policy": "clipped surrogate of reinforcement learning, negated",
    "loss_kl": "divergence from the reference before its weight, aggregated as the loss",
    "kl": "k3 estimate of KL(policy || reference), nats a token",
    "entropy": "of the policy, nats a token",
    "ratio_mean": "importance ratio policy / old policy, mean over tokens",
    "ratio_max": "its largest",
    "ratio_min": "its smallest",
    "clipped_low": "share of tokens whose gain is cut off at 1 - clip_low",
    "clipped_high": "share of tokens whose gain is cut off at 1 + clip_high",
    "importance_mean": "old policy / sampler, mean over tokens",
    "importance_capped_mean": "the same, each at most importance_cap",
    "off_policy_share": "share of tokens in sequences that off_policy_mask leaves out",
    "logprob_gap": "|log probability by trainer - by sampler|, mean over tokens",
    "logprob_gap_max": "its largest; of steps with the weights that were sampled from",
    "reward": "sum of weighted rewards, mean over completions",
    "reward_std": "its standard deviation",
    "reward/": "each reward, mean over completions that are not masked",
    "reward_errors": "completions whose reward raised or returned nothing usable; masked",
    "reward_timeouts": "completions whose reward took too long",
    "masked_samples": "completions that are left out for want of a reward",
    "zero_std_share": "share of groups whose rewards are all equal",
    "resampled_groups": "groups that were drawn beyond the rollout's, to replace such",
    "completion_tokens": "mean length of completions",
    "completion_tokens_min": "shortest",
    "completion_tokens_max": "longest",
    "ended_tokens": "mean length of those that ended by themselves",
    "truncated_share": "share of completions that did not",
    "too_long": "problems that a rollout left out, their prompts too long",
    "weight_version": "steps of the weights that this step's samples were drawn from",
    "reference_age": "steps since the reference was replaced",
    "rollout_s": "seconds of sampling",
    "reward_s": "seconds of scoring completions",
    "score_s": "seconds of log probabilities by reference and trainer",
    "update_s": "seconds of this step",
    "rollout_tokens_per_s": "new tokens a second while sampling",
    "update_tokens_per_s": "positions a second of this step",
    "eval/": "held-out: accuracy, format, tokens (greedy); pass_1, pass_k, format_sampled",
}
SCHEMA = _TRAINING | REINFORCEMENT


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and `events.*`; a disk that refuses them stops nothing.

    Attributes:
        wall_s_before: `wall_s` of the last row of all, that of dropped rows too: steps that a kill
            undid have cost their time. 0 for a new run.
        productive_s_before: `productive_s` of the last row that was kept.
    """

    def __init__(self, workdir: str | os.PathLike, *, after_step: int):
        """Opens the files of `workdir`.

        Rows past `after_step`, which a resumed run writes again, and a last line cut short go from
        the JSONL; TensorBoard is told to hide such events. Other lines that are no rows go too;
        the file as it was is then kept as `metrics.jsonl.damaged`, and this is said.

        Raises:
            InputError: if there is a JSONL file that cannot be read and shortened.
        """
        path = Path(workdir) / METRICS_FILE
        self.wall_s_before = self.productive_s_before = 0.0
        self._kept: dict[int, set[frozenset[str]]] = {}  # step -> names of each of its rows
        alike: dict[frozenset[str], frozenset[str]] = {}  # most rows have the same: kept once
        kept_bytes, damaged = 0, []
        for number, (line, row) in enumerate(_whole_lines(path), 1):
            if row is None:
                damaged.append(number)
                continue
            self.wall_s_before = row.get("wall_s") or self.wall_s_before
            if row["step"] <= after_step:  # steps never fall from one line to the next
                self.productive_s_before = row.get("productive_s") or self.productive_s_before
                names = frozenset(row)
                self._kept.setdefault(row["step"], set()).add(alike.setdefault(names, names))
                kept_bytes += len(line)
        try:
            if damaged:
                _rewrite(path, lambda row: row["step"] <= after_step)
                _say(
                    f"{path}: lines without a row of metrics are left out ({len(damaged)}, the "
                    f"first is line {damaged[0]}); the file as it was is {_damaged(path).name}"
                )
            elif path.exists():
                os.truncate(path, kept_bytes)  # in place, which needs no room on the disk
        except OSError as error:
            raise InputError(f"cannot go on in {path}: {error.strerror or error}") from error
        now = time.time()
        hello = Event(wall_time=now, file_version="brain.Event:2")
        # On reading it TensorBoard forgets what earlier files say of these steps.
        restart = Event(
            wall_time=now,
            step=after_step + 1,
            session_log=SessionLog(status=SessionLog.START),
        )
        self._lines = _Appender(path)
        self._events = _Appender(
            _events_path(Path(workdir)), header=_record(hello) + _record(restart)
        )
        self._told = False

    def has(self, step: int, name: str) -> bool:
        """Whether a row of that step and with that name was there when the file was opened."""
        return any(name in names for names in self._kept.get(step, ()))

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row, which must have a `step`; what the disk refuses is tried again later.

        Raises:
            ValueError: for a name the schema does not know.
        """
        for name in row:
            family = name.split("/")[0] + "/"
            if name not in SCHEMA and not (family in SCHEMA and "/" in name):
                raise ValueError(f"unknown metric '{name}'{nearest(name, SCHEMA)}")
        plain = {name: _plain(value) for name, value in row.items()}
        line = json.dumps(plain, separators=(",", ":")) + "\n"
        self._lines.append(line.encode())
        self._events.append(_record(_event(plain)))
        error = self._lines.error or self._events.error
        if error and not self._told:
            _say(f"metrics cannot be written ({error}); they wait in memory, training goes on")
        self._told = error is not None

    def close(self) -> int:
        """Closes the files, after a last try to write what waits.

        Returns:
            Rows that are missing from `metrics.jsonl`; how many, and of the events, is also said on
            stderr.
        """
        lost, lost_events = self._lines.close(), self._events.close()
        if lost or lost_events:
            _say(f"metrics lost: {lost} rows of {METRICS_FILE}, {lost_events} of TensorBoard's")
        return lost


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Every whole row of a run, oldest first; none if there is no file yet.

    Raises:
        InputError: if there is a file, or a folder of its name, that cannot be read.
    """
    return [row for _, row in _whole_lines(Path(workdir) / METRICS_FILE) if row is not None]


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """(line, its row or None if it is something else); a last line cut short is left out."""
    try:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):  # else cut short by a kill: its row is written again
                    yield line, _row(line)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _rewrite(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leaves only the rows to keep, and the file as it was beside; a kill loses neither."""
    shutil.copyfile(path, _damaged(path))
    whole = path.with_name(path.name + ".tmp")
    with whole.open("wb") as file:
        for line, row in _whole_lines(path):
            if row is not None and keep(row):
                file.write(line)
    os.replace(whole, path)


def _damaged(path: Path) -> Path:
    return path.with_name(path.name + ".damaged")


def _plain(value: Any) -> Any:
    """Arrays to lists, NumPy scalars to Python's; a number that is not finite to null."""
    if getattr(value, "ndim", 0) == 2 and np.issubdtype(value.dtype, np.floating):
        # Biases of every expert: they move by gamma, and binary fractions would treble the file.
        value = np.round(np.asarray(value, np.float64), 7)
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be a file on the same full disk
        tqdm.write(message, file=sys.stderr)  # on a line of its own, also beside a progress bar


# ---- files that outlast a full disk -------------------------------------------------------------


class _Appender:
    """A file that grows by whole records; those that cannot be written wait in memory.

    tensorboardX's own writer is not used: an error ends its thread, after which its bounded queue
    blocks whoever adds to it, and with it the training.
    """

    held_bytes = 64 * 2**20  # what waits at most; the oldest records go first

    def __init__(self, path: Path, header: bytes = b""):
        """Opens the file when there is something to write; `header` goes first, if it is new."""
        self.error: OSError | None = None  # of the last try
        self._path, self._header = path, header
        self._file: int | None = None
        self._size = 0  # of the whole records in the file
        self._waiting: collections.deque[bytes] = collections.deque()
        self._waiting_bytes = self._lost = 0

    def append(self, record: bytes) -> None:
        self._waiting.append(record)
        self._waiting_bytes += len(record)
        try:
            self._flush()
            self.error = None
        except OSError as error:
            self.error = error
            while self._waiting_bytes > self.held_bytes:
                self._waiting_bytes -= len(self._waiting.popleft())
                self._lost += 1

    def close(self) -> int:
        """Returns how many records were lost."""
        try:
            self._flush()
        except OSError:
            self._lost += len(self._waiting)
        if self._file is not None:
            os.close(self._file)
        return self._lost

    def _flush(self) -> None:
        if self._waiting and self._file is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._file = os.open(self._path, flags, 0o644)
            self._size = os.fstat(self._file).st_size
        while self._waiting:
            header = self._header if self._size == 0 else b""
            self._write(header + self._waiting[0])
            self._waiting_bytes -= len(self._waiting.popleft())

    def _write(self, data: bytes) -> None:
        """Adds all of `data`, or nothing: half a record would hide all that follow."""
        assert self._file is not None
        if os.fstat(self._file).st_size > self._size:  # half of one that could not be undone
            os.ftruncate(self._file, self._size)
        done = 0
        try:
            while done < len(data):
                done += os.write(self._file, data[done:])
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)


# ---- TensorBoard's format -----------------------------------------------------------------------


def _events_path(workdir: Path) -> Path:
    """A new file whose name sorts after those of earlier processes: the order they are read in."""
    stamp = int(time.time())
    for earlier in workdir.glob("events.out.tfevents.*"):
        if found := re.match(r"events\.out\.tfevents\.(\d+)", earlier.name):
            stamp = max(stamp, int(found[1]) + 1)
    return workdir / f"events.out.tfevents.{stamp}.{socket.gethostname()}"


def _record(event: Event) -> bytes:
    """Frames an event as TFRecord does: length, its checksum, data, its checksum."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + checksums[0] + data + checksums[1]


def _event(row: dict[str, Any]) -> Event:
    """A row's scalars, one a layer of [L] families and their max, and histograms of [L, E]."""
    values: list[Summary.Value] = []

    def add(tag: str, value: Any) -> None:
        if value is not None:
            values.append(Summary.Value(tag=tag, simple_value=value))

    for name, value in row.items():
        if not isinstance(value, list):
            if name != "step":
                add(name, value)
        elif value and isinstance(value[0], list):
            histogram = _histogram(value, over_mean=name.startswith("load/"))
            if histogram is not None:
                values.append(Summary.Value(tag=name, histo=histogram))
        else:
            for layer, number in enumerate(value):
                add(f"{name}/layer_{layer}", number)
            add(f"{name}/max", max((n for n in value if n is not None), default=None))
    return Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))


def _histogram(table: list[list[Any]], *, over_mean: bool) -> HistogramProto | None:
    """All layers' experts in one; `over_mean`: in multiples of their layer's mean."""
    table_LE = np.asarray(table, np.float64)  # null becomes nan
    if over_mean:
        table_LE = table_LE / np.maximum(table_LE.mean(axis=-1, keepdims=True), 1e-20)
    values = table_LE[np.isfinite(table_LE)]
    if values.size == 0:
        return None
    counts, edges = np.histogram(values, bins=30)
    return HistogramProto(
        min=values.min(),
        max=values.max(),
        num=values.size,
        sum=values.sum(),
        sum_squares=np.square(values).sum(),
        bucket_limit=edges[1:].tolist(),
        bucket=counts.tolist(),
    )
