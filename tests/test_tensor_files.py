"""Safetensors: what the Rust library writes and reads, what is refused, what a kill leaves."""

import contextlib
import errno
import json
import os
import re
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.errors import InputError, RunError
from dsjax.interop.tensor_files import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Shard,
    TensorFolder,
    TensorSpec,
    dtype_name,
    plan_shards,
    shard_is_whole,
    write_index,
    write_shard,
)

pytestmark = pytest.mark.timeout(60)


def random_array(rng, dtype, shape):
    """Every bit pattern of the type, NaNs too; so compare bytes, not values."""
    if dtype == np.bool:
        return rng.integers(0, 2, shape).astype(np.bool)
    raw = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return raw.reshape(-1).view(dtype).reshape(shape)


@pytest.fixture
def arrays(rng):
    """One of each type and some shapes, by sorted names, as the Rust library lays them."""
    found = {f"type.{name}": random_array(rng, dtype, (3, 5)) for name, dtype in DTYPES.items()}
    for shape in [(), (1,), (0,), (2, 0, 3), (2, 1, 3, 1)]:
        found[f"shape.{len(shape)}.{0 in shape}"] = random_array(rng, np.dtype("f4"), shape)
    found['ŵ "quoted"\n\x01\\'] = np.ones(1, np.int16)
    return dict(sorted(found.items()))


def specs_of(arrays):
    return {name: TensorSpec(dtype_name(x.dtype), x.shape) for name, x in arrays.items()}


def same(found, wanted):
    return (
        found.dtype == wanted.dtype
        and found.shape == wanted.shape
        and found.tobytes() == wanted.tobytes()
    )


def write(folder, arrays, max_shard_bytes=10**9):
    shards = plan_shards(specs_of(arrays), max_shard_bytes)
    for shard in shards:
        write_shard(folder, shard, lambda name: [arrays[name]])
    write_index(folder, shards)
    return shards


def refused(folder, *words):
    """The error of opening a folder: one short line with these words."""
    with pytest.raises(InputError) as error:
        TensorFolder.open(folder)
    check_line(str(error.value), *words)
    return str(error.value)


def check_line(message, *words):
    assert message.isprintable()
    assert len(message) < 800
    for word in words:
        assert word in message


# --------------------------------------------------------------------------------------------------
# Beside the Rust library


def test_reads_what_the_rust_library_writes(tmp_path, arrays):
    safetensors.numpy.save_file(arrays, tmp_path / SINGLE_FILE, metadata={"format": "np", "é": "1"})
    with TensorFolder.open(tmp_path) as folder:
        assert folder.files == [tmp_path / SINGLE_FILE]
        assert set(folder.infos) == set(arrays)
        for name, wanted in arrays.items():
            found = folder.read(name)
            assert same(found, wanted), name
            assert not found.flags.writeable
            info = folder.infos[name]
            assert info.stop - info.start == wanted.nbytes == info.spec.num_bytes
            data = (tmp_path / SINGLE_FILE).read_bytes()[info.start : info.stop]
            assert data == wanted.tobytes()


def test_reads_what_serialize_writes(tmp_path, arrays):
    (tmp_path / SINGLE_FILE).write_bytes(safetensors.numpy.save(arrays))
    folder = TensorFolder.open(tmp_path)
    assert all(same(folder.read(name), wanted) for name, wanted in arrays.items())


def test_writes_the_bytes_of_the_rust_library(tmp_path, arrays):
    (shard,) = write(tmp_path, arrays)
    assert shard.name == SINGLE_FILE
    assert not (tmp_path / INDEX_FILE).exists()
    wanted = safetensors.numpy.save(arrays, metadata={"format": "pt"})
    assert (tmp_path / SINGLE_FILE).read_bytes() == wanted


