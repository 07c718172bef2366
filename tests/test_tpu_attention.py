"""`mla_decode` and `mla_attention` for TPUs, interpreted with race detection, and the definitions.

Interpreted, memory that nobody wrote is NaN, and reading past an array is an error.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import choose
from pallas_kernels.latents import Fp8Latents, round_latents
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.mla_attention import shapes as attention_shapes
from pallas_kernels.mla_attention import tpu as attention_tpu
from pallas_kernels.mla_decode import NOTHING, mla_decode, tpu_pages
from pallas_kernels.mla_decode import shapes as decode_shapes
from pallas_kernels.mla_decode import tpu as decode_tpu

FLOAT32 = 2e-6  # rounding of float32 sums in another order, as a relative norm
BFLOAT16 = 5e-3  # weights and results rounded to bfloat16 on another side of a division
GRADIENTS = 8e-3  # likewise, and the scaled queries are rounded; the plain form differs as much
RACE = "RACE DETECTED"  # what the interpreter prints
SCALE = 0.2


@contextlib.contextmanager
def on_tpu(cores=1):
    """Traces for a chip that is not there, of one core or of two that are one device."""
    device = jax.sharding.AbstractDevice("TPU v5" if cores > 1 else "TPU7x", cores, "tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    # A clock for (nearly) every copy under way: with the one that there is otherwise, a copy that
    # overtakes a read is taken for one that came before.
    params = pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=cores, vector_clock_size=64
    )
    with jax.sharding.use_abstract_mesh(mesh), pltpu.force_tpu_interpret_mode(params):
        yield


@pytest.fixture(autouse=True)
def no_race(capfd):
    """A test of this file fails if a race was seen that it has not read itself."""
    yield
    assert RACE not in capfd.readouterr().out


def assert_near(got, wanted, tolerance=FLOAT32):
    assert got.dtype == wanted.dtype
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) <= tolerance * max(np.linalg.norm(wanted), 1e-3)


# ---- mla_decode ---------------------------------------------------------------------------------

FP8_SHAPES = (
    decode_shapes.FP8,
    decode_shapes.Shape(2, 3, 200, 8, (300, 0, 65), 6),  # the second tile is not whole
)
# Three tiles of 320 rows of queries, of which each sees more; an empty sequence between others.
CHUNK = decode_shapes.Shape(5, 64, 16, 8, (130, 0, 3, 261), 6)
LONG = decode_shapes.Shape(1, 4, 16, 8, (1300, 0, 64, 0, 511, 513), 24)  # several steps a sequence


def decode_case(shape, dtype=jnp.float32):
    """A cache of two layers, NaN where no sequence has a page, in a table of pages in any order."""
    rng = np.random.default_rng(0)
    b, width = len(shape.lengths), shape.c + shape.r
    lengths = np.array(shape.lengths, np.int32)
    table = rng.permutation(b * shape.table_width).reshape(b, -1).astype(np.int32)
    in_use = np.arange(shape.table_width) < -(-lengths[:, None] // 64)
    cache = np.full((2, table.size, 64, width), np.nan, np.float32)
    cache[:, table[in_use]] = rng.standard_normal((2, in_use.sum(), 64, width))
    table[~in_use] = rng.choice([10**9, -1], (~in_use).sum())
    q = rng.standard_normal((b, shape.t, shape.n, width))
    positions = lengths[:, None] - shape.t + np.arange(shape.t, dtype=np.int32)
    arrays = jnp.asarray(q, dtype), jnp.asarray(cache, dtype)
    return *arrays, *map(jnp.asarray, (table, lengths, positions))


def narrow(cache, latent_dim):
    q, rope = round_latents(jnp.nan_to_num(cache), latent_dim)
    poison = jnp.isnan(cache[..., :latent_dim])
    scale = jnp.where(poison[..., :1], jnp.nan, q.scale)
    latents = jnp.where(poison, jnp.nan, q.q.astype(jnp.float32)).astype(q.q.dtype)
    rope = jnp.where(poison[..., :1], jnp.nan, rope)
    return Fp8Latents(latents, jnp.swapaxes(scale, -1, -2), rope)


def clean(cache, table, lengths):
    """What the definition is given, which gathers every page of the table: no poison."""
    used = np.arange(table.shape[1]) < -(-np.asarray(lengths)[:, None] // 64)
    cache = jax.tree.map(lambda x: jnp.nan_to_num(x.astype(jnp.float32)).astype(x.dtype), cache)
    return cache, jnp.where(used, table, 0)


def decode_both(shape, q, cache, table, lengths, positions, cores=1):
    how = {"value_dim": shape.c}
    wide, safe = clean(cache, table, lengths)
    wanted = mla_decode(
        q, wide, jnp.int32(1), safe, lengths, positions, SCALE, **how, implementation="reference"
    )
    with on_tpu(cores):
        got = mla_decode(
            q, cache, jnp.int32(1), table, lengths, positions, SCALE, **how, implementation="tpu"
        )
    return got, wanted


@pytest.mark.parametrize("cores", [1, pytest.param(2, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(decode_shapes.SHAPES[0], marks=pytest.mark.nightly),
        *decode_shapes.SHAPES[1:],
        LONG,
    ],
)
def test_mla_decode(shape, cores):
    (out, lse), (wanted, wanted_lse) = decode_both(shape, *decode_case(shape), cores)
    assert_near(out, wanted)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)


@pytest.mark.parametrize("cores", [1, 2])
def test_mla_decode_of_a_chunk(monkeypatch, cores):
    """Two pages a step, tiles of 128 rows; two cores share sequences out, or their keys."""
    monkeypatch.setattr(decode_tpu, "STEP", 128)
    monkeypatch.setattr(decode_tpu, "MOST_ROWS", 128)
    shape = CHUNK if cores == 1 else CHUNK._replace(lengths=CHUNK.lengths[:1], t=1)
    (out, lse), (wanted, wanted_lse) = decode_both(shape, *decode_case(shape), cores)
    assert_near(out, wanted)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (FP8_SHAPES[1], jnp.float32),
        (FP8_SHAPES[0], jnp.bfloat16),
        pytest.param(FP8_SHAPES[0], jnp.float32, marks=pytest.mark.nightly),
        pytest.param(FP8_SHAPES[1], jnp.bfloat16, marks=pytest.mark.nightly),
    ],
)
def test_mla_decode_of_fp8_latents(shape, dtype):
    q, cache, *pages = decode_case(shape, dtype)
    cache = narrow(cache, shape.c)
    (out, lse), (wanted, wanted_lse) = decode_both(shape, q, cache, *pages)
    assert_near(out, wanted, FLOAT32 if dtype == jnp.float32 else BFLOAT16)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)


def test_a_query_that_sees_nothing_gives_zero():
    shape = decode_shapes.Shape(3, 2, 16, 8, (70, 0), 2)
    q, cache, table, lengths, _ = decode_case(shape)
    positions = jnp.array([[-1, 3, -7], [-1, 0, 5]], jnp.int32)
    (out, lse), (wanted, wanted_lse) = decode_both(shape, q, cache, table, lengths, positions)
    blind = np.array([[True, False, True], [True, True, True]])
    assert not np.asarray(out)[blind].any()
    assert (np.asarray(lse)[blind] == np.float32(NOTHING)).all()
    assert_near(out, wanted)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)


@settings(max_examples=2, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=3),
    t=st.integers(1, 3),
    n=st.integers(1, 5),
)
def test_mla_decode_drawn(lengths, t, n):
    shape = decode_shapes.Shape(t, n, 16, 8, tuple(lengths), 7)
    (out, lse), (wanted, wanted_lse) = decode_both(shape, *decode_case(shape))
    assert_near(out, wanted)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)


@pytest.fixture
def copied(monkeypatch):
    """Bytes of each copy that a kernel makes itself, when it has run."""
    sizes = {}
    original = interpret_pallas_call.DMA.execute_read

    def counted(dma):
        original(dma)
        if dma.data is not None:
            sizes[dma.id] = dma.data_size

    monkeypatch.setattr(interpret_pallas_call.DMA, "execute_read", counted)
    return sizes


@pytest.mark.parametrize("cores", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_only_pages_in_use_are_copied(copied, cores):
    shape = LONG
    q, cache, *pages = decode_case(shape, jnp.bfloat16)
    decode_both(shape, q, cache, *pages, cores)
    in_use = sum(-(-length // 64) for length in shape.lengths)
    assert sum(copied.values()) == in_use * 64 * (shape.c + shape.r) * 2
    copied.clear()
    decode_both(shape, q, narrow(cache, shape.c), *pages, cores)
    assert sum(copied.values()) == in_use * 64 * (shape.c + 2 * shape.r + 4)


def test_a_tile_copies_what_its_last_query_sees(copied, monkeypatch):
    monkeypatch.setattr(decode_tpu, "MOST_ROWS", 128)
    decode_both(CHUNK, *decode_case(CHUNK))
    pages = 0
    for length in CHUNK.lengths:
        for last in (1, 3, 4):  # queries of tiles of two, two and one
            pages += -(-max(0, length - CHUNK.t + last + 1) // 64)
    assert sum(copied.values()) == pages * 64 * (CHUNK.c + CHUNK.r) * 4


def test_a_race_that_is_planted_is_seen(monkeypatch, capfd):
    """Copies that are one step further ahead write where a step is being read."""
    monkeypatch.setattr(tpu_pages, "AHEAD", tpu_pages.SLOTS)
    monkeypatch.setattr(decode_tpu, "STEP", 64)
    shape = decode_shapes.Shape(1, 2, 16, 8, (500,), 8)
    decode_both(shape, *decode_case(shape))
    assert RACE in capfd.readouterr().out


def test_what_decoding_does_not_take_is_refused_or_run_elsewhere():
    shape = decode_shapes.SHAPES[0]
    q, cache, table, lengths, positions = decode_case(shape)
    cache, table = clean(cache, table, lengths)

    def decode(cache, table, implementation):
        return mla_decode(
            *(q, cache, jnp.int32(0), table, lengths, positions, SCALE),
            value_dim=shape.c,
            implementation=implementation,
        )

    small = cache[:, :, :60]
    with on_tpu():
        with pytest.raises(choose.Uncovered, match="pages of 60 positions in float32; multiples"):
            decode(small, table, "tpu")
        found = decode(small, table, None)
        with pytest.raises(choose.Uncovered, match="131073 pages; up to 131072"):
            jax.eval_shape(
                lambda table: decode(cache, table, "tpu"),
                jax.ShapeDtypeStruct((1, 131_073), jnp.int32),
            )
    assert_near(found[0], decode(small, table, "reference")[0])


# ---- mla_attention ------------------------------------------------------------------------------


def attention_case(shape, dtype=jnp.float32):
    """Operands, the gradient of the output, and documents: the first row's, and one in others."""
    rng = np.random.default_rng(0)
    b, t, n, i = shape.b, shape.t, shape.n, shape.i or shape.n
    widths = (n, shape.a), (i, shape.a), (i, shape.h), (n, shape.h)
    q, k, v, d_out = (jnp.asarray(rng.standard_normal((b, t, *w)), dtype) for w in widths)
    segments, positions = np.zeros((2, b, t), np.int32)
    for row, documents in enumerate([shape.documents, *[(t - 1,)] * (b - 1)]):
        begin = 0
        for number, length in enumerate(documents):
            here = slice(begin, begin + length)
            segments[row, here], positions[row, here] = number + 1, np.arange(length)
            begin += length
    return (q, k, v), (jnp.asarray(segments), jnp.asarray(positions)), d_out


