"""What a training run shows: metrics on disk, its clock, its share of peak, pictures, profiles."""

import errno
import gzip
import json
import os
import struct
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from dsjax.errors import InputError
from dsjax.presets import preset
from dsjax.train import clock as clock_module
from dsjax.train import flops, metrics
from dsjax.train.clock import Clock, Profiler, process_age_s
from dsjax.train.flops import memory_bytes, peak_flops_per_s, train_flops_per_token
from dsjax.train.metrics import METRICS_FILE, MetricsWriter, read_metrics
from dsjax.train.pictures import check_picture, plot_loss, plot_router, plot_schedule

# ---- metrics ------------------------------------------------------------------------------------


def read_events(path):
    """Every event of a file; checks its frames as TensorBoard does."""
    data, events = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        assert data[8:12] == struct.pack("<I", masked_crc32c(data[:8]))
        body, data = data[12 : 12 + size], data[12 + size :]
        assert len(body) == size
        assert data[:4] == struct.pack("<I", masked_crc32c(body))
        data = data[4:]
        events.append(Event.FromString(body))
    return events


def scalars(workdir):
    """Tag -> {step: value} as TensorBoard shows it: files by name, restarts purge what follows."""
    shown = {}
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        events = read_events(path)
        assert events[0].file_version == "brain.Event:2"
        for event in events:
            if event.session_log.status == SessionLog.START:
                shown = {
                    tag: {step: v for step, v in points.items() if step < event.step}
                    for tag, points in shown.items()
                }
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    points = shown.setdefault(value.tag, {})
                    assert event.step not in points, "a point is there twice"
                    points[event.step] = value.simple_value
    return {tag: points for tag, points in shown.items() if points}


def test_the_writer_refuses_names_it_does_not_know(tmp_path):
    writer = MetricsWriter(tmp_path, after_step=0)
    with pytest.raises(ValueError, match="unknown metric 'los'; did you mean 'loss'"):
        writer.write({"step": 1, "los": 2.0})
    with pytest.raises(ValueError, match="unknown metric 'rooter/moe'"):
        writer.write({"step": 1, "rooter/moe": 2.0})
    with pytest.raises(ValueError, match="unknown metric 'elapsed_s'"):
        writer.write({"step": 1, "elapsed_s": 2.0})
    writer.write({"step": 1, "loss": np.float32(0.5), "load/moe": np.array([[1, 2]])})
    writer.write({"step": 2, "loss": float("nan"), "router/moe/x": jnp.array([1.0, jnp.inf])})
    assert writer.close() == 0
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 0.5, "load/moe": [[1, 2]]},
        {"step": 2, "loss": None, "router/moe/x": [1.0, None]},
    ]