def test_the_rust_library_reads_shards_in_any_order(tmp_path, arrays):
    arrays = dict(reversed(arrays.items()))
    shards = write(tmp_path, arrays, max_shard_bytes=100)
    assert len(shards) > 5
    found = {}
    for shard in shards:
        for name, entry in safetensors.deserialize((tmp_path / shard.name).read_bytes()):
            found[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    wanted = {name: (dtype_name(x.dtype), x.shape, x.tobytes()) for name, x in arrays.items()}
    assert found == wanted
    with TensorFolder.open(tmp_path) as folder:
        assert len(folder.files) == len(shards)
        assert all(same(folder.read(name), x) for name, x in arrays.items())
        assert folder.infos.keys() == arrays.keys()
    for path in folder.files:
        with safetensors.safe_open(path, "np") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                if arrays[name].dtype in (np.float32, np.int64, np.bool):
                    assert same(file.get_tensor(name), arrays[name])


def test_elements_lie_at_multiples_of_their_size(tmp_path):
    arrays = {"a": np.zeros(3, np.int8), "b": np.zeros(3), "c": np.zeros(3, DTYPES["BF16"])}
    write(tmp_path, arrays)
    infos = TensorFolder.open(tmp_path).infos
    assert [*infos] == ["b", "c", "a"]
    assert all(info.start % DTYPES[info.dtype].itemsize == 0 for info in infos.values())


def test_a_tensor_may_begin_at_any_byte(tmp_path):
    values = np.array([1.5, -2, 1e30], DTYPES["BF16"])
    raw(
        tmp_path,
        {"a": entry("I8", [1], 0, 1), "b": entry("BF16", [3], 1, 7), "c": entry("F32", [1], 7, 11)},
        b"\x05" + values.tobytes() + np.float32(3.25).tobytes(),
    )
    folder = TensorFolder.open(tmp_path)
    np.testing.assert_array_equal(folder.read("b").astype(np.float32), values.astype(np.float32))
    assert folder.read("c")[0] + 1 == 4.25


# --------------------------------------------------------------------------------------------------
# Files that are refused


def entry(dtype, shape, start, stop, **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **more}


def raw(folder, header, data=b"", name=SINGLE_FILE):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data)


