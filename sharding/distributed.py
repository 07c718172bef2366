"""Several processes as one run: they find each other, agree, stop together and notice a loss.

Knows nothing about models, folders or checkpoints. All words go through the key-value store of
jax's coordination service, which process 0 runs; none needs a device, so none can hang in a
collective. jax offers that store to libraries alone (`jax._src.distributed`): this is the only
module that reaches for it.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from jax._src import distributed as jax_distributed

AUTO = "auto"  # as a coordinator: SLURM, Kubernetes, Open MPI or a TPU's metadata know it
_PREFIX = "dsjax"
_VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
_LONG_S = 3600.0  # others may work so long on something; a lost process is noticed far sooner


class Processes:
    """The processes of a run, this one among them; `start` makes it.

    Every method that takes a name must be called by every process, in the same order for each
    name; two threads use different names. Errors are of two kinds, chosen by the caller of `start`:
    `refusal` for what a person gave, `loss` for work that cannot go on.

    Attributes:
        index: of this process.
        count: of all.
        hosts: the host of each.
        go_on: ends the line on a lost process; "run it again to go on" until the caller knows more.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        *,
        refusal: type[Exception] = ValueError,
        loss: type[Exception] = RuntimeError,
        gone_after_s: float = 15.0,
    ):
        """One process alone, unless told otherwise; `start` has connected the others."""
        self.index, self.count = index, count
        self.refusal, self.loss = refusal, loss
        self.hosts = [socket.gethostname()] * count
        self.go_on = "run it again to go on"
        self._gone_after_s, self._period_s = gone_after_s, min(1.0, gone_after_s / 6)
        self._uses: dict[str, int] = {}  # of each name; the same in every process
        self._shared: BaseException | None = None  # an error that every process raises
        self._ended = threading.Event()
        self._word: str | None = None  # the last line, once one is told
        # What follows decides at which call of `agreed` all stop.
        self._asked: str | None = None
        self._stop: tuple[str, int] | None = None
        self._calls, self._calling = 0, threading.Lock()
        self._answered = time.monotonic()  # when the store last did
        self._restore_terminate: Callable[[], None] = lambda: None

    def __enter__(self) -> "Processes":
        """Begins to watch the others.

        Raises:
            loss: if one of them does not answer.
        """
        if self.count == 1:
            return self
        self._on_terminate()
        # Before the others can go on: one lost at once has been heard of, and is missed.
        _client().key_value_set(f"{_PREFIX}/alive/{self.index}", "0", True)
        self._answered = time.monotonic()
        for body in (self._watch, self._guard):
            threading.Thread(target=body, daemon=True, name=body.__name__).start()
        self.hosts = self.gather("hosts", socket.gethostname(), max(60.0, 4 * self._gone_after_s))
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves together; an error of this process alone ends all of them, with the same code.

        Such a process ends in here: waiting for the others, as jax does at a process's end, would
        take minutes and end in pages of its log.
        """
        if self.count == 1:
            return
        if error is not None and error is not self._shared and not _is_exit(error):
            self._fail(error)
        try:
            self._wait(f"{_PREFIX}/end", _LONG_S)
        finally:
            self._ended.set()
            self._restore_terminate()
            jax.distributed.shutdown()

    # ---------------------------------------------------------------------------------- agreeing

    def gather(self, name: str, value: str, timeout_s: float = _LONG_S) -> list[str]:
        """Gives every process what each has to say, in their order.

        Raises:
            loss: if one does not come within the time.
        """
        if self.count == 1:
            return [value]
        use = self._use(name)
        folder = f"{_PREFIX}/said/{name}/"
        _client().key_value_set(f"{folder}{use}/{self.index}", value)
        self._wait(f"{folder}{use}", timeout_s)
        said = dict(_client().key_value_dir_get(f"{folder}{use}/"))
        if self.index == 0 and use > 0:  # all have read it: they came to this barrier
            _client().key_value_delete(f"{folder}{use - 1}/")
        return [said[f"{folder}{use}/{i}"] for i in range(self.count)]

    def barrier(self, name: str, timeout_s: float = _LONG_S) -> None:
        """Returns once every process is here.

        Raises:
            loss: if one does not come within the time.
        """
        if self.count > 1:
            self._wait(f"{_PREFIX}/barrier/{name}/{self._use(name)}", timeout_s)

    def agree(self, name: str, fields: dict[str, Any], timeout_s: float = 300.0) -> None:
        """Refuses, in every process and in the same words, what is not the same everywhere.

        Args:
            name: what is compared.
            fields: for JSON; told by the dotted path of what differs first.
            timeout_s: how long to wait for the slowest.

        Raises:
            refusal: naming the field, both values and the processes.
            loss: if one does not come within the time.
        """
        said = [json.loads(text) for text in self.gather(name, json.dumps(fields), timeout_s)]
        first = dict(_flat(said[0]))
        for number, other in enumerate(map(dict, map(_flat, said))):
            for path in (*first, *(p for p in other if p not in first)):
                here, there = first.get(path, "nothing"), other.get(path, "nothing")
                if here != there:
                    raise self.everywhere(
                        self.refusal(
                            f"the processes disagree: {path} is {here} in {self._name(0)} and "
                            f"{there} in {self._name(number)}"
                        )
                    )

    def first(self, name: str, function: Callable[[], Any], timeout_s: float = _LONG_S) -> Any:
        """Does something in process 0 alone, and gives all of them what came out of it.

        Args:
            name: of what is done.
            function: returns something for JSON.
            timeout_s: how long the others wait.

        Raises:
            refusal, loss: as the function does; in every process, in the same words. What else it
                raises is a `loss` to the others.
        """
        if self.count == 1:
            return function()
        key = f"{_PREFIX}/first/{name}/{self._use(name)}"
        if self.index > 0:
            try:
                told = json.loads(_client().blocking_key_value_get(key, int(timeout_s * 1000)))
            except jax.errors.JaxRuntimeError as error:
                raise self._late(name, timeout_s) from error
            if "error" not in told:
                return told["value"]
            raise self.everywhere((self.refusal if told["refused"] else self.loss)(told["error"]))
        try:
            value = function()
            _client().key_value_set(key, json.dumps({"value": value}))
        except Exception as error:
            ours = isinstance(error, (self.refusal, self.loss))
            text = str(error) if ours else f"{self._name(0)} failed: {_first_line(error)}"
            told = {"error": text, "refused": isinstance(error, self.refusal)}
            _client().key_value_set(key, json.dumps(told))
            self._shared = error
            raise
        return value

    def meet(self, name: str, unless: str, timeout_s: float) -> None:
        """A barrier that a failure opens at once: for names that are unique by themselves.

        Raises:
            loss: once a process has said `give_up(unless)`, or if one does not come in time.
        """
        end, key = time.monotonic() + timeout_s, f"{_PREFIX}/meet/{name}"
        here = _client().key_value_increment(key, 1)
        while here < self.count:
            time.sleep(0.02)
            if _client().key_value_dir_get(f"{_PREFIX}/given_up/{unless}/"):
                raise self.loss(f"another process has given up {unless}")
            if time.monotonic() > end:
                raise self._late(name, timeout_s)
            here = int(_client().key_value_increment(key, 0))

    def give_up(self, name: str) -> None:
        """Opens every `meet` that depends on the name."""
        if self.count > 1:
            key = f"{_PREFIX}/given_up/{name}/{self.index}"
            _client().key_value_set(key, "", True)

    def everywhere[E: Exception](self, error: E) -> E:
        """Marks an error that every process is about to raise, so that none blames another."""
        self._shared = error
        return error

    # ---------------------------------------------------------------------------------- stopping

    def ask_to_stop(self, why: str) -> None:
        """Asks all processes to stop at the next call of `agreed` that none has made yet.

        Only takes note, so a signal's handler may call it.
        """
        self._asked = self._asked or why

    def agreed(self) -> str | None:
        """Says whether all stop here, and why: the same at the n-th call in every process.

        Costs no message. Once a process has asked, all tell each other how often they have called;
        the next call after the highest number is it. Whoever calls meanwhile waits for that.
        """
        if self.count == 1:
            return self._asked
        with self._calling:
            self._calls += 1
            if self._stop is None or self._calls < self._stop[1]:
                return None
            return self._stop[0]

    def _agree_on_stop(self, why: str) -> None:
        with self._calling, contextlib.suppress(Exception):  # a lost process: `_watch` tells
            calls = self.gather("stop", str(self._calls))
            self._stop = (why, max(map(int, calls)) + 1)

    # ---------------------------------------------------------------------------------- watching

    def _watch(self) -> None:
        """Says that this process is alive, and hears what happens to others."""
        seen: dict[int, tuple[str, float]] = {}  # of process 0: each one's last word, and when
        beat, stopping = 0, False
        began = time.monotonic()
        while not self._ended.wait(self._period_s):
            try:
                beat += 1
                _client().key_value_set(f"{_PREFIX}/alive/{self.index}", str(beat), True)
                if self.index == 0:
                    self._look_for_lost(
                        dict(_client().key_value_dir_get(f"{_PREFIX}/alive/")), seen
                    )
                if self._asked is not None and not stopping:
                    _publish("stop", self._asked)
                now = dict(_client().key_value_dir_get(f"{_PREFIX}/now/"))
                self._answered = time.monotonic()
            except Exception:
                if self._ended.is_set():
                    return
                if time.monotonic() - began > self._period_s:
                    self._end(f"{self._name(0)} is gone; the run stops; {self.go_on}")
                return
            if (told := now.get(f"{_PREFIX}/now/end")) is not None:
                word, code = json.loads(told)
                self._end(f"{word}; the run stops; {self.go_on}", code)
            if (why := now.get(f"{_PREFIX}/now/stop")) is not None and not stopping:
                stopping = True
                threading.Thread(target=self._agree_on_stop, args=(why,), daemon=True).start()

    def _look_for_lost(self, alive: dict[str, str], seen: dict[int, tuple[str, float]]) -> None:
        now = time.monotonic()
        for number in range(1, self.count):
            word = alive.get(f"{_PREFIX}/alive/{number}")
            if word is None:  # it has only just come: `__enter__` waits for it
                continue
            if number not in seen or seen[number][0] != word:
                seen[number] = (word, now)
            elif now - seen[number][1] > self._gone_after_s:
                _publish("end", json.dumps([f"{self._name(number)} is gone", 1]))

    def _guard(self) -> None:
        """Ends the process if the store answers no more: `_watch` may hang in a call."""
        while not self._ended.wait(self._period_s):
            if time.monotonic() - self._answered > self._gone_after_s + self._period_s:
                self._end(f"{self._name(0)} is gone; the run stops; {self.go_on}")

    def _fail(self, error: BaseException) -> None:
        """Tells the others what happened here, and ends; unless it came of losing one of them."""
        line, code, word = None, 1, f"failed: {type(error).__name__}: {_first_line(error)}"
        if isinstance(error, (self.refusal, self.loss)):
            line, word = str(error), f"failed: {_first_line(error)}"
            code = 2 if isinstance(error, self.refusal) else 1
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            line, word, code = "interrupted", "was interrupted", 130
        else:
            # A collective fails at once where another process has died; who that was takes time.
            # Long enough for `_watch` to end this process with that line.
            # XLA's errors begin with their status; others are a defect of this process alone.
            of_xla = re.match(r"[A-Z_]+: ", str(error)) is not None
            time.sleep((3 if of_xla else 1) * self._gone_after_s + 3 * self._period_s)
            traceback.print_exception(error)
        with contextlib.suppress(Exception):
            _publish("end", json.dumps([f"{self._name(self.index)} {word}", code]))
        self._end(line, code)

    def _end(self, line: str | None, code: int = 1) -> None:
        """Ends the process from whatever thread; the main one may be stuck in a collective."""
        if self._word is None:
            self._word = line or ""
            if line:
                print(f"\n{line}" if sys.stderr.isatty() else line, file=sys.stderr)
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
        if self.index == 0:
            time.sleep(2 * self._period_s + 0.5)  # the store ends with us; let the others read
        os._exit(code)

    def _on_terminate(self) -> None:
        """Puts our line in the place of jax's abort where process 0, and the store, end.

        jax's client takes a callback for that, and cannot call it: the C++ exception that comes of
        it (bad_cast, jaxlib 0.11.2) ends in C++'s terminate handler, in a thread of its own. Once
        it can, `start` has given it the same function.
        """
        if self.index == 0:
            return
        with contextlib.suppress(OSError, AttributeError):
            set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
            set_terminate.restype, set_terminate.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
            handler = ctypes.CFUNCTYPE(None)(self._lost_store)
            before = set_terminate(ctypes.cast(handler, ctypes.c_void_p))

            def restore(keep: object = handler) -> None:
                set_terminate(before)

            self._restore_terminate = restore

    def _lost_store(self, *_: object) -> None:
        if self._word is not None or self._ended.is_set():
            os._exit(1)
        address: str = jax_distributed.global_state.coordinator_address or ":"
        host, port = address.rsplit(":", 1)
        for attempt in range(10):
            time.sleep(0.2 * (attempt > 0))  # who dies closes its sockets one after the other
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            except (OSError, ValueError):
                self._end(f"{self._name(0)} is gone; the run stops; {self.go_on}")
        os.abort()  # something else, which jax's log above tells

    # -------------------------------------------------------------------------------------- words

    def _name(self, number: int) -> str:
        return f"process {number} of {self.count} ({self.hosts[number]})"

    def _use(self, name: str) -> int:
        use = self._uses.get(name, 0)
        self._uses[name] = use + 1
        return use

    def _wait(self, barrier: str, timeout_s: float) -> None:
        try:
            _client().wait_at_barrier(barrier, int(timeout_s * 1000))
        except jax.errors.JaxRuntimeError as error:
            raise self._late(barrier.removeprefix(f"{_PREFIX}/"), timeout_s) from error

    def _late(self, name: str, timeout_s: float) -> Exception:
        return self.loss(f"the other processes did not come to '{name}' within {timeout_s:.0f} s")


def start(
    coordinator: str | None,
    process_id: int | None,
    num_processes: int | None,
    *,
    refusal: type[Exception] = ValueError,
    loss: type[Exception] = RuntimeError,
    connect_timeout_s: float = 300.0,
    gone_after_s: float = 15.0,
) -> Processes:
    """Connects this process with the others of its run; before jax touches a device.

    Args:
        coordinator: `host:port`, where process 0 listens; `auto` asks the cluster for all three;
            None, with the two others, is a run of one process.
        process_id: from 0.
        num_processes: how many there are.
        refusal: raised for what a person gave.
        loss: raised where work cannot go on.
        connect_timeout_s: how long to wait for the slowest to start.
        gone_after_s: after so long without a sign a process is given up.

    Returns:
        The processes, to be entered.

    Raises:
        refusal: for arguments that do not fit, or a cluster that is none.
        loss: if the others cannot be reached.
    """
    given = {"coordinator": coordinator, "process_id": process_id, "num_processes": num_processes}
    if coordinator is None and process_id is None and num_processes is None:
        return Processes(refusal=refusal, loss=loss)
    if coordinator != AUTO:
        _check(given, refusal)
    elif process_id is not None or num_processes is not None:
        raise refusal("--coordinator=auto finds process_id and num_processes by itself")
    # jax's own notice of SIGTERM would take the signal from ours, and knows no Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    processes = Processes(
        process_id or 0, num_processes or 1, refusal=refusal, loss=loss, gone_after_s=gone_after_s
    )
    began = time.monotonic()
    try:
        with _calling_when_lost(processes._lost_store):
            jax.distributed.initialize(
                None if coordinator == AUTO else coordinator,
                num_processes,
                process_id,
                cluster_detection_method=None if coordinator == AUTO else "deactivate",
                initialization_timeout=max(1, round(connect_timeout_s)),
                # Its own end is an abort with pages of log: only if all of ours have failed.
                heartbeat_timeout_seconds=max(100, round(4 * gone_after_s)),
                shutdown_timeout_seconds=max(10, round(gone_after_s)),
            )
    except ValueError as error:  # nothing was detected
        raise refusal(
            f"--coordinator=auto finds no cluster here ({error}); give --coordinator=host:port, "
            "--process_id and --num_processes"
        ) from error
    except RuntimeError as error:  # of jax's, or a bad_cast of its callback
        state = jax_distributed.global_state
        if "should only be called once" in str(error) or "must be called before" in str(error):
            raise
        waited_s, state.client = time.monotonic() - began, None  # else jax says more at the end
        raise loss(
            f"process {state.process_id} could not join the others at "
            f"{state.coordinator_address} ({waited_s:.0f} s, {_first_line(error)}): is process 0 "
            "running there, its port free, every process_id given once, and as many started as "
            "num_processes says?"
        ) from error
    state = jax_distributed.global_state
    processes.index, processes.count = state.process_id, state.num_processes
    processes.hosts = [socket.gethostname()] * state.num_processes
    return processes


def fingerprint(*packages: str) -> dict[str, str]:
    """What the code of this process is: a hash of each package's source, and versions."""
    found = {}
    for name in packages:
        spec = importlib.util.find_spec(name)
        digest = hashlib.sha256()
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
        found[name] = digest.hexdigest()[:16]
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
    return found | versions | {"python": platform.python_version()}


