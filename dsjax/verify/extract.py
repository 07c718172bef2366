"""The answer in a completion: what follows the thinking, in its tag, in its box.

Knows nothing of what the right answer is. Every function takes time linear in the text, whatever a
model wrote into it.
"""

import re
from collections.abc import Callable

THINK, END_THINK = "<think>", "</think>"
ANSWER, END_ANSWER = "<answer>", "</answer>"

_BRACES = re.compile(r"\\boxed\s{0,8}\{|\\.|[{}]", re.DOTALL)
_MOST_UNWRAPPED = 8  # boxes directly within boxes


def opens_thinking(prompt: str) -> bool:
    """Whether the prompt's last word is `<think>`, so that a completion begins within it."""
    return prompt.rstrip().endswith(THINK)


def thinking(prompt: str, completion: str) -> str:
    """The chain of thought: what stands before the last `</think>`, or all where there is none."""
    before, end, _ = completion.rpartition(END_THINK)
    text = before if end else completion
    if opens_thinking(prompt):
        return text
    _, start, after = text.partition(THINK)
    return after if start else text


def final_part(prompt: str, completion: str) -> str | None:
    """What follows the thinking; all where nothing is thought; None where thinking does not end."""
    _, end, after = completion.rpartition(END_THINK)
    if THINK in after or (not end and opens_thinking(prompt)):
        return None
    return after


def boxes(text: str) -> list[str]:
    r"""Contents of the complete `\boxed{...}` of a text, in order; of nested ones the outermost."""
    opened: list[tuple[bool, int, int]] = []  # is it a box, where it begins, where its content does
    found: list[tuple[int, str]] = []
    for match in _BRACES.finditer(text):
        if match[0] == "}":
            if not opened:
                continue
            is_box, start, content = opened.pop()
            if is_box:
                while found and found[-1][0] > start:
                    found.pop()
                found.append((start, text[content : match.start()]))
        elif match[0].endswith("{") and match[0] != r"\{":
            opened.append((match[0] != "{", match.start(), match.end()))
    return [_unwrapped(content) for _, content in found]


def _unwrapped(content: str) -> str:
    content = content.strip()
    for _ in range(_MOST_UNWRAPPED):
        match = _BRACES.match(content)
        if not match or not match[0].startswith(r"\boxed"):
            break
        depth = 0
        for brace in _BRACES.finditer(content):
            depth += {"}": -1}.get(brace[0], int(brace[0].endswith("{") and brace[0] != r"\{"))
            if depth == 0:
                break
        if depth or brace.end() != len(content):
            break
        content = content[match.end() : -1].strip()
    return content


def answer(
    prompt: str, completion: str, same: Callable[[str, str], bool] = str.__eq__
) -> str | None:
    r"""The one answer that a completion gives, or None.

    It is looked for in what follows the thinking (`final_part`): the last complete `\boxed{...}` in
    `<answer>...</answer>` where there is such a pair, otherwise in all of it. Without a box it is
    the tag's whole content, or the whole text of a completion that neither thinks nor uses tags.

    None is also the answer of those who hedge: several answer tags, or boxes that differ.

    Args:
        prompt: the text that was continued; it may end with `<think>`.
        completion: what the model wrote.
        same: whether two boxes say the same.
    """
    part = final_part(prompt, completion)
    if part is None:
        return None
    inner = part
    tags = part.count(ANSWER), part.count(END_ANSWER)
    if tags == (1, 1):
        inner, end, _ = part.partition(ANSWER)[2].partition(END_ANSWER)
        if not end:  # closed before it was opened
            return None
    elif tags != (0, 0):
        return None
    if found := boxes(inner):
        given = found[-1]
    elif tags == (1, 1) or not (END_THINK in completion or opens_thinking(prompt)):
        given = inner.strip()
    else:
        return None
    return given if given and all(same(given, other) for other in set(boxes(part))) else None
