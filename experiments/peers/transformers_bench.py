"""Times transformers' DeepSeek-V3 on the shape `v3_20m`, the tuned peer of our CPU benchmarks.

Runs in the oracle interpreter, imports nothing of dsjax. JSON goes to stdout, progress to stderr.

    transformers_bench.py --mode=train                                the best known variant
    transformers_bench.py --mode=train --variant='{"threads": 1}'     the same with changes
    transformers_bench.py --mode=train --sweep                        search for the best one
    transformers_bench.py --mode=train --interactive                  an iteration a line of stdin

A process is one variant, because thread pools and allocators read the environment once: a variant
that asks for another environment executes this file again in it. `--interactive` lets a benchmark
alternate iterations with another process while both are warm and the one not measured is idle.

Work done: `train` is forward, backward, clipping at 1.0 and AdamW on 8 x 512 tokens, with a target
at each of them. It has no balance loss, no bias update and no MTP: the peer does less than our
step. `forward` computes the logits of 8 x 512 tokens. `generate` is greedy, 4 x (64 prompt + 64
new), end of text off.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

MODES = ("train", "forward", "generate")
BATCH, LENGTH = 8, 512
PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 4, 64, 64
TOKENS = {
    "train": BATCH * LENGTH,
    "forward": BATCH * LENGTH,
    "generate": PROMPTS * NEW_TOKENS,
}
V3_20M = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}

# transformers 5.23's other two, deepgemm and sonicmoe, are CUDA kernels.
EXPERTS = ("eager", "grouped_mm", "batched_mm")
ATTENTION = ("sdpa", "eager")
THREADS = (1, 2)
# glibc returns large blocks to the kernel at once, and their pages come back one fault at a time.
# "kept" keeps them; "huge" asks for huge pages besides.
ALLOCATORS = {
    "default": {},
    "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"},
    "huge": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    },
}
WAITING = {"default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}}
OPTIMIZERS = ("fused", "foreach")
# "loop" is a greedy loop of our own over the model and a DynamicCache, without `generate`.
CACHES = ("dynamic", "static", "loop")

START = {
    "experts": "grouped_mm",
    "attention": "sdpa",
    "threads": 2,
    "waiting": "passive",
    "allocator": "kept",
    "optimizer": "fused",
    "cache": "dynamic",
    "compile": False,
}
# Of two AMD EPYC cores (AVX-512), shared, noisy. `forward` and `generate` won the final of a sweep
# that compiled its leader alone; `train` led one that was cut short, with grouped_mm under eager
# attention on two threads, and every optimizer, waiting and allocator but START's, untried.
VARIANTS = {
    "train": START | {"compile": True},
    "forward": START | {"attention": "eager", "compile": True},
    "generate": START | {"threads": 1, "cache": "static", "compile": True},
}
CHOICES = {
    "experts": EXPERTS,
    "attention": ATTENTION,
    "threads": None,
    "waiting": tuple(WAITING),
    "allocator": tuple(ALLOCATORS),
    "optimizer": OPTIMIZERS,
    "cache": CACHES,
    "compile": (False, True),
}
RELEVANT = {"train": ("optimizer",), "forward": (), "generate": ("cache",)}
# Above this a variant fails by itself, rather than pushing others' processes out of memory.
ADDRESS_SPACE = 16 * 2**30
FINALISTS = 4
# An iteration is quiet if other processes took at most so many cores. A process waits for quiet up
# to PATIENCE_S in all, and a sweep starts a variant again, up to TRIES times, until it has two
# quiet iterations: two threads lose far more to a neighbour than a single one does.
QUIET = 0.15
PATIENCE_S = 20
TRIES = 2


# --- one variant, in this process -----------------------------------------------------------------


def environment(variant):
    """The variables that this variant has to be started with."""
    return {
        **WAITING[variant["waiting"]],
        **ALLOCATORS[variant["allocator"]],
        "OMP_NUM_THREADS": str(variant["threads"]),
    }


def in_own_environment(variant):
    """Executes this file again if the process was started with other variables."""
    wanted = environment(variant)
    tuned = {key for table in (WAITING, ALLOCATORS) for env in table.values() for key in env}
    unwanted = {key for key in tuned if key in os.environ and key not in wanted}
    if unwanted or any(os.environ.get(key) != value for key, value in wanted.items()):
        env = {k: v for k, v in os.environ.items() if k not in unwanted} | wanted
        os.execve(sys.executable, [sys.executable, *sys.argv], env)


def make_iteration(mode, variant):
    """Builds model and inputs; returns a function of one iteration, whose value is a check."""
    import torch
    import transformers

    torch.set_num_threads(variant["threads"])
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**V3_20M)
    model = transformers.DeepseekV3ForCausalLM._from_config(
        config,
        dtype=torch.float32,
        attn_implementation=variant["attention"],
        experts_implementation=variant["experts"],
    )
    ids = torch.randint(0, config.vocab_size, (BATCH, LENGTH + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    call = torch.compile(model) if variant["compile"] and mode != "generate" else model

    if mode == "train":
        model.train()
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=1e-4,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            **{variant["optimizer"]: True},
        )

        def iteration():
            # `shift_labels`, for by itself the loss drops the last position's target.
            loss = call(inputs, labels=targets, shift_labels=targets, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())

    elif mode == "forward":
        model.eval()

        def iteration():
            with torch.inference_mode():
                return float(call(inputs, use_cache=False).logits[:, -1].norm())

    else:
        model.eval()
        prompt = ids[:PROMPTS, :PROMPT_LENGTH].contiguous()
        generate = greedy_loop if variant["cache"] == "loop" else library_generate
        # Under the static cache generate compiles its decode step by itself; `compile` lets it.
        options = {"static": variant["cache"] == "static", "compiled": variant["compile"]}

        def iteration():
            out = generate(torch, transformers, model, prompt, **options)
            if tuple(out.shape) != (PROMPTS, PROMPT_LENGTH + NEW_TOKENS):
                raise RuntimeError(f"generated {tuple(out.shape)}")
            return int((out * torch.arange(1, out.shape[1] + 1)).sum())

    return iteration


def library_generate(torch, transformers, model, prompt, *, static, compiled):
    """`model.generate`, greedy, exactly NEW_TOKENS."""
    options = {"disable_compile": True}
    if compiled:
        compile_config = transformers.CompileConfig(fullgraph=False)
        compile_config._compile_all_devices = True  # by itself it compiles on accelerators alone
        options = {"compile_config": compile_config}
    model.generation_config.eos_token_id = None
    with contextlib.nullcontext() if compiled else torch.inference_mode():
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation="static" if static else None,
            **options,
        )


def greedy_loop(torch, transformers, model, prompt, **_):
    """The same tokens without generate's bookkeeping."""
    with torch.inference_mode():
        cache = transformers.DynamicCache(config=model.config)
        tokens, fed = [prompt], prompt
        for _step in range(NEW_TOKENS):
            out = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            fed = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(fed)
        return torch.cat(tokens, 1)


