"""Times torch's products on a GPU, the peers of our kernels, one a line of stdin.

Runs in an interpreter that has torch (2.10 or later) and CUDA, imports nothing of dsjax. A request
is a line of JSON, {"what": ..., "sizes": [...], "calls": n}, and so is its answer: {"seconds": ...,
"error": ...}, or {"absent": why} where torch has no such product or the GPU none. Data are random,
each call of a round has inputs of its own, and a round is one CUDA graph, launched again and again.
Without CUDA it computes on the CPU, to test the script.
"""

import contextlib
import json
import statistics
import sys
import time

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    torch, MISSING = None, str(error)

TILE, LARGEST = 128, 448.0
REPEATS, LEAST_S = 9, 0.02


def main():
    """Answers until stdin ends."""
    # Libraries may print; the answers have stdout for themselves.
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = respond(request)
        except Exception as error:
            answer = {"absent": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), file=out, flush=True)


def respond(request):
    """A request's answer."""
    if torch is None:
        return {"absent": MISSING}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if request["what"] == "hello":
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        return {"torch": torch.__version__, "cuda": torch.version.cuda, "device": name}
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    make, call, check = PEERS[request["what"]]
    with torch.no_grad(), torch.device(device):
        inputs = [make(*request["sizes"]) for _ in range(request["calls"])]
        error = None if check is None else off_by(call(*inputs[0]), check(*inputs[0]))
        if error is not None and not error < 0.02:  # BF16 and FP8 sums; a wrong layout gives 1
            return {"wrong": f"off by {error:.2e}"}
        seconds = timed(call, inputs, device, request.get("smoke", False))
        if device == "cuda":
            del inputs
            torch.cuda.empty_cache()
    return {"error": error, "seconds": statistics.median(seconds)} | {
        "spread": (min(seconds), max(seconds)),
        "calls": request["calls"],
    }


def off_by(got, wanted):
    """Relative norm of a difference."""
    difference = torch.linalg.vector_norm(got.float() - wanted)
    return float(difference / torch.linalg.vector_norm(wanted))


