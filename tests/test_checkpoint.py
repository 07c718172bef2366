"""Whatever happens to a disk, a process or a folder, a run goes on from what was whole."""

import contextlib
import dataclasses
import errno
import inspect
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dsjax.checkpoint
from dsjax.checkpoint import CheckpointError, Checkpoints, read_params
from dsjax.checksum import checksums, host_checksum
from dsjax.errors import InputError, RunError
from dsjax.overrides import override
from dsjax.presets import preset
from dsjax.workdir import (
    Run,
    WorkdirLock,
    check_workdir,
    prepare_workdir,
    read_run,
    write_run,
)

# ---------------------------------------------------------------------------------------- checksums

DTYPES = [
    np.float32,
    np.int32,
    np.uint32,
    np.float16,
    ml_dtypes.bfloat16,
    np.int16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    np.int8,
    np.uint8,
    np.bool_,
]
SHAPES = [(), (1,), (0,), (3, 0, 2), (7,), (5, 3), (1, 1, 9), (3, 257, 129)]  # the last: blocks


def random_array(rng, shape, dtype):
    """Any bits at all: not-a-numbers and negative zeros, too."""
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(np.bool_)
    words = rng.integers(0, 1 << 8 * dtype.itemsize, shape, dtype=np.uint64)
    return np.asarray(words.astype(f"u{dtype.itemsize}")).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_device_and_host_sum_alike(rng, dtype):
    arrays = {str(shape): random_array(rng, shape, dtype) for shape in SHAPES}
    told = checksums({name: jnp.asarray(array) for name, array in arrays.items()})
    assert told == {name: host_checksum(array) for name, array in arrays.items()}
    assert all(re.fullmatch("[0-9a-f]{16}", text) for text in told.values())
    assert len({told["()"], told["(5, 3)"], told["(3, 257, 129)"]}) == 3


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_each_single_bit_and_each_swap_shows(rng, dtype):
    array = random_array(rng, (4, 6), dtype)
    words = array.view(f"u{array.itemsize}")
    words[...] = rng.permutation(200)[:24].reshape(4, 6)  # no two alike
    whole = host_checksum(array)
    for index in np.ndindex(array.shape):
        for bit in range(8 * array.itemsize):
            words[index] ^= words.dtype.type(1 << bit)
            changed = host_checksum(array)
            assert changed[:8] != whole[:8]
            assert changed[8:] != whole[8:]
            words[index] ^= words.dtype.type(1 << bit)
    for one in np.ndindex(array.shape):
        for other in np.ndindex(array.shape):
            if one < other:
                words[one], words[other] = words[other], words[one]
                assert host_checksum(array) != whole
                words[one], words[other] = words[other], words[one]
    assert host_checksum(array) == whole
    assert host_checksum(array.T.copy()) != whole


def test_a_view_of_another_order_sums_like_its_copy(rng):
    array = rng.standard_normal((40, 50)).astype(np.float32)
    assert host_checksum(array.T) == host_checksum(array.T.copy())
    assert host_checksum(array[::2, 1::3]) == host_checksum(array[::2, 1::3].copy())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_checksum_does_not_know_its_mesh(rng, kind):
    array = rng.standard_normal((16, 8, 24)).astype(np.float32)
    expected = host_checksum(array)
    for shape in [(1, 8), (2, 4)]:
        mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(kind, kind))
        for spec in [("a", "b"), ("b", None, "a"), (("a", "b"),), (None, None, "b"), ()]:
            placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
            assert checksums({"x": placed}) == {"x": expected}
            with jax.set_mesh(mesh):
                assert checksums({"x": placed}) == {"x": expected}


def test_an_array_of_another_size_is_refused():
    with pytest.raises(TypeError, match=r"^opt\.count is int64; arrays of 1, 2 or 4 bytes"):
        checksums({"opt.count": np.zeros(3, np.int64)})


# -------------------------------------------------------------------------------- there and back


def state_of(step, *, size=60, ema=False):
    """A state whose content only its step decides: every kind of leaf that ours have."""
    rng = np.random.default_rng(step)
    weights = {
        "embed_VD": rng.standard_normal((size, 16)).astype(np.float32),
        "stack": {"w_LDF": rng.standard_normal((2, 16, 8)).astype(ml_dtypes.bfloat16)},
    }
    state = {
        "step": np.int32(step).reshape(()),
        "params": weights,
        "bias": {"moe": rng.standard_normal((2, 4)).astype(np.float32)},
        "opt": [
            {"mu": rng.standard_normal((size, 16)).astype(np.float32)},
            random_array(rng, (5, 7), ml_dtypes.float8_e4m3fn),
            np.zeros((0, 3), np.float32),
        ],
        "extra": {"seen": np.array([True, False]), "empty": {}},
    }
    if ema:
        state["extra"]["ema"] = jax.tree.map(lambda w: w.astype(np.float32), weights)
    return jax.tree.map(jnp.asarray, state)


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@contextlib.contextmanager
def opened(workdir, **options):
    told = []
    options = {"keep": 2, "retry_wait_s": 0.01, "tell": told.append} | options
    checkpoints = Checkpoints(workdir, **options)
    checkpoints.told = told
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def save(checkpoints, step, state=None):
    state = state_of(step) if state is None else state
    checkpoints.save(step, state, data={"read": step}, meta={"tokens": 10 * step, "rate": 0.1})


def names(workdir):
    return {path.name for path in pathlib.Path(workdir, "checkpoints").iterdir()}


