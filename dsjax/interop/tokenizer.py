"""Text to token ids and back: byte-level BPE, trained here or read from a Hugging Face folder.

Knows nothing about models, chat templates or files of text. Every string that has a UTF-8 form can
be encoded, and decoding gives it back byte for byte. Source: the pre-tokenizer and the ids of the
special tokens are those of DeepSeek-V3's published `tokenizer.json`.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsjax.errors import InputError

BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")  # an id is the place in this tuple

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

_ROLES = ("bos", "eos", "pad")
_MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

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

    Text never becomes a special token: `encode("<|eos|>")` gives the tokens of those seven
    characters, whatever document they were typed in. Special ids are put in by the caller.
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
        self._token_bytes = _bytes_of_tokens(tokenizer)
        self.bos_id, self.eos_id, self.pad_id = (special_ids[role] for role in _ROLES)
        for role in _ROLES:
            if not 0 <= special_ids[role] < self.vocab_size:
                raise InputError(
                    f"the {role} token has id {special_ids[role]}, outside the vocabulary of "
                    f"{self.vocab_size}"
                )
        self._tokenizer = _without_special_tokens(tokenizer)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, sample_bytes: int = 5_000_000
    ) -> "Tokenizer":
        """Learns merges from a sample of the texts.

        The sample is taken in the order of the texts' hashes, so that the same texts give the same
        tokenizer in any order.

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

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the two files that `load` reads, each in one piece; makes the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, str | int | None] = {}
        for role, token_id in zip(_ROLES, (self.bos_id, self.eos_id, self.pad_id), strict=True):
            config[f"{role}_token"] = self._tokenizer.id_to_token(token_id)
            config[f"{role}_token_id"] = token_id
        _write(folder / TOKENIZER_FILE, self._json)
        _write(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")

    @property
    def vocab_size(self) -> int:
        """One more than the highest id; a model may have more rows, which are never used."""
        return len(self._token_bytes)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, with no special token among them and none added.

        Raises:
            InputError: if the text holds half of a surrogate pair, which UTF-8 cannot write.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"text with a lone surrogate (U+{ord(text[error.start]):04X} at character "
                    f"{error.start}) cannot be encoded"
                ) from error
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

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
    encoded = sorted((text.encode() for text in texts), key=lambda x: hashlib.sha256(x).digest())
    sample = []
    for data in encoded:
        sample.append(data[:max_bytes].decode(errors="ignore"))  # drops half a character at the cut
        max_bytes -= len(data)
        if max_bytes <= 0:
            break
    return sample


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


def _write(path: Path, text: str) -> None:
    """Writes beside the file and moves it there, so that no reader sees half a file."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # temporary files are private
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
