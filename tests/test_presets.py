"""The presets against what is published: sizes, schedules, exact parameter counts, cache bytes."""

import math

import pytest

from dsjax.config import GqaConfig, MlaConfig, MoeConfig
from dsjax.errors import InputError
from dsjax.plan.count import ParameterCounts, cache_bytes_per_token, parameter_counts
from dsjax.presets import deepseek_v2, deepseek_v2_lite, deepseek_v3, nano, preset, presets, tiny
from dsjax.train.schedule import value_at

# From the reports; the published config.json files say the same.
PUBLISHED = {
    #                     V2-Lite   V2      V3
    "layers": (27, 60, 61),
    "dense layers": (1, 1, 3),
    "width": (2048, 5120, 7168),
    "heads": (16, 128, 128),
    "q latent": (None, 1536, 1536),
    "kv latent": (512, 512, 512),
    "nope": (128, 128, 128),
    "rope": (64, 64, 64),
    "value": (128, 128, 128),
    "dense ffn": (10_944, 12_288, 18_432),
    "expert ffn": (1408, 1536, 2048),
    "routed experts": (64, 160, 256),
    "shared experts": (2, 2, 1),
    "experts a token": (6, 6, 8),
    "groups": (1, 8, 8),
    "groups a token": (1, 3, 4),
    "score": ("softmax", "softmax", "sigmoid"),
    "group score": ("max", "max", "top2_sum"),
    "gate scale": (1.0, 16.0, 2.5),
    "gates normalised": (False, False, True),
    "balancing bias": (False, False, True),
    "balance counts": ("selected", "selected", "best_scores"),
    "vocabulary": (102_400, 102_400, 129_280),
    "rope theta": (1e4, 1e4, 1e4),
    "yarn": ((40.0, 4096, 32.0, 1.0, 0.707, 0.707),) * 2 + ((40.0, 4096, 32.0, 1.0, 1.0, 1.0),),
    "max positions": (163_840, 163_840, 163_840),
    "mtp depth": (0, 0, 1),
    "init std": (0.006, 0.006, 0.006),
    "latent norm eps": (1e-6, 1e-6, 1e-6),
    "norm eps": (1e-6, 1e-6, 1e-6),
}
TRAINED = {
    "sequence": (4096, 4096, 4096),
    "batch": (4608, 9216, 15_360),
    "tokens": (5.7e12, 8.1e12, 14.8e12),
    "peak learning rate": (4.2e-4, 2.4e-4, 2.2e-4),
    "betas": ((0.9, 0.95),) * 3,
    "decay": (0.1, 0.1, 0.1),
    "clip": (1.0, 1.0, 1.0),
    # V2: alpha_1, alpha_2, alpha_3 (report 3.1.2 and appendix B.1).
    "balance losses": ((0.001, 0.0, 0.0), (0.003, 0.05, 0.02), (1e-4, 0.0, 0.0)),
}


