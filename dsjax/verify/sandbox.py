"""Runs Python programs that nobody has read: cut off from the machine, in limits, or not at all.

Knows nothing of rewards or tests. A program runs under bubblewrap in namespaces of its own: as
nobody, without capabilities, environment or network, with a read-only interpreter, a small /tmp and
nothing else of the file system, under limits of time, memory, output and processes. Whatever it
leaves running is dead when `run` returns.

What stays possible: to use `processes` times `memory_bytes` of memory at once, to see what
/proc tells of the processor and the kernel, and whatever a hole in the kernel allows. Where root
cannot hand the interpreter to another user from outside, the uid is dropped within, and then
programs may make user namespaces of their own.
"""

import contextlib
import dataclasses
import functools
import os
import signal
import sys
import time

from dsjax.errors import InputError, RunError
from dsjax.verify.sandbox_bwrap import START_SECONDS, Limits, Way, ways
from dsjax.verify.sandbox_process import Program, Running, memory_file, pipe, read

_PROBE = Program(
    files={
        "main.py": """
import os, socket
assert os.getuid() != 0 and os.getpid() < 10 and not os.environ.get("SHELL")
assert not any(map(os.path.exists, ("/etc/passwd", "/sys")))
assert [name for _, name in socket.if_nameindex()] == ["lo"]
print("alone")
"""
    }
)


class SandboxUnavailable(InputError):
    """No sandbox works here, so that nothing was run; says what is missing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """How a program went.

    Attributes:
        stdout: at most `output_bytes`; what is no UTF-8 is replaced.
        stderr: likewise.
        returncode: as a shell tells it: 128 and more stands for a signal.
        timed_out: it was killed for its time.
        truncated: it was killed for its output.
        wall_s: seconds from before the sandbox was made until after it was gone.
    """

    stdout: str
    stderr: str
    returncode: int
    timed_out: bool
    truncated: bool
    wall_s: float

    @property
    def ok(self) -> bool:
        """Whether it ended by itself, and with exit code 0."""
        return self.returncode == 0 and not (self.timed_out or self.truncated)


def run(
    program: Program,
    stdin: str = "",
    *,
    peer: Program | None = None,
    limits: Limits | None = None,
    allow_unsafe: bool = False,
) -> Result:
    """Runs a program in a sandbox of its own, and another beside it if asked.

    Safe to call from several threads and processes at once.

    Args:
        program: whose output and exit code are returned.
        stdin: its standard input.
        peer: runs in a second sandbox under the same limits; its standard output and input are
            descriptors of `program`, which gets their numbers as two more arguments, the one to
            read from first. It ends with `program`.
        limits: `Limits()` if None.
        allow_unsafe: where no sandbox works, run as an ordinary process with limits only, and say
            so on standard error once: the program may then do what this user may do.

    Raises:
        SandboxUnavailable: if no sandbox works here and `allow_unsafe` is not set.
        RunError: if a sandbox that worked before does not start.
    """
    limits = limits or Limits()
    way = _way()
    if isinstance(way, str):
        if not allow_unsafe:
            raise SandboxUnavailable(way)
        _warn(way)
        way = None
    return _run(way, program, stdin, peer, limits)


def unavailable() -> str:
    """Empty where a sandbox works; otherwise why none does. Found out once."""
    way = _way()
    return way if isinstance(way, str) else ""


def _run(
    way: Way | None, program: Program, stdin: str, peer: Program | None, limits: Limits
) -> Result:
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        beside, passed = None, []
        if peer is not None:
            (answers, tell), (requests, ask) = pipe(stack), pipe(stack)
            # Only the programs hold their ends, so that each sees the end of the other.
            with requests, tell:
                beside = Running(way, peer, limits, stdin=requests, stdout=tell)
            stack.enter_context(beside)
            passed = [answers, ask]
        (out, out_end), (errors, errors_end) = pipe(stack), pipe(stack)
        with memory_file("stdin", stdin) as source:
            main = Running(
                way, program, limits, stdin=source, stdout=out_end, stderr=errors_end, passed=passed
            )
        stack.enter_context(main)
        for end in (out_end, errors_end, *passed):
            end.close()
        streams = {out.fileno(): bytearray(), errors.fileno(): bytearray()}
        why = read(main, streams, limits.output_bytes, start + limits.seconds)
        main.end()
    stdout, stderr = (bytes(stream).decode(errors="replace") for stream in streams.values())
    if main.failed or (beside is not None and beside.failed):
        raise RunError(f"the sandbox does not start any more: {stderr.strip()[-300:]}")
    return Result(
        stdout=stdout,
        stderr=stderr,
        returncode=128 + signal.SIGKILL if why else main.returncode,
        timed_out=why == "time",
        truncated=why == "output",
        wall_s=time.monotonic() - start,
    )


def _way() -> Way | str:
    return _found(os.environ.get("PATH", os.defpath))


@functools.cache
def _found(path: str) -> Way | str:
    """The first way that works, tried with a small program, or why none does."""
    if sys.platform != "linux":
        return _advice("it needs Linux")
    reasons = []
    for way in ways(path):
        try:
            result = _run(way, _PROBE, "", None, Limits(seconds=START_SECONDS))
        except (OSError, RunError) as error:
            reasons.append(str(error))
            continue
        if result.ok and result.stdout == "alone\n":
            return way
        reasons.append(" ".join((result.stderr or result.stdout).split()))
    return _advice("; ".join(dict.fromkeys(reasons)) or "bubblewrap is missing")


def _advice(reason: str) -> str:
    return (
        f"model-written code runs in a sandbox only, and none works here ({reason[:300]}); install "
        "bubblewrap 0.8 or later, or pip install 'dsjax[rl]', on a Linux that lets programs make "
        "namespaces, or run with --allow_unsafe_code_execution"
    )


@functools.cache
def _warn(reason: str) -> None:
    print(f"WARNING: model-written code runs without a sandbox: {reason}", file=sys.stderr)
