"""A run's text, ready to train on: the configuration put together from the rest of the room.

Knows nothing about models or steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsjax.config import DataConfig
from dsjax.data.batches import (
    Batch,
    DirectReader,
    RowBatches,
    StreamReader,
    TrainBatches,
    eval_batches,
)
from dsjax.data.fim import marks
from dsjax.data.index import Documents, split_sources
from dsjax.data.mixing import whole_shares
from dsjax.data.on_the_fly import Encoder
from dsjax.data.packing import PackedRows, TokenStream, tokenise
from dsjax.data.token_cache import cache_folder, open_tokens
from dsjax.errors import InputError
from dsjax.interop.tokenizer import SAMPLE_BYTES, Tokenizer


@dataclass(frozen=True)
class Corpus:
    """A run's text.

    Attributes:
        tokenizer: what its tokens mean.
        train: endless micro-batches of this process's rows.
        held_out: the whole held-out split, the same in every process.
        held_out_bytes: the UTF-8 bytes of its documents.
    """

    tokenizer: Tokenizer
    train: TrainBatches
    held_out: list[Batch]
    held_out_bytes: int


def find_tokenizer(data: DataConfig, vocab_size: int) -> Tokenizer:
    """Learns, finds or reads the tokenizer that a configuration names.

    Args:
        data: its `tokenizer` is "train" (learned from the training documents), "deepseek", or a
            folder.
        vocab_size: V; what is learned has at most so many ids.

    Raises:
        InputError: if it cannot be had, or has more ids than V; as `split_sources`.
    """
    if data.tokenizer == "train":
        train, _ = split_sources(data, cache_folder(data))
        texts = (text for documents in _sample(train) for text in documents.texts())
        return Tokenizer.train(texts, vocab_size)
    if data.tokenizer == "deepseek":
        tokenizer = Tokenizer.published()
    else:
        tokenizer = Tokenizer.load(data.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"data.tokenizer {data.tokenizer!r} has {tokenizer.vocab_size} ids, more than "
            f"model.vocab_size {vocab_size}"
        )
    return tokenizer


def open_corpus(
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    micro_batch_size: int,
    eval_batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Corpus:
    """Opens a run's text.

    Micro-batch n has the same rows whatever the number of processes: each takes a contiguous part
    of them. Rows hold documents of one source; sources are mixed row by row by their weights, or,
    without weights, by the number of rows they have (on the fly, by their bytes). Each source
    begins again when it is through, in another order if `data.shuffle`.

    Args:
        data: what to read.
        tokenizer: from `find_tokenizer`, or that of the run that goes on.
        seq_len: T.
        micro_batch_size: rows of a micro-batch over all processes.
        eval_batch_size: rows of a held-out batch.
        seed: of the order of documents and rows, in [0, 2**32).
        process_index: this process's number.
        process_count: how many read this corpus; divides `micro_batch_size`.

    Raises:
        InputError: if the text, the cache folder or one of the numbers cannot be used.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"the data's seed must lie in [0, 2**32), not {seed}")
    if micro_batch_size < 1:
        raise InputError(f"micro_batch_size must be at least 1, not {micro_batch_size}")
    if not 0 <= process_index < process_count or micro_batch_size % process_count:
        raise InputError(
            f"micro-batches of {micro_batch_size} do not divide among {process_count} processes "
            f"(this is number {process_index})"
        )
    if data.fim_rate > 0:
        marks(tokenizer)
    cache_dir = cache_folder(data)
    train, held_out = split_sources(data, cache_dir)
    cached = data.tokenise == "cached"
    for documents in train:
        if not cached and not all(file.random_access for file in documents.files):
            raise InputError(
                f"source {documents.path!r}: a packed file cannot be read on the fly; unpack it, "
                "or set data.tokenise=cached"
            )
    part = micro_batch_size // process_count
    rows = range(process_index * part, (process_index + 1) * part)
    used = [number for number, documents in enumerate(train) if len(documents)]
    seeds = [(seed + number * 0x9E3779B1) % 2**32 for number in used]  # all different
    weights = [data.sources[number].weight for number in used]
    if cached:
        packed = [
            PackedRows(
                open_tokens(train[number], tokenizer, data.fim_rate, cache_dir), seq_len, order_seed
            )
            for number, order_seed in zip(used, seeds, strict=True)
        ]
        shares = _shares(weights, [len(source) for source in packed])
        batches = RowBatches(packed, shares, seeds, data.shuffle, rows, micro_batch_size)
        reader = DirectReader(batches, data.workers)
    else:
        sources = [train[number] for number in used]
        shares = _shares(weights, [documents.num_bytes for documents in sources])
        encoder = Encoder(sources, tokenizer, data.fim_rate)
        reader = StreamReader(
            encoder,
            shares,
            seeds,
            data.shuffle,
            rows,
            micro_batch_size,
            seq_len=seq_len,
            num_workers=data.workers,
        )
    made_of = {
        "text": [documents.fingerprint() for documents in train],
        "weights": [source.weight for source in data.sources],
        "tokenizer": tokenizer.fingerprint,
        "fim_rate": data.fim_rate,
        "tokenise": data.tokenise,
        "seq_len": seq_len,
        "micro_batch_size": micro_batch_size,
        "seed": seed,
        "shuffle": data.shuffle,
    }
    held_out_stream = _held_out(held_out, tokenizer, cache_dir if cached else None)
    return Corpus(
        tokenizer=tokenizer,
        train=TrainBatches(reader, made_of, [source.path for source in data.sources]),
        held_out=eval_batches(PackedRows(held_out_stream, seq_len, None), eval_batch_size),
        held_out_bytes=held_out_stream.num_bytes,
    )


def _shares(weights: Sequence[float | None], sizes: Sequence[int]) -> list[int]:
    given = [weight for weight in weights if weight is not None]
    return whole_shares(given) if given else list(sizes)


def _sample(sources: Sequence[Documents]) -> list[Documents]:
    """Those documents of smallest hash that a tokenizer is learned from."""
    keys = np.concatenate([documents.order_key for documents in sources])
    sizes = np.concatenate([documents.size for documents in sources])
    order = np.argsort(keys, kind="stable")
    count = int(np.searchsorted(np.cumsum(sizes[order]), SAMPLE_BYTES)) + 1
    chosen = np.zeros(len(keys), bool)
    chosen[order[:count]] = True
    borders = np.cumsum([len(documents) for documents in sources])[:-1]
    masks = np.split(chosen, borders)
    return [documents.select(mask) for documents, mask in zip(sources, masks, strict=True)]


def _held_out(sources: Sequence[Documents], tokenizer: Tokenizer, cache_dir) -> TokenStream:
    """The held-out documents of all sources, one source after another; never transformed."""
    if cache_dir is None:
        texts = (text for documents in sources for text in documents.texts())
        return tokenise(texts, tokenizer)
    sources = [documents for documents in sources if len(documents)]
    files = [open_tokens(documents, tokenizer, 0.0, cache_dir) for documents in sources]
    tokens = [source.read(0, int(source.offsets[-1])) for source in files]
    lengths = [np.diff(source.offsets) for source in files]
    return TokenStream(
        tokens=np.concatenate(tokens),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)]),
        document_bytes=np.concatenate([documents.size for documents in sources]),
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
    )
