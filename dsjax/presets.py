"""The published models and the small ones, as configurations.

Numbers come from the reports and from the published `config.json` files; nothing in the code asks
for a preset's name.
"""

from collections.abc import Callable

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
)
from dsjax.errors import InputError, nearest

V3_TOKENS = 14.8e12
DISTILLATION_SAMPLES = 800_000  # R1 report, 2.4


def v3_learning_rate(warmup: float = 2000 * 3072 * 4096 / V3_TOKENS) -> ScheduleConfig:
    """V3's five phases (report 4.2) as a multiple of the peak, over the share of tokens seen.

    0 to the peak in 2K steps, constant to 10T tokens, cosine to a tenth over 4.3T, a tenth for
    333B, then 7.3e-6 (of 2.2e-4) for 167B.

    Args:
        warmup: share of the run; short runs want more than V3's 0.0017.
    """
    return ScheduleConfig(
        start=0.0,
        phases=(
            PhaseConfig(until=warmup, value=1.0, shape="linear"),
            PhaseConfig(until=10e12 / V3_TOKENS, value=1.0),
            PhaseConfig(until=14.3e12 / V3_TOKENS, value=0.1, shape="cosine"),
            PhaseConfig(until=14.633e12 / V3_TOKENS, value=0.1),
            PhaseConfig(until=1.0, value=7.3e-6 / 2.2e-4),
        ),
    )


def v3_bias_speed(speed: float = 1e-3) -> ScheduleConfig:
    """Gamma for 14.3T of V3's tokens, then 0 (V3 report 4.2; 1e-3 there).

    Args:
        speed: short runs want more: in 1e-3 steps a bias takes hundreds of them to matter.
    """
    return ScheduleConfig(
        start=speed,
        phases=(
            PhaseConfig(until=14.3e12 / V3_TOKENS, value=speed),
            PhaseConfig(until=1.0, value=0.0),
        ),
    )


def v3_mtp_weight() -> ScheduleConfig:
    """Lambda 0.3 for 10T tokens, then 0.1 (V3 report 4.2)."""
    return ScheduleConfig(
        start=0.3,
        phases=(
            PhaseConfig(until=10e12 / V3_TOKENS, value=0.3),
            PhaseConfig(until=1.0, value=0.1),
        ),
    )


def _dense_then_experts(
    attention: MlaConfig, *, dense_layers: int, dense_dim: int, moe_layers: int, moe: MoeConfig
) -> tuple[StackConfig, StackConfig]:
    """DeepSeek's two stacks: a few dense layers, then experts."""
    dense = BlockConfig(attention=attention, ffn=SwiGluConfig(hidden_dim=dense_dim))
    experts = BlockConfig(attention=attention, ffn=moe)
    return (
        StackConfig(name="dense", repeats=dense_layers, blocks=(dense,)),
        StackConfig(name="moe", repeats=moe_layers, blocks=(experts,)),
    )


def _v2_yarn() -> RopeConfig:
    return RopeConfig(
        yarn=YarnConfig(
            factor=40.0, original_max_positions=4096, mscale=0.707, mscale_all_dim=0.707
        )
    )


def deepseek_v2_lite() -> Config:
    """DeepSeek-V2-Lite, 15.7B with 2.4B active (V2 report, appendix B)."""
    attention = MlaConfig(
        num_heads=16,
        q_latent_dim=None,
        kv_latent_dim=512,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
        rope=_v2_yarn(),
    )
    moe = MoeConfig(
        num_experts=64,
        num_experts_per_token=6,
        expert_dim=1408,
        num_shared_experts=2,
        score="softmax",
        group_score="max",
        normalize_gates=False,
        gate_scale=1.0,
        balance_bias=False,
        balance_counts="selected",
    )
    return Config(
        model=ModelConfig(
            vocab_size=102_400,
            embed_dim=2048,
            stacks=_dense_then_experts(
                attention, dense_layers=1, dense_dim=10_944, moe_layers=26, moe=moe
            ),
            max_positions=163_840,
        ),
        train=TrainConfig(
            seq_len=4096,
            batch_size=4608,
            total_tokens=5_700_000_000_000,
            yarn=False,
            optimizer=OptimizerConfig(
                learning_rate=4.2e-4,
                schedule=_v2_learning_rate(warmup=2000 * 4608 * 4096 / 5.7e12, first_drop=0.8),
                moment_dtype="bfloat16",
            ),
            balance_loss_weight=0.001,  # alpha_1 alone: a layer's experts share one device
        ),
        precision=PrecisionConfig(compute_dtype="bfloat16"),
    )


