"""The table of what kernels are compiled to: its rules, its comparison and its page.

`docs/kernel_resources.json` holds {target: {"compiler": ..., "cases": {case: what was found}}}, as
`experiments.kernels.ahead` finds it. Knows nothing about compiling.
"""

import re
from collections.abc import Iterable

Table = dict[str, dict]
NAMES = {
    "h100": "H100 (sm_90a)",
    "v5p": "TPU v5p",
    "v6e": "TPU v6e",
    "tpu7x": "TPU 7x",
}
BEGIN = "<!-- made by experiments/kernel_resources.py -->"
END = "<!-- end of what is made -->"


def faults(name: str, found: dict, multiplies: str | None) -> list[str]:
    """What no kernel may have, whatever the table says.

    Args:
        name: of the case, its implementation in parentheses.
        found: of it.
        multiplies: the type that tensor cores multiply; None where they have no part.
    """
    if found["status"] == "failed":
        return [found["why"]]
    if found["status"] != "compiled" or "kernels" not in found:
        return []
    wrong = []
    if not found["kernels"]:
        wrong.append("no kernel in the compiled program")
    for kernel in found["kernels"]:
        where = kernel["name"]
        if kernel.get("spill_bytes"):
            wrong.append(f"{where} spills {kernel['spill_bytes']} bytes of registers")
        if kernel.get("stack_bytes"):
            wrong.append(f"{where} keeps {kernel['stack_bytes']} bytes in local memory")
        # C7510 and its like say that wgmma runs one after the other, C7508 that setmaxnreg does not
        # count; C7519, a fence that the compiler put in, is none of the sort.
        for advice in kernel.get("advice", ()):
            if re.search("serialized|ignored|Performance Loss", advice):
                wrong.append(f"{where}: ptxas says {advice}")
    if name.endswith("(hopper)") and multiplies is not None:
        used = {shape.split()[1] for k in found["kernels"] for shape in k["wgmma"]}
        if used != {multiplies}:
            wrong.append(f"wgmma of {', '.join(sorted(used)) or 'nothing'}, not of {multiplies}")
    return wrong


def differences(table: Table, found: Table) -> list[str]:
    """Where figures are not those of the table, of targets whose compilers are the same."""
    told = []
    for target, now in found.items():
        before = table.get(target)
        if before is None:
            told.append(f"{target}: not in the table")
            continue
        if before["compiler"] != now["compiler"]:
            continue
        for name, figures in now["cases"].items():
            if name not in before["cases"]:
                told.append(f"{target}: {name}: not in the table")
                continue
            was, is_ = flat(before["cases"][name]), flat(figures)
            for key in sorted(was.keys() | is_.keys()):
                if was.get(key) != is_.get(key):
                    told.append(f"{target}: {name}: {key} was {was.get(key)}, is {is_.get(key)}")
    return told


def gone(table: Table, found: Table) -> list[str]:
    """Cases of the table that there are no more; for a comparison of all cases."""
    return [
        f"{target}: {name}: in the table, and no case any more"
        for target in found
        for name in table.get(target, {"cases": {}})["cases"]
        if name not in found[target]["cases"]
    ]


def other_compilers(table: Table, found: Table) -> list[str]:
    """Targets whose figures cannot be held against the table's."""
    return [
        f"{target}: compiled by {now['compiler']}, the table's by {table[target]['compiler']}: "
        "FIGURES ARE NOT COMPARED"
        for target, now in found.items()
        if target in table and table[target]["compiler"] != now["compiler"]
    ]


def flat(figures: dict) -> dict[str, object]:
    """The figures by names: `kernels.0.registers`."""
    result: dict[str, object] = {}

    def add(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}.{key}" if name else key, inner)
        elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
            for number, inner in enumerate(value):
                add(f"{name}.{number}", inner)
        else:
            result[name] = value

    add("", figures)
    return result


# ---- the page -----------------------------------------------------------------------------------


def with_tables(text: str, table: Table) -> str:
    """The page with what is made made anew.

    Raises:
        ValueError: if it has no place for it.
    """
    parts = re.split(f"({re.escape(BEGIN)}\n|{re.escape(END)})", text)
    if len(parts) != 5:
        raise ValueError(f"the page has no '{BEGIN}' with a later '{END}'")
    return "".join([*parts[:2], "\n", page(table), "\n", *parts[3:]])


def page(table: Table) -> str:
    """The tables of all targets, as Markdown."""
    blocks = []
    if "h100" in table:
        blocks += [_title("h100", table), _hopper(table["h100"]["cases"])]
    tpus = [target for target in ("v5p", "v6e", "tpu7x") if target in table]
    if tpus:
        compilers = {table[target]["compiler"] for target in tpus}
        blocks += [f"**TPUs**, by {'; '.join(sorted(compilers))}:\n", _tpu(table, tpus)]
    plain = [row for target in table for row in _plain(target, table[target]["cases"])]
    if plain:
        blocks += [
            "**Plain forms**, what XLA makes where no kernel is:\n",
            _markdown(("call", "implementation", "for", "temporary MB"), plain),
        ]
    return "\n".join(blocks)


def _title(target: str, table: Table) -> str:
    return f"**{NAMES[target]}**, by {table[target]['compiler']}:\n"


def _hopper(found: dict) -> str:
    rows = []
    for name, figures in found.items():
        call, implementation = _parted(name)
        if implementation != "hopper":
            continue
        if figures["status"] != "compiled":
            rows.append((call, _status(figures), *[""] * 7))
        for kernel in figures.get("kernels", ()):
            rows.append(
                (
                    call,
                    f"`{kernel['name']}`",
                    f"{kernel['threads']}",
                    f"{kernel['registers']}",
                    ", ".join(kernel["setmaxnreg"]) or "–",
                    f"{kernel['spill_bytes']}",
                    f"{kernel['shared_bytes']:,}",
                    ", ".join(kernel["wgmma"]) or "–",
                    f"{figures['temp_bytes'] / 1e6:,.2f}",
                )
            )
    head = ("call", "kernel", "threads", "registers", "setmaxnreg", "spilled bytes")
    return _markdown((*head, "shared bytes", "wgmma", "temporary MB"), rows)


def _tpu(table: Table, targets: list[str]) -> str:
    most: dict = max((table[target]["cases"] for target in targets), key=len)
    rows = []
    for name in most:
        cells = []
        for target in targets:
            figures = table[target]["cases"].get(name, {"status": ""})
            if figures["status"] != "compiled":
                cells.append(_status(figures))
                continue
            vmem = max((kernel["vmem_bytes"] for kernel in figures["kernels"]), default=0)
            cells.append(f"{vmem / 2**20:.1f} / {figures['temp_bytes'] / 1e6:,.2f}")
        rows.append((_parted(name)[0], *cells))
    return _markdown(("call", *(f"{NAMES[t]}: VMEM MiB / temporary MB" for t in targets)), rows)


def _plain(target: str, found: dict):
    for name, figures in found.items():
        call, implementation = _parted(name)
        if implementation not in ("hopper", "tpu"):
            megabytes = figures.get("temp_bytes", 0) / 1e6
            told = f"{megabytes:,.1f}" if figures["status"] == "compiled" else _status(figures)
            yield call, f"`{implementation}`", NAMES[target], told


def _parted(name: str) -> tuple[str, str]:
    call, implementation = name.rsplit(" (", 1)
    return call, implementation.removesuffix(")")


def _status(figures: dict) -> str:
    why = figures.get("why", "")
    return figures["status"] + (f": {why}" if why else "")


def _markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
