"""What a person meets: the scripts, what they leave behind, and one line for every mistake."""

import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import venv

import pytest

from dsjax import command_line
from dsjax.train.loop import PretrainResult
from dsjax.train.metrics import REINFORCEMENT, SCHEMA, read_metrics
from dsjax.train.stages import stages
from dsjax.workdir import CONFIG_FILE, read_run
from experiments import command, generate, pretrain

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _allocator_left_alone(monkeypatch):
    monkeypatch.setattr(command, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(command, "keep_compiled", lambda folder: None)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder that is also the current one, so that nothing can be written unseen."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def snapshot(folder):
    """Everything below a folder: kinds, times and contents."""
    found = {}
    for path in sorted(pathlib.Path(folder).rglob("*")):
        kind = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        # A lock that comes and goes moves the time of its folder.
        moved = kind.st_mtime_ns if path.is_file() else None
        found[str(path)] = (kind.st_mode, moved, content)
    return found


@pytest.fixture
def refused(place, capsys):
    """Runs a script that must refuse: exit code 2, one line on stderr, nothing written."""

    def run(main, *arguments, watch=()):
        folders = [place, *watch]
        before = [snapshot(folder) for folder in folders]
        code = main(["script", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        assert err.startswith("script: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert [snapshot(folder) for folder in folders] == before
        return err.removeprefix("script: ").strip()

    return run


# ------------------------------------------------------------------------- pretrain: what is given

CONFIGURATION = [
    (["--preset=nan"], "unknown preset 'nan'; did you mean 'nano'?"),
    (["--preset=deepseek"], "unknown preset 'deepseek'; did you mean 'deepseek_v"),
    (["--preset="], "unknown preset ''; known: deepseek_coder_6_7b, "),
    (["--set", "train.batch_sise=4"], "unknown key 'train.batch_sise'; did you mean 'batch_size'?"),
    (["--set", "trian.batch_size=4"], "unknown key 'trian'; did you mean 'train'?"),
    (["--set", "train.batch_size"], "'train.batch_size' is not of the form path=value"),
    (["--set", "train.batch_size=four"], "train.batch_size must be int, not 'four'"),
    (["--set", "train.batch_size=true"], "train.batch_size must be int, not True"),
    (["--set", "train.batch_size=4.5"], "train.batch_size must be int, not 4.5"),
    (["--set", "train.optimizer.learning_rate=NaN"], "must be finite, not nan"),
    (["--set", "train.total_tokens=-4"], "total_tokens is -4; it must be positive"),
    (["--set", "train.micro_batch_size=3"], "does not divide into micro-batches of 3"),
    (["--set", "model.stacks.moe.blocks.0.ffn.num_groups=3"], "do not divide into 3 groups"),
    (["--set", "train.seq_len=8192"], "longer than model.max_positions 4096"),
    (["--set", "model.vocab_size=\n\n=="], "model.vocab_size must be int"),
    (["--seed=-1"], "seed is -1; it must lie in [0, 2**32)"),
    (["--seed=4294967296"], "seed is 4294967296"),
    (["--seed=1" + "0" * 30], "seed is 1000"),
    (["--seed=x"], "flag --seed=x: "),
    (["--seed="], "flag --seed=: "),
    (["--steps=0"], "--steps is 0; it must be at least 1"),
    (["--steps=-3"], "--steps is -3; it must be at least 1"),
    (["--steps=1.5"], "flag --steps=1.5: "),
    (["--sample="], "--sample='' is no text to continue"),
    (["--sample=a\udcff"], "is no text to continue"),
    (["--stepz=3"], "Unknown command line flag 'stepz'. Did you mean: steps ?"),
    (["--set"], "Missing value for flag --set"),
    (["stray"], "unexpected argument 'stray'"),
    (["--", "--steps=3"], "unexpected argument '--steps=3'"),
    (["--flagfile=/nowhere"], "Unable to open flagfile"),
]


@pytest.mark.parametrize(("arguments", "expected"), CONFIGURATION)
def test_pretrain_refuses_what_it_cannot_use(refused, arguments, expected):
    arguments = ["--workdir=new", "--preset=nano", *arguments]
    assert expected in refused(pretrain.main, *arguments)


def test_pretrain_needs_a_workdir(refused):
    for arguments in (["--preset=nano"], ["--preset=nano", "--workdir="]):
        assert refused(pretrain.main, *arguments).startswith("--workdir is needed")


# ---------------------------------------------------------------------------------- pretrain: text


def text_from(path, **settings):
    """Arguments for a run on the files that a glob names."""
    overrides = [f"data.sources={json.dumps([{'path': str(path)}])}"]
    overrides += [f"data.{name}={value}" for name, value in settings.items()]
    return [argument for override in overrides for argument in ("--set", override)]


def test_pretrain_refuses_an_empty_file(refused, place):
    (place / "a.txt").write_text("something")
    (place / "b.txt").touch()
    error = refused(pretrain.main, "--preset=nano", "--workdir=new", *text_from(place / "*.txt"))
    assert error == f"'{place}/b.txt' is empty"


def test_pretrain_refuses_text_that_is_not_utf8_and_says_where(refused, place):
    (place / "a.txt").write_text("something")
    (place / "ü b.txt").write_bytes("größer ".encode() + b"\xe9 caf\xe9")
    error = refused(pretrain.main, "--preset=nano", "--workdir=new", *text_from(place / "*.txt"))
    assert error == f"'{place}/ü b.txt' is not UTF-8: byte 0xe9 at offset 9"


SOURCES = [
    ("none/*.txt", "no file matches 'none/*.txt'"),
    ("", "no file matches ''"),
    (".", "'.' is a folder: give a glob of files"),
    ("builtin:pyhton", "unknown source 'builtin:pyhton'; did you mean 'builtin:python'?"),
    ("/dev/null", "'/dev/null' is not a regular file"),
]


@pytest.mark.parametrize(("source", "expected"), SOURCES)
def test_pretrain_refuses_a_source_without_text(refused, source, expected):
    error = refused(pretrain.main, "--preset=nano", "--workdir=new", *text_from(source))
    assert expected in error


def test_pretrain_refuses_text_that_does_not_suit_the_settings(refused, place):
    (place / "only.txt").write_text("one document cannot be divided")

    def error(*arguments, **settings):
        return refused(
            pretrain.main,
            *("--preset=nano", "--workdir=new", *text_from("only.txt", **settings), *arguments),
        )

    assert "held_out_fraction=0.05 leaves " in error()
    assert "max_bytes_per_source=3 is too small" in error(max_bytes_per_source=3)
    for number in range(20):
        (place / f"{number}.txt").write_text(f"enough for both sides: {number}")
    several = text_from("*.txt", held_out_fraction=0.5)
    error = refused(
        pretrain.main,
        *("--preset=nano", "--workdir=new", *several, "--set", "model.vocab_size=100"),
    )
    assert "vocab_size=100 is too small" in error


# ------------------------------------------------------------------------------- pretrain: workdir


def test_pretrain_refuses_a_workdir_that_cannot_be_written(refused, place):
    (place / "file").write_text("x")
    (place / "link").symlink_to(place / "nowhere")
    expected = {
        "file": "workdir file: file is not a folder",
        "file/a/b": "workdir file/a/b: file is not a folder",
        f"{place}/link": f"workdir {place}/link: {place}/link is not a folder",
        "link/a": "workdir link/a: link is not a folder",
        "/dev/null": "workdir /dev/null: /dev/null is not a folder",
        "/proc/new": "workdir /proc/new cannot be written: ",
        "/proc/self/new/a": "workdir /proc/self/new/a cannot be written: ",
        "x" * 300: "cannot be written: File name too long",
        "a\0b": "workdir 'a\\x00b' is no path",
        "file/two  spaces\nand lines": "workdir file/two  spaces\\nand lines: file is not a folder",
        "  ": "workdir '  ' is no path",
    }
    for workdir, message in expected.items():
        assert message in refused(pretrain.main, "--preset=nano", f"--workdir={workdir}"), workdir


def test_pretrain_refuses_a_folder_of_something_else(refused, place):
    (place / "mine").mkdir()
    (place / "mine" / "thesis.tex").write_text("years of work")
    error = refused(pretrain.main, "--preset=nano", "--workdir=mine")
    assert error == "workdir mine is not empty and holds no dsjax.json"


BROKEN = [
    ("", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[]", "is of format []"),
    ('{"format": 99}', "is of format 99; this version reads format 1"),
    ('{"format": 1, "seed": 0, "config": {"trian": 1}}', "unknown key 'trian'; did you mean"),
    ('{"format": 1, "seed": 0}', "must be an object with the fields of Config, not None"),
]


@pytest.mark.parametrize(("content", "expected"), BROKEN)
@pytest.mark.parametrize("main", [pretrain.main, generate.main])
def test_a_broken_description_of_a_run_is_named(refused, place, main, content, expected):
    (place / "run").mkdir()
    (place / "run" / CONFIG_FILE).write_text(content)
    rest = ["--preset=nano"] if main is pretrain.main else ["--prompt=a"]
    error = refused(main, "--workdir=run", *rest)
    assert f"run/{CONFIG_FILE}" in error
    assert expected in error


OTHER_RUNS = [
    (["--seed=1"], "seed: 0 there, 1 here"),
    (["--set", "train.batch_size=4"], "train.batch_size: 8 there, 4 here"),
    (["--steps=7"], "train.total_tokens: 3072 there, 3584 here"),
    (["--preset=tiny"], "model.vocab_size: 512 there, 2048 here"),
    (
        ["--set", "model.stacks.moe.blocks.0.ffn.gate_scale=2"],
        "model.stacks.1.blocks.0.ffn.gate_scale: 2.5 there, 2.0 here",
    ),
    (["--set", "data.shuffle=false"], "data.shuffle: True there, False here"),
]


@pytest.mark.parametrize(("arguments", "difference"), OTHER_RUNS)
def test_pretrain_refuses_the_workdir_of_another_run(nano_run, refused, arguments, difference):
    workdir = nano_run.workdir
    arguments = [*nano_run.arguments, *arguments, f"--workdir={workdir}"]
    error = refused(pretrain.main, *arguments, watch=[workdir])
    assert error == f"workdir {workdir} holds another run; {difference}"


# ------------------------------------------------------------------------------- pretrain: the run


def test_a_run_leaves_what_is_promised(nano_run):
    assert nano_run.code == 0
    workdir = pathlib.Path(nano_run.workdir)
    found = {path.name for path in workdir.iterdir()}
    events = {name for name in found if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    pictures = {"loss.png", "router.png", "schedule.png"}
    assert found - events == {CONFIG_FILE, "tokenizer", "checkpoints", "metrics.jsonl", *pictures}
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"3", "6"}
    assert {path.name for path in (workdir / "tokenizer").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for picture in pictures:
        assert (workdir / picture).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    run = read_run(workdir)
    assert run.seed == 0
    assert stages(run.config)[-1].last_step == 6
    assert run.config.train.eval_every_steps == 2
    assert json.loads((workdir / CONFIG_FILE).read_text())["format"] == 1


SPEED = r"(?m)^[0-9,]+ tokens/s; wall time: starting [0-9.]+%, .*\n"


def test_a_run_tells_its_loss_before_and_after_and_shows_samples(nano_run):
    losses = re.findall(
        r"^held-out loss (before|after): ([0-9.]+) nats a token, ([0-9.]+) bits a byte$",
        nano_run.out,
        flags=re.MULTILINE,
    )
    assert [label for label, *_ in losses] == ["before", "after"]
    before, after = (float(loss) for _, loss, _ in losses)
    assert before == pytest.approx(math.log(512), abs=0.2)  # untrained: near uniform
    assert after < before
    rows = read_metrics(nano_run.workdir)
    assert f"{rows[0]['eval_loss']:.4f}" == losses[0][1]
    assert f"{rows[-1]['eval_loss']:.4f}" == losses[1][1]
    assert re.search(SPEED, nano_run.out)
    assert re.findall(r"^--- (.*)$", nano_run.out, flags=re.MULTILINE) == ["'aei '", "'日本'"]
    assert "6/6" in nano_run.err  # the progress bar
    assert "loss " in nano_run.err
    assert "Traceback" not in nano_run.err


def test_a_run_writes_the_metrics_of_the_schema(nano_run):
    lines = pathlib.Path(nano_run.workdir, "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows == read_metrics(nano_run.workdir)
    for row in rows:
        for name in row:
            assert name in SCHEMA or ("/" in name and name.split("/")[0] + "/" in SCHEMA), name
        assert row["tokens"] == row["step"] * 8 * 64
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4, 6]
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    evaluated = {"eval_loss", "bits_per_byte", "eval_loss_ema", "bits_per_byte_ema"}
    of_v2 = {"loss_balance_device", "loss_balance_communication", "eval_overflow"}  # and meshes
    every = {name for name in SCHEMA.keys() - REINFORCEMENT.keys() if not name.endswith("/")}
    every -= evaluated | of_v2
    for row in rows:
        assert evaluated & set(row) in (set(), evaluated)
    for row in trained:
        # The first step compiles, and has no rate.
        rates = {"tokens_per_s", "share_of_peak"}
        assert every - set(row) == (rates if row["step"] == 1 else set())
        assert all(math.isfinite(row[name]) for name in every & set(row))
        for stack, layers in (("moe", 2), ("mtp", 1)):
            for name in (f"load/{stack}", f"bias/{stack}"):
                assert (name in row) == (row["step"] % 2 == 0)
                assert [len(experts) for experts in row.get(name, [])] in ([8] * layers, [])
            health = {name for name in row if name.startswith(f"router/{stack}/")}
            assert {name.split("/")[2] for name in health} == {
                "max_violation",
                "load_entropy",
                "dead_experts",
                "bias_spread",
            }
            assert all(len(row[name]) == layers for name in health)


def test_a_finished_run_trains_no_further(nano_run, place, capsys):
    workdir = place / "the same"
    shutil.copytree(nano_run.workdir, workdir)
    before = snapshot(workdir)
    assert pretrain.main(["pretrain", *nano_run.arguments, f"--workdir={workdir}"]) == 0
    out, _ = capsys.readouterr()
    after = snapshot(workdir)
    assert set(after) == set(before)
    checkpoints = [path for path in before if "/checkpoints/" in path]
    assert {path: after[path] for path in checkpoints} == {p: before[p] for p in checkpoints}
    for name in (CONFIG_FILE, "metrics.jsonl"):
        path = str(workdir / name)
        assert after[path][2] == before[path][2], name  # the same content
    # All that was said is said again, save the speed.
    assert not re.search(SPEED, out)
    assert out == re.sub(SPEED, "", nano_run.out)


def test_a_run_whose_text_has_changed_is_refused(nano_run, place, refused):
    shutil.copytree(nano_run.workdir, place / "run")
    shutil.copytree(pathlib.Path(nano_run.workdir).parent / "some text", place / "text")
    arguments = [*nano_run.arguments, *text_from(place / "text" / "*.txt"), "--workdir=run"]
    description = place / "run" / CONFIG_FILE
    content = json.loads(description.read_text())
    content["config"]["data"]["sources"][0]["path"] = str(place / "text" / "*.txt")
    description.write_text(json.dumps(content))
    with open(place / "text" / "07.txt", "a") as file:
        file.write("one line more\n")
    error = refused(pretrain.main, *arguments)
    assert error == (
        f"cannot resume the data: the text of '{place}/text/*.txt' is not what the run was "
        "trained on"
    )


ENDED = {"stopped_by": None, "shares": {}}


def test_samples_are_cut_where_the_model_ends(nano_run, monkeypatch, capsys):
    load = pretrain.load_pretrained
    figures = {"eval_loss": 1.0, "bits_per_byte": 1.0}
    result = PretrainResult(step=6, before=figures, after=figures, tokens_per_s=None, **ENDED)
    short = "model.max_positions=64"
    monkeypatch.setattr(pretrain, "pretrain", lambda *_, **__: result)
    monkeypatch.setattr(pretrain, "load_pretrained", lambda path: load(path, overrides=[short]))
    samples = ["--sample=aei aei", "--sample=" + "aei " * 100]  # the second leaves no room
    arguments = ["--preset=nano", "--workdir=" + nano_run.workdir, "--set", short, *samples]
    assert pretrain.main(["pretrain", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.findall(r"^--- (.*)$", out, flags=re.MULTILINE) == ["'aei aei'"]


# --------------------------------------------------------------------------------------- generate


def say(capsys, workdir, *arguments):
    assert generate.main(["generate", f"--workdir={workdir}", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_generate_prints_the_prompt_and_its_continuation(nano_run, capsys):
    workdir = nano_run.workdir
    hot = ["--prompt=aei dé 日本", "--temperature=2", "--max_tokens=16"]
    first = say(capsys, workdir, *hot, "--seed=1")
    assert first.startswith("aei dé 日本")
    assert len(first) > len("aei dé 日本\n")
    assert say(capsys, workdir, *hot, "--seed=1") == first
    assert say(capsys, workdir, *hot, "--seed=2") != first
    # The best token each time: the seed decides nothing. Longer budgets begin with shorter ones.
    cold = ["--prompt=aei ", "--temperature=0"]
    short = say(capsys, workdir, *cold, "--max_tokens=8", "--seed=1")
    assert say(capsys, workdir, *cold, "--max_tokens=8", "--seed=2") == short
    long = say(capsys, workdir, *cold, "--max_tokens=16")
    assert long.startswith(short.rstrip("\n�"))
    # An older checkpoint is another model; the preset it is of may be named.
    hot += ["--seed=1", "--preset=nano"]
    assert say(capsys, workdir, *hot, "--step=6") == first
    assert say(capsys, workdir, *hot, "--step=3") != first


GENERATE = [
    (["--temperature=-1"], "temperature is -1.0; it must be finite and at least 0"),
    (["--temperature=NaN"], "temperature is nan"),
    (["--temperature=inf"], "temperature is inf"),
    (["--temperature=hot"], "flag --temperature=hot: "),
    (["--top_p=0"], "top_p is 0.0; it must lie in (0, 1]"),
    (["--top_p=2"], "top_p is 2.0"),
    (["--top_p=nan"], "top_p is nan"),
    (["--max_tokens=0"], "max_tokens is 0; it must be a whole number from 1"),
    (["--max_tokens=-1"], "max_tokens is -1"),
    (["--max_tokens=1000000000000"], "positions; the model has 4096 (model.max_positions)"),
    (["--prompt="], "the prompt is empty"),
    (["--prompt=\udcff"], "lone surrogate"),
    (["--seed=-1"], "seed is -1"),
    (["--step=4"], "has no step 4; it has 3, 6"),
    (["--step=-1"], "has no step -1; it has 3, 6"),
    (["--preset=tiny"], "is not of preset 'tiny'; model.vocab_size: 512 there, 2048 here"),
    (["--preset=tyni"], "unknown preset 'tyni'; did you mean 'tiny'?"),
    (["--set", "train.batch_sise=4"], "did you mean 'batch_size'?"),
    (["--set", "model.embed_dim=64"], "has shape (512, 32), expected (512, 64)"),
    (["--set", "model.stacks.moe.repeats=3"], "has shape (2, 8), expected (3, 8)"),
    (["--set", "model.stacks.moe.name=other"], "has no bias.other"),
    (["--top_k=3"], "Unknown command line flag 'top_k'"),
    (["stray"], "unexpected argument 'stray'"),
]


@pytest.mark.parametrize(("arguments", "expected"), GENERATE)
def test_generate_refuses_what_it_cannot_use(nano_run, refused, arguments, expected):
    arguments = [f"--workdir={nano_run.workdir}", "--prompt=a", *arguments]
    assert expected in refused(generate.main, *arguments, watch=[nano_run.workdir])


def test_generate_needs_a_run_and_a_prompt(nano_run, refused, place):
    (place / "file").touch()
    (place / "empty").mkdir()
    (place / "published").mkdir()
    (place / "published" / "config.json").write_text("{}")
    neither = "holds neither dsjax.json (a run) nor config.json"
    expected = {
        (): "--workdir is needed",
        ("--workdir=", "--prompt=a"): "--workdir is needed",
        (f"--workdir={nano_run.workdir}",): "--prompt is needed",
        ("--workdir=none", "--prompt=a"): "there is no folder none",
        ("--workdir=empty", "--prompt=a"): f"empty {neither}",
        ("--workdir=file", "--prompt=a"): "there is no folder file",
        ("--workdir=published", "--prompt=a"): "published/config.json: model_type is None",
    }
    for arguments, message in expected.items():
        assert message in refused(generate.main, *arguments)


@pytest.mark.parametrize(
    ("lost", "expected"),
    [("checkpoints", "holds no checkpoint"), ("tokenizer", "no tokenizer at ")],
)
def test_generate_says_what_a_run_has_lost(nano_run, refused, place, lost, expected):
    shutil.copytree(nano_run.workdir, place / "run")
    shutil.rmtree(place / "run" / lost)
    assert expected in refused(generate.main, "--workdir=run", "--prompt=a")


# ---------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("flag", ["--help", "-h", "-help"])
@pytest.mark.parametrize("script", [pretrain, generate])
def test_help_lists_the_flags(place, capsys, script, flag):
    assert script.main(["script", flag]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(script.__doc__.strip().splitlines()[0])
    for name in ("preset", "workdir", "seed", "set"):
        assert f"--{name}:" in out or f"--[no]{name}:" in out
    assert ("--steps:" in out) == (script is pretrain)
    assert ("--prompt:" in out) == (script is generate)
    assert snapshot(place) == {}


def test_two_scripts_in_one_process_keep_their_flags_apart(nano_run, refused, capsys):
    refused(pretrain.main, "--preset=tiny", "--seed=7", "--steps=9", "--set", "a=1", "--sample=x")
    refused(generate.main, "--seed=8", "--set", "b=1", "--set", "c=1", "--prompt=y")
    assert (pretrain.FLAGS.seed, pretrain.FLAGS.steps, pretrain.FLAGS.set) == (7, 9, ["a=1"])
    assert (generate.FLAGS.seed, generate.FLAGS.set) == (8, ["b=1", "c=1"])
    refused(pretrain.main, "--prompt=y")  # the other script's
    refused(generate.main, "--steps=9")
    # And one call from the next.
    refused(pretrain.main)
    assert (pretrain.FLAGS.preset, pretrain.FLAGS.seed, pretrain.FLAGS.set) == ("tiny", 0, [])
    assert (pretrain.FLAGS.steps, len(pretrain.FLAGS.sample)) == (None, 3)
    refused(generate.main)
    assert (generate.FLAGS.preset, generate.FLAGS.prompt, generate.FLAGS.seed) == (None, None, 0)


def run_clean(*command, **settings):
    """Runs a command in an environment of its own; returns the finished process."""
    env = {"PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu", "HOME": "/nonexistent"}
    env |= settings.pop("env", {})
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300, check=False, **settings
    )


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    script = [sys.executable, "-m", "experiments.pretrain", f"--workdir={tmp_path}/new"]
    done = run_clean(*script, "--preset=nano", "--set", "train.batch_sise=4", cwd=REPOSITORY)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "pretrain.py: unknown key 'train.batch_sise'; did you mean 'batch_size'?\n"
    )
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------- console script


@pytest.fixture
def decoy(tmp_path, monkeypatch):
    """A folder whose own `experiments` is first on the path, and imported."""
    folder = tmp_path / "elsewhere"
    (folder / "experiments").mkdir(parents=True)
    (folder / "experiments" / "__init__.py").write_text("")
    for name in ("pretrain", "command", "plot"):
        source = 'raise SystemExit("the decoy ran")\n'
        (folder / "experiments" / f"{name}.py").write_text(source)
    return folder


@pytest.fixture
def _own_modules():
    """Puts back the modules named `experiments` afterwards."""
    saved = {name: sys.modules[name] for name in sys.modules if name.startswith("experiments")}
    yield
    for name in [name for name in sys.modules if name.startswith("experiments")]:
        del sys.modules[name]
    sys.modules |= saved


@pytest.mark.usefixtures("_own_modules")
def test_dsjax_runs_our_scripts_from_a_folder_with_others(decoy, monkeypatch, capsys):
    monkeypatch.chdir(decoy)
    monkeypatch.syspath_prepend(decoy)
    for name in [name for name in sys.modules if name.startswith("experiments")]:
        del sys.modules[name]
    sys.modules["experiments.command"] = None  # what another's import might have left
    import experiments

    assert experiments.__file__ == str(decoy / "experiments" / "__init__.py")
    assert command_line.main(["pretrain", "--help"]) == 0
    assert "Pretrains a preset on text" in capsys.readouterr().out
    assert command_line.main(["generate", "--workdir=none", "--prompt=a"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        "dsjax generate: there is no folder none; nothing is downloaded here\n",
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "a command is needed; known: "),
        (["pretrian"], "unknown command 'pretrian'; did you mean 'pretrain'?"),
        (["plot"], "unknown command 'plot'"),
        (["command"], "unknown command 'command'"),
        (["__init__"], "unknown command '__init__'"),
        (["../setup"], "unknown command '../setup'"),
        (["--workdir=x"], "unknown command '--workdir=x'"),
    ],
)
def test_dsjax_refuses_what_is_no_script_of_ours(place, capsys, arguments, expected):
    assert command_line.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"dsjax: {expected}")
    assert err.count("\n") == 1
    assert snapshot(place) == {}


@pytest.mark.parametrize("flag", ["help", "--help", "-h"])
def test_dsjax_lists_its_scripts(capsys, flag):
    assert command_line.main([flag]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    names = re.search(r"^names: (.*)$", out, flags=re.MULTILINE)[1].split(", ")
    assert set(names) >= {"generate", "pretrain"}
    assert not {"command", "__init__", "peers"} & set(names)


@pytest.mark.slow
def test_the_console_script_in_a_clean_environment(decoy, tmp_path):
    """As a wheel would be installed: the packages copied, the script made from its entry point."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    target = project["project"]["scripts"]["dsjax"]
    entry = importlib.metadata.EntryPoint("dsjax", target, "console_scripts")

    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    site = pathlib.Path(
        run_clean(python, "-c", "import site; print(site.getsitepackages()[0])").stdout.strip()
    )
    skipped = shutil.ignore_patterns("__pycache__", "peers")
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        shutil.copytree(REPOSITORY / package, site / package, ignore=skipped)
    # The dependencies, without the path file that would make this checkout importable.
    ours = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(ours))
    script = environment / "bin" / "dsjax"
    script.write_text(
        f"#!{python}\nimport sys\nfrom {entry.module} import {entry.attr}\n"
        f"sys.exit({entry.attr}())\n"
    )
    script.chmod(0o755)

    for path in ("", str(decoy)):  # the second: even with the decoy first on the path
        done = run_clean(script, "pretrain", "--help", cwd=decoy, env={"PYTHONPATH": path})
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Pretrains a preset on text")
        assert done.stderr == ""
    done = run_clean(script, "pretrain", "--preset=nan", cwd=decoy)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dsjax pretrain: unknown preset 'nan'; did you mean 'nano'?\n"
    decoys = run_clean(python, "-m", "experiments.pretrain", cwd=decoy)
    assert decoys.stderr == "the decoy ran\n"  # which is what the console script is for