def _v2_learning_rate(*, warmup: float, first_drop: float) -> ScheduleConfig:
    """2K steps of warm-up, then the peak times 0.316 at two shares of the tokens, the last 90%."""
    return ScheduleConfig(
        start=0.0,
        phases=(
            PhaseConfig(until=warmup, value=1.0, shape="linear"),
            PhaseConfig(until=first_drop, value=1.0),
            PhaseConfig(until=0.9, value=0.316),
            PhaseConfig(until=1.0, value=0.316**2),
        ),
    )


def deepseek_v2() -> Config:
    """DeepSeek-V2, 236B with 21B active (V2 report, 3.1.2)."""
    attention = MlaConfig(
        num_heads=128,
        q_latent_dim=1536,
        kv_latent_dim=512,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
        rope=_v2_yarn(),
    )
    moe = MoeConfig(
        num_experts=160,
        num_experts_per_token=6,
        expert_dim=1536,
        num_shared_experts=2,
        num_groups=8,
        groups_per_token=3,
        score="softmax",
        group_score="max",
        normalize_gates=False,
        gate_scale=16.0,
        balance_bias=False,
        balance_counts="selected",
    )
    return Config(
        model=ModelConfig(
            vocab_size=102_400,
            embed_dim=5120,
            stacks=_dense_then_experts(
                attention, dense_layers=1, dense_dim=12_288, moe_layers=59, moe=moe
            ),
            max_positions=163_840,
        ),
        train=TrainConfig(
            seq_len=4096,
            batch_size=9216,
            total_tokens=8_100_000_000_000,
            micro_batch_size=768,
            batch_ramp=BatchRampConfig(start=2304, tokens=225_000_000_000),
            yarn=False,
            context_stages=(
                ContextStageConfig(
                    seq_len=32_768,
                    batch_size=576,
                    micro_batch_size=96,
                    steps=1000,
                    learning_rate=2.4e-5,  # the report names none: the last of pretraining
                ),
            ),
            optimizer=OptimizerConfig(
                learning_rate=2.4e-4,
                schedule=_v2_learning_rate(warmup=2000 * 2304 * 4096 / 8.1e12, first_drop=0.6),
                moment_dtype="bfloat16",
            ),
            balance_loss_weight=0.003,  # alpha_1, alpha_2, alpha_3
            device_balance_loss_weight=0.05,
            communication_balance_loss_weight=0.02,
        ),
        precision=PrecisionConfig(compute_dtype="bfloat16"),
    )


def deepseek_v3() -> Config:
    """DeepSeek-V3, 671B with 37B active (V3 report, 4.2); R1, V3-0324 and V3.1 share it."""
    attention = MlaConfig(
        num_heads=128,
        q_latent_dim=1536,
        kv_latent_dim=512,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
        rope=RopeConfig(yarn=YarnConfig(factor=40.0, original_max_positions=4096)),
    )
    moe = MoeConfig(
        num_experts=256,
        num_experts_per_token=8,
        expert_dim=2048,
        num_groups=8,
        groups_per_token=4,
        gate_scale=2.5,
    )
    return Config(
        model=ModelConfig(
            vocab_size=129_280,
            embed_dim=7168,
            stacks=_dense_then_experts(
                attention, dense_layers=3, dense_dim=18_432, moe_layers=58, moe=moe
            ),
            mtp=MtpConfig(depth=1, block=BlockConfig(attention=attention, ffn=moe)),
            max_positions=163_840,
        ),
        train=TrainConfig(
            seq_len=4096,
            batch_size=15_360,
            total_tokens=14_800_000_000_000,
            # 4.2M positions, in the longer stages, too.
            micro_batch_size=1024,
            batch_ramp=BatchRampConfig(start=3072, tokens=469_000_000_000),
            yarn=False,
            context_stages=(
                ContextStageConfig(
                    seq_len=32_768,
                    batch_size=1920,
                    micro_batch_size=128,
                    steps=1000,
                    learning_rate=7.3e-6,
                ),
                ContextStageConfig(
                    seq_len=131_072,
                    batch_size=480,
                    micro_batch_size=32,
                    steps=1000,
                    learning_rate=7.3e-6,
                ),
            ),
            ema_decay=0.999,  # the report names none
            optimizer=OptimizerConfig(
                learning_rate=2.2e-4, schedule=v3_learning_rate(), moment_dtype="bfloat16"
            ),
            bias_speed=v3_bias_speed(),
            mtp_loss_weight=v3_mtp_weight(),
            remat="full",
        ),
        data=DataConfig(tokenizer="deepseek", fim_rate=0.1),
        precision=PrecisionConfig(compute_dtype="bfloat16"),
    )


