"""Conversations, and prompts with completions: checked, kept as one text each, and encoded.

Knows nothing about files or rows. A document is a string everywhere in this room, so that hashes,
splits, caches and workers know one kind; a conversation's is its JSON. Its tokens carry a bit that
says whether they are learnt, so that nothing which moves or cuts tokens can lose it.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsjax.errors import InputError, nearest
from dsjax.interop.chat import ChatTemplate, check_messages
from dsjax.interop.tokenizer import SPECIAL_TOKENS, Tokenizer
from dsjax.interop.turns import encode_turns

ROLES = ("system", "developer", "user", "assistant", "tool")
_PAIR = ("prompt", "completion")


def as_text(row: Mapping[str, Any]) -> str:
    """The text of one line's object: `messages` with or without `tools`, or prompt and completion.

    Other fields are left out. The order of what a template reads is kept.

    Raises:
        InputError: for what cannot be learnt from; the caller knows where it stands.
    """
    if "messages" in row:
        _check_turns(row["messages"])
        kept = {"messages": row["messages"]}
        if row.get("tools") is not None:
            if not isinstance(row["tools"], list):
                raise InputError("tools must be a list of objects")
            kept["tools"] = row["tools"]
    elif all(name in row for name in _PAIR):
        for name in _PAIR:
            if not isinstance(row[name], str):
                raise InputError(f"{name!r} is {type(row[name]).__name__}, not a string")
        if not row["completion"]:
            raise InputError("the completion is empty")
        kept = {name: row[name] for name in _PAIR}
    else:
        raise InputError(
            f"neither 'messages' nor 'prompt' with 'completion'{nearest('messages', row)}"
        )
    text = json.dumps(kept, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write what UTF-8 cannot
        raise InputError("half of a surrogate pair in it") from error
    return text


def _check_turns(messages: Any) -> None:
    answers = False
    for number, message in enumerate(check_messages(messages)):
        role = message["role"]
        if role not in ROLES:
            raise InputError(f"message {number} has the role {role!r}{nearest(role, ROLES)}")
        if role != "assistant":
            continue
        content = message.get("content")
        parts = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
        if not "".join(parts).strip() and not message.get("tool_calls"):
            raise InputError(f"message {number}, a turn of the assistant, is empty")
        answers |= number > 0
    if not answers:
        raise InputError("no turn of the assistant answers anything")


class ConversationEncoder:
    """From `as_text`'s texts to tokens with a bit for what is learnt; see `unmarked`."""

    def __init__(self, tokenizer: Tokenizer):
        """Takes the tokenizer with the template that messages are written by."""
        self._tokenizer = tokenizer
        self._template: ChatTemplate | None = None
        # A bit more than an id has.
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**15 else "<u4")

    def __call__(self, text: str) -> np.ndarray:
        """Tokens of a conversation up to its last answer, or of a pair up to EOS.

        Raises:
            InputError: if there is no template, or it refuses the conversation.
        """
        row = json.loads(text)
        if "messages" in row:
            ids, learnt = encode_turns(self._chat(), row["messages"], row.get("tools"))
        else:
            before = self._tokenizer.prompt_ids(row["prompt"])
            after = [*self._tokenizer.encode(row["completion"]), self._tokenizer.eos_id]
            ids = [*before, *after]
            learnt = [False] * len(before) + [True] * len(after)
        return (2 * np.array(ids, np.int64) + np.array(learnt)).astype(self.dtype)

    def _chat(self) -> ChatTemplate:
        if self._template is None:
            if self._tokenizer.chat_template is None:
                raise InputError(
                    "the tokenizer has no chat template; data.chat_template=plain (--template) "
                    "gives it one"
                )
            self._template = ChatTemplate(self._tokenizer)
        return self._template


def unmarked(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ids, which of them are learnt) of tokens with the bit."""
    return tokens >> 1, (tokens & 1).astype(bool)


class TrainingText:
    """What a vocabulary is learnt from: conversations as the template writes them."""

    def __init__(self, template: str | None):
        """Takes the Jinja text; without one the contents alone are read."""
        # Of its names and ids nothing is used but the texts of the special tokens.
        tokenizer = Tokenizer.train([], 256 + len(SPECIAL_TOKENS))
        self._template = None if template is None else ChatTemplate(tokenizer, template)

    def __call__(self, text: str) -> str:
        """Plain text of one of `as_text`'s texts, with no special token in it."""
        row = json.loads(text)
        if "messages" not in row:
            return f"{row['prompt']}{row['completion']}"
        messages, tools = row["messages"], row.get("tools")
        if self._template is None:
            return "\n".join(m["content"] for m in messages if isinstance(m.get("content"), str))
        written = self._template.render(messages, tools=tools, add_generation_prompt=False)
        return re.sub("|".join(map(re.escape, SPECIAL_TOKENS)), "\n", written)
