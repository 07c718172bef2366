"""What every script shares: its flags, its configuration, and how it reports a person's mistake.

Each script has flags of its own (`FlagValues`), so that several can run in one process.
"""

import dataclasses
import sys
from collections.abc import Callable

import jax
from absl import flags

from dsjax.config import Config
from dsjax.errors import InputError, RunError
from dsjax.host_memory import keep_freed_memory
from dsjax.overrides import first_difference, override, to_json
from dsjax.presets import preset


def define_flags(default_preset: str | None, default_workdir: str | None) -> flags.FlagValues:
    """The flags every script takes: --preset, --workdir, --seed and repeatable --set."""
    values = flags.FlagValues()
    flags.DEFINE_string("preset", default_preset, "Named configuration.", flag_values=values)
    flags.DEFINE_string("workdir", default_workdir, "Folder of the run.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Decides every random choice.", flag_values=values)
    flags.DEFINE_multi_string(
        "set", [], "path=value; overrides a field of the configuration.", flag_values=values
    )
    flags.DEFINE_bool("help", False, "Shows the flags.", short_name="h", flag_values=values)
    return values


def configured(values: flags.FlagValues) -> Config:
    """The preset with its overrides.

    Raises:
        InputError: for an unknown preset or field, or a value that does not fit.
    """
    return override(preset(values.preset), *values.set)


def with_steps(config: Config, steps: int) -> Config:
    """The same with a main stage of so many steps of the full batch.

    Raises:
        InputError: if there is none.
    """
    if steps < 1:
        raise InputError(f"--steps is {steps}; it must be at least 1")
    train = dataclasses.replace(config.train, total_tokens=steps * config.train.tokens_per_step)
    return dataclasses.replace(config, train=train)


def check_preset(values: flags.FlagValues, config: Config) -> None:
    """Checks that a loaded run is a model of the preset named by --preset.

    Raises:
        InputError: if it is not, naming the first field that differs.
    """
    difference = first_difference(to_json(config.model), to_json(configured(values).model), "model")
    if difference is not None:
        raise InputError(f"{values.workdir} is not of preset '{values.preset}'; {difference}")


def run(
    values: flags.FlagValues, body: Callable[[flags.FlagValues], None], argv: list[str], usage: str
) -> int:
    """Parses flags and runs a script's body.

    Args:
        values: the script's flags.
        body: what to do with them.
        argv: program name and arguments.
        usage: shown above the flags by --help.

    Returns:
        0; after one line on stderr 2, where something given cannot be used, or 1, where work in
        progress could not go on, or 130 where a person ended it before it had begun.
    """
    name = argv[0].rsplit("/", 1)[-1]
    try:
        values.unparse_flags()
        rest = values(argv)[1:]
        if values.help:
            print(usage.strip(), values.get_help(), sep="\n\n")
            return 0
        if rest:
            raise InputError(f"unexpected argument '{rest[0]}'; flags are of the form --name=value")
        if values.seed < 0 or values.seed >= 2**32:
            raise InputError(f"seed is {values.seed}; it must lie in [0, 2**32)")
        keep_freed_memory()
        body(values)
    except (InputError, flags.Error) as error:
        print(f"{name}: {_one_line(error)}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"{name}: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(part.strip() for part in str(error).splitlines())


def keep_compiled(folder: str) -> None:
    """Keeps compiled programs in a folder, for the next process, unless another one is set."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