def sizes_of(config):
    model, train = config.model, config.train
    dense, moe = model.stacks
    attention, ffn = moe.blocks[0].attention, moe.blocks[0].ffn
    yarn = attention.rope.yarn
    assert dense.blocks[0].attention == attention
    return {
        "layers": model.num_layers,
        "dense layers": dense.repeats,
        "width": model.embed_dim,
        "heads": attention.num_heads,
        "q latent": attention.q_latent_dim,
        "kv latent": attention.kv_latent_dim,
        "nope": attention.nope_dim,
        "rope": attention.rope_dim,
        "value": attention.value_dim,
        "dense ffn": dense.blocks[0].ffn.hidden_dim,
        "expert ffn": ffn.expert_dim,
        "routed experts": ffn.num_experts,
        "shared experts": ffn.num_shared_experts,
        "experts a token": ffn.num_experts_per_token,
        "groups": ffn.num_groups,
        "groups a token": ffn.groups_per_token,
        "score": ffn.score,
        "group score": ffn.group_score,
        "gate scale": ffn.gate_scale,
        "gates normalised": ffn.normalize_gates,
        "balancing bias": ffn.balance_bias,
        "balance counts": ffn.balance_counts,
        "vocabulary": model.vocab_size,
        "rope theta": attention.rope.theta,
        "yarn": (
            yarn.factor,
            yarn.original_max_positions,
            yarn.beta_fast,
            yarn.beta_slow,
            yarn.mscale,
            yarn.mscale_all_dim,
        ),
        "max positions": model.max_positions,
        "mtp depth": 0 if model.mtp is None else model.mtp.depth,
        "init std": model.init_std,
        "latent norm eps": attention.latent_norm_eps,
        "norm eps": model.norm_eps,
        "sequence": train.seq_len,
        "batch": train.batch_size,
        "tokens": float(train.total_tokens),
        "peak learning rate": train.optimizer.learning_rate,
        "betas": (train.optimizer.beta1, train.optimizer.beta2),
        "decay": train.optimizer.weight_decay,
        "clip": train.optimizer.clip_norm,
        "balance losses": (
            train.balance_loss_weight,
            train.device_balance_loss_weight,
            train.communication_balance_loss_weight,
        ),
    }


MODELS = (deepseek_v2_lite, deepseek_v2, deepseek_v3)

# Layers, width, FFN, heads, key/value heads, vocabulary, theta, eps, positions, extension of the
# context, biases: the published config.json files. Then the peak of the learning rate.
QWEN_7B = (152_064, 1e4, 1e-6, 131_072, None, True)
QWEN = (152_064, 1e6, 1e-5, 131_072, None, True)
LLAMA = (128_256, 5e5, 1e-5, 131_072, (8.0, 8192, 1.0, 4.0), False)
CODER = (32_256, 1e5, 1e-6, 16_384, 4.0, False)
DENSE = {
    "r1_distill_qwen_1_5b": (28, 1536, 8960, 12, 2, 151_936, *QWEN_7B[1:], 1e-4),
    "r1_distill_qwen_7b": (28, 3584, 18_944, 28, 4, *QWEN_7B, 8e-5),
    "r1_distill_qwen_14b": (48, 5120, 13_824, 40, 8, *QWEN, 7e-5),
    "r1_distill_qwen_32b": (64, 5120, 27_648, 40, 8, *QWEN, 6e-5),
    "r1_distill_llama_8b": (32, 4096, 14_336, 32, 8, *LLAMA, 5e-5),
    "r1_distill_llama_70b": (80, 8192, 28_672, 64, 8, *LLAMA, 2e-5),
    "deepseek_llm_7b": (30, 4096, 11_008, 32, 32, 102_400, 1e4, 1e-6, 4096, None, False, 4.2e-4),
    "deepseek_coder_6_7b": (32, 4096, 11_008, 32, 32, *CODER, 4.2e-4),
}


@pytest.mark.parametrize("name", DENSE)
def test_a_student_has_its_published_numbers(name):
    config = preset(name)
    model, train = config.model, config.train
    (stack,) = model.stacks
    (block,) = stack.blocks
    gqa, llama3 = block.attention, block.attention.rope.llama3
    extension = None if gqa.rope.linear_factor == 1.0 else gqa.rope.linear_factor
    if llama3 is not None:
        extension = (
            *(llama3.factor, llama3.original_max_positions),
            *(llama3.low_freq_factor, llama3.high_freq_factor),
        )
    assert DENSE[name] == (
        *(stack.repeats, model.embed_dim, block.ffn.hidden_dim, gqa.num_heads, gqa.num_kv_heads),
        *(model.vocab_size, gqa.rope.theta, model.norm_eps, model.max_positions),
        *(extension, gqa.qkv_bias, train.optimizer.learning_rate),
    )
    assert gqa.head_dim == 128
    assert gqa.num_heads * 128 == model.embed_dim
    assert (gqa.out_bias, model.tie_embeddings, gqa.rope.yarn, model.mtp) == (
        False,
        False,
        None,
        None,
    )