def run_variant(mode, variant, *, repeats, interactive):
    """Times one variant here; prints its JSON, or in interactive mode a JSON line an iteration."""
    in_own_environment(variant)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, resource.RLIM_INFINITY))
    iteration = make_iteration(mode, variant)
    started = time.perf_counter()
    check = iteration()  # the first's value: parameters are the same ones in every variant
    first_s = time.perf_counter() - started
    iteration()
    result = {"mode": mode, "variant": variant, "check": check, "first_s": first_s}
    if interactive:
        print(json.dumps(result | {"ready": True}), flush=True)
        for _line in sys.stdin:
            seconds, others = timed(iteration)
            print(json.dumps({"seconds": seconds, "others": others}), flush=True)
        return
    pairs, patience_s = [], PATIENCE_S
    for _ in range(repeats):
        patience_s -= wait_for_quiet(patience_s)
        pairs.append(timed(iteration))
    print(json.dumps(result | summary(mode, pairs)))


def timed(iteration):
    """Wall seconds of one iteration, and how many cores other processes kept busy meanwhile."""
    busy, own, started = busy_cpu_s(), time.process_time(), time.perf_counter()
    iteration()  # it returns a Python number, so all of it is done
    seconds = time.perf_counter() - started
    others = busy_cpu_s() - busy - (time.process_time() - own)
    return seconds, round(max(others, 0.0) / seconds, 2)