def restored(workdir):
    """(step, what was told), with the content checked."""
    with opened(workdir) as checkpoints:
        found = checkpoints.restore_newest(shapes(state_of(0)))
    assert found is not None
    assert_same(found.state, state_of(found.step))
    assert found.data == {"read": found.step}
    assert found.meta == {"tokens": 10 * found.step, "rate": 0.1}
    return found.step, checkpoints.told


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A folder with steps 1, 2 and 3. Read only: a test copies it."""
    folder = tmp_path_factory.mktemp("three")
    with opened(folder, keep=3) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step)
        checkpoints.wait()
    return folder


@pytest.fixture
def three(three_steps, tmp_path):
    shutil.copytree(three_steps, tmp_path / "run")
    return tmp_path / "run"


def test_what_was_saved_comes_back(three):
    assert names(three) == {"1", "2", "3"}
    items = {path.name for path in (three / "checkpoints" / "3").iterdir()}
    assert items >= {"state", "data", "meta"}
    assert restored(three) == (3, [])
    assert names(three) == {"1", "2", "3"}


def test_nothing_was_ever_saved(tmp_path):
    with opened(tmp_path) as checkpoints:
        assert checkpoints.poll() is None
        assert checkpoints.restore_newest(shapes(state_of(0))) is None
        checkpoints.wait()
    with pytest.raises(InputError, match=rf"^{tmp_path} holds no checkpoint$"):
        read_params(tmp_path, {})


def test_the_caller_may_change_everything_after_save(tmp_path):
    """Arrays are donated, the iterator goes on."""
    state, data = state_of(1), {"read": 1}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, data=data, meta={"tokens": 10, "rate": 0.1})
        data["read"] = 99
        wipe = jax.jit(
            lambda s: jax.tree.map(lambda a: (a != a) if a.dtype == bool else a * 0, s),
            donate_argnums=0,
        )
        jax.block_until_ready(wipe(state))
        checkpoints.wait()
    assert restored(tmp_path) == (1, [])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_another_mesh(tmp_path, kind):
    def laid_out(tree, mesh_shape):
        mesh = jax.make_mesh(mesh_shape, ("data", "model"), axis_types=(kind, kind))

        def sharding(leaf):
            if leaf.ndim == 2 and leaf.shape[0] % 8 == 0 and leaf.shape[1] % 8 == 0:
                return NamedSharding(mesh, PartitionSpec("data", "model"))
            return NamedSharding(mesh, PartitionSpec())

        return jax.tree.map(sharding, tree)

    state = state_of(1, size=64)
    with opened(tmp_path) as checkpoints:
        save(checkpoints, 1, jax.device_put(state, laid_out(state, (1, 8))))
        checkpoints.wait()
        for mesh_shape in [(2, 4), (8, 1), None]:
            like = shapes(state)
            if mesh_shape is not None:
                like = jax.tree.map(
                    lambda leaf, sharding: jax.ShapeDtypeStruct(
                        leaf.shape, leaf.dtype, sharding=sharding
                    ),
                    like,
                    laid_out(state, mesh_shape),
                )
            found = checkpoints.restore_newest(like)
            assert_same(found.state, state)
            for leaf, wanted in zip(
                jax.tree.leaves(found.state), jax.tree.leaves(like), strict=True
            ):
                if mesh_shape is None:
                    assert leaf.sharding.device_set == {jax.devices()[0]}
                else:
                    assert leaf.sharding == wanted.sharding
    assert checkpoints.told == []


def test_a_path_through_the_folder_above(three, tmp_path, monkeypatch):
    """TensorStore refuses `..`, which is no damage."""
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / "beside")
    assert restored("../run") == (3, [])
    with opened("../run", keep=4) as checkpoints:
        save(checkpoints, 4)
        checkpoints.wait()
        assert checkpoints.told == []
    assert restored("../run") == (4, [])
    assert names(three) == {"1", "2", "3", "4"}
    for step in (None, 4):
        tree, read = read_params("../run", shapes(state_of(0)), step)
        assert_same(tree, state_of(4))
        assert read == 4


# ------------------------------------------------------------------------------------------- damage


def files_of(workdir, step):
    folder = workdir / "checkpoints" / str(step)
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def kind_of(path):
    """What sort of file it is: Orbax's data files have random names."""
    return re.sub(r"[0-9a-f]{32}$", "*", str(path))


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << random.Random(at).randrange(8)
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file(three_steps, tmp_path):
    """Either it is told and step 2 comes back, or no value has changed; arrays are always told."""
    told_of = {}
    for number, path in enumerate(files_of(three_steps, 3)):
        workdir = tmp_path / str(number)
        shutil.copytree(three_steps, workdir)
        broken = workdir / "checkpoints" / "3" / path
        for at in {0, broken.stat().st_size // 2, broken.stat().st_size - 1}:
            flip(broken, at)
        step, told = restored(workdir)
        if step == 2:
            assert len(told) == 1
            assert told[0].startswith("checkpoint 3 is damaged (")
            assert told[0].endswith("); going back to 2")
            assert names(workdir) == {"1", "2", "3.damaged"}
        else:
            assert (step, told) == (3, [])
        told_of.setdefault(kind_of(path), set()).add(step)
    assert told_of["data/metadata"] == told_of["meta/metadata"] == {2}
    assert told_of["state/manifest.ocdbt"] == {2}
    assert 2 in told_of["state/ocdbt.process_0/d/*"]


def test_a_flipped_bit_in_the_arrays_themselves(three_steps, tmp_path):
    """Places all over the largest file, where hardly a bit means nothing to the compression."""
    passed_over = 0
    for at in range(1, 9):
        workdir = tmp_path / str(at)
        shutil.copytree(three_steps, workdir)
        largest = array_file(workdir)
        flip(largest, largest.stat().st_size * at // 9)
        step, told = restored(workdir)
        if step == 2:
            assert re.match(r"checkpoint 3 is damaged \((params|opt|bias|extra|step)\b", told[0])
            passed_over += 1
    assert passed_over >= 6


def stale_values(workdir):
    """Arrays that are readable and wrong: those of step 2, written by Orbax itself."""
    folder = workdir / "checkpoints"
    shutil.rmtree(folder / "3" / "state")
    shutil.copytree(folder / "2" / "state", folder / "3" / "state")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def array_file(workdir):
    paths = (workdir / "checkpoints" / "3" / "state" / "ocdbt.process_0" / "d").iterdir()
    return max(paths, key=lambda path: path.stat().st_size)


def without_leaf(workdir):
    """A whole Orbax tree that lacks what `meta` says is there."""
    state = workdir / "checkpoints" / "3" / "state"
    shutil.rmtree(state)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(state, {"step": jnp.int32(3)})


def renamed(workdir):
    shutil.rmtree(workdir / "checkpoints" / "3")
    shutil.copytree(workdir / "checkpoints" / "2", workdir / "checkpoints" / "3")


DAMAGE = {
    "stale values": (stale_values, r"[\w.]+: checksum differs"),
    "array file truncated": (lambda w: cut(array_file(w)), r"[\w.]+: .+"),
    "array file deleted": (lambda w: array_file(w).unlink(), r"[\w.]+: .+"),
    "manifest deleted": (
        lambda w: (w / "checkpoints" / "3" / "state" / "manifest.ocdbt").unlink(),
        r"[\w.]+: .+",
    ),
    "meta truncated": (
        lambda w: cut(w / "checkpoints" / "3" / "meta" / "metadata"),
        r"meta cannot be read: .+",
    ),
    "meta empty": (
        lambda w: (w / "checkpoints" / "3" / "meta" / "metadata").write_text("{}"),
        r"meta is not what was saved",
    ),
    "meta other": (
        lambda w: edit(
            w / "checkpoints" / "3" / "meta" / "metadata", '"tokens": 30', '"tokens": 31'
        ),
        r"meta: checksum differs",
    ),
    "data other": (
        lambda w: (w / "checkpoints" / "3" / "data" / "metadata").write_text('{"read": 4}'),
        r"data: checksum differs",
    ),
    "item missing": (
        lambda w: shutil.rmtree(w / "checkpoints" / "3" / "data"),
        r"data is missing",
    ),
    "empty folder": (
        lambda w: [
            shutil.rmtree(w / "checkpoints" / "3"),
            (w / "checkpoints" / "3").mkdir(),
        ],
        r"state is missing",
    ),
    "folder renamed": (renamed, r"holds step 2"),
    "leaf missing": (without_leaf, r"[\w.]+( is missing|: .+)"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_step_is_told_moved_aside_and_passed_over(three, kind):
    damage, reason = DAMAGE[kind]
    damage(three)
    with pytest.raises(InputError, match=rf"^checkpoint 3 of .* is damaged \({reason}\)$"):
        read_params(three, shapes(state_of(0)), 3)
    lines = []
    tree, step = read_params(three, shapes(state_of(0)), tell=lines.append)
    assert_same(tree, state_of(2))
    assert step == 2
    assert re.fullmatch(rf"checkpoint 3 of .* damaged \({reason}\); going back to an .*", *lines)
    assert names(three) == {"1", "2", "3"}  # reading changes nothing
    step, told = restored(three)
    assert step == 2
    assert re.fullmatch(rf"checkpoint 3 is damaged \({reason}\); going back to 2", *told)
    assert names(three) == {"1", "2", "3.damaged"}
    assert restored(three) == (2, [])


def test_files_that_no_value_depends_on_cost_no_step(three):
    """Orbax's own description of the tree: ours is in `meta`."""
    for name in ("_METADATA", "_sharding"):
        cut(three / "checkpoints" / "3" / "state" / name)
    (three / "checkpoints" / "3" / "_CHECKPOINT_METADATA").unlink()
    assert restored(three) == (3, [])


def test_an_earlier_damaged_one_keeps_its_name(three):
    (three / "checkpoints" / "3.damaged").mkdir()
    (three / "checkpoints" / "3.damaged-2").mkdir()
    cut(array_file(three))
    assert restored(three)[0] == 2
    assert names(three) == {"1", "2", "3.damaged", "3.damaged-2", "3.damaged-3"}


def test_all_damaged(three):
    for step in (1, 2, 3):
        shutil.rmtree(three / "checkpoints" / str(step) / "state")
    for _ in range(2):  # the second time nothing but their names tells
        with opened(three) as checkpoints, pytest.raises(InputError) as error:
            checkpoints.restore_newest(shapes(state_of(0)))
        assert "damaged checkpoints alone (1.damaged, 2.damaged, 3.damaged)" in str(error.value)
        assert "\n" not in str(error.value)
    assert names(three) == {"1.damaged", "2.damaged", "3.damaged"}


def test_read_params_of_damaged_steps_alone(three):
    for step in (1, 2, 3):
        shutil.rmtree(three / "checkpoints" / str(step) / "state")
    with pytest.raises(InputError, match=r"3 of .* \(state is missing\), and there is no older"):
        read_params(three, shapes(state_of(0)), tell=lambda line: None)


def test_what_is_no_step_is_passed_over(three):
    folder = three / "checkpoints"
    (folder / "9.orbax-checkpoint-tmp-123" / "state").mkdir(parents=True)
    (folder / "8.unverified.orbax-checkpoint-tmp").mkdir()
    (folder / "7.deleted" / "state").mkdir(parents=True)
    (folder / "6.abandoned").mkdir()
    (folder / "best").mkdir()
    (folder / "0012").mkdir()
    (folder / "٣").mkdir()
    (folder / "5").write_text("a file")
    step, told = restored(three)
    assert step == 3
    assert sorted(line.rsplit("/", 1)[1] for line in told) == sorted(
        f"{name} is no checkpoint; it is left alone" for name in ("best", "0012", "٣", "5")
    )
    assert names(three) == {"1", "2", "3", "6.abandoned", "best", "0012", "٣", "5"}


def test_a_step_written_but_not_yet_read_back_counts_after_a_kill(three):
    folder = three / "checkpoints"
    (folder / "3").rename(folder / "3.unverified")
    assert restored(three) == (3, [])
    (folder / "3").rename(folder / "3.unverified")
    cut(folder / "3.unverified" / "meta" / "metadata")
    assert restored(three)[0] == 2


def test_a_device_without_room_is_no_damage(three, monkeypatch):
    """Only what lies on disk is called damaged."""

    def full(*args, **kwargs):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(jax, "device_put", full)
    with opened(three) as checkpoints, pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        checkpoints.restore_newest(shapes(state_of(0)))
    assert names(three) == {"1", "2", "3"}


def tensorstore_fails(message):
    def fail(*args, **kwargs):
        raise ValueError(message)

    return lambda patch: patch.setattr(dsjax.checkpoint.ts, "open", fail)


def system_fails(code, name):
    """The call `os.<name>`, or the reading of a file, fails for step 3 alone."""

    def apply(patch):
        where, call = (pathlib.Path, "read_bytes") if name == "read_bytes" else (os, name)
        done = getattr(where, call)

        def fail(path, *args):
            if f"{os.sep}3{os.sep}" in str(path):
                raise OSError(code, os.strerror(code), str(path))
            return done(path, *args)

        patch.setattr(where, call, fail)

    return apply


NO_DAMAGE = {
    "no permission": (
        tensorstore_fails(
            'PERMISSION_DENIED: Error opening "auto" driver: Failed to open: "/a/manifest.ocdbt": '
            "Permission denied [tensorstore_spec='{}'] [os_error_code='13']"
        ),
        r"bias\.moe: Permission denied",
    ),
    "no memory": (tensorstore_fails("RESOURCE_EXHAUSTED: no room"), r"bias\.moe: .*no room"),
    "server gone": (tensorstore_fails("UNAVAILABLE: try again"), r"bias\.moe: .*try again"),
    "disk error": (
        tensorstore_fails("UNKNOWN: Input/output error [os_error_code='5']"),
        r"bias\.moe: .*Input/output error",
    ),
    "a folder in the way": (
        tensorstore_fails("FAILED_PRECONDITION: Not a directory [os_error_code='20']"),
        r"bias\.moe: .*Not a directory",
    ),
    "a path that it refuses": (
        tensorstore_fails("Invalid file path"),
        r"bias\.moe: Invalid file path",
    ),
    "manifest, files": (system_fails(errno.EMFILE, "read_bytes"), r"data: Too many open files"),
    "manifest, permission": (system_fails(errno.EACCES, "read_bytes"), r"data: Permission denied"),
    "item, permission": (system_fails(errno.EACCES, "listdir"), r"state: Permission denied"),
    "item, stale": (system_fails(errno.ESTALE, "listdir"), r"state: Stale file handle"),
}


@pytest.mark.parametrize("kind", NO_DAMAGE)
def test_what_cannot_be_read_is_not_damaged(three, kind, monkeypatch):
    """It is told, nothing is renamed, and nothing older is taken for the newest."""
    fails, reason = NO_DAMAGE[kind]
    with monkeypatch.context() as patch, opened(three) as checkpoints:
        fails(patch)
        for read in (
            lambda: checkpoints.restore_newest(shapes(state_of(0))),
            lambda: checkpoints.rewind(3),
            lambda: read_params(three, shapes(state_of(0))),
            lambda: read_params(three, shapes(state_of(0)), 3),
        ):
            with pytest.raises(InputError) as error:
                read()
            message = rf"checkpoint 3( of {re.escape(str(three))})? cannot be read \({reason}\)"
            assert re.fullmatch(message, str(error.value))
        assert checkpoints.told == []
    assert names(three) == {"1", "2", "3"}
    assert restored(three) == (3, [])


def test_a_folder_that_cannot_be_listed_is_not_empty(three, monkeypatch):
    def refuse(path):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with opened(three) as checkpoints:
        monkeypatch.setattr(os, "scandir", refuse)
        for read in (
            lambda: checkpoints.rewind(3),
            lambda: read_params(three, shapes(state_of(0))),
        ):
            with pytest.raises(InputError, match=r"checkpoints cannot be read: Permission denied$"):
                read()


def test_a_folder_that_cannot_be_tidied(three, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    (three / "checkpoints" / "4.unverified").mkdir()
    with opened(three) as checkpoints:
        monkeypatch.setattr(os, "rename", refuse)
        with pytest.raises(InputError, match=r"checkpoints cannot be tidied: Read-only file sys"):
            checkpoints.restore_newest(shapes(state_of(0)))
        (three / "checkpoints" / "4.unverified").rmdir()
        cut(array_file(three))
        with pytest.raises(InputError, match=r"3 is damaged \(.*it cannot be renamed: Read-only"):
            checkpoints.restore_newest(shapes(state_of(0)))


def test_links_among_the_steps(three):
    """A link tells another step than it holds; deleting one deletes nothing behind it."""
    folder = three / "checkpoints"
    (folder / "77").symlink_to("2")
    for name in ("8.deleted", "3.unverified"):
        (folder / name).symlink_to("2")
    (folder / "9.deleted").symlink_to("nowhere")
    step, told = restored(three)
    assert (step, told) == (3, ["checkpoint 77 is damaged (holds step 2); going back to 3"])
    assert names(three) == {"1", "2", "3", "77.damaged"}
    (folder / "1").rename(three / "1")
    (folder / "1").symlink_to("../1")  # its own number: it is that step
    (folder / "5.unverified").symlink_to("2")
    with opened(three, keep=3) as checkpoints:
        checkpoints.restore_newest(shapes(state_of(0)))
        (folder / "6.unverified").symlink_to("2")
        save(checkpoints, 4)
        checkpoints.wait()
    assert checkpoints.told == ["checkpoint 5 is damaged (holds step 2); going back to 3"]
    assert names(three) == {"2", "3", "4", "5.damaged", "77.damaged"}
    assert (three / "1" / "meta").is_dir()


def test_a_step_saved_before_steps_were_written_down_is_whole(three):
    path = three / "checkpoints" / "3" / "meta" / "metadata"
    saved = json.loads(path.read_text())
    del saved["content"]["step"]
    saved["digest"] = dsjax.checkpoint._digest(saved["content"])
    path.write_text(json.dumps(saved))
    assert restored(three) == (3, [])


# --------------------------------------------------------------------------------------- other runs


def changed(path, leaf):
    """The shapes of a state with another leaf at a path; None takes it out."""
    tree = shapes(state_of(0))
    *above, last = path
    node = tree
    for key in above:
        node = node[key]
    if leaf is None:
        del node[last]
    else:
        node[last] = leaf
    return tree


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            changed(["params", "embed_VD"], jax.ShapeDtypeStruct((61, 16), jnp.float32)),
            r"params\.embed_VD has shape \(60, 16\), expected \(61, 16\)",
        ),
        (
            changed(["params", "stack", "w_LDF"], jax.ShapeDtypeStruct((2, 16, 8), jnp.float32)),
            r"params\.stack\.w_LDF is bfloat16, expected float32",
        ),
        (
            changed(["params", "head_DV"], jax.ShapeDtypeStruct((16, 60), jnp.float32)),
            r"has no params\.head_DV, expected float32 \[16, 60\]",
        ),
        (
            changed(["bias", "moe"], None),
            r"has bias\.moe \(float32 \[2, 4\]\), which this run has not",
        ),
    ],
)
def test_another_tree_is_refused_by_its_first_leaf(three, like, message):
    """And is not damage: nothing is renamed, nothing older is tried."""
    with opened(three) as checkpoints, pytest.raises(InputError, match=message) as error:
        checkpoints.restore_newest(like)
    assert str(error.value).startswith(f"checkpoint 3 of {three}")
    assert checkpoints.told == []
    assert names(three) == {"1", "2", "3"}


def test_weights_alone_cannot_be_resumed(tmp_path):
    state = state_of(1)
    weights = {"params": state["params"], "bias": state["bias"]}
    with opened(tmp_path) as checkpoints:
        save(checkpoints, 1, weights)
        checkpoints.wait()
        with pytest.raises(InputError) as error:
            checkpoints.restore_newest(shapes(state))
    assert str(error.value) == (
        f"checkpoint 1 of {tmp_path} holds bias and params alone; it cannot be resumed, but "
        "--init can start from it"
    )
    tree, step = read_params(tmp_path, shapes(weights))
    assert_same(tree, weights)
    assert step == 1


# ------------------------------------------------------------------------------------ weights alone


def test_any_part_of_a_state_can_be_read(tmp_path):
    state = state_of(4, ema=True)
    with opened(tmp_path) as checkpoints:
        save(checkpoints, 4, state)
        checkpoints.wait()
    parts = [
        {"params": state["params"], "bias": state["bias"]},
        {"extra": {"ema": state["extra"]["ema"]}, "bias": state["bias"]},
    ]
    for part in parts:
        tree, step = read_params(tmp_path, shapes(part))
        assert_same(tree, part)
        assert step == 4
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))