@pytest.mark.parametrize("name", [name for name in DENSE if name.startswith("r1_")])
def test_students_are_distilled_as_published(name):
    """R1 report: batches of 64, 32,768 tokens, a cosine from the peak to its tenth."""
    train = preset(name).train
    assert (train.batch_size, train.seq_len) == (64, 32_768)
    shares = [float(value_at(train.optimizer.schedule, share)) for share in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([1.0, 0.55, 0.1], rel=1e-6)
    epochs = train.total_tokens / train.seq_len / 800_000
    assert 2 <= epochs <= 3


@pytest.mark.parametrize("number", [*PUBLISHED, *TRAINED])
@pytest.mark.parametrize("make", MODELS)
def test_a_published_model_has_its_published_number(make, number):
    expected = (PUBLISHED | TRAINED)[number][MODELS.index(make)]
    assert sizes_of(make())[number] == expected


def test_the_mtp_block_of_v3_is_one_of_its_moe_blocks():
    model = deepseek_v3().model
    assert model.mtp.block == model.stacks[1].blocks[0]


def test_the_demonstration_and_the_benchmark_have_the_sizes_asked_for():
    wanted = {
        "tiny": (2048, 128, 4, 1, 512, 16, 96, 4, 4, 32, 16, 32, 64, 96, 1),
        "v3_20m": (4096, 256, 6, 1, 704, 32, 128, 4, 4, 32, 16, 32, 64, 96, 0),
    }
    for name, numbers in wanted.items():
        model = preset(name).model
        dense, moe = model.stacks
        mla, ffn = moe.blocks[0].attention, moe.blocks[0].ffn
        assert numbers == (
            *(model.vocab_size, model.embed_dim, model.num_layers, dense.repeats),
            *(dense.blocks[0].ffn.hidden_dim, ffn.num_experts, ffn.expert_dim),
            *(ffn.num_experts_per_token, mla.num_heads, mla.nope_dim, mla.rope_dim),
            *(mla.value_dim, mla.kv_latent_dim, mla.q_latent_dim),
            0 if model.mtp is None else model.mtp.depth,
        )
        assert (ffn.num_groups, ffn.groups_per_token, ffn.num_shared_experts) == (4, 2, 1)


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match=r"unknown preset 'deepseek_v4'; did you mean 'deepseek_v"):
        preset("deepseek_v4")
    with pytest.raises(
        InputError, match=r"known: deepseek_coder_6_7b, deepseek_llm_7b, deepseek_v2, .*v3_20m"
    ):
        preset("")
    assert preset("tiny") == tiny()
    assert set(presets()) >= {"deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "nano", "small"}


# -------------------------------------------------------------------------------------- schedules

V3, V2, T = 14.8e12, 8.1e12, 1e12
WARM = 2000 * 3072 * 4096  # 2K steps of V3's first batch size


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (0, 0.0),
        (WARM / 2, 1.1e-4),
        (WARM, 2.2e-4),
        (5 * T, 2.2e-4),
        (10 * T, 2.2e-4),
        (12.15 * T, (2.2e-4 + 2.2e-5) / 2),  # half of the cosine
        (10 * T + 4.3 * T / 3, 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.75),  # cos 60 degrees is 1/2
        (14.3 * T, 2.2e-5),
        (14.6 * T, 2.2e-5),
        (14.64 * T, 7.3e-6),
        (V3, 7.3e-6),
    ],
)
def test_v3s_learning_rate_has_its_five_phases(tokens, rate):
    optimizer = deepseek_v3().train.optimizer
    found = optimizer.learning_rate * float(value_at(optimizer.schedule, tokens / V3))
    assert found == pytest.approx(rate, rel=2e-4, abs=1e-12)  # progress is float32


