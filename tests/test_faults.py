"""Runs that are killed, stopped, locked out or left without a disk, in processes of their own."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

from dsjax.checkpoint import read_params
from dsjax.train.loop import _as_dict
from dsjax.train.metrics import read_metrics
from dsjax.train.state import abstract_state
from dsjax.workdir import CONFIG_FILE, read_run
from experiments import command as scripts
from experiments import pretrain
from sharding.rules import AxisRules

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 120
SETTINGS = [
    "data.held_out_fraction=0.2",
    "train.batch_size=4",
    "train.micro_batch_size=2",
    'train.batch_ramp={"start": 2, "tokens": 10000}',
    "train.ema_decay=0.9",
    "train.eval_every_steps=40",
    "train.save_every_steps=5",
]
TIMES = {
    *("data_wait_s", "goodput", "memory_bytes", "productive_s", "save_s", "share_of_peak"),
    *("tokens_per_s", "wall_s"),
}


def command(workdir, text, *more):
    settings = [f'data.sources=[{{"path": "{text}/*.txt"}}]', *SETTINGS, *more]
    return [
        *(sys.executable, "-m", "experiments.pretrain", "--preset=nano", "--sample=aei"),
        *(f"--steps={STEPS}", f"--workdir={workdir}"),
        *(argument for setting in settings for argument in ("--set", setting)),
    ]


def start(*arguments):
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(*arguments):
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def wait_for(condition, process, limit_s=240.0):
    """Returns once the condition holds; fails if the process ends before."""
    until = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < until
        time.sleep(0.02)


def last_step(workdir):
    rows = read_metrics(workdir)
    return rows[-1]["step"] if rows else 0


def newest_checkpoint(workdir):
    folder = workdir / "checkpoints"
    found = folder.iterdir() if folder.is_dir() else ()
    return max((int(path.name) for path in found if path.name.isdigit()), default=0)


def numbers_of(workdir):
    """Rows without what depends on the machine or on where a process ended."""
    return [
        {name: v for name, v in row.items() if name not in TIMES and "/" not in name}
        for row in read_metrics(workdir)
    ]


def assert_same_run(workdir, unbroken):
    """Curve, evaluations and the whole final state, bit for bit."""
    assert numbers_of(workdir) == numbers_of(unbroken)
    like = _as_dict(abstract_state(read_run(unbroken).config, AxisRules()))
    (state, step), (wanted, wanted_step) = (read_params(f, like) for f in (workdir, unbroken))
    assert step == wanted_step
    chex.assert_trees_all_equal(state, wanted)


def make_unbroken(folder):
    words = np.random.default_rng(0)
    known = ["".join(words.choice(list("aeiourstnlmdé"), size=n)) for n in range(2, 10)]
    text = folder / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i:02}.txt").write_text(" ".join(words.choice(known, size=400)))
    workdir = folder / "unbroken"
    finish(workdir, text)
    return {"text": str(text), "workdir": str(workdir)}


@pytest.fixture(scope="module")
def unbroken(once):
    """A run that nothing happened to, and its text."""
    return once("a run of 120 steps", make_unbroken)


@pytest.mark.nightly
@pytest.mark.parametrize("times", [20])
def test_killed_at_random_moments_it_gives_the_unbroken_curve(unbroken, times, tmp_path):
    """kill -9, most often while it trains and saves every few steps; then the same command."""
    workdir, rng = tmp_path / "killed", random.Random(0)
    reached = []
    for number in range(times):
        process = start(workdir, unbroken["text"])
        if number % 5 == 4:  # somewhere on the way up
            time.sleep(rng.uniform(0.0, 6.0))
        else:
            before = last_step(workdir)  # rows past the checkpoint go when training begins
            wait_for(lambda before=before: last_step(workdir) != before, process)
            wanted = newest_checkpoint(workdir) + 1 + rng.randrange(10)
            wait_for(lambda wanted=wanted: last_step(workdir) >= wanted, process)
            time.sleep(rng.uniform(0.0, 0.05))
        process.kill()
        process.communicate()
        reached.append(last_step(workdir))
    assert max(reached) < STEPS, reached  # none was too late
    assert len(set(reached)) > times // 4, reached
    finish(workdir, unbroken["text"])
    assert_same_run(workdir, unbroken["workdir"])


def test_a_signal_ends_the_step_saves_and_exits_with_0(unbroken, tmp_path):
    workdir = tmp_path / "stopped"
    process = start(workdir, unbroken["text"])
    wait_for(lambda: last_step(workdir) >= 15, process)
    other = subprocess.run(
        command(workdir, unbroken["text"]), capture_output=True, text=True, check=False
    )
    running = process.poll() is None
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    if running:  # two at once: the second is refused, and says who is there
        assert other.returncode == 2
        assert f"is in use by process {process.pid} on " in other.stderr
    assert process.returncode == 0, err
    assert time.monotonic() - sent < 30
    step = last_step(workdir)
    assert f"stopped by SIGTERM at step {step}; the same command goes on" in out
    assert step < STEPS
    assert (workdir / "checkpoints" / str(step)).is_dir()
    finish(workdir, unbroken["text"])
    assert_same_run(workdir, unbroken["workdir"])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder],
        check=False,
        capture_output=True,
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.nightly
def test_a_full_disk_keeps_the_old_step_and_ends_the_run_only_after_retries(unbroken, small_disk):
    workdir = small_disk / "run"
    process = start(workdir, unbroken["text"])
    wait_for(lambda: newest_checkpoint(workdir) >= 5, process)  # it is verified by then
    with open(small_disk / "somebody else's", "wb") as file:
        try:
            while True:
                os.write(file.fileno(), b"x" * 65536)
        except OSError:
            pass
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    assert "it is tried again" in err
    assert "checkpoints in a row could not be saved" in err or "could not be saved (" in err
    assert err.rstrip().splitlines()[-1].startswith("pretrain.py: ")  # what it ends with
    assert "Traceback" not in err
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert steps
    assert max(steps) < STEPS
    os.remove(small_disk / "somebody else's")
    finish(workdir, unbroken["text"])
    assert_same_run(workdir, unbroken["workdir"])


@pytest.mark.nightly
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(unbroken, tmp_path):
    """A bit flipped in the newest one: told in a line, put aside, and the curve is the same."""
    workdir = tmp_path / "damaged"
    process = start(workdir, unbroken["text"])
    wait_for(lambda: newest_checkpoint(workdir) >= 20, process)
    process.kill()
    process.communicate()
    folder = workdir / "checkpoints"
    newest, older = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())[::-1][:2]
    for left in folder.glob("*.unverified"):
        shutil.rmtree(left)
    files = [p for p in (folder / str(newest) / "state").rglob("d/*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    done = finish(workdir, unbroken["text"])
    assert f"checkpoint {newest} is damaged (" in done.stderr
    assert f"going back to {older}" in done.stderr
    assert (folder / f"{newest}.damaged").is_dir()
    assert_same_run(workdir, unbroken["workdir"])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (["train.batch_size=8"], "train.batch_size: 4 there, 8 here"),
        (["data.fim_rate=0.5"], "data.fim_rate: 0.0 there, 0.5 here"),
        (["mesh.wire=bfloat16"], "mesh.wire: 'full' there, 'bfloat16' here"),
        (["model.norm_eps=1e-5"], "model.norm_eps: 1e-06 there, 1e-05 here"),
        (["data.shuffle=false"], "data.shuffle: True there, False here"),
    ],
)
def test_another_configuration_is_refused_by_name(unbroken, capsys, monkeypatch, change, field):
    monkeypatch.setattr(scripts, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(scripts, "keep_compiled", lambda folder: None)
    arguments = command(unbroken["workdir"], unbroken["text"], *change)[2:]
    assert pretrain.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert field in err


@pytest.mark.nightly
def test_what_decides_no_number_may_change_when_a_run_goes_on(unbroken, tmp_path):
    workdir = tmp_path / "changed"
    process = start(workdir, unbroken["text"])
    wait_for(lambda: last_step(workdir) >= 12, process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    changes = ["train.save_every_steps=100", "train.router_every_steps=50"]
    changes += ["train.keep_checkpoints=1", "train.profile_steps=[30,31]", "mesh.expert=1"]
    finish(workdir, unbroken["text"], *changes)
    assert_same_run(workdir, unbroken["workdir"])
    content = json.loads((workdir / CONFIG_FILE).read_text())
    assert content["config"]["train"]["save_every_steps"] == 100
    assert list((workdir / "profile").rglob("perfetto_trace.json.gz"))
    assert len(list(pathlib.Path(workdir, "checkpoints").iterdir())) == 1
