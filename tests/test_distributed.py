"""Real processes on loopback: they agree, stop together, save together, and notice a loss."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from dsjax.errors import InputError
from dsjax.meshes import check_training
from dsjax.overrides import override
from dsjax.presets import preset
from dsjax.train.stop import StopRequest
from experiments import pretrain
from sharding import distributed
from sharding.distributed import Processes
from tests import processes as roles

ROOT = pathlib.Path(__file__).resolve().parent.parent
GONE_S = 3.0  # what `tests.processes` gives up a process after
SLOW_S = 8.0  # what a busy machine may add


@dataclasses.dataclass
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str
    at: float  # time.monotonic

    @property
    def result(self):
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])  # after gloo's

    @property
    def lines(self):
        """What it told, without what the coordination service's client logs."""
        return [x for x in self.err.splitlines() if x and not re.match(r"[IWE]\d{4} ", x)]


class Group:
    """Processes of one role, begun together."""

    def __init__(self, role, count, folder, *rest, devices=1, own=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        self.folder, self.processes = pathlib.Path(folder), []
        for index in range(count):
            arguments = rest if own is None else own[index]
            command = [sys.executable, "-m", "tests.processes", role]
            self.processes.append(
                subprocess.Popen(
                    [*command, *map(str, (index, count, port, folder, *arguments))],
                    cwd=ROOT,
                    env=env,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )

    def wait_until_running(self):
        end = time.monotonic() + 90
        wanted = [self.folder / f"running-{i}" for i in range(len(self.processes))]
        while not all(path.exists() for path in wanted):
            assert time.monotonic() < end
            if any(process.poll() is not None for process in self.processes):
                pytest.fail("\n".join(each.err for each in self.ended()))
            time.sleep(0.05)

    def ended(self):
        results = []
        for process in self.processes:
            try:
                out, err = process.communicate(timeout=90)
            except subprocess.TimeoutExpired:
                for each in self.processes:
                    each.kill()
                raise
            results.append(Ended(process.returncode, out, err, time.monotonic()))
        return results


def run(*arguments, **options):
    """As `Group`, to its end; again where another process has taken the port meanwhile."""
    for _ in range(3):
        results = Group(*arguments, **options).ended()
        if not any("Failed to start RPC server" in each.err for each in results):
            break
    return results


# ----------------------------------------------------------------------------------------- starting


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("a:1", None, 2), "--coordinator and --num_processes needs --process_id too"),
        ((None, 0, None), "--process_id needs --coordinator and --num_processes too"),
        (("a", 0, 2), "--coordinator is 'a'; it must be host:port"),
        (("a:1", 0, 0), "--num_processes is 0; it must be at least 1"),
        (("a:1", 2, 2), "--process_id is 2; it must lie in [0, 2)"),
        (("a:1", -1, 2), "--process_id is -1; it must lie in [0, 2)"),
        (("auto", 0, 2), "--coordinator=auto finds process_id and num_processes by itself"),
    ],
)
def test_arguments_that_do_not_fit(arguments, told):
    with pytest.raises(InputError) as caught:
        distributed.start(*arguments, refusal=InputError)
    assert str(caught.value) == told


def test_one_process_alone():
    with distributed.start(None, None, None) as alone:
        assert (alone.index, alone.count) == (0, 1)
        assert alone.gather("x", "a") == ["a"]
        alone.agree("x", {"a": 1})
        alone.barrier("x")
        assert alone.first("x", lambda: [1]) == [1]
        with pytest.raises(KeyError):
            alone.first("x", lambda: {}["a"])
        assert alone.agreed() is None
        stop = StopRequest(alone)
        with stop:
            assert stop.agreed() is None
            signal.raise_signal(signal.SIGTERM)
            assert (stop.signal_name, stop.agreed()) == ("SIGTERM", "SIGTERM")
    stop = StopRequest()
    stop.signal_name = "SIGINT"
    assert stop.agreed() == "SIGINT"


def test_the_code_has_a_fingerprint(tmp_path, monkeypatch):
    package = tmp_path / "some_package_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = distributed.fingerprint(package.name, "sharding")
    assert {package.name, "sharding", "jax", "jaxlib", "flax", "python"} < set(before)
    (package / "__init__.py").write_text("a = 2\n")
    after = distributed.fingerprint(package.name, "sharding")
    assert {name for name in before if before[name] != after[name]} == {package.name}


def test_nobody_else_comes(tmp_path):
    began = time.monotonic()
    group = Group("alone", 2, tmp_path)
    group.processes.pop(0).kill()
    (late,) = group.ended()
    assert late.code == 1
    assert time.monotonic() - began < 40
    assert late.lines[-1].startswith("process 1 could not join the others at 127.0.0.1:")
    assert "Traceback" not in late.err


# ----------------------------------------------------------------------------------------- agreeing


def test_a_refusal_is_everyones(tmp_path):
    """What process 0 says no to, and what the processes disagree on."""
    results = run("refuse", 2, tmp_path)
    host = socket.gethostname()
    told = (
        f"the processes disagree: config.seed is 3 in process 0 of 2 ({host}) and 4 in "
        f"process 1 of 2 ({host})"
    )
    for each in results:
        assert (each.code, each.lines) == (2, ["workdir x holds another run", told])