def wait_for_quiet(limit_s):
    """Sleeps until other processes leave the cores alone; returns the seconds waited."""
    started = time.perf_counter()
    while (waited := time.perf_counter() - started) < limit_s:
        _, others = timed(lambda: time.sleep(0.4))
        if others <= QUIET:
            break
    return waited


def busy_cpu_s():
    """CPU seconds that this machine has worked for anyone, or its host took away."""
    with open("/proc/stat") as lines:
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, next(lines).split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def summary(mode, pairs):
    """Seconds of all iterations and of the quiet ones, and tokens a second at the quiet median."""
    seconds = [s for s, _ in pairs]
    quiet = [s for s, others in pairs if others <= QUIET]
    # Contention only ever adds: without a quiet iteration, the least disturbed one is the estimate.
    quiet_s = statistics.median(quiet) if quiet else min(seconds)
    return {
        "pairs": pairs,
        "quiet": len(quiet),
        "quiet_s": quiet_s,
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "others": statistics.median(others for _, others in pairs),
        "tokens_per_s": TOKENS[mode] / quiet_s,
    }


# --- the sweep ------------------------------------------------------------------------------------


def spawn(mode, variant, repeats, timeout_s):
    """One variant in processes of its own, until quiet: its JSON, or an "error"."""
    command = [sys.executable, os.path.abspath(__file__), f"--mode={mode}"]
    command += [f"--repeats={repeats}", f"--variant={json.dumps(variant)}"]
    pairs = []
    for _try in range(TRIES):
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            return {"mode": mode, "variant": variant, "error": f"over {timeout_s} s"}
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            told = [line for line in lines if "Error" in line] or lines or ["no message"]
            error = f"exit {done.returncode}: {told[-1][:300]}"
            return {"mode": mode, "variant": variant, "error": error}
        result = json.loads(done.stdout.splitlines()[-1])
        pairs += result["pairs"]
        if summary(mode, pairs)["quiet"] >= min(2, repeats):
            break
    return result | summary(mode, pairs)


def gathered_bytes(mode):
    """What batched_mm gathers: a copy of an expert's weights for each of a token's experts."""
    one = 3 * V3_20M["hidden_size"] * V3_20M["moe_intermediate_size"] * 4
    layers = V3_20M["num_hidden_layers"] - V3_20M["first_k_dense_replace"]
    tokens = PROMPTS * PROMPT_LENGTH if mode == "generate" else BATCH * LENGTH
    return tokens * V3_20M["num_experts_per_tok"] * one * (layers if mode == "train" else 1)