def _check(given: dict[str, Any], refusal: type[Exception]) -> None:
    """Refuses arguments that do not fit together."""
    if missing := [f"--{name}" for name, value in given.items() if value is None]:
        has = " and ".join(f"--{name}" for name, value in given.items() if value is not None)
        raise refusal(f"{has} needs {' and '.join(missing)} too")
    if not re.fullmatch(r"\S+:[0-9]{1,5}", given["coordinator"]):
        raise refusal(f"--coordinator is {given['coordinator']!r}; it must be host:port")
    if given["num_processes"] < 1:
        raise refusal(f"--num_processes is {given['num_processes']}; it must be at least 1")
    if not 0 <= given["process_id"] < given["num_processes"]:
        raise refusal(
            f"--process_id is {given['process_id']}; it must lie in [0, {given['num_processes']})"
        )


@contextlib.contextmanager
def _calling_when_lost(callback: Callable[..., None]) -> Iterator[None]:
    """Gives jax's client a callback, which `initialize` has no argument for."""
    arguments = {"missed_heartbeat_callback": callback, "shutdown_on_destruction": False}
    module, name = jax_distributed._jax, "get_distributed_runtime_client"
    plain = getattr(module, name)
    setattr(module, name, functools.partial(plain, **arguments))
    try:
        yield
    finally:
        setattr(module, name, plain)


def _client() -> Any:
    client = jax_distributed.global_state.client
    if client is None:
        raise RuntimeError("jax.distributed is not initialised")
    return client


def _publish(kind: str, word: str) -> None:
    """Tells all processes something; the first word of its kind stays."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # ALREADY_EXISTS
        _client().key_value_set(f"{_PREFIX}/now/{kind}", word)


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of dictionaries by dotted path, as JSON."""
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _flat(value, f"{path}.{name}" if path else name)
    else:
        yield path, json.dumps(tree)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _is_exit(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and error.code in (None, 0)
