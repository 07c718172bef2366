"""AdamW with global-norm clipping, and V3's schedules over the fraction of tokens seen.

Source: V3 section 4.2; Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2.
"""

import math

import numpy as np

# Of 14.8T tokens (V3 section 4.2).
CONSTANT_UNTIL = 10.0 / 14.8
COSINE_UNTIL = 14.3 / 14.8
MIDDLE_UNTIL = 14.633 / 14.8


def clip_by_global_norm(grads, clip_norm):
    """Scales all gradients by clip / norm where the norm of all together is above `clip_norm`.

    Source: Pascanu et al. 2013 (arXiv 1211.5063), algorithm 1; V3 section 4.2 (1.0).

    Returns:
        (grads, norm before clipping).
    """
    norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in grads.values()))
    factor = clip_norm / norm if norm > clip_norm else 1.0
    return {name: np.asarray(g, np.float64) * factor for name, g in grads.items()}, norm


def adamw_step(
    params,
    grads,
    first,
    second,
    step,
    *,
    learning_rate,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    decayed=None,
):
    """One step: clip, moments, bias correction, decoupled decay times the learning rate.

    Source: Loshchilov and Hutter 2019, algorithm 2; coefficients from V3 section 4.2.

    Args:
        params: flat dict of arrays; grads, first and second moments alike.
        grads: before clipping.
        first: first moments, zeros before step 1.
        second: second moments, zeros before step 1.
        step: counts from 1.
        learning_rate: this step's.
        beta1: of the first moment.
        beta2: of the second moment.
        eps: added after the square root.
        weight_decay: times learning_rate times the parameter before the step.
        clip_norm: global norm.
        decayed: names that decay; None for all.

    Returns:
        (params, first, second, gradient norm before clipping), all new.
    """
    grads, norm = clip_by_global_norm(grads, clip_norm)
    new_params, new_first, new_second = {}, {}, {}
    for name, g in grads.items():
        m = beta1 * first[name] + (1.0 - beta1) * g
        v = beta2 * second[name] + (1.0 - beta2) * g * g
        m_hat = m / (1.0 - beta1**step)
        v_hat = v / (1.0 - beta2**step)
        p = np.asarray(params[name], np.float64)
        decay = weight_decay if decayed is None or name in decayed else 0.0
        new_params[name] = p - learning_rate * (m_hat / (np.sqrt(v_hat) + eps) + decay * p)
        new_first[name], new_second[name] = m, v
    return new_params, new_first, new_second, norm


def v3_learning_rate(progress, *, warmup, peak=2.2e-4, middle=2.2e-5, final=7.3e-6):
    """V3's five phases: linear warm-up, constant, cosine, constant, lower constant.

    Source: V3 section 4.2. A border belongs to the phase that begins there.

    Args:
        progress: fraction of the 14.8T tokens seen, in [0, 1].
        warmup: fraction at which 2,000 steps end (the report gives steps only).
        peak: after warm-up, until 10T tokens.
        middle: reached by a cosine over 4.3T tokens, held for 333B.
        final: for the last 167B.
    """
    if progress < warmup:
        return peak * progress / warmup
    if progress < CONSTANT_UNTIL:
        return peak
    if progress < COSINE_UNTIL:
        done = (progress - CONSTANT_UNTIL) / (COSINE_UNTIL - CONSTANT_UNTIL)
        return middle + (peak - middle) * 0.5 * (1.0 + math.cos(math.pi * done))
    if progress < MIDDLE_UNTIL:
        return middle
    return final


def v3_mtp_weight(progress):
    """Lambda: 0.3 for the first 10T tokens, then 0.1. Source: V3 section 4.2."""
    return 0.3 if progress < CONSTANT_UNTIL else 0.1


def v3_bias_speed(progress):
    """Gamma: 0.001 for the first 14.3T tokens, then 0. Source: V3 section 4.2."""
    return 1e-3 if progress < COSINE_UNTIL else 0.0