def test_the_writer_drops_what_is_written_again(tmp_path):
    path = tmp_path / METRICS_FILE
    whole = "".join(json.dumps({"step": n, "loss": n / 2}) + "\n" for n in range(1, 6))
    path.write_text(whole + '{"step": 6, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    writer = MetricsWriter(tmp_path, after_step=3)
    assert writer.has(3, "loss")
    assert not writer.has(4, "loss")
    assert not writer.has(3, "eval_loss")
    writer.write({"step": 4, "loss": 9.0})
    writer.close()
    assert [row["loss"] for row in read_metrics(tmp_path)] == [0.5, 1.0, 1.5, 9.0]
    for cut in ('{"step": 6, "lo', '{"step": 6}', '"', "\ufffd"):  # all before it kept
        path.write_text(whole + cut)
        writer = MetricsWriter(tmp_path, after_step=9)
        writer.write({"step": 6, "loss": 3.0})
        writer.close()
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


NO_ROWS = ("[]", '{"x": 1}', '{"step": true}', '{"step": "2"}', "\x00\x01", "", "[" * 100_000)


@pytest.mark.parametrize("line", NO_ROWS)
def test_a_line_that_is_no_row_costs_no_other(tmp_path, capsys, line):
    path = tmp_path / METRICS_FILE
    rows = [json.dumps({"step": n, "wall_s": 2.0 * n}) for n in range(1, 8)]
    text = "\n".join([*rows[:2], line, *rows[2:], '{"step": 8, "wa'])  # the last one is cut short
    path.write_text(text)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert path.read_text() == text
    assert capsys.readouterr().err == ""
    writer = MetricsWriter(tmp_path, after_step=5)
    assert writer.wall_s_before == 14.0
    assert writer.has(5, "wall_s")
    writer.write({"step": 6, "wall_s": 16.0})
    writer.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    damaged = tmp_path / f"{METRICS_FILE}.damaged"
    assert damaged.read_text() == text
    (told,) = capsys.readouterr().err.splitlines()
    assert told == (
        f"{path}: lines without a row of metrics are left out (1, the first is line 3); "
        f"the file as it was is {damaged.name}"
    )
    damaged.unlink()
    MetricsWriter(tmp_path, after_step=6).close()  # whole now
    assert not damaged.exists()
    assert capsys.readouterr().err == ""


def test_metrics_that_cannot_be_opened(tmp_path, monkeypatch):
    path = tmp_path / METRICS_FILE
    path.mkdir()
    for opens in (read_metrics, lambda folder: MetricsWriter(folder, after_step=0)):
        with pytest.raises(InputError, match=r"^cannot read .*metrics\.jsonl: Is a directory$"):
            opens(tmp_path)
    path.rmdir()
    path.write_text('{"step": 1}\n[]\n{"step": 2}\n')
    content = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("copyfile", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(metrics.shutil if name == "copyfile" else os, name, full)
            with pytest.raises(InputError, match=r"cannot go on in .*: No space left on device$"):
                MetricsWriter(tmp_path, after_step=2)
        assert path.read_bytes() == content


def test_no_metrics_is_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []
    writer = MetricsWriter(tmp_path, after_step=0)
    assert (writer.wall_s_before, writer.productive_s_before) == (0.0, 0.0)
    assert writer.close() == 0
    assert list(tmp_path.iterdir()) == []


def test_families_in_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, after_step=0)
    writer.write(
        {
            "step": 7,
            "loss": 2.5,
            "eval_loss": float("inf"),
            "skipped_steps": 3,
            "router/moe/max_violation": np.float32([0.5, np.nan, 1.5]),
            "load/moe": np.array([[1, 3], [20, 20]]),
            "bias/moe": np.float32([[0.001, -0.001], [np.nan, 0.0]]),
        }
    )
    writer.close()
    assert scalars(tmp_path) == {
        "loss": {7: 2.5},
        "skipped_steps": {7: 3.0},
        "router/moe/max_violation/layer_0": {7: 0.5},
        "router/moe/max_violation/layer_2": {7: 1.5},
        "router/moe/max_violation/max": {7: 1.5},
    }
    (path,) = tmp_path.glob("events.*")
    values = {v.tag: v for event in read_events(path) for v in event.summary.value}
    load, bias = values["load/moe"].histo, values["bias/moe"].histo
    assert (load.min, load.max, load.num, load.sum) == (0.5, 1.5, 4.0, 4.0)  # over its layer's mean
    assert sum(load.bucket) == 4
    assert load.bucket_limit[-1] == 1.5
    assert bias.num == 3.0
    (row,) = read_metrics(tmp_path)
    assert row["bias/moe"] == [[0.001, -0.001], [None, 0.0]]  # short, not 0.0010000000474974513


def test_abandoned_steps_vanish_and_a_finished_run_adds_nothing(tmp_path):
    def process(after_step, steps, value):
        writer = MetricsWriter(tmp_path, after_step=after_step)
        for step in steps:
            if not writer.has(step, "loss"):
                writer.write({"step": step, "loss": value})
        writer.close()

    process(0, range(8), 1.0)  # killed at 7, saved at 5
    process(5, range(6, 10), 2.0)
    wanted = [1.0] * 6 + [2.0] * 4
    assert [row["loss"] for row in read_metrics(tmp_path)] == wanted
    assert list(scalars(tmp_path)["loss"].values()) == wanted
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 3
    process(9, [9], 3.0)  # finished, and run again
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_event_files_sort_by_age_whatever_the_clock_says(tmp_path, monkeypatch):
    for step, seconds in enumerate((2e9, 2e9, 1e9)):  # the same second, and a clock set back
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda seconds=seconds: seconds)
            writer = MetricsWriter(tmp_path, after_step=step - 1)
            writer.write({"step": step, "loss": float(step)})
            writer.close()
    assert len(list(tmp_path.glob("events.*"))) == 3
    assert scalars(tmp_path) == {"loss": {0: 0.0, 1: 1.0, 2: 2.0}}


def test_times_of_earlier_processes(tmp_path):
    writer = MetricsWriter(tmp_path, after_step=0)
    for step in range(1, 6):
        writer.write({"step": step, "wall_s": 10.0 * step, "productive_s": 4.0 * step})
    writer.write({"step": 5, "eval_loss": 1.0})
    writer.close()
    writer = MetricsWriter(tmp_path, after_step=3)
    assert (writer.wall_s_before, writer.productive_s_before) == (50.0, 12.0)
    writer.close()


