"""A run of several processes, by the script: the curve of one, whatever becomes of a process."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from dsjax.train.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
WAIT_S = 300.0  # what a busy machine may take to trace and compile
STEPS = 10
CURVES = ("loss", "loss_mtp", "loss_balance", "grad_norm", "eval_loss", "tokens")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = np.random.default_rng(0)
    known = ["".join(words.choice(list("aeiourstnlmd"), size=n)) for n in range(2, 10)]
    for i in range(30):
        (folder / f"{i}.txt").write_text(" ".join(words.choice(known, size=300)) + ".\n")
    return folder


class Run:
    """Processes begun together: `count` of them with `devices` each, over one mesh."""

    def __init__(self, workdir, text, count, devices, *arguments, own=None):
        self.workdir = pathlib.Path(workdir)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "experiments.pretrain", f"--workdir={workdir}"]
        command += ["--preset=nano", f"--steps={STEPS}", "--set", "train.save_every_steps=2"]
        command += ["--set", f'data.sources=[{{"path": "{text}/*.txt"}}]', "--sample=aei "]
        command += ["--set", "data.held_out_fraction=0.2", "--set", "train.eval_every_steps=100"]
        command += ["--set", "train.micro_batch_size=4", *arguments]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        self.processes = []
        for index in range(count):
            several = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}"]
            several = [*several, f"--process_id={index}"] if count > 1 else []
            self.processes.append(
                subprocess.Popen(
                    [*command, *several, *(own[index] if own else ())],
                    cwd=ROOT,
                    env=env,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )

    def wait_for_checkpoint(self, step):
        until = time.monotonic() + WAIT_S
        while not (self.workdir / "checkpoints" / str(step)).exists():
            assert time.monotonic() < until
            if any(process.poll() is not None for process in self.processes):
                pytest.fail("\n".join(err[-2000:] for _, _, err in self.ended()))
            time.sleep(0.02)

    def ended(self):
        """(code, stdout, stderr) of each."""
        found = []
        for process in self.processes:
            try:
                out, err = process.communicate(timeout=WAIT_S)
            except subprocess.TimeoutExpired:
                for each in self.processes:
                    each.kill()
                raise
            found.append((process.returncode, out, err))
        return found


def mesh(**axes):
    return [part for name, value in axes.items() for part in ("--set", f"mesh.{name}={value}")]


def curve(workdir):
    """Each step's figures; a step that was taken twice counts as it was taken last."""
    rows = {}
    for row in read_metrics(workdir):
        rows.setdefault(row["step"], {}).update(
            {name: row[name] for name in CURVES if row.get(name) is not None}
        )
    return rows


def assert_same_curve(workdir, wanted):
    got, wanted = curve(workdir), curve(wanted)
    assert got.keys() == wanted.keys() == set(range(STEPS + 1))
    for step, figures in wanted.items():
        assert got[step].keys() == figures.keys()
        for name, value in figures.items():
            assert got[step][name] == pytest.approx(value, rel=2e-4), (step, name)


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """The run of one process with one device."""
    run = Run(tmp_path_factory.mktemp("alone") / "run", text, 1, 1)
    ((code, _, err),) = run.ended()
    assert code == 0, err[-2000:]
    return run.workdir


@pytest.mark.nightly
def test_a_killed_process_ends_all_and_others_go_on(alone, text, tmp_path):
    """Two processes of two devices; one is killed; four of one device take the run to its end."""
    layout = mesh(rules="fsdp_ep", fsdp=2, expert=2)
    run = Run(tmp_path / "run", text, 2, 2, *layout)
    run.wait_for_checkpoint(2)
    run.processes[1].kill()
    killed = time.monotonic()
    (code, _, err), _ = run.ended()
    if code == 0:
        pytest.skip("the run was over before the signal came")
    assert time.monotonic() - killed < 60
    assert code == 1
    assert "process 1 of 2" in err.splitlines()[-1], err[-2000:]
    assert "run it again" in err.splitlines()[-1]

    for code, _, err in Run(tmp_path / "run", text, 4, 1, *layout).ended():
        assert code == 0, err[-3000:]
    assert_same_curve(tmp_path / "run", alone)


@pytest.mark.nightly
def test_a_signal_to_one_saves_and_stops_all(alone, text, tmp_path):
    """Two processes; the second gets SIGTERM; one process with one device goes on."""
    run = Run(tmp_path / "run", text, 2, 1, *mesh(rules="fsdp", fsdp=2))
    run.wait_for_checkpoint(2)
    run.processes[1].send_signal(signal.SIGTERM)
    ended = run.ended()
    for code, _, err in ended:
        assert code == 0, err[-3000:]
    step = max(curve(tmp_path / "run"))
    if step == STEPS:
        pytest.skip("the run was over before the signal came")
    assert f"stopped by SIGTERM at step {step}" in ended[0][1]
    assert ended[1][1].splitlines()[-1:] == [] or "held-out" not in ended[1][1]
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()

    ((code, _, err),) = Run(tmp_path / "run", text, 1, 1).ended()
    assert code == 0, err[-3000:]
    assert_same_curve(tmp_path / "run", alone)


@pytest.mark.slow
def test_processes_that_disagree_are_refused(text, tmp_path):
    layout = mesh(rules="fsdp", fsdp=2)
    own = [(), ("--set", "train.optimizer.learning_rate=0.5")]
    for code, _, err in Run(tmp_path / "run", text, 2, 1, *layout, own=own).ended():
        assert code == 2
        told = err.splitlines()[-1]
        assert "the processes disagree: config.train.optimizer.learning_rate is " in told
        assert "process 0 of 2" in told
        assert "0.5 in process 1 of 2" in told
    assert not (tmp_path / "run").exists()
