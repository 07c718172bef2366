"""dsjax/config and dsjax/overrides: JSON and back, overrides, and what is refused in one line."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import (
    BatchRampConfig,
    BlockConfig,
    Config,
    ContextStageConfig,
    DataConfig,
    GqaConfig,
    Llama3RopeConfig,
    MlaConfig,
    ModelConfig,
    MoeConfig,
    MtpConfig,
    OptimizerConfig,
    PhaseConfig,
    PrecisionConfig,
    RopeConfig,
    ScheduleConfig,
    SourceConfig,
    StackConfig,
    SwiGluConfig,
    TrainConfig,
    YarnConfig,
    constant,
)
from dsjax.errors import InputError, nearest
from dsjax.overrides import first_difference, from_json, override, to_json
from dsjax.presets import deepseek_v3, nano, preset, presets

MOE = "model.stacks.moe.blocks.0.ffn"
MLA = "model.stacks.moe.blocks.0.attention"


def through_json(config):
    return from_json(type(config), json.loads(json.dumps(to_json(config), allow_nan=False)))


def set_at(tree, path, value):
    """A copy of a JSON tree with `value` at a dotted path."""
    tree = json.loads(json.dumps(tree))
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    node = tree
    for part in parents:
        node = node[part]
    node[last] = value
    return tree


def leaves(tree, path=""):
    """Dotted path -> scalar of a JSON tree."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def message_of(function, *arguments):
    with pytest.raises(InputError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", presets())
def test_every_preset_survives_json(name):
    config = presets()[name]()
    again = through_json(config)
    assert again == config
    assert hash(again) == hash(config)
    assert first_difference(to_json(config), to_json(again)) is None


def test_json_names_every_field_and_the_class():
    tree = to_json(nano())
    assert tree["kind"] == "Config"
    assert list(tree["train"]) == ["kind", *(f.name for f in dataclasses.fields(TrainConfig))]
    assert tree["model"]["stacks"][0]["blocks"][0]["ffn"]["kind"] == "SwiGluConfig"
    assert tree["model"]["stacks"][1]["blocks"][0]["ffn"]["kind"] == "MoeConfig"
    assert tree["model"]["stacks"][1]["blocks"][0]["attention"]["rope"]["yarn"] is None


def test_what_has_a_default_may_be_left_out_of_json():
    model = to_json(nano())["model"]
    tree = {"model": model, "train": {"seq_len": 8, "batch_size": 2, "total_tokens": 16}}
    assert from_json(Config, tree).train == TrainConfig(seq_len=8, batch_size=2, total_tokens=16)


positive = st.floats(min_value=1e-12, max_value=1e12)
size = st.integers(1, 1 << 40)


@st.composite
def ropes(draw):
    yarn = st.builds(YarnConfig, factor=positive, original_max_positions=size, mscale=positive)
    llama3 = st.builds(Llama3RopeConfig, factor=positive, original_max_positions=size)
    extension = draw(
        st.just({})
        | st.fixed_dictionaries({"yarn": yarn})
        | st.fixed_dictionaries({"llama3": llama3})
        | st.fixed_dictionaries({"linear_factor": positive})
    )
    return RopeConfig(theta=draw(positive), **extension)


@st.composite
def attention_configs(draw):
    if draw(st.booleans()):
        heads = draw(st.integers(1, 64))
        return GqaConfig(
            num_heads=heads * draw(st.integers(1, 8)),
            num_kv_heads=heads,
            head_dim=2 * draw(size),
            rope=draw(ropes()),
            qkv_bias=draw(st.booleans()),
        )
    return MlaConfig(
        num_heads=draw(size),
        q_latent_dim=draw(st.none() | size),
        kv_latent_dim=draw(size),
        nope_dim=draw(size),
        rope_dim=2 * draw(size),
        value_dim=draw(size),
        rope=draw(ropes()),
    )


@st.composite
def moe_configs(draw):
    groups, per_group = draw(st.integers(1, 8)), draw(st.integers(2, 8))
    kept = draw(st.integers(1, groups))
    return MoeConfig(
        num_experts=groups * per_group,
        num_experts_per_token=draw(st.integers(1, kept * per_group)),
        expert_dim=draw(size),
        num_shared_experts=draw(st.integers(0, 3)),
        num_groups=groups,
        groups_per_token=kept,
        score=draw(st.sampled_from(["sigmoid", "softmax"])),
        group_score=draw(st.sampled_from(["top2_sum", "max"])),
        normalize_gates=draw(st.booleans()),
        gate_scale=draw(positive),
        balance_bias=draw(st.booleans()),
    )


@st.composite
def schedules(draw):
    ends = sorted(draw(st.sets(st.floats(1e-9, 1.0, exclude_max=True), max_size=4)))
    shapes = st.sampled_from(["constant", "linear", "cosine"])
    values = st.floats(min_value=0.0, allow_infinity=False)
    phases = [PhaseConfig(until=e, value=draw(values), shape=draw(shapes)) for e in [*ends, 1.0]]
    return ScheduleConfig(start=draw(values), phases=tuple(phases))


blocks = st.builds(
    BlockConfig,
    attention=attention_configs(),
    ffn=moe_configs() | st.builds(SwiGluConfig, hidden_dim=size),
)


@st.composite
def configs(draw):
    names = draw(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=3, unique=True))
    stacks = tuple(
        StackConfig(
            name=name,
            repeats=draw(st.integers(1, 99)),
            blocks=tuple(draw(st.lists(blocks, min_size=1, max_size=2))),
        )
        for name in names
    )
    micro, count = draw(st.integers(1, 64)), draw(st.integers(1, 64))
    seq_len = draw(st.integers(2, 4096))
    weights = st.none() if draw(st.booleans()) else positive
    paths = st.builds(SourceConfig, path=st.text(), weight=weights)
    whole = draw(st.integers(1, count)) * micro
    ramp = st.builds(BatchRampConfig, start=st.just(whole), tokens=size)
    max_positions = draw(st.integers(seq_len, 1 << 20))
    lengths = sorted(draw(st.lists(st.integers(seq_len, max_positions), max_size=2)))
    return Config(
        model=ModelConfig(
            vocab_size=draw(size),
            embed_dim=draw(size),
            stacks=stacks,
            mtp=draw(st.none() | st.builds(MtpConfig, depth=st.integers(1, 4), block=blocks)),
            max_positions=max_positions,
        ),
        train=TrainConfig(
            seq_len=seq_len,
            batch_size=micro * count,
            micro_batch_size=micro,
            batch_ramp=draw(st.none() | ramp),
            context_stages=tuple(
                ContextStageConfig(
                    seq_len=length,
                    batch_size=draw(size),
                    steps=draw(size),
                    learning_rate=draw(positive),
                    yarn=draw(st.booleans()),
                )
                for length in lengths
            ),
            ema_decay=draw(st.none() | st.floats(0.1, 0.99)),
            profile_steps=tuple(draw(st.lists(size, max_size=3))),
            total_tokens=draw(size),
            optimizer=OptimizerConfig(learning_rate=draw(positive), schedule=draw(schedules())),
            bias_speed=draw(schedules()),
        ),
        data=DataConfig(
            sources=tuple(draw(st.lists(paths, min_size=1, max_size=3))),
            max_bytes_per_source=draw(st.none() | size),
            fim_rate=draw(st.floats(0.0, 1.0)),
        ),
    )


