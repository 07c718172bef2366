"""Which tokens of a conversation its assistant wrote: what supervised fine-tuning learns.

Knows nothing about files, rows or losses. A template says nowhere what an assistant writes; it is
found by rendering: with the messages before a turn and the beginning of an answer, which is what
the model is asked with, and with the turn itself. What the second adds to the first is the turn.
Both are encoded apart, so that the tokens before an answer are those of a prompt.
"""

import contextlib
import re
from typing import Any

from dsjax.errors import InputError
from dsjax.interop.chat import KEPT, ChatTemplate, GuardedChat, Messages, Tools

# Noon of one day: a template that writes the date would else make other tokens every day.
_NOW = 1737374400.0  # 2025-01-20, when R1 was published
_OPENING = re.compile(r"<think>\s*\Z")
_CLOSING = re.compile(r"</think>\s*\Z")


def encode_turns(
    template: ChatTemplate, messages: Messages, tools: Tools = None
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation up to its last answer, and which of them are learnt.

    Learnt is each turn of the assistant up to the token that ends it. A turn that later ones do not
    show as it was written is context alone (R1's and Qwen3's templates drop the reasoning of
    earlier turns). The last turn is learnt whole: its reasoning too, where the template drops even
    that (R1's), unless the prompt asks for no reasoning by ending in `</think>` (V3.1's).

    Args:
        template: of the model.
        messages: as in `ChatTemplate.render`; one of the assistant follows another one.
        tools: see there.

    Returns:
        (ids, learnt), equally long; marks typed in messages are text, as in
        `ChatTemplate.encode_chat`.

    Raises:
        InputError: as `ChatTemplate.encode_chat`; and for a template that ends a turn with no
            special token, or begins an answer with something that the turn does not.
    """
    chat = template.guard(messages, tools=tools, now=_NOW)
    answers = [i for i, m in enumerate(chat.messages) if i and m["role"] == "assistant"]
    if not answers:
        raise InputError("no turn of the assistant answers anything")
    *earlier, last = answers
    prompt, written = _turn(chat, last)
    ids: list[int] = []
    learnt: list[bool] = []
    encoded = 0  # characters of the last prompt

    def add(until: int, turn: str) -> None:
        nonlocal encoded
        before, after = chat.encode(prompt[encoded:until]), chat.encode(turn)
        count = _ended(template, after)
        ids.extend(before + after)
        learnt.extend([False] * len(before) + [True] * count + [False] * (len(after) - count))
        encoded = until + len(turn)

    for number in earlier:
        with contextlib.suppress(InputError):  # one that cannot be told is context, too
            before, turn = _turn(chat, number)
            if prompt.startswith(before + turn):
                add(len(before), turn)
    add(len(prompt), written)
    end = len(learnt) - learnt[::-1].index(True)
    return ids[:end], learnt[:end]


def turn_end(template: ChatTemplate) -> int:
    """The token that ends a turn of the assistant.

    Raises:
        InputError: if there is none, or the template takes no question of a user.
    """
    question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
    ids, _ = encode_turns(template, [question, answer])
    return ids[-1]


def _turn(chat: GuardedChat, number: int) -> tuple[str, str]:
    """(what the model is asked with, what it is to write, with what ends the turn)."""
    prompt = chat.text(number, add_generation_prompt=True)
    shown = chat.text(number + 1, add_generation_prompt=False)
    begun = _OPENING.sub("", prompt)  # some prompts open the reasoning that history does not show
    opening = prompt[len(begun) :]
    if not shown.startswith(begun):
        raise InputError(
            "the chat template does not write a conversation as the prompt of its last turn and "
            "what follows, so that what the assistant wrote cannot be told"
        )
    written = shown[len(begun) :]
    reasoning, gap = _reasoning(chat.messages[number])
    is_shown = reasoning is None or (reasoning.strip() in written and "</think>" in written)
    if is_shown or _CLOSING.search(prompt):
        if not shown.startswith(prompt):
            raise InputError(
                f"the chat template begins an answer with {opening!r}, but a turn of the assistant "
                "has no reasoning"
            )
        return prompt, shown[len(prompt) :]
    if opening:
        begin = reasoning.lstrip() if opening != "<think>" else reasoning
    else:
        begin = f"<think>{reasoning}"
    rest = written.removeprefix("</think>")
    return prompt, f"{begin}</think>{'' if rest.startswith(gap) else gap}{rest}"


def _reasoning(message: dict[str, Any]) -> tuple[str | None, str]:
    """What stands between a turn's tags, or None, and the white space behind them."""
    for name in ("reasoning_content", "thinking", "reasoning"):
        if isinstance(given := message.get(name), str) and given.strip():
            return f"\n{given.strip()}\n", "\n\n"
    content = message.get("content")
    if not isinstance(content, str) or "</think>" not in content:
        return None, ""
    before, _, after = content.rpartition("</think>")
    _, tag, within = before.partition("<think>")
    return within if tag else before, after[: len(after) - len(after.lstrip())]


def _ended(template: ChatTemplate, turn: list[int]) -> int:
    """How many tokens of a turn there are up to the special one that ends it."""
    marks = template.tokenizer.marks
    ends = set(marks.values()) - {marks.get(text) for text in KEPT["assistant"]}
    count = max((i + 1 for i, token_id in enumerate(turn) if token_id in ends), default=0)
    if not count:
        raise InputError(
            "the chat template ends a turn of the assistant with no special token, so that an "
            "answer would not end; {{ eos_token }} is one"
        )
    return count