# ---- a full disk --------------------------------------------------------------------------------


def test_a_write_that_fails_stops_nothing(tmp_path, monkeypatch, capsys):
    writer = MetricsWriter(tmp_path, after_step=0)
    write, room = os.write, [True]

    def failing(file, data):
        if room[0]:
            return write(file, data)
        if len(data) > 5:
            return write(file, data[:5])  # a disk fills up in the middle of a record
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(file, data):
        if not room[0]:
            write(file, data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data)

    for step in range(1, 31):
        monkeypatch.setattr(os, "write", failing if step < 20 else half)
        room[0] = not (5 <= step < 15 or 22 <= step < 25)
        writer.write({"step": step, "loss": step / 2})
        whole = step if room[0] else (4 if step < 15 else 21)
        assert len(read_metrics(tmp_path)) == whole  # at once, not at the end
    assert writer.close() == 0
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 31))
    assert list(scalars(tmp_path)["loss"]) == list(range(1, 31))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2  # an outage, a line
    assert "No space left on device" in told[0]


def test_what_waits_is_bounded_and_what_is_lost_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    writer = MetricsWriter(tmp_path, after_step=0)
    monkeypatch.setattr(metrics._Appender, "held_bytes", 200)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refuse)
        for step in range(10):
            writer.write({"step": step, "loss": 0.25})
    kept = 200 // len('{"step":0,"loss":0.25}\n')
    assert writer.close() == 10 - kept
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(10))[-kept:]
    assert f"metrics lost: {10 - kept} rows of metrics.jsonl" in capsys.readouterr().err


def test_a_folder_that_is_gone_stops_nothing(tmp_path):
    folder = tmp_path / "gone"
    writer = MetricsWriter(folder, after_step=0)
    writer.write({"step": 1, "loss": 1.0})
    folder.mkdir()
    writer.write({"step": 2, "loss": 2.0})
    assert writer.close() == 0
    assert len(read_metrics(folder)) == 2


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True
    )
    if done.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_real_full_disk(small_disk, capsys):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(40 * 1024))
    writer = MetricsWriter(small_disk, after_step=0)
    for step in range(200):
        writer.write({"step": step, "loss": 1.0 / 3.0, "grad_norm": step / 7.0})
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert 0 < len(read_metrics(small_disk)) < 200
    for path in small_disk.glob("events.*"):
        read_events(path)  # whole records only
    ballast.unlink()
    writer.write({"step": 200, "loss": 0.5})
    assert writer.close() == 0
    assert [row["step"] for row in read_metrics(small_disk)] == list(range(201))
    assert list(scalars(small_disk)["loss"]) == list(range(201))
    # Full again at a restart: rows past the checkpoint can still go.
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(bytes(64 * 1024))
    writer = MetricsWriter(small_disk, after_step=99)
    assert writer.close() == 0
    assert len(read_metrics(small_disk)) == 100


# ---- clock --------------------------------------------------------------------------------------


class Time:
    """A clock that moves when told."""

    def __init__(self):
        self.s = 1000.0

    def __call__(self):
        return self.s

    def take(self, seconds):
        self.s += seconds


def test_a_clock_books_every_second():
    now = Time()
    clock = Clock(100.0, 40.0, age_s=3.0, now=now)
    now.take(2.0)  # 5 s of start-up in all
    with clock.pause():
        now.take(1.0)
    clock.begin_stage()
    with clock.waiting():
        now.take(0.5)
    now.take(7.5)  # compiles
    assert clock.tokens_per_s() is None
    row = clock.step(100)
    assert row == pytest.approx(
        {
            "data_wait_s": 0.5,
            "save_s": 0.0,
            "wall_s": 114.0,
            "productive_s": 40.0,
            "goodput": 40.0 / 114.0,
        }
    )
    with clock.saving():
        now.take(2.0)
    with clock.waiting():
        now.take(1.0)
    now.take(3.0)
    row = clock.step(100)
    assert row == pytest.approx(
        {
            "data_wait_s": 1.0,
            "save_s": 2.0,
            "tokens_per_s": 25.0,
            "wall_s": 120.0,
            "productive_s": 43.0,
            "goodput": 43.0 / 120.0,
        }
    )
    now.take(2.0)
    assert "tokens_per_s" in clock.step(100, skipped=True)  # it took its time, for nothing
    with clock.pause():
        now.take(4.0)
    assert clock.totals() == pytest.approx(
        {"wall_s": 126.0, "productive_s": 43.0, "goodput": 43.0 / 126.0}
    )
    clock.begin_stage()
    now.take(5.0)
    assert "tokens_per_s" not in clock.step(100)  # another stage compiles too
    now.take(1.0)
    assert clock.tokens_per_s() == pytest.approx(200 / 6.0)
    seconds = {
        "starting": 5.0,
        "compiling": 12.5,
        "training": 3.0,
        "skipped": 2.0,
        "waiting": 1.5,
        "evaluating": 5.0,
        "saving": 2.0,
        "other": 1.0,
    }
    assert clock.shares() == pytest.approx({kind: s / 32.0 for kind, s in seconds.items()})