@pytest.mark.parametrize(
    "assignments",
    [
        ("train.batch_size=12", "train.micro_batch_size=3"),
        ("train.micro_batch_size=3", "train.batch_size=12"),
        (
            *('train.batch_ramp={"start": 3, "tokens": 9}', "train.batch_ramp.start=6"),
            *("train.batch_size=12", "train.micro_batch_size=3"),
        ),
    ],
)
def test_overrides_need_to_go_together_only_at_the_end(assignments):
    config = override(preset("small"), *assignments)
    assert (config.train.batch_size, config.train.micro_batch_size) == (12, 3)
    with pytest.raises(InputError, match="does not divide into micro-batches"):
        override(preset("small"), *assignments[:1])


# beartype looks at a random item of a list, and Hypothesis minds.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
@settings(max_examples=40, deadline=None)
@given(configs())
def test_any_configuration_survives_json(config):
    assert through_json(config) == config


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, -(10**400), 2**63, "sigmoid", "bfloat16", "MlaConfig"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["kind", "value", "until", "path", "x"]), inner)
    ),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from([path for path, _ in leaves(to_json(nano()))]), value=values)
def test_whatever_stands_in_a_field_is_taken_or_refused_in_one_line(path, value):
    tree = set_at(to_json(nano()), path, value)
    try:
        config = from_json(Config, tree)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)
        return
    assert through_json(config) == config


@pytest.mark.parametrize("value", [None, 3, "text", [], [1], {"kind": "TrainConfig"}, {}, True])
def test_what_is_no_configuration_is_refused(value):
    message_of(from_json, Config, value)


def test_an_unknown_key_is_named_with_the_nearest_one():
    tree = to_json(nano())
    tree["train"]["batch_sise"] = 4
    message = message_of(from_json, Config, tree)
    assert "'train.batch_sise'" in message
    assert "did you mean 'batch_size'?" in message


