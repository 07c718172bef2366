"""README.md against the tree: its map, the tests and code it names, its numbers, its examples."""

import ast
import pathlib
import re

import pytest

from dsjax.plan.count import cache_bytes_per_token, parameter_counts
from dsjax.presets import preset, presets
from experiments import command, pretrain

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PAGES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *("docs/notation.md", "docs/log.md", "docs/training.md", "docs/weights.md"),
    *("docs/sharding.md", "docs/launch.md", "docs/attention.md", "docs/fp8.md", "docs/kernels.md"),
    *("docs/reinforcement.md", "docs/rewards.md"),
)
TOP = ("dsjax", "sharding", "pallas_kernels", "experiments", "tests")


def read(page):
    return (REPOSITORY / page).read_text(encoding="utf-8")


def fenced(page, language):
    """The blocks of code that are marked with a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), flags=re.MULTILINE | re.DOTALL)


def expanded(name):
    """`a.{b,c}` -> `a.b`, `a.c`."""
    if (match := re.fullmatch(r"(.*)\{(.*)\}(.*)", name)) is None:
        return [name]
    return [f"{match[1]}{choice}{match[3]}" for choice in match[2].split(",")]


def mapped():
    """Every file of the map with what is said of it; indentation by two spaces is a folder."""
    (tree,) = fenced("README.md", "tree")
    files, folders = [], []
    for line in tree.splitlines():
        indent, name, said = re.fullmatch(r"((?:  )*)(\S+) *(.*)", line).groups()
        del folders[len(indent) // 2 :]
        if name.endswith("/"):
            folders.append(name)
        else:
            files += [("".join(folders) + file, said) for file in expanded(name)]
    return files


def present():
    """Every file of the five folders, but for what tools leave there."""
    found = set()
    for folder in TOP:
        for path in (REPOSITORY / folder).rglob("*"):
            parts = path.relative_to(REPOSITORY).parts
            if path.is_file() and not any(p.startswith((".", "__pycache__")) for p in parts):
                found.add("/".join(parts))
    return found


def test_the_map_names_every_file_and_no_other():
    files = [file for file, _ in mapped()]
    assert len(files) == len(set(files))
    assert set(files) == present()
    assert all(said for _, said in mapped())


def defined(path):
    """Names of a module: functions, classes and `Class.method`."""
    names = set()
    for node in ast.parse(read(path)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{n.name}" for n in node.body if hasattr(n, "name")}
    return names


@pytest.mark.parametrize("page", PAGES)
def test_every_test_and_function_that_is_named_exists(page):
    text = read(page)
    named = set(re.findall(r"`([\w/]+\.py)::([\w.]+)`", text))
    assert len(named) == len(set(re.findall(r"`[^`\n]*::[^`\n]*`", text)))  # none is misspelt
    missing = [f"{path}::{name}" for path, name in sorted(named) if name not in defined(path)]
    assert not missing
    paths = set(re.findall(rf"`((?:{'|'.join(TOP)}|docs)/[\w/.]+)`", text))
    assert not [path for path in sorted(paths) if not (REPOSITORY / path).exists()]
    links = set(re.findall(r"\]\((?!\w+:|#)([^)#]+)", text))
    assert not [
        link for link in sorted(links) if not (REPOSITORY / page).parent.joinpath(link).exists()
    ]


def test_the_python_examples_parse():
    blocks = fenced("README.md", "python")
    assert blocks
    for block in blocks:
        ast.parse(block)


def test_the_presets_have_the_numbers_of_the_table():
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+ \|.*%) \|", read("README.md"), flags=re.MULTILINE)
    assert {name for name, _ in rows} == set(presets())
    for name, numbers in rows:
        config = preset(name)
        counts, model = parameter_counts(config), config.model
        attention = model.stacks[0].blocks[0].attention
        cache = int(cache_bytes_per_token(model, 2))
        heads = 2 * 2 * model.num_layers * attention.num_heads * attention.value_dim
        figures = (counts.total, counts.mtp, counts.active, model.num_layers, cache, heads)
        wanted = [*(f"{figure:,}" for figure in figures), f"{1 - cache / heads:.1%}"]
        assert numbers.split(" | ") == wanted, name


def test_the_mistakes_are_answered_as_shown(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "keep_freed_memory", lambda: False)
    monkeypatch.chdir(tmp_path)
    (console,) = fenced("README.md", "console")
    shown = re.findall(r"^\$ python -m experiments\.pretrain (.*)\n(.*)\n", console, re.MULTILINE)
    assert 2 * len(shown) == len(console.splitlines())
    for arguments, answer in shown:
        assert pretrain.main(["pretrain.py", *arguments.split()]) == 2
        assert capsys.readouterr() == ("", answer + "\n")
    assert list(tmp_path.iterdir()) == []