@pytest.mark.parametrize(
    ("name", "tokens", "value"),
    [
        ("bias_speed", 0, 1e-3),
        ("bias_speed", 14.2 * T, 1e-3),
        ("bias_speed", 14.4 * T, 0.0),
        ("bias_speed", V3, 0.0),
        ("mtp_loss_weight", 0, 0.3),
        ("mtp_loss_weight", 9.9 * T, 0.3),
        ("mtp_loss_weight", 10.1 * T, 0.1),
        ("mtp_loss_weight", V3, 0.1),
    ],
)
def test_v3s_bias_speed_and_mtp_weight_change_where_published(name, tokens, value):
    schedule = getattr(deepseek_v3().train, name)
    assert float(value_at(schedule, tokens / V3)) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "share", "rate"),
    [
        (deepseek_v2, 0.0, 0.0),
        (deepseek_v2, 1000 * 2304 * 4096 / V2, 1.2e-4),
        (deepseek_v2, 0.59, 2.4e-4),
        (deepseek_v2, 0.61, 2.4e-4 * 0.316),
        (deepseek_v2, 0.91, 2.4e-4 * 0.316**2),
        (deepseek_v2, 1.0, 2.4e-4 * 0.316**2),
        (deepseek_v2_lite, 1000 * 4608 * 4096 / 5.7e12, 2.1e-4),
        (deepseek_v2_lite, 0.79, 4.2e-4),
        (deepseek_v2_lite, 0.81, 4.2e-4 * 0.316),
        (deepseek_v2_lite, 0.91, 4.2e-4 * 0.316**2),
    ],
)
def test_v2s_learning_rate_falls_in_two_steps(make, share, rate):
    optimizer = make().train.optimizer
    found = optimizer.learning_rate * float(value_at(optimizer.schedule, share))
    assert found == pytest.approx(rate, rel=1e-5, abs=1e-12)


# ----------------------------------------------------------------------------------------- counts

COUNTS = {
    "deepseek_v2_lite": (15_706_484_224, 0, 2_451_435_008, 102_400 * 2048),
    "deepseek_v2": (235_741_434_880, 0, 20_851_512_320, 102_400 * 5120),
    "deepseek_v3": (671_026_404_352, 11_610_067_968, 36_625_603_584, 129_280 * 7168),
    # The totals are those of the published checkpoints.
    "r1_distill_qwen_1_5b": (1_777_088_000, 0, 1_543_714_304, 151_936 * 1536),
    "r1_distill_qwen_7b": (7_615_616_512, 0, 7_070_619_136, 152_064 * 3584),
    "r1_distill_qwen_14b": (14_770_033_664, 0, 13_991_465_984, 152_064 * 5120),
    "r1_distill_qwen_32b": (32_763_876_352, 0, 31_985_308_672, 152_064 * 5120),
    "r1_distill_llama_8b": (8_030_261_248, 0, 7_504_924_672, 128_256 * 4096),
    "r1_distill_llama_70b": (70_553_706_496, 0, 69_503_033_344, 128_256 * 8192),
    "deepseek_llm_7b": (6_910_365_696, 0, 6_490_935_296, 102_400 * 4096),
    "deepseek_coder_6_7b": (6_740_512_768, 0, 6_608_392_192, 32_256 * 4096),
    "nano": (109_272, 34_888, 56_024, 512 * 32),
    "nano_dense": (41_248, 0, 41_248, 512 * 32),
    "tiny": (2_903_808, 736_032, 1_314_560, 2048 * 128),
    "tiny_wide": (3_296_512, 0, 2_379_008, 2048 * 256),
    "tiny_context": (405_472, 0, 301_024, 512 * 96),
    "tiny_reasoner": (1_369_152, 0, 713_792, 512 * 128),
    "v3_20m": (19_579_072, 0, 4_767_936, 4096 * 256),
    "small": (494_938_368, 41_038_208, 93_464_832, 32_768 * 768),
}


def test_every_preset_has_a_count():
    assert set(COUNTS) == set(presets())


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_counted_exactly(name):
    total, mtp, active, embedding = COUNTS[name]
    expected = ParameterCounts(total=total, mtp=mtp, active=active, embedding=embedding)
    assert parameter_counts(preset(name)) == expected


