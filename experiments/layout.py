r"""Says what a mesh does with every tensor, and what moves in a micro-batch; needs no devices.

python -m experiments.layout --preset=deepseek_v3 --set mesh.rules=fsdp_ep \
    --set mesh.fsdp=32 --set mesh.expert=64 --set train.remat=full
python -m experiments.layout --preset=deepseek_v3 --page=docs/sharding.md

An exchange `auto` counts as `ragged`, which is what accelerators take.
"""

import dataclasses
import pathlib
import sys

from absl import flags

from dsjax.config import Config
from dsjax.errors import InputError
from dsjax.meshes import check_training, rules_of
from dsjax.plan.collectives import bytes_by_kind, predicted, summary
from dsjax.plan.layout import activations, layout_table, page_tables, state_bytes, with_tables
from experiments import command

FLAGS = command.define_flags(default_preset="deepseek_v3", default_workdir=None)
flags.DEFINE_integer(
    "rows",
    None,
    "Rows of a micro-batch over all devices; the configuration's where it divides, else one a "
    "device.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "page", None, "Page whose tables of all presets to make anew.", flag_values=FLAGS
)


Cells = list[tuple[str, ...]]


def _body(values: flags.FlagValues) -> None:
    config = command.configured(values)
    if values.page is not None:
        _make_page(values.page, config)
        return
    mesh, sizes = config.mesh, config.mesh.axes
    training = mesh.rules != "decode" and mesh.num_devices > 1
    refused = None
    if training:
        try:
            check_training(config)
        except InputError as error:
            refused = error
        config = _with_rows(config, values.rows)
        check_training(config)
    elif values.rows is not None:
        raise InputError("--rows goes with a mesh to train on; this one moves no gradients")
    rules = rules_of(mesh)
    if rules.exchange.kind == "auto":
        rules = dataclasses.replace(
            rules, exchange=dataclasses.replace(rules.exchange, kind="ragged")
        )
    used = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
    print(
        f"{values.preset} by {mesh.rules} on {used or 'one device'}: {mesh.num_devices:,} devices"
    )
    table = layout_table(config, rules, sizes)
    told = ("gradient, float32",) if training else ()

    def held(row):
        return state_bytes(row, config) if training else row.numbers * row.dtype.itemsize

    cells: Cells = [("tensor", "shape", "stored", "at use", *told, "MB a device")]
    for row in table:
        name = row.name + (f" x{row.copies}" if row.copies > 1 else "")
        shape = " x ".join(map(str, row.shape))
        megabytes = f"{held(row) / 1e6:,.1f}"
        told = (row.gradient,) if training else ()
        cells.append((name, shape, row.stored, row.use, *told, megabytes))
    _print(cells)
    total = sum(map(held, table)) / 1e9
    if training:
        average = "" if config.train.ema_decay is None else ", average"
        what = f"parameters, moments{average}"
        print(f"{what}: {total:,.3f} GB a device; gradient sums and activations come on top\n")
    else:
        print(f"parameters: {total:,.3f} GB a device\n")
    cells = [("activation", "dims", "where it lies")]
    cells += [(a.name, " ".join(a.shape), a.stored) for a in activations(config, rules, sizes)]
    _print(cells)
    if not training:
        return
    rows, length = config.train.batch_size, config.train.seq_len
    if refused is not None:
        print(f"\nthe configuration as it is would not train here: {refused}")
    found = predicted(config, rules, sizes, rows=rows, seq_len=length)
    print(
        f"\na micro-batch of {rows:,} rows of {length:,} tokens, remat {config.train.remat}: what "
        "a device receives in forward and backward pass"
    )
    cells = [("what", "times", "MB")]
    cells += [(what, f"{times:,}", f"{moved / 1e6:,.3f}") for what, times, moved in summary(found)]
    _print(cells)
    cells = [("in all", "times", "MB")]
    for (kind, axes), (times, moved) in bytes_by_kind(found).items():
        cells.append((f"{kind} over {', '.join(axes)}", f"{times:,}", f"{moved / 1e6:,.3f}"))
    print()
    _print(cells)
    print(f"{sum(one.bytes for one in found) / 1e9:,.3f} GB a device")


def _with_rows(config: Config, rows: int | None) -> Config:
    """The same with one stage of micro-batches of so many rows."""
    train, axes = config.train, config.mesh.axes
    devices = 1
    for axis in rules_of(config.mesh).of("batch"):
        devices *= axes[axis]
    if rows is None:
        rows = train.micro_batch_size or train.batch_size
        rows = devices if rows % devices else rows
    if rows < 1:
        raise InputError(f"--rows is {rows}; it must be at least 1")
    train = dataclasses.replace(
        train, batch_size=rows, micro_batch_size=None, batch_ramp=None, context_stages=()
    )
    return dataclasses.replace(config, train=train)


def _make_page(name: str, config: Config) -> None:
    page = pathlib.Path(name)
    try:
        text = page.read_text(encoding="utf-8")
        page.write_text(with_tables(text, page_tables(config)), encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--page={name}: {error}") from error


def _print(cells: Cells) -> None:
    """Columns side by side; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        parts = [
            text.rjust(width) if text[:1].isdecimal() else text.ljust(width)
            for text, width in zip(row, widths, strict=True)
        ]
        print("  ".join(parts).rstrip())


def main(argv: list[str]) -> int:
    """Runs the script; see `experiments.command.run`."""
    return command.run(FLAGS, _body, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
