"""Fill in the middle: some documents become prefix, suffix and then the middle, to be predicted.

Knows nothing about files, rows or seeds of a run: what happens to a document is a function of its
text. Source: DeepSeek-V3 technical report, section 4.1 (prefix-suffix-middle, at the level of
documents, before packing); the cuts lie between characters, as in Bavarian et al. 2022
(arXiv 2207.14255), section 3.
"""

import hashlib
from collections.abc import Sequence

from dsjax.errors import InputError
from dsjax.interop.tokenizer import Tokenizer

_KEY = b"dsjax fill in the middle 1"  # another key would choose other documents and cuts


def cut(text: str, rate: float) -> tuple[str, str, str] | None:
    """Chooses whether a text is transformed, and where it is cut.

    Args:
        text: the document.
        rate: the share of documents to transform, in [0, 1].

    Returns:
        (prefix, middle, suffix), each of which may be empty; or None to leave the text as it is.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=24, key=_KEY).digest()
    chosen, one, other = (int.from_bytes(digest[i : i + 8], "big") for i in (0, 8, 16))
    if chosen / 2**64 >= rate:
        return None
    begin, end = sorted(number * (len(text) + 1) >> 64 for number in (one, other))
    return text[:begin], text[begin:end], text[end:]


def encode_documents(
    tokenizer: Tokenizer, texts: Sequence[str], fim_rate: float
) -> list[list[int]]:
    """Tokens of documents, a share of them as `begin prefix hole suffix end middle`.

    Args:
        tokenizer: of a vocabulary with the three marks, unless the rate is 0.
        texts: documents.
        fim_rate: the share to transform.

    Returns:
        ids of each document, without EOS.

    Raises:
        InputError: if the tokenizer has no marks.
    """
    if fim_rate == 0:
        return tokenizer.encode_batch(texts)
    hole, begin, end = marks(tokenizer)
    parts: list[str] = []
    cuts = [cut(text, fim_rate) for text in texts]
    for text, pieces in zip(texts, cuts, strict=True):
        parts += [text] if pieces is None else pieces
    encoded = iter(tokenizer.encode_batch(parts))
    documents = []
    for pieces in cuts:
        if pieces is None:
            documents.append(next(encoded))
        else:
            prefix, middle, suffix = next(encoded), next(encoded), next(encoded)
            documents.append([begin, *prefix, hole, *suffix, end, *middle])
    return documents


def fim_prompt(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """What a model trained so completes with the middle, and then EOS.

    Raises:
        InputError: if the tokenizer has no marks.
    """
    hole, begin, end = marks(tokenizer)
    before, after = tokenizer.encode_batch([prefix, suffix])
    return [begin, *before, hole, *after, end]


def marks(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """The ids (hole, begin, end); InputError if there are none."""
    if tokenizer.fim is None:
        raise InputError("fill-in-the-middle (data.fim_rate) needs a tokenizer with its marks")
    return tokenizer.fim