def test_a_step_by_its_number(three):
    part = {"params": state_of(1)["params"]}
    tree, step = read_params(three, shapes(part), 1)
    assert_same(tree, part)
    assert step == 1
    with pytest.raises(InputError, match=r"run has no step 7; it has 1, 2, 3$"):
        read_params(three, shapes(part), 7)


def test_weights_of_another_model_are_refused(three):
    like = {"params": {"embed_VD": jax.ShapeDtypeStruct((60, 16), jnp.bfloat16)}}
    with pytest.raises(InputError, match=r"params\.embed_VD is float32, expected bfloat16"):
        read_params(three, like)
    like = {"extra": {"ema": {"embed_VD": jax.ShapeDtypeStruct((60, 16), jnp.float32)}}}
    with pytest.raises(InputError, match=r"checkpoint 3 of .* has no extra\.ema\.embed_VD"):
        read_params(three, like)


# ----------------------------------------------------------------------------------- rotate, rewind


def test_nothing_is_deleted_before_a_newer_step_is_verified(tmp_path, monkeypatch):
    """Looks at the folder while the read-back is held up."""
    read_back, reading, go_on = dsjax.checkpoint._read_back, threading.Event(), threading.Event()

    def slow(*arguments):
        reading.set()
        assert go_on.wait(60)
        read_back(*arguments)

    with opened(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        monkeypatch.setattr(dsjax.checkpoint, "_read_back", slow)
        save(checkpoints, 2)
        assert reading.wait(60)
        assert names(tmp_path) == {"1", "2.unverified"}
        assert checkpoints.poll() is None
        assert read_params(tmp_path, shapes(state_of(1)))[1] == 1
        go_on.set()
        checkpoints.wait()
        assert names(tmp_path) == {"2"}
        assert checkpoints.told == []


def test_the_newest_steps_stay(tmp_path):
    with opened(tmp_path, keep=2) as checkpoints:
        for step in (5, 10, 15, 20):
            save(checkpoints, step)
        checkpoints.wait()
        assert names(tmp_path) == {"15", "20"}
    with opened(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore_newest(shapes(state_of(0))).step == 20
        save(checkpoints, 20)  # asked to stop at once: it is there already
        checkpoints.wait()
        save(checkpoints, 25)
        checkpoints.wait()
        assert names(tmp_path) == {"20", "25"}
        assert checkpoints.told == []


def test_a_damaged_step_does_not_count_among_those_kept(three):
    shutil.rmtree(three / "checkpoints" / "2" / "meta")
    with opened(three, keep=2) as checkpoints:
        checkpoints.restore_newest(shapes(state_of(0)))
        save(checkpoints, 4)
        checkpoints.wait()
    assert names(three) == {"2", "3", "4"}


def test_rewind(three):
    with opened(three) as checkpoints:
        with pytest.raises(InputError, match=r"run has no step 7; it has 1, 2, 3$"):
            checkpoints.rewind(7)
        checkpoints.rewind(1)
    assert names(three) == {"1", "2.abandoned", "3.abandoned"}
    with opened(three) as checkpoints:
        assert checkpoints.restore_newest(shapes(state_of(0))).step == 1
        save(checkpoints, 2)
        checkpoints.wait()
        checkpoints.rewind(1)
        save(checkpoints, 2)
        checkpoints.wait()
    assert names(three) == {"1", "2", "2.abandoned", "2.abandoned-2", "3.abandoned"}


def test_rewind_to_a_damaged_step_moves_nothing(three):
    cut(array_file(three))
    shutil.copytree(three / "checkpoints" / "3", three / "checkpoints" / "0")
    with opened(three) as checkpoints, pytest.raises(InputError, match="checkpoint 0 is damaged"):
        checkpoints.rewind(0)
    assert names(three) == {"0", "1", "2", "3"}


# ------------------------------------------------------------------------------------ failing saves


def poll(checkpoints):
    """The outcome of the last save, once there is one."""
    concurrent = checkpoints._outcome
    concurrent.exception(timeout=60)
    return checkpoints.poll()


@pytest.fixture
def disk(monkeypatch):
    """A disk that fails as long as `disk.failing` says: at once, in the background, or silently."""

    @dataclasses.dataclass
    class Disk:
        failing: str | None = None

    disk, sync, make = Disk(), dsjax.checkpoint.sync, ocp.AsyncCheckpointer.save

    def failing_sync(path):
        if disk.failing == "later":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if disk.failing == "silently" and path.name == "meta":
            cut(largest(path.parent))
        sync(path)

    def failing_save(self, *args, **kwargs):
        if disk.failing == "at once":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        make(self, *args, **kwargs)

    def largest(folder):
        files = [path for path in folder.rglob("*") if path.is_file()]
        return max(files, key=lambda path: path.stat().st_size)

    monkeypatch.setattr(dsjax.checkpoint, "sync", failing_sync)
    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", failing_save)
    return disk


REASONS = {
    "at once": "Input/output error",
    "later": "No space left on device",
    "silently": r"(params|opt)\.[\w.]+: .*",
}


@pytest.mark.parametrize("how", REASONS)
def test_training_goes_on_after_a_save_that_failed(tmp_path, disk, how):
    with opened(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 1)
        assert poll(checkpoints) is None
        disk.failing = how
        save(checkpoints, 2)
        error = poll(checkpoints)
        assert isinstance(error, CheckpointError)
        assert re.fullmatch(
            rf"checkpoint 2 was not saved \({REASONS[how]}\); the newest good one is 1", str(error)
        )
        assert checkpoints.poll() is None  # once
        assert names(tmp_path) == {"1"}
        disk.failing = None
        save(checkpoints, 3)
        checkpoints.wait()
        assert names(tmp_path) == {"3"}
        assert checkpoints.told == []
    assert restored(tmp_path) == (3, [])


@pytest.mark.parametrize("how", REASONS)
def test_saving_is_given_up_after_so_many_failures(tmp_path, disk, how):
    with opened(tmp_path) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        disk.failing = how
        for step in (2, 3, 4):
            save(checkpoints, step)
        with pytest.raises(CheckpointError) as error:
            save(checkpoints, 5)
        assert re.fullmatch(
            rf"3 checkpoints in a row could not be saved, the last one for: {REASONS[how]}; "
            "the newest good one is 1",
            str(error.value),
        )
        assert len(checkpoints.told) == 3
        assert names(tmp_path) == {"1"}


def test_what_a_failed_save_wrote_late_is_cleared_by_the_next(tmp_path):
    with opened(tmp_path) as checkpoints:
        (tmp_path / "checkpoints" / "1.unverified.orbax-checkpoint-tmp" / "state").mkdir(
            parents=True
        )
        save(checkpoints, 2)
        checkpoints.wait()
    assert names(tmp_path) == {"2"}


def test_wait_tries_again(tmp_path, disk):
    disk.failing = "later"
    with opened(tmp_path, retry_wait_s=0.2) as checkpoints:
        save(checkpoints, 1)
        poll(checkpoints)
        threading.Timer(0.1, setattr, (disk, "failing", None)).start()
        checkpoints.wait()
        assert names(tmp_path) == {"1"}
        disk.failing = "at once"
        save(checkpoints, 2)
        message = (
            r"^checkpoint 2 could not be saved \(Input/output error\); the newest good one is 1$"
        )
        with pytest.raises(CheckpointError, match=message):
            checkpoints.wait()
        assert len(checkpoints.told) == 3
    assert restored(tmp_path) == (1, [])


def test_wait_does_not_try_arrays_that_are_gone(tmp_path, disk):
    disk.failing = "later"
    with opened(tmp_path) as checkpoints:
        state = state_of(1)
        save(checkpoints, 1, state)
        state["params"]["embed_VD"].delete()
        with pytest.raises(CheckpointError, match=r"\); there is no older one$"):
            checkpoints.wait()
        assert len(checkpoints.told) == 1


def test_close_tells_and_raises_nothing(tmp_path, disk):
    disk.failing = "later"
    with opened(tmp_path) as checkpoints:
        save(checkpoints, 1)
    assert checkpoints.told == [
        "checkpoint 1 was not saved (No space left on device); there is no older one"
    ]
    checkpoints.close()


@contextlib.contextmanager
def mounted(folder, options):
    folder.mkdir()
    result = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True
    )
    if result.returncode:
        pytest.skip(f"mounting is not permitted here: {result.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def many(step):
    """5 MB that only the step decides, here and in the process to be killed."""
    rng = np.random.default_rng(step)
    return {f"w{i}": jnp.asarray(rng.standard_normal((250, 200)), jnp.float32) for i in range(25)}


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
def test_a_full_disk(tmp_path):
    """Half a step is never left, the older step stays, and room that is made is used."""
    with mounted(tmp_path / "small", "size=8m") as small, opened(small, keep=1) as checkpoints:
        save(checkpoints, 1, many(1))
        checkpoints.wait()
        for step in (2, 3):
            save(checkpoints, step, many(step))
            error = poll(checkpoints)
            assert error is not None, step
            assert re.match(rf"checkpoint {step} was not saved \(.*No space left", str(error))
            assert "\n" not in str(error)
        with pytest.raises(CheckpointError, match=r"checkpoint 3 could not be saved .*No space"):
            checkpoints.wait()
        found = checkpoints.restore_newest(many(0))
        assert found.step == 1
        assert_same(found.state, many(1))
        assert names(small) == {"1"}
        subprocess.run(["mount", "-o", "remount,size=32m", small], check=True)
        checkpoints.wait()  # the state of step 3 is still there
        assert names(small) == {"3"}


FILLER = f"""
import sys
import jax.numpy as jnp
import numpy as np
from dsjax.checkpoint import CheckpointError, Checkpoints

{inspect.getsource(many)}
checkpoints = Checkpoints(sys.argv[1], keep=1, retry_wait_s=0.01)
for step in (1, 2, 3):
    checkpoints.save(step, many(step), data={{}}, meta={{}})
try:
    checkpoints.wait()
except CheckpointError as error:
    print(error, file=sys.stderr)
checkpoints.close()
"""


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
def test_a_full_disk_is_told_in_our_lines_alone(tmp_path):
    with mounted(tmp_path / "small", "size=8m") as small:
        done = subprocess.run(
            [sys.executable, "-c", FILLER, small], capture_output=True, text=True, check=True
        )
    lines = done.stderr.splitlines()
    assert len(lines) == 5
    for line in lines:
        assert re.match(r"checkpoint [23] (was not|could not be) saved \(.*No space left", line)


def test_what_is_not_orbax_s_is_still_printed(tmp_path, monkeypatch, capsys):
    """Only the callbacks into a loop that it has closed are not."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    dsjax.checkpoint._quiet.__wrapped__()

    class Broken:
        def __init__(self, message):
            self.message = message

        def __del__(self):
            raise RuntimeError(self.message)

    Broken("Event loop is closed")
    assert capsys.readouterr().err == ""
    Broken("a defect of ours")
    assert "RuntimeError: a defect of ours" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- kill -9

SAVER = f"""
import sys
import jax.numpy as jnp
import numpy as np
from dsjax.checkpoint import Checkpoints

{inspect.getsource(many)}
checkpoints = Checkpoints(sys.argv[1], keep=2)
found = checkpoints.restore_newest(many(0))
step = 0 if found is None else found.step
while True:
    step += 1
    checkpoints.save(step, many(step), data={{}}, meta={{"tokens": step}})
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_while_it_saves(tmp_path):
    moments = random.Random(0)
    newest = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, tmp_path], stdout=subprocess.PIPE, text=True
        )
        first = int(process.stdout.readline())  # the first save has started
        assert first == newest + 1
        for _ in range(moments.randrange(3)):
            process.stdout.readline()
        time.sleep(moments.random() * 0.6)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        with opened(tmp_path) as checkpoints:
            found = checkpoints.restore_newest(many(0))
        assert checkpoints.told == []
        step = 0 if found is None else found.step
        if found is not None:
            assert_same(found.state, many(step))
            assert found.meta == {"tokens": step}
        # `save(n + 1)` returns only once n is on disk.
        assert step >= max([first, *map(int, rest)]) - 1
        newest = step
        assert all(name.isdigit() for name in names(tmp_path))


