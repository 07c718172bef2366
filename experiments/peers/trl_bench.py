"""A GRPO step of TRL with transformers' generation, the tuned peer of `experiments.bench_grpo`.

Runs in the oracle interpreter, imports nothing of dsjax. JSON goes to stdout, progress to stderr.

    trl_bench.py --model=DIR --shape='{"prompts": 8, ...}'             the best known variant, timed
    trl_bench.py ... --variant='{"threads": 1}'                        the same with changes
    trl_bench.py ... --sweep                                           search for the best one
    trl_bench.py ... --interactive                                     a step a line of stdin

A step is `GRPOTrainer`'s own, from its prompts to the optimizer: generate, decode, reward, forward,
backward, clipping, AdamW. It is on-policy, without a reference; nothing is logged or saved.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from transformers_bench import ADDRESS_SPACE, ALLOCATORS, WAITING, in_own_environment

CHOICES = {
    "experts": ("grouped_mm", "eager", "batched_mm"),
    "attention": ("sdpa", "eager"),
    "threads": (1, 2),
    "waiting": tuple(WAITING),
    "allocator": tuple(ALLOCATORS),
    "optimizer": ("adamw_torch_fused", "adamw_torch"),
    # "compiled" is the static cache with generate's decode step compiled; "paged" is transformers'
    # continuous batching.
    "cache": ("dynamic", "static", "compiled", "paged"),
    "compile": (False, True),  # of the train step
    "micro_batch": (64, 32, 16),  # sequences a forward and backward
}
BEST = {
    "experts": "grouped_mm",
    "attention": "sdpa",
    "threads": 2,
    "waiting": "passive",
    "allocator": "kept",
    "optimizer": "adamw_torch_fused",
    "cache": "compiled",
    "compile": False,
    "micro_batch": 64,
}
WARM_STEPS = 2


def small_share(text):
    """The reward: which part of the tokens, written as numbers, lies in the lower half."""
    numbers = [int(word) for word in text.split()]
    return sum(number < 2048 for number in numbers) / max(len(numbers), 1)


def tokenizer_of_numbers(vocab_size):
    """Token i is written i. The one that ends a text is none of the model's: it is never drawn."""
    import tokenizers
    import transformers

    words = {str(i): i for i in range(vocab_size)} | {"<end>": vocab_size}
    model = tokenizers.models.WordLevel(words, unk_token="0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    )


def make_trainer(folder, shape, variant, output):
    """The trainer; it takes steps without end."""
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(variant["threads"])
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=variant["attention"],
        experts_implementation=variant["experts"],
    )
    model.generation_config.eos_token_id = None
    tokenizer = tokenizer_of_numbers(model.config.vocab_size)
    draw = random.Random(0)
    prompts = [
        " ".join(str(draw.randrange(model.config.vocab_size)) for _ in range(shape["prompt"]))
        for _ in range(64 * shape["prompts"])
    ]
    sequences = shape["prompts"] * shape["group"]
    micro = min(variant["micro_batch"], sequences)
    config = trl.GRPOConfig(
        output_dir=output,
        num_generations=shape["group"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=sequences // micro,
        max_completion_length=shape["new"],
        num_iterations=1,
        beta=0.0,
        temperature=1.0,
        loss_type="grpo",
        scale_rewards="group",
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        optim=variant["optimizer"],
        max_steps=10**6,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        torch_compile=variant["compile"],
        use_transformers_continuous_batching=variant["cache"] == "paged",
        cache_implementation="static" if variant["cache"] in ("static", "compiled") else None,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
    )

    def reward(completions, **_):
        return [small_share(text) for text in completions]

    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    if variant["cache"] == "compiled":
        compiling = transformers.CompileConfig(fullgraph=False)
        compiling._compile_all_devices = True  # by itself it compiles on accelerators alone
        trainer.generation_config.disable_compile = False
        trainer.generation_config.compile_config = compiling
    return trainer


def take_steps(trainer, steps, on_step):
    """Takes a step whenever `steps` yields; returns when it is exhausted.

    Args:
        trainer: of `make_trainer`.
        steps: an iterator, asked before each step.
        on_step: called with the seconds of each step, and those of generation among them.
    """
    import transformers

    generate, spent_s = trainer._generate, [0.0]

    def timed_generate(*arguments):
        began = time.perf_counter()
        found = generate(*arguments)
        spent_s[0] += time.perf_counter() - began
        return found

    trainer._generate = timed_generate

    class Paced(transformers.TrainerCallback):
        began = 0.0

        def on_step_begin(self, args, state, control, **_):
            if next(steps, None) is None:
                raise _EndedError
            spent_s[0], self.began = 0.0, time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            on_step(time.perf_counter() - self.began, spent_s[0])

    trainer.add_callback(Paced())
    with contextlib.suppress(_EndedError):
        trainer.train()


class _EndedError(Exception):
    """No more steps are wanted; the trainer itself ends only after one more."""


def run_variant(args, variant):
    """Times one variant here: a JSON line when it is warm, then one a step or one of all."""
    in_own_environment(variant)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, resource.RLIM_INFINITY))
    told, done = sys.stdout, []
    sys.stdout = sys.stderr  # what the trainer prints is no JSON

    def tell(value):
        print(json.dumps(value), file=told, flush=True)

    def steps():
        yield from range(WARM_STEPS)
        if args.interactive:
            tell({"variant": variant, "ready": True})
            yield from (0 for _ in sys.stdin)
        else:
            yield from range(args.repeats)

    def on_step(seconds, generation_s):
        done.append((seconds, generation_s))
        if args.interactive and len(done) > WARM_STEPS:
            tell({"seconds": seconds, "generation_s": generation_s})

    with tempfile.TemporaryDirectory() as output:
        take_steps(
            make_trainer(args.model, json.loads(args.shape), variant, output), steps(), on_step
        )
    if not args.interactive:
        step_s, generation_s = zip(*done[WARM_STEPS:], strict=True)
        tell(
            {
                "variant": variant,
                "seconds": statistics.median(step_s),
                "min_s": min(step_s),
                "generation_s": statistics.median(generation_s),
            }
        )


