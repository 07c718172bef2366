"""What each process of test_distributed does; toy arrays, no model.

`python -m tests.processes ROLE INDEX COUNT PORT FOLDER ...` prints one line of JSON at its end.
"""

import json
import resource
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.errors import InputError, RunError
from sharding import distributed

P = PartitionSpec


def opened(folder, processes, **options):
    from dsjax.checkpoint import Checkpoints  # seconds, which most roles need not wait

    return Checkpoints(folder, keep=3, processes=processes, **options)


def array_of(shape, spec, mesh, start=0.0):
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + np.float32(start)
    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), lambda i: whole[i])


def state_of(step, mesh):
    return {
        "w": array_of((8, 6), P("x"), mesh, step),
        "opt": {
            "mu": array_of((4, 8), P(None, "x"), mesh, 2 * step),
            "empty": np.zeros((0, 3), np.float32),
        },
        "step": array_of((), P(), mesh, step),
        "large": array_of((512, 64), P("x"), mesh, 0.1 * step),
    } | {f"b{i}": array_of((8,), P(), mesh, i + step) for i in range(3)}


def train(processes, folder, *, steps, save_every=5, wait_s=0.05):
    """Steps with a sum over all devices, as training has; saves; stops when all agree."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    step_of = jax.jit(
        lambda x: x + x.mean() / (1 + x.mean()), out_shardings=NamedSharding(mesh, P("x"))
    )
    x = array_of((8,), P("x"), mesh)
    from dsjax.train.stop import StopRequest

    processes.agree("start", distributed.fingerprint("sharding"))
    with StopRequest(processes) as stop:
        checkpoints = opened(folder, processes)
        why, step = None, 0
        while step < steps and why is None:
            x = jax.block_until_ready(step_of(x))
            time.sleep(wait_s)
            step += 1
            Path(folder, f"running-{processes.index}").touch()
            if step % save_every == 0:
                checkpoints.save(step, state_of(step, mesh), data={"read": step}, meta={})
            why = stop.agreed()
        checkpoints.save(step, state_of(step, mesh), data={"read": step}, meta={})
        checkpoints.wait()
        checkpoints.close()
    return {"step": step, "why": why}


def alone(processes, folder):
    return {"count": processes.count}


def refuse(processes, folder):
    """Process 0 says no; then they disagree."""
    assert processes.first("count", lambda: [processes.index, processes.count]) == [0, 2]

    def function():
        raise InputError("workdir x holds another run")

    try:
        processes.first("workdir", function)
    except InputError as error:
        print(error, file=sys.stderr)
    processes.barrier("here")
    seed = 3 + processes.index
    processes.agree("start", {"config": {"seed": seed, "mesh": {"fsdp": 2}}, "seed": seed})


def fail(processes, folder):
    if processes.index == 1:
        raise RunError("text is lost on the way")
    time.sleep(60)


def crash(processes, folder):
    if processes.index == 0:
        raise KeyError("a defect")
    time.sleep(60)


def save(processes, folder, *faults):
    """Saves steps 1 and 2, and 3 once the disks work again."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    told = []
    checkpoints = opened(folder, processes, tell=told.append)
    began, limit = time.monotonic(), resource.getrlimit(resource.RLIMIT_FSIZE)
    if faults and processes.index == 1:  # as a full disk: no file of this process can grow
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    for step in (1, 2, 3):
        state = state_of(step, mesh)
        checkpoints.save(step, state, data={"read": step}, meta={"tokens": 10 * step})
        checkpoints._settle()
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        if faults and processes.index == 0 and step == 1:
            break_disk("sync")
    checkpoints.wait()
    checkpoints.close()
    steps = sorted(path.name for path in Path(folder, "checkpoints").iterdir())
    return {"steps": steps, "told": told, "saved_s": time.monotonic() - began}


def break_disk(where):
    """The disk refuses once, at a function of `dsjax.checkpoint`."""
    import dsjax.checkpoint

    plain, calls = getattr(dsjax.checkpoint, where), []

    def refuses(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return plain(*arguments, **options)

    setattr(dsjax.checkpoint, where, refuses)


def restore(processes, folder):
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    told = []
    checkpoints = opened(folder, processes, tell=told.append)
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None)),
        state_of(0, mesh),
    )
    found = checkpoints.restore_newest(like)
    checkpoints.close()
    expected = state_of(found.step, mesh)
    for got, wanted in zip(jax.tree.leaves(found.state), jax.tree.leaves(expected), strict=True):
        if not isinstance(wanted, jax.Array):
            continue
        assert got.sharding == wanted.sharding
        for a, b in zip(got.addressable_shards, wanted.addressable_shards, strict=True):
            np.testing.assert_array_equal(a.data, b.data)
    return {"step": found.step, "data": found.data, "meta": found.meta, "told": told}


def main(role, index, count, port, folder, *rest):
    options = {"refusal": InputError, "loss": RunError, "gone_after_s": 3.0}
    options["connect_timeout_s"] = 2.0 if role == "alone" else 60.0
    number = {"process_id": int(index), "num_processes": int(count)}
    try:
        if count == "1":
            processes = distributed.start(None, None, None, **options)
        else:
            processes = distributed.start(f"127.0.0.1:{port}", **number, **options)
        with processes:
            if role == "train":
                processes.go_on = "run it again to go on from checkpoint 5"
                result = train(processes, folder, steps=int(rest[0]))
            else:
                result = globals()[role](processes, folder, *rest)
    except (InputError, RunError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
