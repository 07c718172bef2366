"""Benchmarks the train step and generation against transformers, and the step against itself.

python -m experiments.bench_train --preset=v3_20m --out=bench.json

The peer runs in an interpreter of its own (`make oracle`) as a warm process that does an iteration
when told, so that both sides alternate in one run. JSON goes to stdout or to --out.
"""

import sys

from absl import flags

from experiments import command

FLAGS = command.define_flags(default_preset="v3_20m", default_workdir=None)
flags.DEFINE_integer("repeats", 7, "Iterations a side.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "File for the JSON; stdout if left out.", flag_values=FLAGS)
flags.DEFINE_string(
    "oracle", ".venv-oracle/bin/python", "The peer's interpreter.", flag_values=FLAGS
)
flags.DEFINE_multi_enum(
    "part",
    ["peer_train", "peer_generate", "dispatch", "parts", "compile"],
    ["peer_train", "peer_generate", "dispatch", "parts", "compile"],
    "What to measure.",
    flag_values=FLAGS,
)


def _body(values: flags.FlagValues) -> None:
    from experiments.peers.benchmark import run

    run(
        command.configured(values),
        parts=values.part,
        repeats=values.repeats,
        oracle=values.oracle,
        out=values.out,
        seed=values.seed,
    )


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