def sweep(args):
    """From the best known variant each choice by itself, taken over where it is faster."""
    results, best = [], dict(BEST)

    def attempt(variant):
        command = [sys.executable, os.path.abspath(__file__), f"--model={args.model}"]
        command += [f"--shape={args.shape}", f"--repeats={args.repeats}"]
        command += [f"--variant={json.dumps(variant)}"]
        told = {"variant": variant}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=args.timeout_s, check=False
            )
            told |= {"error": (done.stderr.splitlines() or ["no message"])[-1][:300]}
            if done.returncode == 0:
                told = json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            told |= {"error": f"over {args.timeout_s} s"}
        print(json.dumps(told), file=sys.stderr, flush=True)
        results.append(told)
        return told.get("min_s", float("inf"))

    fastest = attempt(best)
    for name, values in CHOICES.items():
        for value in values:
            if value != best[name] and (found := attempt(best | {name: value})) < fastest:
                fastest, best = found, best | {name: value}
    return {"best": best, "min_s": fastest, "variants": results}


def main(argv=None):
    """Runs one variant, or the sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a published DeepSeek-V3")
    parser.add_argument("--shape", required=True, help="JSON: prompts, group, prompt, new")
    parser.add_argument("--variant", default="{}", help="JSON: changes to the best known variant")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--interactive", action="store_true", help="one step a line of stdin")
    parser.add_argument("--sweep", action="store_true", help="search for the best variant")
    parser.add_argument("--timeout_s", type=int, default=300, help="of one variant of the sweep")
    args = parser.parse_args(argv)
    if args.sweep:
        print(json.dumps(sweep(args), indent=1))
        return
    changes = json.loads(args.variant)
    for name, value in changes.items():
        if value not in CHOICES.get(name, ()):
            raise ValueError(f"{name}={value!r}; there are {CHOICES.get(name, tuple(CHOICES))}")
    run_variant(args, BEST | changes)


if __name__ == "__main__":
    main()