def attention_and_gradients(operands, ids, d_out, implementation, first_row=None):
    def attend(q, k, v):
        return mla_attention(
            q, k, v, *ids, SCALE, first_row=first_row, implementation=implementation
        )

    out, backward = jax.vjp(attend, *operands)
    return out, *backward(d_out)


ATTENTION = (
    attention_shapes.SHAPES[1],
    *(
        pytest.param(shape, marks=pytest.mark.nightly)
        for shape in (attention_shapes.SHAPES[0], *attention_shapes.SHAPES[2:])
    ),
    # Three tiles: a document over all of them, one inside, and a row of one tile's padding.
    attention_shapes.Shape(2, 300, 2, 24, 16, (140, 20, 30), 1),
)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention_tpu, "MOST_BYTES", 128 * 4)


@pytest.mark.parametrize("shape", ATTENTION)
def test_mla_attention(small_tiles, shape):
    case = attention_case(shape)
    with on_tpu():
        got = attention_and_gradients(*case, "tpu")
    for a, b in zip(got, attention_and_gradients(*case, "reference"), strict=True):
        assert_near(a, b)
    padding = np.asarray(case[1][0]) == 0
    assert not any(np.asarray(x)[padding].any() for x in got)


def test_mla_attention_in_bfloat16():
    case = attention_case(attention_shapes.Shape(1, 130, 2, 192, 128, (100, 25)), jnp.bfloat16)
    with on_tpu():
        got = attention_and_gradients(*case, "tpu")
    for a, b in zip(got, attention_and_gradients(*case, "reference"), strict=True):
        assert_near(a, b, GRADIENTS)