def test_a_missing_key_is_named():
    tree = to_json(nano())
    del tree["model"]["stacks"][1]["blocks"][0]["attention"]["kv_latent_dim"]
    expected = "missing key 'model.stacks.1.blocks.0.attention.kv_latent_dim'"
    assert message_of(from_json, Config, tree) == expected


def test_a_dataclass_of_another_kind_is_refused():
    tree = set_at(to_json(nano()), "train.kind", "DataConfig")
    assert message_of(from_json, Config, tree) == (
        "train is of kind 'DataConfig', expected TrainConfig"
    )


# ------------------------------------------------------------------------------------------ types

WRONG_TYPES = [
    ("train.batch_size", True),
    ("train.batch_size", 4.5),
    ("train.batch_size", math.nan),
    ("train.batch_size", math.inf),
    ("train.batch_size", "4"),
    ("train.batch_size", None),
    ("train.batch_size", [4]),
    ("train.optimizer.learning_rate", True),
    ("train.optimizer.learning_rate", "1e-3"),
    ("train.optimizer.learning_rate", math.nan),
    ("train.optimizer.learning_rate", math.inf),
    ("train.optimizer.learning_rate", 10**400),
    ("train.optimizer.learning_rate", None),
    ("train.remat", "ful"),
    ("train.remat", 0),
    ("train.remat", None),
    ("data.shuffle", 1),
    ("data.shuffle", "true"),
    ("data.sources", "builtin:python"),
    ("data.sources", {"path": "builtin:python"}),
    ("data.sources.0.path", 7),
    ("model.stacks.0.name", None),
    ("model.mtp", 3),
    ("precision.compute_dtype", "float16"),
]


@pytest.mark.parametrize(("path", "value"), WRONG_TYPES)
def test_a_wrong_type_is_refused_and_its_path_named(path, value):
    message = message_of(from_json, Config, set_at(to_json(nano()), path, value))
    assert message.startswith(f"{path} ")


def test_a_whole_number_may_be_written_as_a_float_and_a_float_as_a_whole_number():
    config = override(override(nano(), "train.total_tokens=1e9"), "train.optimizer.clip_norm=2")
    assert config.train.total_tokens == 10**9
    assert type(config.train.total_tokens) is int
    assert config.train.optimizer.clip_norm == 2.0
    assert type(config.train.optimizer.clip_norm) is float


def test_unions_are_told_apart_by_kind():
    assert override(nano(), "model.mtp=null").model.mtp is None
    dense = '{"kind": "SwiGluConfig", "hidden_dim": 48}'
    config = override(nano(), f"{MOE}={dense}")
    assert config.model.stacks[1].blocks[0].ffn == SwiGluConfig(hidden_dim=48)
    for value in ('{"hidden_dim": 48}', '{"kind": "Moe"}', "48", "null"):
        message = message_of(override, nano(), f"{MOE}={value}")
        assert message.startswith(f"{MOE} needs a 'kind', one of SwiGluConfig, MoeConfig")


# -------------------------------------------------------------------------------------- overrides


def test_an_override_changes_one_field_and_nothing_else():
    config = override(nano(), "train.batch_size=4")
    assert config.train.batch_size == 4
    assert dataclasses.replace(config.train, batch_size=8) == nano().train
    assert first_difference(to_json(nano()), to_json(config)) == (
        "train.batch_size: 8 there, 4 here"
    )


def test_overrides_reach_through_stack_names_and_indices():
    by_name = override(nano(), f"{MOE}.num_experts=16")
    by_index = override(nano(), "model.stacks.1.blocks.0.ffn.num_experts=16")
    assert by_name == by_index
    assert by_name.model.stacks[1].blocks[0].ffn.num_experts == 16
    assert by_name.model.stacks[0] == nano().model.stacks[0]
    assert override(nano(), "model.stacks.dense.repeats=5").model.num_layers == 7
    path = override(nano(), "data.sources.1.path=texts/a=b *.txt").data.sources[1].path
    assert path == "texts/a=b *.txt"  # only the first sign of equality divides


def test_values_are_json_or_bare_text():
    assert override(nano(), "train.remat=full").train.remat == "full"
    assert override(nano(), 'train.remat="full"').train.remat == "full"
    assert override(nano(), "data.shuffle=false").data.shuffle is False
    assert override(nano(), "train.micro_batch_size=null").train.micro_batch_size is None
    sources = override(nano(), 'data.sources=[{"path": "x"}]').data.sources
    assert sources == (SourceConfig(path="x"),)
    assert override(nano(), 'data.sources.0.path="12"').data.sources[0].path == "12"