def test_goodput_over_a_kill(tmp_path):
    """Ten steps of a second, killed after seven with a checkpoint at five, then done."""
    for after_step, last_step in ((0, 7), (5, 10)):
        now = Time()
        writer = MetricsWriter(tmp_path, after_step=after_step)
        clock = Clock(writer.wall_s_before, writer.productive_s_before, age_s=10.0, now=now)
        for step in range(after_step + 1, last_step + 1):
            now.take(1.0)
            writer.write({"step": step, **clock.step(8)})
        writer.close()
    last = read_metrics(tmp_path)[-1]
    assert last["wall_s"] == 10 + 7 + 10 + 5
    assert last["productive_s"] == 4 + 4  # the first of each process compiles; 6 and 7 are undone
    assert last["goodput"] == pytest.approx(8 / 32)


def test_a_failing_save_is_booked_too():
    now = Time()
    clock = Clock(age_s=0.0, now=now)

    def save():
        with clock.saving():
            now.take(2.0)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        save()
    assert clock.shares() == {"saving": 1.0}


def test_starting_and_ending_a_trace_is_no_training(tmp_path, monkeypatch):
    now = Time()
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: now.take(3.0))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: now.take(5.0))
    clock, profiler = Clock(age_s=0.0, now=now), Profiler(tmp_path, (2,))
    clock.begin_stage()
    rows = []
    for step in (1, 2, 3):
        with clock.profiling():
            profiler.before(step)
        now.take(2.0)
        with clock.profiling():
            profiler.after(step)
        rows.append(clock.step(100))
    assert [row.get("tokens_per_s") for row in rows] == [None, 50.0, 50.0]
    assert rows[-1]["productive_s"] == 4.0
    shares = {"compiling": 2.0, "training": 4.0, "profiling": 8.0}
    assert clock.shares() == pytest.approx({kind: s / 14.0 for kind, s in shares.items()})


def test_a_clock_that_has_not_moved():
    assert Clock(age_s=0.0, now=Time()).totals()["goodput"] == 0.0


def test_the_age_of_a_process(monkeypatch):
    code = "from dsjax.train.clock import process_age_s; print(process_age_s())"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took = time.monotonic() - start
    assert 0.0 < float(done.stdout) < took + 0.05  # the kernel counts hundredths

    def missing(*_):
        raise FileNotFoundError

    monkeypatch.setattr(clock_module, "open", missing, raising=False)
    assert 0.0 < process_age_s() < 1e6


# ---- share of peak, memory ----------------------------------------------------------------------


def test_train_flops_count_what_a_token_meets():
    parts = train_flops_per_token(preset("deepseek_v3"))
    # Twice the active parameters (37B with the head, 1 MTP block of about 1.5B more), thrice.
    assert 6 * 37e9 < sum(parts.values()) < 6 * 44e9
    assert set(parts) == {
        "attention",
        "experts",
        "dense_ffn",
        "router",
        "head",
        "mtp_projection",
    }


@pytest.mark.parametrize(
    ("kind", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 80GB HBM3", "float32", 494.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312.0),
        ("NVIDIA L4", "bfloat16", 121.0),
        ("Tesla T4", "float32", 8.1),
        ("TPU v4", "bfloat16", 275.0),
        ("TPU v5 lite", "bfloat16", 197.0),
        ("TPU v5p", "bfloat16", 459.0),
        ("TPU v5", "bfloat16", 459.0),
        ("TPU v6 lite", "bfloat16", 918.0),
        ("TPU7x", "bfloat16", 1153.5),
    ],
)
def test_published_peaks(kind, dtype, tflops):
    assert flops._published_flops_per_s(kind, jnp.dtype(dtype)) == tflops * 1e12