def sweep(mode, *, repeats, rounds, timeout_s):
    """Grid of the choices that interact, then each other one from the best, then a final."""
    results = []

    def attempt(variant):
        if any(r["variant"] == variant for r in results):
            return
        needed = gathered_bytes(mode)
        if variant["experts"] == "batched_mm" and needed > ADDRESS_SPACE / 2:
            error = f"not run: would gather {needed / 2**30:.0f} GiB of expert weights"
            results.append({"mode": mode, "variant": variant, "error": error})
        else:
            results.append(spawn(mode, variant, repeats, timeout_s))
        report(results[-1])

    compiled = {"compile": True} | ({"cache": "static"} if mode == "generate" else {})
    for experts, attention, threads in itertools.product(EXPERTS, ATTENTION, THREADS):
        variant = START | {"experts": experts, "attention": attention, "threads": threads}
        if experts != "batched_mm" or attention == "sdpa":  # slow whatever the attention
            attempt(variant)
        if experts == "grouped_mm":
            attempt(variant | compiled)
    attempt(START | compiled | {"experts": "eager"})
    for key in (*RELEVANT[mode], "waiting", "allocator"):
        for value in CHOICES[key]:
            if not (key == "cache" and best(results)["variant"]["compile"]):
                attempt(best(results)["variant"] | {key: value})
    attempt(best(results)["variant"] | {"waiting": "default", "allocator": "default"})

    # A final in rounds: what was measured minutes apart on a shared machine is not comparable.
    good = sorted((r for r in results if "error" not in r), key=lambda r: r["quiet_s"])[:FINALISTS]
    pairs = [[] for _ in good]
    for _round in range(rounds):
        for place, finalist in enumerate(good):
            again = spawn(mode, finalist["variant"], repeats, timeout_s)
            report(again)
            pairs[place] += again.get("pairs", [])
    final = [
        {"variant": r["variant"]} | summary(mode, p) for r, p in zip(good, pairs, strict=True) if p
    ]
    winner = best(final or good)
    checks = [r["check"] for r in results if "check" in r]
    return {
        "mode": mode,
        "tokens": TOKENS[mode],
        "best": {k: v for k, v in winner.items() if k not in ("pairs", "check", "first_s")},
        # Relative: the same loss, logits or tokens from every variant, or they are not alternatives
        "check_spread": (max(checks) - min(checks)) / abs(max(checks)),
        "final": final,
        "variants": results,
    }


def best(results):
    """The fastest so far."""
    return min((r for r in results if "error" not in r), key=lambda r: r["quiet_s"])


def report(result):
    """A line on stderr."""
    other = {k for keys in RELEVANT.values() for k in keys} - set(RELEVANT[result["mode"]])
    label = " ".join(f"{k}={v}" for k, v in result["variant"].items() if k not in other)
    text = result.get("error") or (
        f"{result['quiet_s']:.3f} s ({result['quiet']} of {len(result['pairs'])} quiet,"
        f" median {result['median_s']:.3f}, min {result['min_s']:.3f},"
        f" first {result['first_s']:.1f})"
    )
    print(f"{result['mode']}: {label}: {text}", file=sys.stderr, flush=True)


def machine():
    """What the timings depend on besides this file."""
    from importlib.metadata import version

    name = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def parse_variant(text, mode):
    """The mode's best known variant with the given changes."""
    changes = json.loads(text) if text else {}
    for key, value in changes.items():
        if key not in CHOICES:
            raise ValueError(f"unknown choice {key!r}; there are {', '.join(CHOICES)}")
        if CHOICES[key] is not None and value not in CHOICES[key]:
            raise ValueError(f"{key} is one of {CHOICES[key]}, not {value!r}")
    return VARIANTS[mode] | changes


def main(argv=None):
    """Runs one variant, or the sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=MODES, default="train")
    parser.add_argument("--variant", help="JSON object of changes to the mode's best known variant")
    parser.add_argument("--repeats", type=int, default=5, help="timed iterations of a process")
    parser.add_argument("--interactive", action="store_true", help="one iteration a line of stdin")
    parser.add_argument("--sweep", action="store_true", help="search for the best variant")
    parser.add_argument("--rounds", type=int, default=3, help="of the sweep's final")
    parser.add_argument("--timeout_s", type=int, default=300, help="of one variant of the sweep")
    args = parser.parse_args(argv)
    if args.sweep:
        before = machine()
        found = sweep(args.mode, repeats=args.repeats, rounds=args.rounds, timeout_s=args.timeout_s)
        load = {"load_average_after": os.getloadavg()}
        print(json.dumps({"machine": before | load} | found, indent=1))
        return
    variant = parse_variant(args.variant, args.mode)
    run_variant(args.mode, variant, repeats=args.repeats, interactive=args.interactive)


if __name__ == "__main__":
    main()
