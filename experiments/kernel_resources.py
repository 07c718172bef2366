"""Compiles every kernel for an H100 and for TPUs, none of which need be there, and compares.

python -m experiments.kernel_resources --target=h100 --only=fp8_matmul
python -m experiments.kernel_resources --write

`make aot` installs the compilers into .aot, where the processes that compile find them. Registers,
spills, shared memory and instructions are held against docs/kernel_resources.json: to the digit
where the compilers are the same versions, and always by the rules (no spill, the wanted wgmma, no
failure). Exit code 1 if anything differs. --write makes the table and its page anew.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from dsjax.errors import InputError, RunError
from experiments import command
from experiments.ahead_of_time import topologies
from experiments.kernels import table
from experiments.kernels.ahead import TOPOLOGIES
from experiments.kernels.cases import cases

TARGETS = {"cuda": ("h100",), "tpu": ("v5p", "v6e", "tpu7x")}  # a process each

FLAGS = command.define_flags(default_preset=None, default_workdir=None)
flags.DEFINE_multi_enum(
    "target", None, sum(TARGETS.values(), ()), "Devices; all if left out.", flag_values=FLAGS
)
flags.DEFINE_multi_string(
    "only", [], "An op or one of its calls, as the table names it.", flag_values=FLAGS
)
flags.DEFINE_bool(
    "brief", False, "One call of each op; what else the table has stands.", flag_values=FLAGS
)
flags.DEFINE_bool("write", False, "Makes the table and its page anew.", flag_values=FLAGS)
flags.DEFINE_string(
    "aot", str(topologies.AOT), "Folder of the compilers: make aot.", flag_values=FLAGS
)
flags.DEFINE_string(
    "table",
    str(topologies.REPOSITORY / "docs/kernel_resources.json"),
    "The table.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "page", str(topologies.REPOSITORY / "docs/kernels.md"), "Its page.", flag_values=FLAGS
)


def _body(values: flags.FlagValues) -> None:
    known = {case.name: case for case in cases() if case.compiled}
    ops = {case.op for case in known.values()}
    for name in values.only:
        if name not in known and name not in ops:
            raise InputError(f"--only={name}: no such call; ops: {'; '.join(sorted(ops))}")
    wanted = values.target or sum(TARGETS.values(), ())
    found: table.Table = {}
    for platform, targets in TARGETS.items():
        if chosen := [target for target in targets if target in wanted]:
            told = ["--brief"] if values.brief else []
            told += [f"--only={name}" for name in values.only]
            found |= _compile(platform, chosen, told, values.aot)
    wrong = _faults(found, known)
    for line in wrong:
        print(line)
    if values.write:
        _write(found, values)
    else:
        before = _read(values.table)
        for line in table.other_compilers(before, found):
            print(line)
        changed = table.differences(before, found)
        if not values.only and not values.brief:
            changed += table.gone(before, found)
        for line in changed:
            print(line)
        wrong += changed
    compiled = sum(
        figures["status"] == "compiled" for t in found.values() for figures in t["cases"].values()
    )
    print(f"{compiled} compiled, {len(wrong)} faults or differences")
    if wrong:
        raise RunError(f"{len(wrong)} faults or differences; --write takes differences over")


def _compile(platform: str, targets: list[str], told: list[str], aot: str) -> table.Table:
    """Compiles in a process that has the platform's compiler."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as dumps:
        environment = topologies.environment(TOPOLOGIES[targets[0]], aot)
        environment["MOSAIC_GPU_DUMP_TO"] = dumps
        done = subprocess.run(
            [sys.executable, "-m", "experiments.kernels.ahead", platform, *targets, *told],
            cwd=topologies.REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-20:])
        raise RunError(f"compiling for {', '.join(targets)} ended with {done.returncode}: {last}")
    result = json.loads(done.stdout)
    print(f"{', '.join(targets)}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return {t: {"compiler": result["compiler"], "cases": result[t]} for t in targets}


def _faults(found: table.Table, known: dict) -> list[str]:
    return [
        f"{target}: {name}: {fault}"
        for target, figures in found.items()
        for name, figure in figures["cases"].items()
        for fault in table.faults(name, figure, known[name.rsplit(" (", 1)[0]].multiplies)
    ]


def _read(name: str) -> table.Table:
    try:
        return json.loads(Path(name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"--table={name}: {error}") from error


def _write(found: table.Table, values: flags.FlagValues) -> None:
    """Takes over what was compiled; what was not stays, unless there is no such case any more."""
    whole = _read(values.table)
    for target, figures in found.items():
        some = values.only or values.brief
        before = whole.get(target, {"cases": {}})["cases"] if some else {}
        whole[target] = {"compiler": figures["compiler"], "cases": before | figures["cases"]}
    whole = {target: whole[target] for target in sum(TARGETS.values(), ()) if target in whole}
    try:
        text = Path(values.page).read_text(encoding="utf-8")
        made = table.with_tables(text, whole)
        Path(values.table).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        Path(values.page).write_text(made, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"--page={values.page}: {error}") from error


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