MISSPELT = [
    ("train.batch_sise=4", "batch_size"),
    ("trian.batch_size=4", "train"),
    ("train.optimiser.learning_rate=1", "optimizer"),
    ("train.optimizer.learning_rat=1", "learning_rate"),
    ("model.stacks.mo.repeats=1", "moe"),
    ("model.stacks.moe.blocks.0.ffn.num_expert=8", "num_experts"),
    ("precision.compute_type=float32", "compute_dtype"),
    ("train.remat=fulll", "full"),
    ("data.held_out=0.1", "held_out_fraction"),
]


@pytest.mark.parametrize(("assignment", "near"), MISSPELT)
def test_a_misspelt_override_is_offered_the_nearest_name(assignment, near):
    assert f"did you mean '{near}'?" in message_of(override, nano(), assignment)


REFUSED = [
    ("", "is not of the form path=value"),
    ("train.batch_size", "is not of the form path=value"),
    ("=4", "unknown key ''"),
    ("train.=4", "unknown key 'train.'"),
    ("qqqq=4", "known: data, infer, mesh, model, precision, rl, train"),
    ("model.stacks.2.repeats=1", "unknown key 'model.stacks.2'"),
    ("model.stacks.-1.repeats=1", "unknown key 'model.stacks.-1'"),
    ("train.batch_size.x=4", "'train.batch_size' is 8 and has no field 'x'"),
    ("train=4", "train must be an object with the fields of TrainConfig"),
    ('train={"batch_size": 4}', "missing key 'train.seq_len'"),
    ("train.batch_size=" + "9" * 5000, "train.batch_size must be int"),
    ("train.batch_size=" + "[" * 10_000, "train.batch_size must be int"),
    ("train.optimizer.learning_rate=NaN", "train.optimizer.learning_rate must be finite, not nan"),
    ("train.optimizer.learning_rate=nan", "train.optimizer.learning_rate must be float"),
    ("train.optimizer.learning_rate=-1", "learning_rate is -1.0; it must be positive"),
    ("train.optimizer.beta2=1", "beta2 is 1.0; it must lie in [0, 1)"),
    ("train.optimizer.weight_decay=-0.1", "weight_decay is -0.1"),
    ("train.total_tokens=-5", "total_tokens is -5; it must be positive"),
    ("train.batch_size=0", "batch_size is 0; it must be positive"),
    ("train.eval_every_steps=0", "eval_every_steps is 0; it must be positive"),
    ("train.seq_len=1", "a next token needs at least 2"),
    ("train.seq_len=5000", "train.seq_len 5000 is longer than model.max_positions 4096"),
    ("train.balance_loss_weight=-1", "balance_loss_weight is -1"),
    ("data.sources=[]", "sources is empty"),
    ("data.held_out_fraction=1", "held_out_fraction is 1.0; it must lie between 0 and 1"),
    ("model.stacks=[]", "stacks is empty"),
    ("model.stacks.moe.blocks=[]", "'moe' has no block"),
    ("model.stacks.moe.name=dense", "stack names collide"),
    ("model.stacks.moe.name=mtp", "stack names collide"),
    ("model.stacks.moe.name=a b", "'a b' is not an identifier"),
    # Sizes that do not go together.
    ("train.micro_batch_size=3", "batch_size 8 does not divide into micro-batches of 3"),
    (f"{MOE}.num_groups=3", "8 experts do not divide into 3 groups"),
    (f"{MOE}.groups_per_token=5", "groups_per_token 5 is more than num_groups 4"),
    (f"{MOE}.num_experts_per_token=5", "5 experts a token, but 2 groups hold 4"),
    (f"{MOE}.num_groups=8", "top2_sum needs two experts a group"),
    (f"{MLA}.rope_dim=7", "rope_dim is 7; it must be even"),
    (f"{MLA}.rope_dim=-2", "rope_dim is -2; it must be positive"),
    (f"{MLA}.rope.linear_factor=0", "linear_factor is 0.0; it must be positive"),
    (f"{MLA}={{}}", "attention needs a 'kind', one of MlaConfig, GqaConfig; got None"),
]


@pytest.mark.parametrize(("assignment", "expected"), REFUSED)
def test_an_override_that_cannot_be_is_refused(assignment, expected):
    assert expected in message_of(override, nano(), assignment)