MEMBER = b'"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}'
HOSTILE = {
    "shape is not the span": ({"a": entry("F32", [2], 0, 4)}, b"1234", "'a'", "takes 8"),
    "hole": ({"a": entry("I8", [1], 0, 1), "b": entry("I8", [1], 2, 3)}, b"123", "'b'", "hole"),
    "hole at first": ({"a": entry("I8", [1], 1, 2)}, b"12", "'a'", "hole"),
    "overlap": (
        {"a": entry("I8", [2], 0, 2), "b": entry("I8", [2], 1, 3)}, b"123", "'b'", "overlaps",
    ),
    "the same bytes": (
        {"a": entry("I8", [2], 0, 2), "b": entry("I8", [2], 0, 2)}, b"12", "overlaps",
    ),
    "empty one inside another": (
        {"a": entry("I8", [2], 0, 2), "b": entry("I8", [0], 1, 1)}, b"12", "'b'", "overlaps",
    ),
    "truncated": ({"a": entry("I8", [4], 0, 4)}, b"123", "'a'", "cut short"),
    "trailing": ({"a": entry("I8", [4], 0, 4)}, b"12345", "'a'", "more follows"),
    "trailing after none": ({}, b"1", "more follows"),
    "backwards": ({"a": entry("I8", [0], 4, 0)}, b"1234", "'a'", "data_offsets"),
    "negative offset": ({"a": entry("I8", [1], -1, 0)}, b"", "'a'", "data_offsets"),
    "three offsets": (
        {"a": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1, 1]}}, b"1", "'a'",
    ),
    "offset 2**63": ({"a": entry("I8", [1], 2**63, 2**63 + 1)}, b"", "'a'", "data_offsets"),
    "unknown dtype": ({"a": entry("F7", [1], 0, 1)}, b"1", "'a'", "'F7'", "BF16"),
    "four bits": ({"a": entry("F4", [2], 0, 1)}, b"1", "'a'", "'F4'"),
    "dtype no string": ({"a": entry(["F32"], [1], 0, 4)}, b"1234", "'a'", "dtype"),
    "fraction": ({"a": entry("I8", [1.0], 0, 1)}, b"1", "'a'", "shape"),
    "truth": ({"a": entry("I8", [True], 0, 1)}, b"1", "'a'", "shape"),
    "minus": ({"a": entry("I8", [-1, -1], 0, 1)}, b"1", "'a'", "shape"),
    "shape no list": ({"a": entry("I8", 1, 0, 1)}, b"1", "'a'", "shape"),
    "shape null": ({"a": entry("I8", None, 0, 1)}, b"1", "'a'", "shape"),
    "wraps to zero": ({"a": entry("I8", [2**32, 2**32], 0, 0)}, b"", "'a'", "too large"),
    "huge": ({"a": entry("F64", [2**62], 0, 0)}, b"", "'a'", "too large"),
    "huge but empty": ({"a": entry("I8", [0, 2**62, 8], 0, 0)}, b"", "'a'", "too large"),
    "a size of 2**64": ({"a": entry("I8", [2**64], 0, 0)}, b"", "'a'", "shape"),
    "65 dimensions": ({"a": entry("I8", [1] * 65, 0, 1)}, b"1", "'a'", "too large"),
    "100,000 dimensions": ({"a": entry("I8", [1] * 10**5, 0, 1)}, b"1", "'a'", "too large"),
    "100,000 times two": ({"a": entry("I8", [2] * 10**5, 0, 1)}, b"1", "'a'", "too large"),
    "unknown field": ({"a": entry("I8", [1], 0, 1, more=1)}, b"1", "'a'", "more"),
    "missing field": ({"a": {"dtype": "I8", "shape": [1]}}, b"1", "'a'"),
    "entry no object": ({"a": [1, 2]}, b"", "'a'"),
    "metadata not text": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "metadata nested": ({"__metadata__": {"a": {}}}, b"", "__metadata__"),
    "metadata null": ({"__metadata__": None}, b"", "__metadata__"),
    "metadata half character": (b'{"__metadata__":{"a":"\\ud800"}}', b"", "__metadata__"),
    "half a character": (
        b'{"\\ud800":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}', b"", "'\\ud800'",
    ),
    "key twice": (b"{" + MEMBER + b"," + MEMBER + b"}", b"1", "'a' is there twice"),
    "field twice": (
        b'{"a":{"dtype":"I8","shape":[1],"shape":[1],"data_offsets":[0,1]}}', b"1", "'shape'",
    ),
    "metadata twice": (b'{"__metadata__":{"x":"1","x":"2"}}', b"", "'x'"),
    "two metadata": (b'{"__metadata__":{},"__metadata__":{}}', b"", "'__metadata__'"),
    "NaN": (b'{"a":{"dtype":"I8","shape":[NaN],"data_offsets":[0,1]}}', b"1", "NaN"),
    "Infinity": (b'{"a":{"dtype":"I8","shape":[-Infinity],"data_offsets":[0,1]}}', b"", "Inf"),
    "1e999": (b'{"a":{"dtype":"I8","shape":[1e999],"data_offsets":[0,1]}}', b"1", "'a'", "inf"),
    "-0": (b'{"a":{"dtype":"I8","shape":[-0],"data_offsets":[0,0]}}', b"", "'a'", "shape"),
    "5000 digits": (b'{"a":{"dtype":"I8","shape":[' + b"9" * 5000 + b"]}}", b"", "JSON"),
    "4000 digits": (
        b'{"a":{"dtype":"I8","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,1]}}', b"", "'a'",
    ),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "nested"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"", "nested"),
    "not UTF-8": (b'{"\xff":1}', b"", "utf-8"),
    "UTF-16": ('{"a":1}'.encode("utf-16"), b"", "JSON"),
    "byte order mark": (b"\xef\xbb\xbf{}", b"", "JSON"),
    "leading space": (b" {}", b"", "JSON"),
    "padded with line ends": (b"{}\n\n", b"", "JSON"),
    "list": (b"[]", b"", "JSON"),
    "no header": (b"", b"", "JSON"),
    "half a header": (b'{"a":}', b"", "JSON"),
    "two headers": (b"{}{}", b"", "JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path, case):
    header, data, *words = HOSTILE[case]
    raw(tmp_path, header, data)
    refused(tmp_path, str(tmp_path / SINGLE_FILE), *words)


def test_files_without_a_header_are_refused(tmp_path):
    path = tmp_path / SINGLE_FILE
    for content in [b"", b"1234567", b"\x02" + bytes(7) + b"{", b"\xff" * 8, b"\xff" * 64]:
        path.write_bytes(content)
        refused(tmp_path, str(path))
    with open(path, "wb") as file:  # sparse: a header of 100 MB and a byte
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    refused(tmp_path, str(path), "100000001")


def test_names_cannot_flood_the_terminal(tmp_path):
    name = "\x1b[2J\n\u202e../" + "x" * 100_000
    raw(tmp_path, {name: entry("F32", ["y" * 10**6] * 10, 0, 4)})
    assert len(refused(tmp_path, r"'\x1b[2J\n\u202e../")) < 500 + len(str(tmp_path))
    raw(tmp_path, {name: entry("\n" * 10**6, [1], 0, 4)})
    assert len(refused(tmp_path)) < 700 + len(str(tmp_path))


def test_a_name_is_never_a_path(tmp_path):
    outside = tmp_path / "outside"
    inside = tmp_path / "inside"
    arrays = {"../outside": np.arange(3), str(outside): np.ones(2)}
    write(inside, arrays)
    assert not outside.exists()
    with TensorFolder.open(inside) as folder:
        assert all(same(folder.read(name), x) for name, x in arrays.items())
        with pytest.raises(InputError, match="no tensor 'b'"):
            folder.read("b")


def test_truth_values_are_zero_or_one(tmp_path):
    raw(tmp_path, {"a": entry("BOOL", [2], 0, 2)}, b"\x01\x02")
    with pytest.raises(InputError, match=r"tensor 'a' of .*model\.safetensors' has truth values"):
        TensorFolder.open(tmp_path).read("a")


FILE = bytes(
    safetensors.numpy.save(
        {
            "w": np.arange(6, dtype=np.float32).reshape(2, 3),
            "é": np.ones(4, DTYPES["F8_E4M3"]),
            "n": np.zeros((2, 0), np.int64),
        },
        metadata={"format": "pt"},
    )
)
HEADER_END = 8 + int.from_bytes(FILE[:8], "little")


def outcome(content):
    """Opens and reads a file's tensors: refused in one line, or just as the Rust library has it."""
    with tempfile.TemporaryDirectory() as place:
        Path(place, SINGLE_FILE).write_bytes(content)
        try:
            with TensorFolder.open(place) as folder:
                found = {
                    name: (info.dtype, [*info.shape], folder.read(name).tobytes())
                    for name, info in folder.infos.items()
                }
        except InputError as error:
            check_line(str(error), SINGLE_FILE)
            return None
    rust = safetensors.deserialize(content)
    wanted = {name: (x["dtype"], x["shape"], bytes(x["data"])) for name, x in rust}
    assert found == wanted
    return found


def test_a_file_cut_at_any_byte_is_refused():
    assert outcome(FILE)
    assert not any(outcome(FILE[:end]) for end in range(len(FILE)))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 8 * HEADER_END - 1))