@pytest.mark.parametrize("first_row", [150, pytest.param(0, marks=pytest.mark.nightly)])
def test_mla_attention_of_some_of_the_rows(small_tiles, first_row):
    shape = attention_shapes.Shape(1, 300, 2, 24, 16, (100, 120, 60))
    (q, k, v), ids, d_out = attention_case(shape)
    part = slice(first_row, first_row + 150)
    case = (q[:, part], k, v), ids, d_out[:, part]

    def run(first_row, implementation):
        return attention_and_gradients(*case, implementation, first_row)

    with on_tpu():
        got = jax.jit(run, static_argnums=1)(jnp.int32(first_row), "tpu")
    for a, b in zip(got, run(first_row, "reference"), strict=True):
        assert_near(a, b)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), max_size=6),
    first_row=st.sampled_from([None, 0, 350]),
)
def test_tiles_that_are_visited_are_those_with_a_pair_that_counts(lengths, first_row):
    rows = 700
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)[:rows]
    segments = np.pad(segments, (0, rows - len(segments)))
    queries = slice(0, rows) if first_row is None else slice(first_row, first_row + 350)
    count = queries.stop - queries.start
    table = attention_tpu._table(jnp.asarray(segments), first_row, (count, rows), (128, 128))
    row = np.arange(rows)
    seen = (segments[:, None] == segments) & (segments != 0) & (row[:, None] >= row)
    seen = np.pad(seen[queries], [(0, -count % 128), (0, -rows % 128)])
    wanted = seen.reshape(seen.shape[0] // 128, 128, -1, 128).any(axis=(1, 3))
    key = np.arange(wanted.shape[1])
    first, last = np.asarray(table.first_t)[:, None], np.asarray(table.last_t)[:, None]
    np.testing.assert_array_equal((first <= key) & (key <= last), wanted)


def test_what_attention_does_not_take_is_refused():
    def shapes(t, n=1):
        q, ids = jax.ShapeDtypeStruct((1, t, n, 8), jnp.float32), ((1, t), jnp.int32)
        return *[q] * 3, *[jax.ShapeDtypeStruct(*ids)] * 2

    def attend(*arguments):
        return mla_attention(*arguments, SCALE, implementation="tpu")

    with on_tpu():
        with pytest.raises(choose.Uncovered, match="200000 queries of 200000 rows"):
            jax.eval_shape(attend, *shapes(200_000))
        with pytest.raises(choose.Uncovered, match="none may be empty"):
            jax.eval_shape(attend, *shapes(0))
