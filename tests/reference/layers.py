"""RMSNorm, SwiGLU, softmax and cross entropy, one vector at a time; knows nothing of sequences."""

import numpy as np


def rms_norm(x_D, scale_D, eps):
    """x / sqrt(mean(x^2) + eps) * scale over the last dim of `x_D`, any leading dims.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467), eq. 4; eps as in the published code.
    """
    x_D = np.asarray(x_D, np.float64)
    mean_square = np.mean(x_D * x_D, axis=-1, keepdims=True)
    return x_D / np.sqrt(mean_square + eps) * np.asarray(scale_D, np.float64)


def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    x = np.asarray(x, np.float64)
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0 / (1.0 + small), small / (1.0 + small))


def softmax(x_V):
    """exp(x) / sum exp(x) of one vector."""
    weight_V = np.exp(x_V - np.max(x_V))
    return weight_V / np.sum(weight_V)


def log_sum_exp(x_V):
    """log(sum(exp(x))) of one vector."""
    top = np.max(x_V)
    return top + np.log(np.sum(np.exp(x_V - top)))


def cross_entropy(logits_V, target):
    """-log softmax(logits)[target], in nats."""
    return log_sum_exp(logits_V) - logits_V[target]


def swiglu(x_D, w_in_D2F, w_down_FD):
    """(silu(x W_gate) * (x W_up)) W_down of one vector; gate in the first F columns.

    Source: Shazeer 2020 (arXiv 2002.05202), eq. 6; the FFN of V3 section 2.1.
    """
    hidden_dim = w_down_FD.shape[0]
    both_2F = x_D @ w_in_D2F
    gate_F, up_F = both_2F[:hidden_dim], both_2F[hidden_dim:]
    return (gate_F * sigmoid(gate_F) * up_F) @ w_down_FD
