"""What a training step asks for, and what a device has: operations, their peak rate, memory.

Knows nothing about arrays or time. A multiplication and an addition count as two; norms, softmax,
rope and other elementwise work do not count, as is usual for a share of peak.
"""

import resource
import statistics
import sys
import time
from collections import Counter

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsjax.config import AttentionConfig, BlockConfig, Config, MlaConfig, MoeConfig

# Start of `device_kind` -> dense TFLOP/s a device for (bfloat16, float32), None where the device
# has no such unit; the first that fits. float32 is what XLA runs by default: TF32 on NVIDIA's
# tensor cores from Ampere on, one bfloat16 pass on a TPU. NVIDIA's data sheets give twice the dense
# figure where they say "with sparsity".
_PEAK_TFLOPS = (
    ("NVIDIA H200 NVL", 835.5, 417.5),  # H200 data sheet, nvidia.com/data-center/h200
    ("NVIDIA H200", 989.5, 494.5),
    ("NVIDIA GH200", 989.5, 494.5),  # its GPU is an H100 SXM or H200
    ("NVIDIA H100 PCIe", 756.0, 378.0),  # H100 data sheet, nvidia.com/data-center/h100
    ("NVIDIA H100 NVL", 835.5, 417.5),
    ("NVIDIA H100", 989.5, 494.5),  # SXM: "NVIDIA H100 80GB HBM3"
    ("NVIDIA A100", 312.0, 156.0),  # A100 data sheet; SXM and PCIe alike
    ("NVIDIA L4", 121.0, 60.0),  # L4 data sheet, nvidia.com/data-center/l4
    ("Tesla T4", None, 8.1),  # T4 data sheet; Turing has tensor cores for float16 only
    ("TPU v4", 275.0, 275.0),  # docs.cloud.google.com/tpu/docs/v4; likewise v5e, v5p, v6e, tpu7x
    ("TPU v5 lite", 197.0, 197.0),  # v5e
    ("TPU v5e", 197.0, 197.0),
    ("TPU v5", 459.0, 459.0),  # v5p
    ("TPU v5p", 459.0, 459.0),
    ("TPU v6 lite", 918.0, 918.0),  # v6e
    ("TPU v6e", 918.0, 918.0),
    ("TPU7x", 1153.5, 1153.5),  # 2,307 a chip, which JAX shows as two devices
)


def _attention(config: AttentionConfig, embed_dim: int, seq_len: int) -> dict[str, int]:
    """Forward operations a token; scores count the causal half of the positions."""
    n, a, h = config.num_heads, config.head_dim, config.value_dim
    queries = embed_dim * n * a
    if isinstance(config, MlaConfig):
        if config.q_latent_dim is not None:
            queries = embed_dim * config.q_latent_dim + config.q_latent_dim * n * a
        keys = embed_dim * config.cache_dim + config.kv_latent_dim * n * (config.nope_dim + h)
    else:
        keys = embed_dim * config.num_kv_heads * (a + h)
    out = n * h * embed_dim
    scores = seq_len / 2 * n * (a + h)
    return {"attention": 2 * (queries + keys + out) + int(2 * scores)}


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


def peak_flops_per_s(device: jax.Device, dtype: DTypeLike) -> float:
    """Dense operations a second that a device can do in contractions of a dtype.

    Published for known accelerators; otherwise (a CPU, an unknown GPU) measured with a square
    matrix product, which takes under half a second on two cores.

    Args:
        device: one device; the caller multiplies by how many there are. CPU devices made with
            `jax_num_cpu_devices` share the same cores: count them as one.
        dtype: that of the contractions.
    """
    dtype = jnp.dtype(dtype)
    published = _published_flops_per_s(device.device_kind, dtype)
    return published or _measured_flops_per_s(device, dtype)


def _published_flops_per_s(device_kind: str, dtype: jnp.dtype) -> float | None:
    for kind, bfloat16, float32 in _PEAK_TFLOPS:
        # Whole words: an L40 is no L4.
        if device_kind == kind or device_kind.startswith((f"{kind} ", f"{kind}-")):
            tflops = {"bfloat16": bfloat16, "float32": float32}.get(dtype.name)
            return None if tflops is None else tflops * 1e12
    return None


def _measured_flops_per_s(device: jax.Device, dtype: jnp.dtype) -> float:
    size = 1024 if device.platform == "cpu" else 8192
    a_DD = jax.device_put(jnp.ones((size, size), dtype), device)
    multiply = jax.jit(jnp.matmul)
    multiply(a_DD, a_DD).block_until_ready()  # compiles
    seconds = []
    while len(seconds) < 3 or (len(seconds) < 25 and sum(seconds) < 0.15):
        start = time.perf_counter()
        multiply(a_DD, a_DD).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def memory_bytes(device: jax.Device | None = None) -> int:
    """The most that was ever in use: of an accelerator's memory, else resident in the process.

    Args:
        device: the first one, if left out.
    """
    stats = (device or jax.local_devices()[0]).memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # kibibytes on Linux
