"""A run's text, ready to train on: the configuration put together from the rest of the room.

Knows nothing about models or steps.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from dsjax.config import DataConfig
from dsjax.data.batches import (
    Batch,
    DirectReader,
    RowBatches,
    StreamReader,
    TrainBatches,
    eval_batches,
)
from dsjax.data.conversations import ConversationEncoder, TrainingText
from dsjax.data.fim import marks
from dsjax.data.fitting import FittedRows
from dsjax.data.index import Documents, split_sources
from dsjax.data.mixing import whole_shares
from dsjax.data.on_the_fly import Encoder
from dsjax.data.packing import PackedRows, TokenStream, tokenise
from dsjax.data.token_cache import TokenFiles, cache_folder, open_tokens
from dsjax.errors import InputError
from dsjax.interop.templates import template_text
from dsjax.interop.tokenizer import SAMPLE_BYTES, Tokenizer


@dataclass(frozen=True)
class Corpus:
    """A run's text.

    Attributes:
        tokenizer: what its tokens mean.
        train: endless micro-batches of this process's rows.
        held_out: the whole held-out split, the same in every process.
        held_out_bytes: the UTF-8 bytes of its documents; of conversations, of what is learnt.
    """

    tokenizer: Tokenizer
    train: TrainBatches
    held_out: list[Batch]
    held_out_bytes: int


def find_tokenizer(data: DataConfig, vocab_size: int) -> Tokenizer:
    """Learns, finds or reads the tokenizer that a configuration names.

    Args:
        data: its `tokenizer` is "train" (learned from the training documents), "deepseek", or a
            folder; its `chat_template` takes the place of the tokenizer's own.
        vocab_size: V; what is learned has at most so many ids.

    Raises:
        InputError: if it cannot be had, or has more ids than V; as `split_sources`.
    """
    if data.tokenizer == "train":
        train, _ = split_sources(data, cache_folder(data))
        tokenizer = Tokenizer.train(_training_texts(data, _sample(train)), vocab_size)
    elif data.tokenizer == "deepseek":
        tokenizer = Tokenizer.published()
    else:
        tokenizer = Tokenizer.load(data.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"data.tokenizer {data.tokenizer!r} has {tokenizer.vocab_size} ids, more than "
            f"model.vocab_size {vocab_size}"
        )
    return with_template(data, tokenizer)


def with_template(data: DataConfig, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the chat template that a configuration names, if it names one.

    Raises:
        InputError: if there is no such template.
    """
    if data.chat_template is None:
        return tokenizer
    return tokenizer.with_template(template_text(data.chat_template))