def _dense(attention: GqaConfig, *, layers: int, hidden_dim: int) -> tuple[StackConfig]:
    """The one stack of a Llama or Qwen2 block."""
    block = BlockConfig(attention=attention, ffn=SwiGluConfig(hidden_dim=hidden_dim))
    return (StackConfig(name="dense", repeats=layers, blocks=(block,)),)


def _distilled(model: ModelConfig, *, learning_rate: float) -> Config:
    """The recipe of R1's students: 2-3 epochs over 800K samples, cosine to a tenth of the peak.

    Two epochs here, each sample a row of its own; the report gives no number of tokens.
    """
    return Config(
        model=model,
        train=TrainConfig(
            seq_len=32_768,
            batch_size=64,
            micro_batch_size=1,
            total_tokens=2 * DISTILLATION_SAMPLES * 32_768,
            optimizer=OptimizerConfig(
                learning_rate=learning_rate,
                schedule=ScheduleConfig(
                    start=1.0, phases=(PhaseConfig(until=1.0, value=0.1, shape="cosine"),)
                ),
            ),
            remat="full",
        ),
        precision=PrecisionConfig(compute_dtype="bfloat16"),
    )


def _qwen2(
    *,
    vocab_size: int,
    embed_dim: int,
    layers: int,
    hidden_dim: int,
    num_heads: int,
    num_kv_heads: int,
    theta: float,
    norm_eps: float,
) -> ModelConfig:
    """Qwen2.5: biases on queries, keys and values, heads of 128."""
    attention = GqaConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        rope=RopeConfig(theta=theta),
        qkv_bias=True,
    )
    return ModelConfig(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        stacks=_dense(attention, layers=layers, hidden_dim=hidden_dim),
        norm_eps=norm_eps,
        init_std=0.02,
        max_positions=131_072,
    )


def _llama3(*, embed_dim: int, layers: int, hidden_dim: int, num_heads: int) -> ModelConfig:
    """Llama 3.1 and 3.3: eight key/value heads, heads of 128, frequencies for 128K positions."""
    rope = RopeConfig(
        theta=500_000.0, llama3=Llama3RopeConfig(factor=8.0, original_max_positions=8192)
    )
    attention = GqaConfig(num_heads=num_heads, num_kv_heads=8, head_dim=128, rope=rope)
    return ModelConfig(
        vocab_size=128_256,
        embed_dim=embed_dim,
        stacks=_dense(attention, layers=layers, hidden_dim=hidden_dim),
        norm_eps=1e-5,
        init_std=0.02,
        max_positions=131_072,
    )


def r1_distill_qwen_1_5b() -> Config:
    """DeepSeek-R1-Distill-Qwen-1.5B (R1 report, 2.4), on Qwen2.5-Math-1.5B; head untied."""
    model = _qwen2(
        vocab_size=151_936,
        embed_dim=1536,
        layers=28,
        hidden_dim=8960,
        num_heads=12,
        num_kv_heads=2,
        theta=10_000.0,
        norm_eps=1e-6,
    )
    return _distilled(model, learning_rate=1e-4)


def r1_distill_qwen_7b() -> Config:
    """DeepSeek-R1-Distill-Qwen-7B, on Qwen2.5-Math-7B."""
    model = _qwen2(
        vocab_size=152_064,
        embed_dim=3584,
        layers=28,
        hidden_dim=18_944,
        num_heads=28,
        num_kv_heads=4,
        theta=10_000.0,
        norm_eps=1e-6,
    )
    return _distilled(model, learning_rate=8e-5)


def r1_distill_qwen_14b() -> Config:
    """DeepSeek-R1-Distill-Qwen-14B, on Qwen2.5-14B."""
    model = _qwen2(
        vocab_size=152_064,
        embed_dim=5120,
        layers=48,
        hidden_dim=13_824,
        num_heads=40,
        num_kv_heads=8,
        theta=1_000_000.0,
        norm_eps=1e-5,
    )
    return _distilled(model, learning_rate=7e-5)