def test_a_flipped_bit_is_refused_or_harmless(bit):
    content = bytearray(FILE)
    content[bit // 8] ^= 1 << bit % 8
    outcome(bytes(content))


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([*DTYPES, "F4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["I8", "BOOL", "BF16", "F32"]) | JUNK,
        "shape": st.lists(st.integers(0, 3), max_size=3) | JUNK,
        "data_offsets": st.tuples(st.integers(0, 4), st.integers(0, 4)) | JUNK,
    }
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=3), ENTRY | JUNK, max_size=3), st.binary(max_size=4))
def test_any_header_is_refused_or_read_as_by_the_rust_library(header, data):
    text = json.dumps(header).encode()
    outcome(len(text).to_bytes(8, "little") + text + data)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=64), st.booleans())
def test_random_bytes_are_refused_or_valid(content, with_length):
    outcome(len(content).to_bytes(8, "little") + content if with_length else content)


# --------------------------------------------------------------------------------------------------
# Folders


@pytest.fixture
def sharded(tmp_path):
    """Two files, `a` and `b`, with an index."""
    folder = tmp_path / "sharded"
    write(folder, {"a": np.ones(2), "b": np.zeros(2)}, max_shard_bytes=16)
    assert sorted(os.listdir(folder)) == [FIRST, SECOND, INDEX_FILE]
    return folder


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def index(folder, weight_map, **more):
    text = json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map, **more})
    (folder / INDEX_FILE).write_text(text)


def test_the_index_is_as_hugging_face_writes_it(sharded):
    assert json.loads((sharded / INDEX_FILE).read_text()) == {
        "metadata": {"total_size": 32},
        "weight_map": {"a": FIRST, "b": SECOND},
    }


def test_the_single_file_goes_before_an_index(sharded):
    raw(sharded, {"c": entry("I8", [1], 0, 1)}, b"1")
    shards = plan_shards({name: TensorSpec("F64", (2,)) for name in "ab"}, 16)
    with pytest.raises(InputError, match="would be read instead"):
        write_index(sharded, shards)
    assert [*TensorFolder.open(sharded).infos] == ["c"]


@pytest.mark.parametrize(
    "file",
    [
        "/etc/x.safetensors",
        "../x.safetensors",
        "..",
        "sub/x.safetensors",
        "sub/../x.safetensors",
        "..\\x.safetensors",
        "x\0.safetensors",
        "x.bin",
        "x.safetensors.bin",
        "",
        "\ud800.safetensors",
        None,
        3,
        ["x.safetensors"],
    ],
)
def test_an_index_names_plain_files_only(sharded, file):
    index(sharded, {"a": FIRST, "b": file})
    refused(sharded, INDEX_FILE, "tensor 'b'", "plain name")