def rows_an_epoch(data: DataConfig, tokenizer: Tokenizer, seq_len: int) -> int:
    """How many rows give every training document once.

    Raises:
        InputError: if rows are made on the fly, whose number nobody knows, or sources have weights,
            by which they end at different times; and as `open_corpus`.
    """
    if data.tokenise != "cached" or data.sources[0].weight is not None:
        raise InputError("epochs are counted in rows of cached tokens and sources without weights")
    train, _ = split_sources(data, cache_folder(data))
    rows = _Rows(data, tokenizer, seq_len)
    return sum(len(rows.of(documents, data.fim_rate, 0)) for documents in train if len(documents))


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
    made = _Rows(data, tokenizer, seq_len)
    if cached:
        packed = [
            made.of(train[number], data.fim_rate, order_seed)
            for number, order_seed in zip(used, seeds, strict=True)
        ]
        for number, source in zip(used, packed, strict=True):
            _tell_too_long(train[number], source, "training")
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
    if data.has_conversations:
        made_of["chat_template"] = _digest(tokenizer.chat_template)
        made_of["too_long"] = data.too_long
    held_out_batches, held_out_bytes = _held_out(made, held_out, eval_batch_size)
    return Corpus(
        tokenizer=tokenizer,
        train=TrainBatches(reader, made_of, [source.path for source in data.sources]),
        held_out=held_out_batches,
        held_out_bytes=held_out_bytes,
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


def _training_texts(data: DataConfig, sources: Sequence[Documents]) -> Iterator[str]:
    """What a tokenizer is learned from; conversations as they will be written."""
    named = data.chat_template
    written: TrainingText | None = None
    for documents in sources:
        if not documents.conversations:
            yield from documents.texts()
            continue
        if written is None:
            written = TrainingText(None if named is None else template_text(named))
        for number, text in enumerate(documents.texts()):
            try:
                yield written(text)
            except InputError as error:
                raise documents.located(number, error) from error


class _Rows:
    """Makes rows of documents, with one process for the template of all conversations."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, seq_len: int):
        self.data, self.tokenizer, self.seq_len = data, tokenizer, seq_len
        self._cache_dir = cache_folder(data)
        self._converse = ConversationEncoder(tokenizer)

    def tokens(self, documents: Documents, fim_rate: float) -> TokenFiles:
        """The tokens of a source, in files."""
        return open_tokens(documents, self.tokenizer, fim_rate, self._cache_dir, self._converse)

    def of(
        self, documents: Documents, fim_rate: float, order_seed: int | None
    ) -> PackedRows | FittedRows:
        """The rows of a source, from token files."""
        tokens = self.tokens(documents, fim_rate)
        if not documents.conversations:
            return PackedRows(tokens, self.seq_len, order_seed)
        rows = FittedRows(tokens, self.seq_len, order_seed, self.data.too_long)
        if not len(rows):
            raise InputError(
                f"source {documents.path!r}: none of {len(documents)} conversations fits rows of "
                f"{self.seq_len} tokens"
            )
        return rows


def _tell_too_long(documents: Documents, rows: PackedRows | FittedRows, side: str) -> None:
    """Says which conversations of a source find no room."""
    if isinstance(rows, FittedRows) and (rows.num_cut or rows.num_dropped):
        line = (
            f"{documents.path}: of {len(documents)} {side} conversations, {rows.num_cut} are cut "
            f"at {rows.seq_len + 1} tokens, and {rows.num_dropped} longer ones left out"
        )
        tqdm.write(line, file=sys.stderr)


def _digest(template: str | dict[str, str] | None) -> str:
    return hashlib.sha256(json.dumps(template).encode()).hexdigest()[:16]


def _held_out(
    made: _Rows, sources: Sequence[Documents], batch_size: int
) -> tuple[list[Batch], int]:
    """All held-out documents in batches, never transformed, and the bytes of what is predicted."""
    found = [documents for documents in sources if len(documents)]
    texts = [documents for documents in found if not documents.conversations]
    parts: list[PackedRows | FittedRows] = []
    num_bytes = 0
    if texts:
        stream = _text_stream(made, texts)
        parts.append(PackedRows(stream, made.seq_len, None))
        num_bytes += stream.num_bytes
    vocabulary = range(made.tokenizer.vocab_size)
    bytes_of = np.array([len(made.tokenizer.token_bytes(token_id)) for token_id in vocabulary])
    for documents in found:
        if documents.conversations:
            rows = made.of(documents, 0.0, None)
            _tell_too_long(documents, rows, "held-out")
            for row in (rows[number] for number in range(len(rows))):
                num_bytes += int(bytes_of[row["targets_T"][row["weights_T"] > 0]].sum())
            parts.append(rows)
    return eval_batches(parts, batch_size), num_bytes


def _text_stream(made: _Rows, sources: Sequence[Documents]) -> TokenStream:
    """The documents of all sources, one source after another."""
    if made.data.tokenise != "cached":
        texts = (text for documents in sources for text in documents.texts())
        return tokenise(texts, made.tokenizer)
    files = [made.tokens(documents, 0.0) for documents in sources]
    tokens = [source.read(0, int(source.offsets[-1])) for source in files]
    lengths = [np.diff(source.offsets) for source in files]
    return TokenStream(
        tokens=np.concatenate(tokens),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)]),
        document_bytes=np.concatenate([documents.size for documents in sources]),
        vocab_size=made.tokenizer.vocab_size,
        pad_id=made.tokenizer.pad_id,
    )