def r1_distill_qwen_32b() -> Config:
    """DeepSeek-R1-Distill-Qwen-32B, on Qwen2.5-32B."""
    model = _qwen2(
        vocab_size=152_064,
        embed_dim=5120,
        layers=64,
        hidden_dim=27_648,
        num_heads=40,
        num_kv_heads=8,
        theta=1_000_000.0,
        norm_eps=1e-5,
    )
    return _distilled(model, learning_rate=6e-5)


def r1_distill_llama_8b() -> Config:
    """DeepSeek-R1-Distill-Llama-8B, on Llama-3.1-8B."""
    model = _llama3(embed_dim=4096, layers=32, hidden_dim=14_336, num_heads=32)
    return _distilled(model, learning_rate=5e-5)


def r1_distill_llama_70b() -> Config:
    """DeepSeek-R1-Distill-Llama-70B, on Llama-3.3-70B-Instruct."""
    model = _llama3(embed_dim=8192, layers=80, hidden_dim=28_672, num_heads=64)
    return _distilled(model, learning_rate=2e-5)


def deepseek_llm_7b() -> Config:
    """DeepSeek LLM 7B, a Llama block with a key head for each query head (arXiv 2401.02954)."""
    attention = GqaConfig(num_heads=32, num_kv_heads=32, head_dim=128)
    return Config(
        model=ModelConfig(
            vocab_size=102_400,
            embed_dim=4096,
            stacks=_dense(attention, layers=30, hidden_dim=11_008),
        ),
        train=TrainConfig(
            seq_len=4096,
            batch_size=2304,
            total_tokens=2_000_000_000_000,
            optimizer=OptimizerConfig(
                learning_rate=4.2e-4,
                schedule=_v2_learning_rate(warmup=2000 * 2304 * 4096 / 2e12, first_drop=0.8),
            ),
        ),
        precision=PrecisionConfig(compute_dtype="bfloat16"),
    )


def deepseek_coder_6_7b() -> Config:
    """DeepSeek Coder 6.7B, a Llama block over 16K positions (arXiv 2401.14196)."""
    # Differs from the paper: its main stage had theta 1e4 and no interpolation; a model has one
    # rope here, and this is the published checkpoint's.
    rope = RopeConfig(theta=100_000.0, linear_factor=4.0)
    attention = GqaConfig(num_heads=32, num_kv_heads=32, head_dim=128, rope=rope)
    return Config(
        model=ModelConfig(
            vocab_size=32_256,
            embed_dim=4096,
            stacks=_dense(attention, layers=32, hidden_dim=11_008),
            max_positions=16_384,
        ),
        train=TrainConfig(
            seq_len=4096,
            batch_size=2304,
            total_tokens=2_000_000_000_000,
            context_stages=(
                ContextStageConfig(
                    seq_len=16_384,
                    batch_size=512,
                    steps=1000,
                    learning_rate=4.2e-5,  # the report names none: the last of pretraining
                ),
            ),
            optimizer=OptimizerConfig(
                learning_rate=4.2e-4,
                schedule=_v2_learning_rate(warmup=2000 * 2304 * 4096 / 2e12, first_drop=0.8),
            ),
        ),
        data=DataConfig(fim_rate=0.5),
        precision=PrecisionConfig(compute_dtype="bfloat16"),
    )


def nano() -> Config:
    """A V3 in miniature that runs in seconds: every part present, for tests."""
    attention = MlaConfig(
        num_heads=2, q_latent_dim=24, kv_latent_dim=16, nope_dim=16, rope_dim=8, value_dim=16
    )
    moe = MoeConfig(
        num_experts=8,
        num_experts_per_token=2,
        expert_dim=32,
        num_groups=4,
        groups_per_token=2,
        gate_scale=2.5,
    )
    return Config(
        model=ModelConfig(
            vocab_size=512,
            embed_dim=32,
            stacks=_dense_then_experts(
                attention, dense_layers=1, dense_dim=64, moe_layers=2, moe=moe
            ),
            mtp=MtpConfig(depth=1, block=BlockConfig(attention=attention, ffn=moe)),
            init_std=0.05,
        ),
        train=TrainConfig(
            seq_len=64,
            batch_size=8,
            total_tokens=20 * 8 * 64,
            optimizer=OptimizerConfig(learning_rate=3e-3, schedule=v3_learning_rate(warmup=0.1)),
            bias_speed=v3_bias_speed(),
            mtp_loss_weight=v3_mtp_weight(),
            eval_every_steps=10,
            eval_batches=2,
            save_every_steps=10,
        ),
    )