def test_an_index_must_agree_with_its_files(sharded):
    paths = str(sharded / FIRST), str(sharded / SECOND)
    index(sharded, {"a": FIRST, "b": "model-00003-of-00002.safetensors"})
    refused(sharded, "model-00003-of-00002.safetensors", "No such file")
    index(sharded, {"a": FIRST, "b": "x" * 500 + ".safetensors"})
    refused(sharded, "File name too long")
    index(sharded, {"a": FIRST, "b": SECOND, "c": SECOND})
    refused(sharded, paths[1], "tensor 'c'", "not there")
    index(sharded, {"a": FIRST})
    TensorFolder.open(sharded)  # as other libraries: a file that the index does not name is no part
    index(sharded, {"a": SECOND, "b": SECOND})
    refused(sharded, paths[1], "tensor 'a'", "not there")
    index(sharded, {"a": SECOND, "b": FIRST})
    refused(sharded, "tensor 'a'", "not there")
    both = {"a": entry("I8", [1], 0, 1), "b": entry("I8", [1], 1, 2)}
    raw(sharded, both, b"12", name=SECOND)
    index(sharded, {"a": FIRST, "b": SECOND})
    refused(sharded, "tensor 'a'", paths[0], paths[1], "too")
    index(sharded, {"b": SECOND})
    refused(sharded, paths[1], "tensor 'a'", f"not in {INDEX_FILE}")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "JSON"),
        (b"[]", "weight_map"),
        (b"{}", "weight_map"),
        (b'{"weight_map": []}', "weight_map"),
        (b'{"weight_map": {}}', "weight_map"),
        (b'{"weight_map": {"a": "1", "a": "2"}}', "'a' is there twice"),
        (b'{"weight_map": {}, "weight_map": {}}', "'weight_map' is there twice"),
        (b'{"metadata": {"total_size": NaN}}', "NaN"),
        (b"[" * 100_000, "nested"),
        (b'{"weight_map": "\xff"}', "utf-8"),
    ],
)
def test_indices_that_are_none_are_refused(sharded, text, word):
    (sharded / INDEX_FILE).write_bytes(text)
    refused(sharded, str(sharded / INDEX_FILE), word)


def test_links_lead_into_the_folder_or_the_hubs_blobs(tmp_path, sharded):
    # Out of the folder: refused.
    outside = tmp_path / "outside.safetensors"
    os.rename(sharded / SECOND, outside)
    (sharded / SECOND).symlink_to(outside)
    refused(sharded, str(sharded / SECOND), "leads out of its folder", str(outside))
    # Inside of it: as good as the file.
    os.rename(outside, sharded / "kept")
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to("kept")
    assert same(TensorFolder.open(sharded).read("b"), np.zeros(2))
    # To nowhere, or to itself.
    (sharded / "kept").unlink()
    refused(sharded, str(sharded / SECOND), "No such file")
    (sharded / "kept").symlink_to(SECOND)
    refused(sharded, str(sharded / SECOND), "symbolic links")


@pytest.mark.parametrize(
    ("model", "snapshots", "blobs", "accepted"),
    [
        ("models--deepseek-ai--DeepSeek-V3", "snapshots", "blobs", True),
        ("models--deepseek-ai--DeepSeek-V3", "snapshots", "elsewhere", False),
        ("models--deepseek-ai--DeepSeek-V3", "other", "blobs", False),
        ("mine", "snapshots", "blobs", False),
    ],
)
def test_a_snapshot_of_the_hub_cache(tmp_path, sharded, model, snapshots, blobs, accepted):
    revision = tmp_path / model / snapshots / "e815299b0bcbac849fa540c768ef21845365c9eb"
    kept = tmp_path / model / blobs
    revision.mkdir(parents=True)
    kept.mkdir()
    for number, name in enumerate([FIRST, SECOND, INDEX_FILE]):
        os.rename(sharded / name, kept / f"hash{number}")
        (revision / name).symlink_to(f"../../{blobs}/hash{number}")
    by_link = tmp_path / "link"
    by_link.symlink_to(revision)
    for folder in [revision, by_link]:
        if accepted:
            with TensorFolder.open(folder) as tensors:
                assert tensors.files == [folder / FIRST, folder / SECOND]
                assert same(tensors.read("a"), np.ones(2))
        else:
            refused(folder, "leads out of its folder")
    if accepted:  # another model's blobs are not this one's
        other = tmp_path / "models--other" / "blobs"
        other.mkdir(parents=True)
        os.rename(kept / "hash0", other / "hash0")
        (revision / FIRST).unlink()
        (revision / FIRST).symlink_to("../../../models--other/blobs/hash0")
        refused(revision, FIRST, "leads out of its folder")


@pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE, FIRST])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_regular_files_are_opened(sharded, name, kind):
    (sharded / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(sharded / name)
    elif kind == "folder":
        (sharded / name).mkdir()
    else:
        (sharded / name).symlink_to("/dev/zero")
    refused(sharded, str(sharded / name), "out of" if kind == "device" else "not a regular file")


def test_pickles_are_never_opened(tmp_path):
    for name in ["pytorch_model-00001-of-00002.bin", "x.pt", "x.pth"]:
        folder = tmp_path / name
        folder.mkdir()
        os.mkfifo(folder / name)  # opening it would hang
        refused(folder, name, "pickle", "never opened", "save_file(torch.load(")


def test_folders_without_tensors_are_refused(tmp_path):
    refused(tmp_path, str(tmp_path), SINGLE_FILE, INDEX_FILE)
    raw(tmp_path, {}, name="other.safetensors")
    refused(tmp_path, "1 other")
    refused(tmp_path / "none", "No such file")
    refused(tmp_path / "other.safetensors", "Not a directory")
    refused(tmp_path / "a\0b", "null")
    refused(tmp_path / ("x" * 300), "too long")
    raw(tmp_path, {})
    assert not TensorFolder.open(tmp_path).infos


def test_a_disk_that_fails_is_one_line(sharded, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for function in ["pread", "open", "lstat", "listdir"]:
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fails)
            refused(sharded, str(sharded), "Input/output error")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(sharded):
    (sharded / SECOND).chmod(0)
    refused(sharded, str(sharded / SECOND), "Permission denied")


def test_files_that_change_after_opening_are_refused(sharded, tmp_path):
    folder = TensorFolder.open(sharded)
    read = folder.read("a")
    with open(sharded / FIRST, "r+b") as file:
        file.truncate(8)
    with pytest.raises(InputError, match=f"{FIRST}' has been cut short"):
        folder.read("a")
    del read
    write(sharded, {"a": np.ones(2), "b": np.ones(2)}, max_shard_bytes=16)
    with pytest.raises(InputError, match=f"{SECOND}' has changed"):
        folder.read("b")
    (sharded / SECOND).unlink()
    with pytest.raises(InputError, match=f"{SECOND}': No such file"):
        folder.read("b")


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_files_are_mapped_once_when_they_are_read(tmp_path):
    arrays = {f"{layer:03d}.{name}": np.full(3, layer) for layer in range(40) for name in "ab"}
    write(tmp_path, arrays, max_shard_bytes=48)
    before = descriptors()
    with TensorFolder.open(tmp_path) as folder:
        assert len(folder.files) == 40
        assert descriptors() == before
        views = [folder.read(name) for name in ("000.a", "000.b", "000.a", "007.b")]
        assert descriptors() == before + 2
        assert np.shares_memory(views[0], views[2])
    assert views[3][0] == 7  # still there
    with pytest.raises(ValueError, match="closed"):
        folder.read("000.a")
    del views
    assert descriptors() == before
    (tmp_path / folder.files[30].name).write_bytes(b"")
    refused(tmp_path)
    assert descriptors() == before


def test_views_cannot_be_written_to(sharded):
    read = TensorFolder.open(sharded).read("a")
    with pytest.raises(ValueError, match="read-only"):
        read[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        read.flags.writeable = True


# --------------------------------------------------------------------------------------------------
# Writing


def test_shards_are_greedy_and_in_order():
    sizes = {"a": 4, "b": 4, "c": 3, "huge": 100, "d": 1, "e": 8, "none": 0}
    specs = {name: TensorSpec("I8", (size,)) for name, size in sizes.items()}
    shards = plan_shards(specs, 8)
    assert [[*shard.specs] for shard in shards] == [
        ["a", "b"],
        ["c"],
        ["huge"],
        ["d"],
        ["e", "none"],
    ]
    assert shards[1].name == "model-00002-of-00005.safetensors"
    assert [shard.num_bytes for shard in shards] == [8, 3, 100, 1, 8]
    assert plan_shards(specs, 10**6) == [Shard(SINGLE_FILE, specs)]
    assert plan_shards({}, 8) == [Shard(SINGLE_FILE, {})]


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "word"),
    [
        ("__metadata__", "I8", (1,), "'__metadata__'"),
        ("\ud800", "I8", (1,), "'\\ud800'"),
        ("a", "F4", (1,), "tensor 'a'"),
        ("a", "I8", (-1,), "tensor 'a'"),
        ("a", "I8", (2**62, 2), "tensor 'a'"),
        ("a", "I8", (1,) * 65, "tensor 'a'"),
    ],
)
def test_what_cannot_be_written_is_refused(name, dtype, shape, word):
    with pytest.raises(InputError) as error:
        plan_shards({name: TensorSpec(dtype, shape)}, 10)
    check_line(str(error.value), word)


