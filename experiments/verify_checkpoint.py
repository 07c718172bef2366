"""Asks whether weights compute what was trained: a text as loaded, and under wrong guesses.

python -m experiments.verify_checkpoint --source=DeepSeek-V3
python -m experiments.verify_checkpoint --source=runs/tiny --text=some.txt --json_out=figures.json

--source is a folder of Hugging Face, or of a run. The exit code is 0 for PASS and 1 for FAIL.
--window is for folders that a short run was converted to: it must not be longer than what was
learned. --guess=NAME, which may be repeated, tries these wrong guesses alone.
"""

import json
import sys
from pathlib import Path

from absl import flags

from dsjax import load_pretrained
from dsjax.durable import write_durably
from dsjax.errors import InputError, RunError, nearest
from dsjax.evaluate.verify import LEAST_TOKENS, MAX_TOKENS, NAMES, TEXT, verify
from experiments import command

FLAGS = command.define_flags(default_preset=None, default_workdir=None)
flags.DEFINE_string("source", None, "Folder of Hugging Face, or of a run.", flag_values=FLAGS)
flags.DEFINE_string("text", None, "File of text; a built-in one if left out.", flag_values=FLAGS)
flags.DEFINE_string(
    "dtype", None, "bfloat16, float32 or fp8; the folder's own if left out.", flag_values=FLAGS
)
flags.DEFINE_integer("max_tokens", MAX_TOKENS, "The most of the text's tokens.", flag_values=FLAGS)
flags.DEFINE_integer("window", None, "Length of a row of the text.", flag_values=FLAGS)
flags.DEFINE_integer("step", None, "Checkpoint of a run; the newest.", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "ignore", [], "Unknown field of config.json that changes nothing.", flag_values=FLAGS
)
flags.DEFINE_multi_string(
    "guess", [], f"Wrong guesses to try: {', '.join(NAMES)}; all.", flag_values=FLAGS
)
flags.DEFINE_string("json_out", None, "File for all figures.", flag_values=FLAGS)


def _body(values: flags.FlagValues) -> None:
    if values.workdir or values.preset:
        given = "workdir" if values.workdir else "preset"
        raise InputError(f"--{given} is not used here; --source names the folder")
    if not values.source:
        raise InputError("--source is needed: a folder of Hugging Face, or of a run")
    for name in values.guess:
        if name not in NAMES:
            raise InputError(f"unknown guess '{name}'{nearest(name, NAMES)}")
    if values.max_tokens < LEAST_TOKENS:
        raise InputError(f"--max_tokens is {values.max_tokens}; it must be at least {LEAST_TOKENS}")
    if values.json_out and not Path(values.json_out).absolute().parent.is_dir():
        raise InputError(f"--json_out={values.json_out} lies in no folder that exists")
    text = TEXT if values.text is None else _read(values.text)
    lm = load_pretrained(
        values.source,
        step=values.step,
        dtype=values.dtype,
        overrides=values.set,
        ignore=values.ignore,
    )
    if lm.tokenizer is None:
        raise InputError(f"{values.source} has no tokenizer.json; a text cannot be scored")
    report = verify(
        lm.config,
        lm.params,
        lm.bias,
        lm.tokenizer,
        text,
        max_tokens=values.max_tokens,
        window=values.window,
        only=values.guess,
        on_guess=lambda name: print(f"trying {name}", file=sys.stderr),
    )
    if values.json_out:
        content = json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n"
        try:
            write_durably(Path(values.json_out), content.encode())
        except OSError as error:
            raise RunError(f"cannot write {values.json_out}: {error.strerror}") from error
    print(report.text())
    if not report.passed:
        raise RunError(report.verdict())


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"cannot read {path}: {reason}") from error


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