# ------------------------------------------------------------------------------------- the folder


def nano(*assignments):
    config = preset("nano")
    for assignment in assignments:
        config = override(config, assignment)
    return config


def save_tokenizer(folder):
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")


def prepared(workdir, run):
    return prepare_workdir(workdir, run, save_tokenizer)


def test_a_run_and_back(tmp_path):
    run = Run(config=nano(), seed=3, init="runs/before")
    assert prepared(tmp_path / "a" / "run", run) is False
    assert read_run(tmp_path / "a" / "run") == run
    found = {path.name for path in (tmp_path / "a" / "run").iterdir()}
    assert found == {"dsjax.json", "tokenizer"}
    assert prepared(tmp_path / "a" / "run", run) is True


def test_init_may_be_absent_from_the_file(tmp_path):
    run = Run(config=nano(), seed=3)
    write_run(tmp_path, run)
    content = json.loads((tmp_path / "dsjax.json").read_text())
    del content["init"]
    (tmp_path / "dsjax.json").write_text(json.dumps(content))
    assert read_run(tmp_path) == run


def test_free_fields_are_brought_up_to_date(tmp_path):
    prepared(tmp_path, Run(config=nano(), seed=3))
    run = Run(config=nano("train.save_every_steps=17", "train.keep_checkpoints=5"), seed=3)
    assert check_workdir(tmp_path, run) is True
    assert read_run(tmp_path) != run  # checking writes nothing
    assert prepared(tmp_path, run) is True
    assert read_run(tmp_path) == run
    assert {path.name for path in tmp_path.iterdir()} == {"dsjax.json", "tokenizer"}