def test_types_without_a_name_are_refused():
    assert all(dtype_name(dtype) == name for name, dtype in DTYPES.items())
    for dtype in ["c16", "O", "U3", ">f4", "M8[s]"]:
        with pytest.raises(InputError, match="cannot hold"):
            dtype_name(dtype)
    with pytest.raises(InputError, match="cannot hold anything"):
        plan_shards({}, 0)


def test_pieces_are_written_one_by_one(tmp_path):
    count, size = 24, 500_000
    (shard,) = plan_shards({"a": TensorSpec("F32", (count, size))}, 10**9)
    alive, told = [], []

    def pieces(name):
        assert name == "a"
        for number in range(count):
            assert not any(piece() is not None for piece in alive)
            piece = np.full((1, size), number, np.float32)
            alive.append(weakref.ref(piece))
            yield piece.T.T if number % 2 else piece
            del piece

    write_shard(tmp_path, shard, pieces, told.append)
    assert told == [4 * size] * count
    read = TensorFolder.open(tmp_path).read("a")
    assert (read == np.arange(count)[:, None]).all()


def test_pieces_of_any_layout(tmp_path, rng):
    values = rng.standard_normal((4, 6)).astype(DTYPES["BF16"])
    specs = {
        "a": TensorSpec("BF16", (4, 6)),
        "b": TensorSpec("BF16", ()),
        "c": TensorSpec("I8", (0,)),
    }
    pieces = {
        "a": [values[0], values[1:3, :], np.asfortranarray(values[3:])],
        "b": [values[0, 0].reshape(())],
        "c": [],
    }
    (shard,) = plan_shards(specs, 10**9)
    write_shard(tmp_path, shard, pieces.__getitem__)
    folder = TensorFolder.open(tmp_path)
    assert same(folder.read("a"), values)
    assert same(folder.read("b"), values[0, 0].reshape(()))
    assert folder.read("c").shape == (0,)


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [np.zeros(3, np.float32)],
        [np.zeros(5, np.float32)],
        [np.zeros(2, np.float32)] * 3,
        [np.zeros(8, np.int16)],
        [np.zeros(4, ">f4")],
        [np.zeros(4, np.float32), np.zeros((0, 2), np.int32)],
    ],
)
def test_pieces_must_be_what_was_planned(tmp_path, pieces):
    (shard,) = plan_shards({"w": TensorSpec("F32", (2, 2))}, 100)
    with pytest.raises(ValueError, match=r"tensor 'w' of model\.safetensors"):
        write_shard(tmp_path, shard, lambda name: pieces)
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    (shard,) = plan_shards({name: TensorSpec("F32", (2,)) for name in "abc"}, 100)
    write_whole = os.write

    def fails_at(number):
        calls = []

        def fails(*arguments):
            calls.append(None)
            if len(calls) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_whole(*arguments)

        return fails

    def pieces(name):
        return [np.zeros(2, np.float32)]

    for number in range(1, 5):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", fails_at(number))
            with pytest.raises(RunError, match=r"model\.safetensors': No space left"):
                write_shard(tmp_path, shard, pieces)
        assert os.listdir(tmp_path) == []
    for function in ["fsync", "replace"]:
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fails_at(1))
            with pytest.raises(RunError, match="No space left"):
                write_shard(tmp_path, shard, pieces)
        assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write .*file/model"):
        write_shard(tmp_path / "file", shard, pieces)


def test_the_callers_own_errors_are_not_renamed(tmp_path):
    (shard,) = plan_shards({"a": TensorSpec("F32", (2,))}, 100)

    def pieces(name):
        yield np.zeros(1, np.float32)
        raise FileNotFoundError(errno.ENOENT, "the source")

    with pytest.raises(FileNotFoundError, match="the source"):
        write_shard(tmp_path, shard, pieces)
    assert os.listdir(tmp_path) == []


