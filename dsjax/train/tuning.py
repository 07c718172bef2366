"""Supervised fine-tuning as a configuration: R1's recipe, and how many steps an epoch has.

Knows nothing about steps or files: the loop is that of pretraining, and what is learnt of a row
comes with the data. Source: DeepSeek-R1 (arXiv 2501.12948), supplement on hyper-parameters.
"""

import dataclasses
import math

from dsjax.config import (
    Config,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    ScheduleConfig,
    TrainConfig,
    constant,
)
from dsjax.data.corpus import rows_an_epoch
from dsjax.interop.tokenizer import Tokenizer

EPOCHS = 2.0  # R1's stages take two to three
_BATCH_SIZE, _SEQ_LEN, _LEARNING_RATE = 128, 32_768, 5e-5
# To a tenth: 5e-5 -> 5e-6.
_COSINE = ScheduleConfig(start=1.0, phases=(PhaseConfig(until=1.0, value=0.1, shape="cosine"),))
# What V3's pretraining ended with (report 4.2). Biases stand still: what is seen now is too little
# to balance experts by.
_MTP_LOSS_WEIGHT, _BIAS_SPEED = 0.1, 0.0


def published_recipe(model: ModelConfig) -> TrainConfig:
    """R1's supervised stages: batches of 128 rows of 32,768 tokens, cosine from 5e-5 to 5e-6.

    A model of fewer positions has shorter rows. The number of tokens is a step's; `with_epochs`
    sets it.
    """
    seq_len = min(_SEQ_LEN, model.max_positions)
    return TrainConfig(
        seq_len=seq_len,
        batch_size=_BATCH_SIZE,
        total_tokens=_BATCH_SIZE * seq_len,
        optimizer=OptimizerConfig(learning_rate=_LEARNING_RATE, schedule=_COSINE),
        bias_speed=constant(_BIAS_SPEED),
        mtp_loss_weight=constant(_MTP_LOSS_WEIGHT),
    )


def tuning_recipe(train: TrainConfig) -> TrainConfig:
    """How a run of ours is tuned: with the sizes and the peak rate that it was trained with.

    The rate falls to a tenth by a cosine, as R1's; what only pretraining does is left out.
    """
    return dataclasses.replace(
        train,
        optimizer=dataclasses.replace(train.optimizer, schedule=_COSINE),
        bias_speed=constant(_BIAS_SPEED),
        mtp_loss_weight=constant(_MTP_LOSS_WEIGHT),
        batch_ramp=None,
        context_stages=(),
        yarn=train.yarn or bool(train.context_stages),
        profile_steps=(),
    )


def with_epochs(config: Config, epochs: float, tokenizer: Tokenizer) -> Config:
    """The same with a main stage that sees every row of the training side so many times.

    Args:
        config: whose text is read and tokenised now, unless that was done before.
        epochs: how many, positive; the last batch is filled up from the next one.
        tokenizer: of the run.

    Raises:
        InputError: as `rows_an_epoch`.
    """
    rows = rows_an_epoch(config.data, tokenizer, config.train.seq_len)
    steps = max(1, math.ceil(epochs * rows / config.train.batch_size - 1e-9))
    total_tokens = steps * config.train.tokens_per_step
    train = dataclasses.replace(config.train, total_tokens=total_tokens)
    return dataclasses.replace(config, train=train)