def attention_on_paper(attention, d):
    """A layer's projections, their biases, and the norms of latents."""
    n = attention.num_heads
    if isinstance(attention, GqaConfig):
        width = (n + 2 * attention.num_kv_heads) * attention.head_dim
        biases = attention.qkv_bias * width + attention.out_bias * d
        return d * width + n * attention.head_dim * d + biases
    c, q = attention.kv_latent_dim, attention.q_latent_dim
    p, r, h = attention.nope_dim, attention.rope_dim, attention.value_dim
    queries = d * n * (p + r) if q is None else d * q + q + q * n * (p + r)
    return queries + d * (c + r) + c + c * n * (p + h) + n * h * d


def parameters_on_paper(config):
    """(total, active) by the equations of the reports, from the configuration's numbers alone."""
    model = config.model
    d = model.embed_dim
    total = active = d  # the final norm
    for stack in model.stacks:
        for block in stack.blocks:
            ffn = block.ffn
            both = attention_on_paper(block.attention, d) + 2 * d  # and two norms
            if isinstance(ffn, MoeConfig):
                expert = 3 * d * ffn.expert_dim
                both += d * ffn.num_experts + ffn.num_shared_experts * expert
                total += stack.repeats * ffn.num_experts * expert
                active += stack.repeats * ffn.num_experts_per_token * expert
            else:
                both += 3 * d * ffn.hidden_dim
            total += stack.repeats * both
            active += stack.repeats * both
    matrices = 1 if model.tie_embeddings else 2
    return total + matrices * model.vocab_size * d, active + model.vocab_size * d


@pytest.mark.parametrize("name", COUNTS)
def test_the_counts_are_those_of_the_equations(name):
    counts = parameter_counts(preset(name))
    assert (counts.total, counts.active) == parameters_on_paper(preset(name))


@pytest.mark.parametrize(
    ("make", "total", "active"),
    [(deepseek_v2_lite, 15.7, 2.45), (deepseek_v2, 235.7, 20.85), (deepseek_v3, 671.0, 36.63)],
)
def test_the_counts_are_the_published_ones(make, total, active):
    counts = parameter_counts(make())
    assert round(counts.total / 1e9, 1) == total
    assert round(counts.active / 1e9, 2) == active


# ------------------------------------------------------------------------------------------ cache


@pytest.mark.parametrize("name", COUNTS)
def test_a_cached_token_costs_c_plus_r_numbers_a_layer(name):
    """Or, with grouped-query attention, a key and a value of each key/value head."""
    model = preset(name).model

    def cached(attention):
        if isinstance(attention, MlaConfig):
            return attention.kv_latent_dim + attention.rope_dim
        return 2 * attention.num_kv_heads * attention.head_dim

    numbers = sum(
        stack.repeats * cached(block.attention) for stack in model.stacks for block in stack.blocks
    )
    assert cache_bytes_per_token(model, 2) == 2 * numbers


def test_mla_saves_what_is_published():
    v2, v3 = deepseek_v2().model, deepseek_v3().model
    # Against multi-head attention with as many heads: 2 * N * H numbers a layer.
    attention = v3.stacks[1].blocks[0].attention
    mha = v3.num_layers * 2 * attention.num_heads * attention.value_dim * 2
    saved = 1 - cache_bytes_per_token(v3, 2) / mha
    assert math.floor(1000 * saved) == 982
    # V2 report: six bits a number, against DeepSeek 67B (95 layers, 8 key/value heads of 128).
    saved = 1 - cache_bytes_per_token(v2, 6 / 8) / (95 * 2 * 8 * 128 * 2)
    assert math.floor(1000 * saved) == 933


def test_v3_caches_seventy_kilobytes_a_token():
    assert cache_bytes_per_token(deepseek_v3().model, 2) == 61 * 576 * 2 == 70_272
    assert cache_bytes_per_token(nano().model, 4) == 3 * 24 * 4