@pytest.mark.parametrize(
    ("run", "difference"),
    [
        (Run(config=nano(), seed=4), "seed: 3 there, 4 here"),
        (Run(config=nano(), seed=3, init="x"), "init: None there, 'x' here"),
        (Run(config=nano("train.batch_size=2"), seed=3), r"train\.batch_size: \d+ there, 2 here"),
        (
            Run(config=nano('data.sources=[{"path": "other.txt"}]'), seed=3),
            r"data\.sources\S*: .* there, .* here",
        ),
        (Run(config=nano("model.vocab_size=2048"), seed=3), r"model\.vocab_size: .*"),
    ],
)
def test_another_run_is_refused_by_its_first_field(tmp_path, run, difference):
    prepared(tmp_path, Run(config=nano(), seed=3))
    before = (tmp_path / "dsjax.json").read_bytes()
    for refuse in (check_workdir, prepared):
        with pytest.raises(InputError, match=rf"^workdir .* holds another run; {difference}$"):
            refuse(tmp_path, run)
    assert (tmp_path / "dsjax.json").read_bytes() == before


def test_a_folder_whose_preparation_was_cut_short_is_prepared_again(tmp_path, monkeypatch):
    """Ends the process, as it were, at each thing that it does to the folder."""
    run = Run(config=nano(), seed=3)

    class Killed(BaseException):
        pass

    def killing(name, after):
        done = getattr(os, name)
        calls = iter(range(1000))

        def call(*args, **kwargs):
            if next(calls) == after:
                raise Killed
            return done(*args, **kwargs)

        return call

    cut_short = 0
    for name in ("mkdir", "open", "replace", "fsync", "rmdir"):
        for after in range(12):
            workdir = tmp_path / f"{name} {after}"
            with monkeypatch.context() as patch, contextlib.suppress(Killed):
                patch.setattr(os, name, killing(name, after))
                prepared(workdir, run)
                break  # it was not killed any more
            cut_short += 1
            check_workdir(workdir, run)
            prepared(workdir, run)
            assert read_run(workdir) == run
            assert {path.name for path in workdir.iterdir()} == {"dsjax.json", "tokenizer"}
            assert (workdir / "tokenizer" / "tokenizer.json").read_text() == "{}"
    assert cut_short >= 10


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer", ".dsjax.json.tmp"])
def test_what_is_not_ours_is_not_thrown_away(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(InputError, match=r"is not empty and holds no dsjax\.json"):
        prepared(tmp_path, Run(config=nano(), seed=3))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / ".preparing").mkdir()
    (tmp_path / "more").write_text("precious")
    with pytest.raises(InputError, match=r"is not empty and holds no dsjax\.json"):
        prepared(tmp_path, Run(config=nano(), seed=3))
    assert (tmp_path / name).read_text() == "precious"


