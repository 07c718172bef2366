"""One process, eight virtual devices, programs compiled once and kept."""

import contextlib
import dataclasses
import fcntl
import gc
import io
import json
import os
import pathlib

# Before jax is imported. Tests check meaning, not speed: unoptimised code compiles twice as fast,
# and fused loops of LLVM's own twice as fast again as those that go through MLIR. They run slowly:
# a test that computes much does so in a process of its own, without these flags. AVX multiplies and
# adds in two roundings, so that bits do not hang on what was fused with what.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        "--xla_cpu_max_isa=AVX",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    ]
)

# Token files of the tests' corpora, outside a person's own cache; named by what they hold.
os.environ["XDG_CACHE_HOME"] = str(
    pathlib.Path(__file__).resolve().parent.parent / ".cache" / "xdg"
)

import jax
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_collection_finish():
    """Tracing makes millions of small objects: to look for cycles so often is a tenth of the time.

    What lives by now lives to the end, and is never looked at again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 10, 10)


@pytest.fixture
def rng():
    """Random numbers that are the same in every run."""
    return np.random.default_rng(0)


@dataclasses.dataclass(frozen=True)
class NanoRun:
    """A finished run of `nano`: its folder, the command that made it, and what that printed."""

    workdir: str
    arguments: list[str]  # without --workdir
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Does something once, whatever the number of workers: `once(name, make)`.

    `make(folder)` gets an empty folder and returns something for JSON, which every worker is given.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers

    def done(name, make):
        folder = shared / name
        folder.mkdir(exist_ok=True)
        result = folder / "done.json"
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not result.exists():
                result.write_text(json.dumps(make(folder)))
        return json.loads(result.read_text())

    return done


@pytest.fixture(scope="session")
def nano_run(once):
    """Pretrains `nano` for six steps through the script.

    Read only: a test that changes the folder copies it.
    """
    return NanoRun(**once("nano run", _pretrain_nano))


def _pretrain_nano(folder):
    from experiments import command, pretrain

    corpus = folder / "some text"
    corpus.mkdir()
    words = np.random.default_rng(0)
    known = ["".join(words.choice(list("aeiourstnlmdé"), size=n)) for n in range(2, 10)] + ["日本"]
    for i in range(40):
        text = " ".join(words.choice(known, size=400))
        (corpus / f"{i:02}.txt").write_text(text + ".\n", encoding="utf-8")
    arguments = [
        "--preset=nano",
        "--steps=6",
        "--sample=aei ",
        "--sample=日本",
        *("--set", f'data.sources=[{{"path": "{corpus}/*.txt"}}]'),
        *("--set", "data.held_out_fraction=0.2"),
        *("--set", "train.eval_every_steps=2"),
        *("--set", "train.save_every_steps=3"),
        *("--set", "train.router_every_steps=2"),
        *("--set", "train.ema_decay=0.9"),
    ]
    workdir = str(folder / "a run")
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        # Both would be for the process's whole life.
        patch.setattr(command, "keep_freed_memory", lambda: False)
        patch.setattr(command, "keep_compiled", lambda folder: None)
        code = pretrain.main(["pretrain", *arguments, f"--workdir={workdir}"])
    return {
        "workdir": workdir,
        "arguments": arguments,
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
    }