def nano_dense() -> Config:
    """A Qwen2 in miniature with a tied head, which runs in seconds: for tests of students."""
    attention = GqaConfig(num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True)
    return Config(
        model=ModelConfig(
            vocab_size=512,
            embed_dim=32,
            stacks=_dense(attention, layers=2, hidden_dim=96),
            init_std=0.05,
            tie_embeddings=True,
        ),
        train=TrainConfig(
            seq_len=64,
            batch_size=8,
            total_tokens=20 * 8 * 64,
            optimizer=OptimizerConfig(learning_rate=3e-3, schedule=v3_learning_rate(warmup=0.1)),
            eval_every_steps=10,
            eval_batches=2,
            save_every_steps=10,
        ),
    )


def tiny() -> Config:
    """The demonstration: learns real text on two cores in minutes."""
    attention = MlaConfig(
        num_heads=4, q_latent_dim=96, kv_latent_dim=64, nope_dim=32, rope_dim=16, value_dim=32
    )
    moe = MoeConfig(
        num_experts=16,
        num_experts_per_token=4,
        expert_dim=96,
        num_groups=4,
        groups_per_token=2,
        gate_scale=2.5,
    )
    return Config(
        model=ModelConfig(
            vocab_size=2048,
            embed_dim=128,
            stacks=_dense_then_experts(
                attention, dense_layers=1, dense_dim=512, moe_layers=3, moe=moe
            ),
            mtp=MtpConfig(depth=1, block=BlockConfig(attention=attention, ffn=moe)),
            init_std=0.02,
        ),
        train=TrainConfig(
            seq_len=256,
            batch_size=4,
            total_tokens=1_600_000,
            optimizer=OptimizerConfig(learning_rate=1.5e-3, schedule=v3_learning_rate(warmup=0.03)),
            bias_speed=v3_bias_speed(5e-3),
            mtp_loss_weight=v3_mtp_weight(),
        ),
    )


def tiny_reasoner() -> Config:
    """The base of `make r1zero`: learns the form of an answer on two cores in minutes."""
    attention = MlaConfig(
        num_heads=4, q_latent_dim=None, kv_latent_dim=64, nope_dim=32, rope_dim=16, value_dim=32
    )
    moe = MoeConfig(num_experts=8, num_experts_per_token=2, expert_dim=128, gate_scale=2.5)
    return Config(
        model=ModelConfig(
            vocab_size=512,
            embed_dim=128,
            stacks=_dense_then_experts(
                attention, dense_layers=1, dense_dim=384, moe_layers=2, moe=moe
            ),
            init_std=0.02,
            max_positions=512,
        ),
        train=TrainConfig(
            seq_len=256,
            batch_size=16,
            total_tokens=400 * 16 * 256,
            optimizer=OptimizerConfig(learning_rate=2e-3, schedule=v3_learning_rate(warmup=0.05)),
            bias_speed=v3_bias_speed(5e-3),
        ),
    )


def tiny_wide() -> Config:
    """For questions of precision: contractions of 256 or more, an expert's rows on average."""
    attention = MlaConfig(
        num_heads=4, q_latent_dim=256, kv_latent_dim=256, nope_dim=64, rope_dim=32, value_dim=64
    )
    moe = MoeConfig(
        num_experts=4,
        num_experts_per_token=2,
        expert_dim=256,
        gate_scale=2.5,
    )
    return Config(
        model=ModelConfig(
            vocab_size=2048,
            embed_dim=256,
            stacks=_dense_then_experts(
                attention, dense_layers=1, dense_dim=512, moe_layers=1, moe=moe
            ),
            init_std=0.02,
        ),
        train=TrainConfig(
            seq_len=128,
            batch_size=4,
            total_tokens=1000 * 4 * 128,
            optimizer=OptimizerConfig(
                learning_rate=1e-3,
                schedule=v3_learning_rate(warmup=0.05),
                moment_dtype="bfloat16",
            ),
            bias_speed=v3_bias_speed(5e-3),
        ),
        precision=PrecisionConfig(compute_dtype="bfloat16"),
    )