def test_a_folder_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path):
    run = Run(config=nano(), seed=3)
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for workdir in ("file", "file/below", "dangling"):
        with pytest.raises(InputError, match=r"is not a folder$"):
            check_workdir(tmp_path / workdir, run)
    for workdir in ("", " ", "a\0b"):
        with pytest.raises(InputError, match=r"is no path$"):
            check_workdir(workdir, run)
    prepared(tmp_path / "run", run)
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    with pytest.raises(InputError, match=r"checkpoints is not a folder$"):
        check_workdir(tmp_path / "run", run)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
def test_a_folder_that_cannot_be_written(tmp_path):
    run = Run(config=nano(), seed=3)
    with mounted(tmp_path / "disk", "size=1m") as disk:
        prepared(disk / "run", run)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for workdir in (disk / "run", disk / "new"):
            with pytest.raises(InputError, match="cannot be written: Read-only file system"):
                check_workdir(workdir, run)
            with (
                pytest.raises(InputError, match="cannot be locked: Read-only"),
                WorkdirLock(workdir),
            ):
                pass


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gs://bucket/run", "there is a :/ in .*, as in a URL"),
        ("gs:", "there is a :/ in .*, as in a URL"),
        ("run[1]", r"there is a \[ in .*, which begins a pattern"),
        ("run 1]", r"there is a \] in .*, which ends a pattern"),
        ("old\\run", r"there is a \\ in .*, which counts as a slash"),
        ("run\udcff", "the path is not UTF-8"),
    ],
)
def test_a_path_that_checkpoints_cannot_have_is_refused(tmp_path, name, reason, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target").mkdir()
    for refuse in (
        lambda: check_workdir(name, Run(config=nano(), seed=3)),
        lambda: check_workdir(os.path.join("target", name, "run"), Run(config=nano(), seed=3)),
        lambda: Checkpoints(name, keep=1),
        lambda: read_params(name, {}),
    ):
        with pytest.raises(InputError) as error:
            refuse()
        line = str(error.value)
        assert re.fullmatch(rf"workdir .*: {reason}[,;] .*", line)
        line.encode()  # it can be printed
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    if "/" not in name:  # a link's own name does not matter, where it leads to does
        (tmp_path / name).symlink_to("target")
        check_workdir(name, Run(config=nano(), seed=3))


@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace"])
def test_a_disk_that_is_full_from_the_start(tmp_path, monkeypatch, call):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = Run(config=nano(), seed=3)
    monkeypatch.setattr(os, call, full)
    line = rf"^workdir {tmp_path} cannot be written: No space left on device$"
    with pytest.raises(RunError, match=line):
        prepared(tmp_path, run)
    if call == "mkdir":
        with pytest.raises(RunError, match=line):
            Checkpoints(tmp_path, keep=1)
    else:
        with pytest.raises(RunError, match=line):
            write_run(tmp_path, run)


# ---------------------------------------------------------------------------------------- the lock


def test_a_folder_is_locked_once(tmp_path):
    with WorkdirLock(tmp_path):
        with (
            pytest.raises(InputError) as error,
            WorkdirLock(tmp_path),
        ):
            pass
        holder = f"process {os.getpid()} on {socket.gethostname()}, since "
        assert str(error.value).startswith(f"workdir {tmp_path} is in use by {holder}")
    assert list(tmp_path.iterdir()) == []
    with WorkdirLock(tmp_path):
        pass


def test_a_folder_made_for_the_lock_goes_with_it_unless_something_is_in_it(tmp_path):
    with WorkdirLock(tmp_path / "a" / "b"):
        assert check_workdir(tmp_path / "a" / "b", Run(config=nano(), seed=3)) is False
    assert list(tmp_path.iterdir()) == []
    with WorkdirLock(tmp_path / "a" / "b"):
        prepared(tmp_path / "a" / "b", Run(config=nano(), seed=3))
    assert {p.name for p in (tmp_path / "a" / "b").iterdir()} == {"dsjax.json", "tokenizer"}


LOCKER = """
import sys, time
from dsjax.workdir import WorkdirLock
with WorkdirLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_another_process_holds_the_lock_until_it_is_killed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", LOCKER, tmp_path], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "locked\n"
        with (
            pytest.raises(
                InputError, match=rf"in use by process {process.pid} on {socket.gethostname()}"
            ),
            WorkdirLock(tmp_path),
        ):
            pass
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / ".lock").exists()  # nobody could tidy up
    with WorkdirLock(tmp_path):
        assert check_workdir(tmp_path, Run(config=nano(), seed=3)) is False
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_without_a_name_still_locks(tmp_path):
    with WorkdirLock(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(InputError, match=r"in use by another process$"), WorkdirLock(tmp_path):
            pass