@pytest.mark.parametrize("kind", ["NVIDIA L40S", "NVIDIA H1000", "TPU v5x", "cpu"])
def test_devices_without_a_published_peak(kind):
    assert flops._published_flops_per_s(kind, jnp.dtype("bfloat16")) is None


def test_no_published_peak_for_a_dtype():
    assert flops._published_flops_per_s("Tesla T4", jnp.dtype("bfloat16")) is None
    assert flops._published_flops_per_s("NVIDIA H200", jnp.dtype("float64")) is None


def test_a_measured_peak():
    rate = peak_flops_per_s(jax.devices("cpu")[0], "float32")
    assert 1e8 < rate < 1e14


def test_memory():
    assert 10e6 < memory_bytes() < 1e13
    assert memory_bytes(jax.devices("cpu")[0]) > 10e6


# ---- pictures -----------------------------------------------------------------------------------


def png_size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def synthetic_rows(rng, *, steps, layers, experts):
    rows = [{"step": 0, "tokens": 0, "eval_loss": 9.0}]
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "tokens": step * 1000,
            "seq_len": 64 if step < steps else 128,
            "loss": 9.0 / step if step != 2 else None,
            "loss_mtp": 10.0 / step,
            "grad_norm": 1.0 / step,
            "learning_rate": 1e-3,
            "skipped_steps": int(step >= 2),
        }
        for stack, count in (("moe", layers), ("mtp", 1)):
            row[f"router/{stack}/max_violation"] = rng.random(count).tolist()
            row[f"router/{stack}/bias_spread"] = rng.random(count).tolist()
            if step % 2:
                row[f"load/{stack}"] = rng.integers(0, 9, (count, experts)).tolist()
                row[f"bias/{stack}"] = rng.normal(size=(count, experts)).tolist()
        rows.append(row)
    return [*rows, {"step": steps, "tokens": steps * 1000, "eval_loss": 1.0, "eval_loss_ema": 1.0}]


def write_rows(workdir, rows):
    (workdir / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("steps", "layers", "experts"), [(1, 1, 4), (3, 2, 16), (400, 2, 8), (9, 58, 256)]
)
def test_the_pictures_of_a_run(tmp_path, rng, steps, layers, experts):
    pytest.importorskip("matplotlib")
    write_rows(tmp_path, synthetic_rows(rng, steps=steps, layers=layers, experts=experts))
    assert plot_loss(tmp_path) == tmp_path / "loss.png"
    assert plot_router(tmp_path) == tmp_path / "router.png"
    for name in ("loss.png", "router.png"):
        width, height = png_size(tmp_path / name)
        assert 800 < width < 2000
        assert 500 < height < 2500
    assert {path.name for path in tmp_path.iterdir()} == {METRICS_FILE, "loss.png", "router.png"}


def test_pictures_of_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    assert plot_loss(tmp_path) == tmp_path / "loss.png"
    assert plot_router(tmp_path) is None
    assert plot_schedule(tmp_path, []) is None
    write_rows(tmp_path, [{"step": 0, "tokens": 0, "eval_loss": None}])  # before the first step
    assert plot_loss(tmp_path) == tmp_path / "loss.png"
    assert plot_router(tmp_path) is None


def test_rows_without_tokens_are_not_drawn(tmp_path, rng):
    pytest.importorskip("matplotlib")
    rows = synthetic_rows(rng, steps=3, layers=2, experts=4)
    write_rows(tmp_path, [*rows, {"step": 4, "loss": 1.0, "load/moe": [[1] * 4] * 2}])
    assert plot_loss(tmp_path) == tmp_path / "loss.png"
    assert plot_router(tmp_path) == tmp_path / "router.png"


def test_a_router_without_biases(tmp_path, rng):
    """A softmax router, balanced by losses alone."""
    pytest.importorskip("matplotlib")
    rows = synthetic_rows(rng, steps=5, layers=2, experts=8)
    write_rows(tmp_path, [{k: v for k, v in r.items() if "bias" not in k} for r in rows])
    assert plot_router(tmp_path) == tmp_path / "router.png"
    write_rows(tmp_path, [{k: v for k, v in r.items() if "router" not in k} for r in rows])
    assert plot_router(tmp_path) == tmp_path / "router.png"