def tiny_context() -> Config:
    """Longer contexts in small: names and codes found again at 8 times the first length.

    Two layers with mostly rotary keys, 128 tokens without YaRN, then 1,024 with it.
    """
    attention = MlaConfig(
        num_heads=4,
        q_latent_dim=None,
        kv_latent_dim=64,
        nope_dim=8,
        rope_dim=32,
        value_dim=32,
        rope=RopeConfig(yarn=YarnConfig(factor=8.0, original_max_positions=128)),
    )
    moe = MoeConfig(num_experts=4, num_experts_per_token=2, expert_dim=96, gate_scale=2.5)
    return Config(
        model=ModelConfig(
            vocab_size=512,
            embed_dim=96,
            stacks=_dense_then_experts(
                attention, dense_layers=1, dense_dim=256, moe_layers=1, moe=moe
            ),
            init_std=0.06,
            max_positions=8192,
        ),
        train=TrainConfig(
            seq_len=128,
            batch_size=16,
            total_tokens=800 * 16 * 128,
            yarn=False,
            context_stages=(
                ContextStageConfig(seq_len=1024, batch_size=2, steps=100, learning_rate=1e-3),
            ),
            optimizer=OptimizerConfig(learning_rate=3e-3, schedule=v3_learning_rate(warmup=0.05)),
            bias_speed=v3_bias_speed(),
        ),
        data=DataConfig(sources=(SourceConfig(path="builtin:recall"),), held_out_fraction=0.02),
    )


def v3_20m() -> Config:
    """The benchmark's shape: 20M parameters, every part of V3 but MTP and YaRN."""
    attention = MlaConfig(
        num_heads=4, q_latent_dim=96, kv_latent_dim=64, nope_dim=32, rope_dim=16, value_dim=32
    )
    moe = MoeConfig(
        num_experts=32,
        num_experts_per_token=4,
        expert_dim=128,
        num_groups=4,
        groups_per_token=2,
        gate_scale=2.5,
    )
    return Config(
        model=ModelConfig(
            vocab_size=4096,
            embed_dim=256,
            stacks=_dense_then_experts(
                attention, dense_layers=1, dense_dim=704, moe_layers=5, moe=moe
            ),
            init_std=0.02,
        ),
        train=TrainConfig(
            seq_len=512,
            batch_size=8,
            total_tokens=20_000_000,
            optimizer=OptimizerConfig(learning_rate=1e-3, schedule=v3_learning_rate(warmup=0.02)),
        ),
    )


def small() -> Config:
    """About 100M active parameters: a day's experiment on one GPU."""
    attention = MlaConfig(
        num_heads=8, q_latent_dim=384, kv_latent_dim=256, nope_dim=64, rope_dim=32, value_dim=64
    )
    moe = MoeConfig(
        num_experts=64,
        num_experts_per_token=6,
        expert_dim=256,
        num_groups=8,
        groups_per_token=4,
        gate_scale=2.5,
    )
    return Config(
        model=ModelConfig(
            vocab_size=32_768,
            embed_dim=768,
            stacks=_dense_then_experts(
                attention, dense_layers=1, dense_dim=2048, moe_layers=11, moe=moe
            ),
            mtp=MtpConfig(depth=1, block=BlockConfig(attention=attention, ffn=moe)),
            init_std=0.006,
        ),
        train=TrainConfig(
            seq_len=2048,
            batch_size=64,
            micro_batch_size=16,
            total_tokens=3_000_000_000,
            optimizer=OptimizerConfig(learning_rate=6e-4, schedule=v3_learning_rate(warmup=0.01)),
            bias_speed=v3_bias_speed(),
            mtp_loss_weight=v3_mtp_weight(),
            remat="dots",
        ),
        precision=PrecisionConfig(compute_dtype="bfloat16"),
    )


def presets() -> dict[str, Callable[[], Config]]:
    """Every preset by name."""
    known = (
        *(deepseek_v2_lite, deepseek_v2, deepseek_v3),
        *(r1_distill_qwen_1_5b, r1_distill_qwen_7b, r1_distill_qwen_14b, r1_distill_qwen_32b),
        *(r1_distill_llama_8b, r1_distill_llama_70b, deepseek_llm_7b, deepseek_coder_6_7b),
        *(nano, nano_dense, tiny, tiny_context, tiny_reasoner, tiny_wide, v3_20m, small),
    )
    return {make.__name__: make for make in known}


def preset(name: str) -> Config:
    """Returns the preset of that name.

    Raises:
        InputError: for an unknown name, with the nearest known one.
    """
    known = presets()
    if name not in known:
        raise InputError(f"unknown preset '{name}'{nearest(name, known)}")
    return known[name]()
