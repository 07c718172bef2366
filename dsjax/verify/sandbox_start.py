"""Limits its own process for good and becomes the program: the first thing that runs in a sandbox.

`dsjax.verify.sandbox` hands its text to the interpreter and nothing imports it: it knows nothing of
dsjax. Arguments: bytes of memory, seconds of CPU, bytes of a file, processes or
-1, the uid to become or -1, the program's file, its arguments.
"""

import os
import resource
import sys
import types

NOBODY = 65534
OPEN_FILES = 64


def _limit(memory_bytes: int, cpu_s: int, file_bytes: int, processes: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for name, most in limits.items():
        if most < 0:
            continue
        _, hard = resource.getrlimit(name)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(name, (most, most))


def _become(uid: int) -> None:
    """Gives root away for good, and with it all capabilities."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    try:
        os.setresuid(uid, uid, uid)
    except OSError:  # a container that knows few uids
        os.setresuid(NOBODY, NOBODY, NOBODY)


def main() -> None:
    """Runs the program as `__main__`, which sees nothing of this."""
    memory_bytes, cpu_s, file_bytes, processes, uid = map(int, sys.argv[1:6])
    sys.argv = sys.argv[6:]
    _limit(memory_bytes, cpu_s, file_bytes, processes)
    if uid >= 0:
        _become(uid)
    path = sys.argv[0]
    sys.path.insert(0, os.getcwd())
    with open(path, encoding="utf-8") as file:
        source = file.read()
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__dict__["__file__"] = path
    exec(compile(source, path, "exec"), module.__dict__)


if __name__ == "__main__":
    main()
