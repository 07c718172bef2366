"""Chat templates for bases that came without one: two of our own, or a person's file.

Knows nothing about rendering (`dsjax.interop.chat`). An answer begins on a line of its own, exactly
as the model writes it, so that what it wrote goes back into the history unchanged.
"""

from pathlib import Path
from types import MappingProxyType

from dsjax.errors import InputError, nearest
from dsjax.interop.chat import MAX_TEMPLATE

_TURNS = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- 'Assistant:\\n' + written(message) + eos_token + '\\n' }}
    {%- elif message.role == 'user' %}
        {{- 'User: ' + message.content + '\\n' }}
    {%- elif message.role == 'tool' %}
        {{- 'Tool: ' + message.content + '\\n' }}
    {%- else %}
        {{- message.content + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:\\n' }}
{%- endif %}
"""

_PLAIN = (
    """\
{%- macro written(message) -%}
    {%- if message.reasoning_content %}
        {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content }}
{%- endmacro -%}
"""
    + _TURNS
)

# The idea of table 1 of the R1 paper (arXiv 2501.12948): a base is told the form, and no more.
_R1_ZERO = (
    """\
{%- macro written(message) -%}
    {%- if message.reasoning_content %}
        {{- '<think>' + message.reasoning_content + '</think>' }}
        {{- '\\n<answer>' + message.content + '</answer>' }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endmacro -%}
{{- 'User brings a problem, and Assistant solves it. A reply of Assistant has two parts: how it ' }}
{{- 'gets there, as <think> ... </think>, and then the result alone, as ' }}
{{- '<answer> ... </answer>.\\n' }}
"""
    + _TURNS
)

TEMPLATES = MappingProxyType({"plain": _PLAIN, "r1_zero": _R1_ZERO})


def template_text(name: str) -> str:
    """The text of a template.

    Args:
        name: "plain" (User: ... Assistant: ...), "r1_zero" (the same, after words that ask for
            <think> and <answer>), or a file whose name ends in `.jinja`.

    Raises:
        InputError: for another name, or a file that cannot be read.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not name.endswith(".jinja"):
        raise InputError(
            f"unknown chat template {name!r}{nearest(name, TEMPLATES)}, or a file *.jinja"
        )
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"cannot read the chat template {name!r}: {reason}") from error
    if not text.strip():
        raise InputError(f"the chat template {name!r} is empty")
    if len(text) > MAX_TEMPLATE:
        raise InputError(
            f"the chat template {name!r} has {len(text):,} characters; at most {MAX_TEMPLATE:,} "
            "are read"
        )
    return text