def timed(call, inputs, device, smoke):
    """Seconds a call, of several repeats."""
    if device == "cpu":
        return [_clocked(lambda: [call(*x) for x in inputs]) / len(inputs) for _ in range(2)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries make their plans and workspaces outside the graph
        for arguments in inputs[:2]:
            call(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*arguments) for arguments in inputs]

    def run(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(rounds):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    run(2)
    rounds = max(2, round((0 if smoke else LEAST_S) / run(1)))
    seconds = [run(rounds) / (rounds * len(inputs)) for _ in range(2 if smoke else REPEATS)]
    del kept
    return seconds


def _clocked(work):
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


# ---- data ----------------------------------------------------------------------------------------


def normal(*shape):
    """Random BF16."""
    return torch.randn(*shape, dtype=torch.bfloat16)


def tiled(x, height):
    """FP8 in tiles of height x 128 along the last dimension, and their scales."""
    rows, cols = x.shape
    padded = F.pad(x.float(), (0, -cols % TILE, 0, -rows % height))
    parts = padded.view(padded.shape[0] // height, height, -1, TILE)
    scale = parts.abs().amax(dim=(1, 3)) / LARGEST
    q = (parts / scale[:, None, :, None]).reshape(padded.shape)[:rows, :cols]
    return q.to(torch.float8_e4m3fn).contiguous(), scale


def wide(q, scale):
    """What the FP8 numbers stand for, float32."""
    scale = scale.repeat_interleave(TILE, 1)[:, : q.shape[1]]
    if scale.shape[0] != q.shape[0]:
        scale = scale.repeat_interleave(TILE, 0)[: q.shape[0]]
    return q.float() * scale


def block_operands(m, n, k, height):
    """A [M, K] in tiles of 1x128 and B [N, K] in tiles of height x 128."""
    return *tiled(normal(m, k), 1), *tiled(normal(n, k), height)


def grouped(experts, rows):
    """Where each group of rows ends."""
    return torch.arange(1, experts + 1, dtype=torch.int32) * rows


# ---- products ------------------------------------------------------------------------------------


def block_scaled(a, a_scale, b, b_scale):
    """The product of cuBLASLt, float32 scales of 1x128 by 1x128 or by 128x128.

    It wants scales of 1x128 with the rows running fastest, those of 128x128 with K running fastest
    in a multiple of four.
    """
    recipe_a = F.ScalingType.BlockWise1x128
    if b_scale.shape[0] == b.shape[0]:
        recipe_b, out = F.ScalingType.BlockWise1x128, torch.float32
    else:
        recipe_b, out = F.ScalingType.BlockWise128x128, torch.bfloat16
    return F.scaled_mm(a, b.t(), a_scale, recipe_a, b_scale, recipe_b, output_dtype=out)


def block_layout(a, a_scale, b, b_scale):
    """The scales as `block_scaled` takes them; made before the clock runs."""
    a_scale = a_scale.t().contiguous().t()
    if b_scale.shape[0] == b.shape[0]:
        b_scale = b_scale.t().contiguous().t()
    else:
        b_scale = F.pad(b_scale, (0, -b_scale.shape[1] % 4)).contiguous().t()
    return a, a_scale, b, b_scale


def block_check(a, a_scale, b, b_scale):
    """The same in float32."""
    if b_scale.shape[0] != b.shape[0]:
        b_scale = b_scale.t()[:, : -(-b.shape[1] // TILE)]
    return wide(a, a_scale) @ wide(b, b_scale).t()


def per_tensor(a, b, one):
    """FP8 with a scale a tensor, sums in full precision."""
    return F.scaled_mm(
        *(a, b.t(), one, F.ScalingType.TensorWise, one, F.ScalingType.TensorWise),
        output_dtype=torch.bfloat16,
        use_fast_accum=False,
    )


def group_rows(x, w, ends):
    """[X, K] by [E, K, N], expert by expert in float32."""
    parts = torch.tensor_split(x.float(), ends[:-1].tolist())
    return torch.cat([part @ weight.float() for part, weight in zip(parts, w, strict=True)])


def group_sums(x, dy, ends):
    """[X, D]^T by [X, F] of each expert's rows, in float32."""
    cut = ends[:-1].tolist()
    pairs = zip(torch.tensor_split(x, cut), torch.tensor_split(dy, cut), strict=True)
    return torch.stack([a.float().t() @ b.float() for a, b in pairs])


def row_scaled(x):
    """FP8 with a scale a row."""
    scale = x.float().abs().amax(dim=-1, keepdim=True) / LARGEST
    return (x.float() / scale).to(torch.float8_e4m3fn), scale.squeeze(-1)


def grouped_fp8(experts, rows, k, n):
    """Rows, weights [E, N, K], their scales, and where groups end."""
    x, x_scale = row_scaled(normal(experts * rows, k))
    w, w_scale = row_scaled(normal(experts, n, k))
    return x, w, x_scale, w_scale, grouped(experts, rows)


def absorbed(b, s, n, t, c, r):
    """Queries of all heads over latents without pages; the values are the first C of them."""
    return normal(b, n, t, c + r), normal(b, 1, s, c + r), c


def absorbed_by_matmuls(q, latents, c):
    """Two products of cuBLAS and a softmax between them; all queries see all keys but the last."""
    b, n, t, z = q.shape
    scores = q.reshape(b, n * t, z) @ latents[:, 0].transpose(1, 2) * 0.1
    scores = scores.reshape(b, n, t, -1) + hidden(t, latents)
    weights = torch.softmax(scores.float(), dim=-1).to(q.dtype)
    return (weights.reshape(b, n * t, -1) @ latents[:, 0, :, :c]).reshape(b, n, t, c)


def hidden(t, latents):
    """Minus infinity where a key comes after the query."""
    s = latents.shape[2]
    late = torch.arange(s)[None] > torch.arange(s - t, s)[:, None]
    return torch.zeros(t, s, dtype=latents.dtype).masked_fill(late, -torch.inf)


def absorbed_by_sdpa(q, latents, c):
    """Whichever kernel torch takes for keys of 576 and values of 512."""
    keys = latents.expand(-1, q.shape[1], -1, -1)
    mask = hidden(q.shape[2], latents) if q.shape[2] > 1 else None
    return F.scaled_dot_product_attention(q, keys, keys[..., :c], mask, scale=0.1)


def absorbed_check(q, latents, c):
    """The same in float32."""
    return absorbed_by_matmuls(q.float(), latents.float(), c)


def sequences(b, s, n, a, h, documents):
    """Queries, keys, values and the gradient of the result, heads first; one document a row."""
    assert documents == 1
    return normal(b, n, s, a), normal(b, n, s, a), normal(b, n, s, h), normal(b, n, s, h)


def attention(backend):
    """Causal attention by one of torch's kernels."""

    def call(q, k, v, d_out):
        del d_out
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.07)

    return call


def attention_both(backend):
    """And its gradients."""
    forward = attention(backend)

    def call(q, k, v, d_out):
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            return torch.autograd.grad(forward(q, k, v, d_out), (q, k, v), d_out)

    return call


def attention_peers():
    """By their names; none where torch is too old to choose."""
    if torch is None:
        return {}
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "its choice": None,
    }
    found = {}
    for name, backend in kernels.items():
        found[f"attention by {name}"] = (sequences, attention(backend), None)
        found[f"attention by {name}, both passes"] = (sequences, attention_both(backend), None)
    return found


# what is asked: (sizes to arguments, arguments to the result, arguments to the float32 result)
PEERS = {
    "copy": (lambda count: (normal(count // 2),), lambda x: x.clone(), None),
    "bf16": (
        lambda m, n, k: (normal(m, k), normal(n, k)),
        lambda a, b: a @ b.t(),
        lambda a, b: a.float() @ b.float().t(),
    ),
    "fp8 per tensor": (
        lambda m, n, k: (
            normal(m, k).to(torch.float8_e4m3fn),
            normal(n, k).to(torch.float8_e4m3fn),
            torch.ones((), dtype=torch.float32),
        ),
        per_tensor,
        lambda a, b, one: a.float() @ b.float().t(),
    ),
    "1x128 by 128x128": (
        lambda m, n, k: block_layout(*block_operands(m, n, k, TILE)),
        block_scaled,
        block_check,
    ),
    "1x128 by 1x128": (
        lambda m, n, k: block_layout(*block_operands(m, n, k, 1)),
        block_scaled,
        block_check,
    ),
    "grouped product": (
        lambda e, rows, d, f: (normal(e * rows, d), normal(e, d, f), grouped(e, rows)),
        lambda x, w, ends: torch._grouped_mm(x, w, offs=ends),
        group_rows,
    ),
    "grouped product, transposed": (
        lambda e, rows, d, f: (normal(e * rows, f), normal(e, d, f), grouped(e, rows)),
        lambda x, w, ends: torch._grouped_mm(x, w.transpose(1, 2), offs=ends),
        lambda x, w, ends: group_rows(x, w.transpose(1, 2), ends),
    ),
    "grouped weight gradient": (
        lambda e, rows, d, f: (normal(e * rows, d), normal(e * rows, f), grouped(e, rows)),
        lambda x, dy, ends: torch._grouped_mm(x.t(), dy, offs=ends),
        group_sums,
    ),
    "grouped fp8 product, a scale a row": (
        grouped_fp8,
        lambda x, w, x_scale, w_scale, ends: torch._scaled_grouped_mm(
            *(x, w.transpose(1, 2), x_scale, w_scale), offs=ends, out_dtype=torch.bfloat16
        ),
        lambda x, w, x_scale, w_scale, ends: group_rows(
            x.float() * x_scale[:, None], (w.float() * w_scale[..., None]).transpose(1, 2), ends
        ),
    ),
    "absorbed attention by matmuls": (absorbed, absorbed_by_matmuls, absorbed_check),
    "absorbed attention by SDPA": (absorbed, absorbed_by_sdpa, absorbed_check),
    **attention_peers(),
}


if __name__ == "__main__":
    main()