def schedule(stages):
    """Rows of (steps, batch size, sequence length) stages, from their first and last step."""
    rows, tokens, before = [], 0, 0
    for number, (steps, batch_size, seq_len) in enumerate(stages):
        for step in sorted({0, steps // 2, steps - 1}):
            rows.append(
                {
                    "stage": number,
                    "step": before + step,
                    "tokens": tokens + step * batch_size * seq_len,
                    "batch_size": batch_size,
                    "seq_len": seq_len,
                    "learning_rate": 1e-4 / (number + 1),
                    "bias_speed": 1e-3 * (number == 0),
                    "mtp_loss_weight": 0.3,
                }
            )
        tokens, before = tokens + steps * batch_size * seq_len, before + steps
    return rows


@pytest.mark.parametrize(
    "stages",
    [
        [(1, 4, 64)],
        [(235_000, 15_360, 4096), (1000, 1920, 32_768), (1000, 480, 131_072)],
        [(20, 8, 64), (20, 8, 128)],
    ],
)
def test_the_picture_of_a_recipe(tmp_path, stages):
    pytest.importorskip("matplotlib")
    assert plot_schedule(tmp_path, schedule(stages)) == tmp_path / "schedule.png"
    png_size(tmp_path / "schedule.png")
    named = tmp_path / "mine.png"
    assert plot_schedule(str(named), schedule(stages)) == named
    png_size(named)


def test_paths_of_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    for path in ("mine.png", tmp_path / "mine.PDF", "./mine.svg", tmp_path, "."):
        check_picture(path)
        drawn = plot_schedule(path, schedule([(2, 4, 64)]))
        assert drawn is not None
        assert drawn.exists()
    (tmp_path / "file").write_text("")
    for path, message in (
        ("", "is empty"),
        ("x.xyz", r"^cannot draw 'x.xyz': a picture ends in .png, .pdf, .svg$"),
        ("x", r"^cannot draw 'x': a picture ends in"),
        ("missing/x.png", r"^cannot draw 'missing/x.png': there is no folder 'missing'$"),
        ("file/x.png", "there is no folder 'file'"),
    ):
        with pytest.raises(InputError, match=message):
            check_picture(path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(InputError, match=r"^cannot draw 'x.png': the folder '.' is not writable$"):
        check_picture("x.png")


def test_no_matplotlib_no_picture(tmp_path, rng, monkeypatch):
    write_rows(tmp_path, synthetic_rows(rng, steps=3, layers=2, experts=4))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_loss(tmp_path) is None
    assert plot_router(tmp_path) is None
    assert plot_schedule(tmp_path, schedule([(2, 4, 64)])) is None


def test_a_picture_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert plot_loss(tmp_path) is None
    assert "loss.png is not drawn: [Errno 28] No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- profiles -----------------------------------------------------------------------------------


@jax.jit
def work(x_DD):
    return jnp.sin(x_DD @ x_DD).sum()


def trace_of(folder):
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        return json.load(file)["traceEvents"]


def test_profiles_of_chosen_steps(tmp_path):
    x_DD = jnp.ones((64, 64))
    work(x_DD).block_until_ready()
    profiler = Profiler(tmp_path, (2, 3, 5, 8, 9))
    for step in range(1, 9):  # the run stops before 9
        profiler.before(step)
        work(x_DD).block_until_ready()
        profiler.after(step)
    profiler.close()
    folder = tmp_path / "profile" / "plugins" / "profile"
    assert {p.name for p in folder.iterdir()} == {"steps_2-3", "steps_5-5", "steps_8-9"}
    for name, steps in (("steps_2-3", {"2", "3"}), ("steps_5-5", {"5"}), ("steps_8-9", {"8"})):
        events = trace_of(folder / name)
        timed = [event for event in events if event.get("ph") == "X"]
        assert len(timed) > 5
        assert {e["args"]["step_num"] for e in timed if e["name"] == "train"} == steps
        assert any("work" in event["name"] for event in timed)
        (plane,) = (folder / name).glob("*.xplane.pb")  # what TensorBoard's plugin reads
        names = [p.name for p in jax.profiler.ProfileData.from_file(str(plane)).planes]
        assert any("host" in name.lower() for name in names)


def test_a_failing_profiler_stops_nothing(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no profiler here")

    for name in ("start_trace", "stop_trace"):
        with monkeypatch.context() as patch:
            patch.setattr(jax.profiler, name, fail)
            profiler = Profiler(tmp_path, (1, 3))
            for step in range(1, 5):
                profiler.before(step)
                profiler.after(step)
        told = capsys.readouterr().err
        assert "no profiler here" in told
        if name == "stop_trace":
            jax.profiler.stop_trace()  # for the tests that follow