@pytest.mark.parametrize(
    ("role", "culprit", "own", "others"),
    [
        ("fail", 1, "text is lost on the way", "text is lost on the way"),
        ("crash", 0, "KeyError: 'a defect'", "KeyError: 'a defect'"),
    ],
)
def test_a_failure_of_one_ends_all(tmp_path, role, culprit, own, others):
    results = run(role, 2, tmp_path)
    assert [each.code for each in results] == [1, 1]
    assert results[culprit].lines[-1] == own
    host = socket.gethostname()
    assert results[1 - culprit].lines == [
        f"process {culprit} of 2 ({host}) failed: {others}; the run stops; run it again to go on"
    ]


# ----------------------------------------------------------------------------------------- stopping


def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path):
    group = Group("train", 2, tmp_path, "100000")
    group.wait_until_running()
    group.processes[1].send_signal(signal.SIGTERM)
    one, other = (each.result for each in group.ended())
    assert one == other
    assert one["why"] == "SIGTERM"
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert str(one["step"]) in names
    assert all(name.isdecimal() for name in names)


@pytest.mark.parametrize(("count", "victim"), [(4, 2), (2, 0)])
def test_a_killed_process_is_noticed_by_all(tmp_path, count, victim):
    group = Group("train", count, tmp_path, "100000")
    group.wait_until_running()
    killed = time.monotonic()
    group.processes[victim].kill()
    results = group.ended()
    told = (
        f"process {victim} of {count} ({socket.gethostname()}) is gone; the run stops; run it "
        "again to go on from checkpoint "
    )
    for index, each in enumerate(results):
        if index == victim:
            continue
        assert each.code == 1
        assert each.at - killed < 1.5 * GONE_S + SLOW_S
        assert each.lines[-1].startswith(told)
        assert len(each.lines) == 1
        assert "Traceback" not in each.err


# -------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three steps that 2 processes of 2 devices each have saved. Read only."""
    folder = tmp_path_factory.mktemp("saved")
    for each in run("save", 2, folder, devices=2):
        assert each.result["steps"] == ["1", "2", "3"]
        assert each.result["told"] == []
    return folder


def test_two_processes_save_and_others_restore(saved, tmp_path):
    expected = {"step": 3, "data": {"read": 3}, "meta": {"tokens": 30}, "told": []}
    assert roles.restore(Processes(), saved) == expected  # on the 8 devices of this process
    for each in run("restore", 4, saved):
        assert each.result == expected


def test_damage_is_everyones(saved, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    largest = max(
        (path for path in (folder / "checkpoints" / "3" / "state").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    first, second = (each.result for each in run("restore", 2, folder))
    assert first["told"][0].startswith("checkpoint 3 is damaged (")
    assert first["told"][0].endswith("; going back to 2")
    assert second["told"] == []
    assert first["step"] == second["step"] == 2
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"1", "2", "3.damaged"}


def test_a_disk_that_refuses_one_is_everyones(tmp_path):
    """While Orbax writes in process 1; then while process 0 brings it to disk."""
    results = [each.result for each in run("save", 2, tmp_path, "faults")]
    assert [each["steps"] for each in results] == [["3"], ["3"]]
    told = [re.sub(r" \(process (\d): .+\)", r" \1", line) for line in results[0]["told"]]
    assert told == [
        "checkpoint 1 was not saved 1; there is no older one",
        "checkpoint 2 was not saved 0; there is no older one",
    ]
    assert results[1]["told"] == []
    assert max(each["saved_s"] for each in results) < 30


# ------------------------------------------------------------------------------------ launch files

LAUNCH = ROOT / "experiments" / "launch"


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_a_launch_script_parses(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_a_launch_file_names_flags_and_fields_that_exist(path):
    text = path.read_text()
    command = text[text.index("-m experiments.pretrain") :]
    command = command[: command.index("mesh.expert=4") + len("mesh.expert=4")]
    known = set(pretrain.FLAGS)
    found = re.findall(r"--(\w+)", command)
    assert "coordinator" in found
    assert set(found) <= known
    settings = re.findall(r"--set (\S+=\S+)", command)
    config = override(preset(re.search(r"--preset=(\w+)", command)[1]), *settings)
    assert config.mesh.num_devices == 32
    check_training(config)
    coordinator = re.search(r"--coordinator=(\S+)", command)[1]
    assert coordinator == "auto" or {"process_id", "num_processes"} <= set(found)


def test_the_jobset_is_one():
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert jobset["kind"] == "JobSet"
    assert job["completionMode"] == "Indexed"
    script = job["template"]["spec"]["containers"][0]["command"][-1]
    assert f"--num_processes={job['parallelism']} " in script
    assert job["parallelism"] == job["completions"]
    name = f"{jobset['metadata']['name']}-workers-0-0.{jobset['metadata']['name']}"
    assert f"--coordinator={name}:55527 " in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