GQA = "model.stacks.dense.blocks.0.attention"
REFUSED_DENSE = [
    ("num_kv_heads=3", "4 heads do not divide over 3 key/value heads"),
    ("num_kv_heads=0", "num_kv_heads is 0; it must be positive"),
    ("head_dim=7", "head_dim is 7; it must be even"),
    ("kv_latent_dim=4", "unknown key"),
    ('rope.llama3={"factor": 8, "original_max_positions": 64, "high_freq_factor": 1}', "not below"),
    (
        'rope={"linear_factor": 2, "yarn": {"factor": 2, "original_max_positions": 64}}',
        "RopeConfig has yarn and linear_factor; at most one may be given",
    ),
]


@pytest.mark.parametrize(("assignment", "expected"), REFUSED_DENSE)
def test_a_dense_students_sizes_are_checked(assignment, expected):
    assert expected in message_of(override, preset("nano_dense"), f"{GQA}.{assignment}")


def test_a_configuration_written_before_there_were_students_is_read():
    """Its ropes have YaRN alone, its model no word on tying."""
    tree = to_json(nano())
    del tree["model"]["tie_embeddings"]
    for stack in tree["model"]["stacks"]:
        rope = stack["blocks"][0]["attention"]["rope"]
        assert (rope.pop("llama3"), rope.pop("linear_factor")) == (None, 1.0)
    assert from_json(Config, json.loads(json.dumps(tree))) == nano()


@pytest.mark.parametrize("rate", [math.nan, math.inf, 0.0, -1e-3])
def test_a_learning_rate_made_in_python_is_checked_too(rate):
    message_of(lambda: OptimizerConfig(learning_rate=rate))


@pytest.mark.parametrize("ends", [(), (0.5,), (0.5, 0.5, 1.0), (0.7, 0.5, 1.0), (0.0, 1.0), (1.5,)])
def test_the_phases_of_a_schedule_rise_to_one(ends):
    phases = tuple(PhaseConfig(until=end, value=1.0) for end in ends)
    assert "rise strictly" in message_of(lambda: ScheduleConfig(start=0.0, phases=phases))


def test_nearest_offers_one_name_or_all():
    assert nearest("batch_sise", ["batch_size", "seq_len"]) == "; did you mean 'batch_size'?"
    assert nearest("zzz", ["b", "a"]) == "; known: a, b"
    assert nearest("zzz", []) == ""


def test_configurations_are_frozen_and_derive_their_sizes():
    config = nano()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.batch_size = 4
    assert config.train.tokens_per_step == 8 * 64
    assert constant(0.5) == ScheduleConfig(start=0.5, phases=(PhaseConfig(until=1.0, value=0.5),))
    assert PrecisionConfig() == config.precision
    pair = StackConfig(name="x", repeats=3, blocks=config.model.stacks[1].blocks * 2)
    assert [pair.key(i) for i in range(2)] == ["x_0", "x_1"]
    assert dataclasses.replace(config.model, stacks=(pair,)).num_layers == 6


# ------------------------------------------------------------------------------------ differences


@settings(max_examples=100, deadline=None)
@given(leaf=st.sampled_from([item for item in leaves(to_json(nano()))]))
def test_the_field_that_differs_is_named(leaf):
    path, value = leaf
    here = set_at(to_json(nano()), path, "another")
    found = first_difference(to_json(nano()), here)
    assert found == f"{path}: {value!r} there, 'another' here"


def test_the_first_of_several_differences_is_named():
    here = set_at(to_json(nano()), "train.batch_size", 4)
    here = set_at(here, "model.embed_dim", 64)
    assert first_difference(to_json(nano()), here) == "model.embed_dim: 32 there, 64 here"


DIFFERENCES = [
    ({"a": 1}, {"a": 1, "b": 2}, "b: absent there, present here"),
    ({"a": 1, "b": 2}, {"a": 1}, "b: present there, absent here"),
    ({"a": [1]}, {"a": [1, 2]}, "a: [1] there, [1, 2] here"),
    ({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 1}, {"b": 3}]}, "a.1.b: 2 there, 3 here"),
    ({"a": None}, {"a": {"b": 1}}, "a: None there, {'b': 1} here"),
    ({"a": 1}, {"a": True}, "a: 1 there, True here"),
    ({"a": 1}, {"a": 1.0}, "a: 1 there, 1.0 here"),
    ({"a": {"b": []}}, {"a": {"b": []}}, None),
]


@pytest.mark.parametrize(("there", "here", "expected"), DIFFERENCES)
def test_differences_of_structure_and_type(there, here, expected):
    assert first_difference(there, here) == expected


def test_two_presets_differ_in_their_first_number():
    found = first_difference(to_json(nano()), to_json(deepseek_v3()))
    assert found == "model.vocab_size: 512 there, 129280 here"