def test_short_writes_are_gone_on_with(tmp_path, arrays, monkeypatch):
    write_some = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write_some(file, data[:7]))
    write(tmp_path, arrays)
    monkeypatch.undo()
    wanted = safetensors.numpy.save(arrays, metadata={"format": "pt"})
    assert (tmp_path / SINGLE_FILE).read_bytes() == wanted


KILLED = """
import os, signal, sys
import numpy as np
from dsjax.interop.tensor_files import TensorSpec, plan_shards, write_shard

def pieces(name):
    for row in range(4):
        if (name, row) == ("c", 2):
            os.kill(os.getpid(), signal.SIGKILL)
        yield np.full((1, 1000), row, np.float32)

for shard in plan_shards({name: TensorSpec("F32", (4, 1000)) for name in "abcd"}, 16000):
    write_shard(sys.argv[1], shard, pieces)
"""


def test_a_kill_leaves_no_file_that_looks_whole_and_a_resume_makes_the_rest(tmp_path):
    result = subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    assert result.returncode == -9
    shards = plan_shards({name: TensorSpec("F32", (4, 1000)) for name in "abcd"}, 16000)
    assert [shard_is_whole(tmp_path, shard) for shard in shards] == [True, True, False, False]
    (left,) = set(os.listdir(tmp_path)) - {shard.name for shard in shards[:2]}
    assert re.fullmatch(r"\.model-00003-of-00004\.safetensors\..+\.partial", left)
    refused(tmp_path, "2 other")
    written = []

    def pieces(name):
        written.append(name)
        return [np.zeros((4, 1000), np.float32)]

    for shard in shards:
        if not shard_is_whole(tmp_path, shard):
            write_shard(tmp_path, shard, pieces)
    write_index(tmp_path, shards)
    assert written == ["c", "d"]
    assert sorted(os.listdir(tmp_path)) == [*(shard.name for shard in shards), INDEX_FILE]
    assert TensorFolder.open(tmp_path).read("b")[3, 0] == 3


def test_only_exactly_this_file_is_whole(tmp_path):
    specs = {"a": TensorSpec("F32", (2, 2)), "b": TensorSpec("I32", (2, 2))}
    (shard,) = plan_shards(specs, 100)
    path = tmp_path / SINGLE_FILE
    assert not shard_is_whole(tmp_path, shard)
    assert not shard_is_whole(tmp_path / "none", shard)
    write(tmp_path, {"a": np.zeros((2, 2), np.float32), "b": np.zeros((2, 2), np.int32)})
    assert shard_is_whole(tmp_path, shard)
    for other in [
        {"a": TensorSpec("F32", (4,)), "b": specs["b"]},
        {"a": TensorSpec("U32", (2, 2)), "b": specs["b"]},
        {"A": specs["a"], "b": specs["b"]},
        {"a": specs["a"]},
    ]:
        assert not shard_is_whole(tmp_path, plan_shards(other, 100)[0])
    whole = path.read_bytes()
    for content in [b"", whole[:-1], whole + b"1", whole[:20], whole.replace(b"pt", b"np")]:
        path.write_bytes(content)
        assert not shard_is_whole(tmp_path, shard)
    path.unlink()
    os.mkfifo(path)
    assert not shard_is_whole(tmp_path, shard)
    path.unlink()
    path.mkdir()
    assert not shard_is_whole(tmp_path, shard)
    path.rmdir()
    (tmp_path / "elsewhere").write_bytes(whole)
    path.symlink_to("elsewhere")
    assert not shard_is_whole(tmp_path, shard)
    write(tmp_path, {"a": np.zeros((2, 2), np.float32), "b": np.zeros((2, 2), np.int32)})
    assert not path.is_symlink()
    assert shard_is_whole(tmp_path, shard)


def test_two_writers_do_not_mix_their_bytes(tmp_path):
    (shard,) = plan_shards({"a": TensorSpec("F32", (2,))}, 100)

    def first(name):
        yield np.ones(1, np.float32)
        write_shard(tmp_path, shard, lambda name: [np.full(2, 2, np.float32)])
        yield np.ones(1, np.float32)

    with pytest.raises(RunError, match="does another process write there"):
        write_shard(tmp_path, shard, first)
    assert os.listdir(tmp_path) == [SINGLE_FILE]
    assert same(TensorFolder.open(tmp_path).read("a"), np.full(2, 2, np.float32))
    with contextlib.suppress(RunError):
        write_index(tmp_path, [shard])
    assert os.listdir(tmp_path) == [SINGLE_FILE]
