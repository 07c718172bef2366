"""Published recipes of reinforcement learning as configurations, around the model of a folder.

Knows nothing about how they are carried out.
"""

import dataclasses
import os
from collections.abc import Callable

from dsjax.config import (
    Config,
    MeshConfig,
    OptimizerConfig,
    PrecisionConfig,
    RewardConfig,
    RlConfig,
    TrainConfig,
    constant,
)
from dsjax.errors import InputError, nearest
from dsjax.interop.published import Published, is_published
from dsjax.train.stages import stages
from dsjax.workdir import CONFIG_FILE, read_run


def r1_zero() -> RlConfig:
    """R1-Zero (R1 report, 2.1 and appendix): accuracy and format, equal weights, KL 0.001.

    The clip range is not reported; 0.2 is DeepSeekMath's.
    """
    return RlConfig()


def r1() -> RlConfig:
    """R1's first stage of reinforcement learning: clip 10, and the language of the thoughts."""
    rewards = (
        RewardConfig(name="accuracy"),
        RewardConfig(name="format_think"),
        RewardConfig(name="language"),
    )
    return RlConfig(clip_low=10.0, clip_high=10.0, rewards=rewards)


def dapo() -> RlConfig:
    """DAPO (arXiv 2503.14476): clip-higher, token mean, no KL, no truncated samples, resampling."""
    return RlConfig(
        prompts=512,
        max_completion_tokens=20_480,
        mini_batches=16,
        rewards=(RewardConfig(name="accuracy", weight=2.0),),  # there right is 1 and wrong -1
        aggregation="dapo",
        clip_low=0.2,
        clip_high=0.28,
        kl_weight=0.0,
        dynamic_sampling=8,
        mask_truncated=True,
        overlong_tokens=4096,
    )


def dr_grpo() -> RlConfig:
    """Dr. GRPO (arXiv 2503.20783): nothing divided by lengths or deviations, no KL."""
    return RlConfig(
        rewards=(RewardConfig(name="accuracy"),),
        advantage="mean",
        aggregation="dr_grpo",
        kl_weight=0.0,
    )


def v3_2() -> RlConfig:
    """R1-Zero with V3.2's stabilisers (arXiv 2512.02556, 3.1); it gives no delta: 0.5 is TRL's."""
    return dataclasses.replace(
        r1_zero(),
        advantage="mean",
        kl="unbiased",
        off_policy_mask=0.5,
        replay_routing=True,
    )


def recipes() -> dict[str, Callable[[], RlConfig]]:
    """Every recipe by name."""
    return {make.__name__: make for make in (r1_zero, r1, dapo, dr_grpo, v3_2)}


def recipe(name: str) -> RlConfig:
    """Returns the recipe of that name.

    Raises:
        InputError: for an unknown name, with the nearest known one.
    """
    known = recipes()
    if name not in known:
        raise InputError(f"unknown recipe '{name}'{nearest(name, known)}")
    return known[name]()


def around(init: str | os.PathLike, rl: RlConfig) -> Config:
    """A run of reinforcement learning that begins with the model of a folder.

    Learning rate 3e-6 (R1 report), constant; no weight decay; the routers' biases stay as they are.

    Args:
        init: folder of a run, or of a published model.
        rl: how it is trained.

    Raises:
        InputError: if it is neither.
    """
    if os.path.isfile(os.path.join(init, CONFIG_FILE)):
        there = stages(read_run(init).config)[-1].config
        model, precision, mesh = there.model, there.precision, there.mesh
        train = there.train
    elif is_published(init):
        with Published(init) as published:
            model, precision, mesh = published.model, PrecisionConfig(), MeshConfig()
        train = TrainConfig(seq_len=2, batch_size=1, total_tokens=1)
    else:
        raise InputError(f"{os.fspath(init)} is neither the folder of a run nor a published model")
    train = dataclasses.replace(
        train,
        batch_ramp=None,
        context_stages=(),
        ema_decay=None,
        bias_speed=constant(0.0),
        optimizer=OptimizerConfig(learning_rate=3e-6, weight_decay=0.0, beta2=0.999),
    )
    config = Config(model=model, precision=precision, train=train, mesh=mesh)
    return dataclasses.replace(config, rl=_that_fits(rl, model.max_positions))


def _that_fits(rl: RlConfig, positions: int) -> RlConfig:
    """The recipe with shorter completions, where the model has not as many positions."""
    if rl.longest <= positions:
        return rl
    prompt = min(rl.max_prompt_tokens, positions // 4)
    completion = positions - prompt
    overlong = min(rl.overlong_tokens, completion // 5)
    return dataclasses.replace(
        rl, max_prompt_tokens=prompt, max_completion_tokens=completion, overlong_tokens=overlong
    )
