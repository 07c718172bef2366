"""Floating-point operations of a training step, by part of the model.

Knows nothing about devices. A multiplication and an addition count as two; norms, softmax, rope and
other elementwise work do not count, as is usual for a share of peak.
"""

from collections import Counter

from dsjax.config import BlockConfig, Config, MlaConfig, MoeConfig


def _attention(config: MlaConfig, embed_dim: int, seq_len: int) -> dict[str, int]:
    """Forward operations a token; scores count the causal half of the positions."""
    n, a, z = config.num_heads, config.head_dim, config.cache_dim
    queries = embed_dim * n * a
    if config.q_latent_dim is not None:
        queries = embed_dim * config.q_latent_dim + config.q_latent_dim * n * a
    latent = embed_dim * z + config.kv_latent_dim * n * (config.nope_dim + config.value_dim)
    out = n * config.value_dim * embed_dim
    scores = seq_len / 2 * n * (a + config.value_dim)
    return {"attention": 2 * (queries + latent + out) + int(2 * scores)}


def _ffn(block: BlockConfig, embed_dim: int) -> dict[str, int]:
    if not isinstance(block.ffn, MoeConfig):
        return {"dense_ffn": 2 * 3 * embed_dim * block.ffn.hidden_dim}
    one = 2 * 3 * embed_dim * block.ffn.expert_dim
    return {
        "experts": block.ffn.num_experts_per_token * one,
        "dense_ffn": block.ffn.num_shared_experts * one,
        "router": 2 * embed_dim * block.ffn.num_experts,
    }


def train_flops_per_token(config: Config) -> dict[str, int]:
    """Operations a token of a forward and a backward pass, by part.

    The backward pass counts as two forward passes. What is recomputed (attention's scores, remat)
    is not counted: a share of peak says how much of it went into the model's mathematics.

    Returns:
        {"attention", "experts", "dense_ffn", "router", "head", "mtp_projection"} -> operations;
        parts that the model does not have are left out.
    """
    model, seq_len = config.model, config.train.seq_len
    head = 2 * model.embed_dim * model.vocab_size
    total: Counter[str] = Counter({"head": head})
    blocks = [(block, stack.repeats) for stack in model.stacks for block in stack.blocks]
    if model.mtp is not None:
        blocks.append((model.mtp.block, model.mtp.depth))
        total["head"] += head * model.mtp.depth
        total["mtp_projection"] += 2 * 2 * model.embed_dim**2 * model.mtp.depth
    for block, repeats in blocks:
        attention = _attention(block.attention, model.embed_dim, seq_len)
        for part, flops in (attention | _ffn(block, model.embed_dim)).items():
            total[part] += flops * repeats
    return {part: 3 * flops for part, flops in total.items()}
