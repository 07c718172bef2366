"""The page of what `experiments.bench_kernels` measured: shares of the device's best, and peers.

Knows nothing about measuring; it reads the JSON.
"""

import re

BEGIN = "<!-- made by experiments/bench_kernels.py -->"
END = "<!-- end of what is made by experiments/bench_kernels.py -->"
PARTS = {
    "product": "Products, 1x128 by 128x128",
    "weight_gradient": "Products, 1x128 by 1x128",
    "grouped": "Grouped products",
    "quantize": "To FP8",
    "decode": "Attention over the paged latent cache, absorbed",
    "attention": "Attention in training",
}


FASTEST = {"e4m3": "fp8", "bf16": "bf16"}


def with_figures(text: str, results: list[dict]) -> str:
    """The page with its figures made anew.

    Raises:
        ValueError: if it has no place for them, or the results are of several devices or of a
            smoke test.
    """
    devices = {result["machine"]["device"] for result in results}
    if len(devices) != 1:
        raise ValueError(f"figures of {', '.join(sorted(devices))} do not go on one page")
    if any(result["smoke"] for result in results):
        raise ValueError("a smoke test's figures mean nothing")
    parts = re.split(f"({re.escape(BEGIN)}\n|{re.escape(END)})", text)
    if len(parts) != 5:
        raise ValueError(f"the page has no '{BEGIN}' with a later '{END}'")
    return "".join([*parts[:2], "\n", *map(page, results), *parts[3:]])


def page(result: dict) -> str:
    """One run's tables, as Markdown."""
    machine, peak = result["machine"], peaks(result)
    torch = result["torch"]
    lines = [
        f"**{machine['device']}**, {machine['date']}: jax {machine['jax']}, "
        f"driver and power limit {machine.get('driver, power limit', '–')}, "
        + (f"torch {torch['torch']}" if "torch" in torch else f"no torch ({torch['absent']})"),
        "",
        "In the same run: "
        + "; ".join(f"{name} {figure}" for name, figure in _ceilings(result).items()),
        "",
    ]
    for part, title in PARTS.items():
        cases = [case for case in result["cases"] if case["part"] == part]
        if cases:
            lines += [f"*{title}*", "", *_table(cases, peak), ""]
    if result["not reached"]:
        lines += [f"Not reached in time: {'; '.join(result['not reached'])}.", ""]
    return "\n".join(lines) + "\n"


def peaks(result: dict) -> dict[str, float]:
    """Operations or bytes a second at best, of XLA or torch; 0 where neither could."""
    best = {}
    for name, measured in result["ceilings"].items():
        work = measured.get("flops") or measured["bytes"]
        took = [measured[by]["seconds"] for by in ("xla", "torch") if "seconds" in measured[by]]
        best[name] = work / min(took) if took else 0.0
    return best


def _ceilings(result: dict) -> dict[str, str]:
    told = {}
    for name, measured in result["ceilings"].items():
        unit = "TFLOP/s" if "flops" in measured else "GB/s"
        scale = 1e12 if "flops" in measured else 1e9
        work = measured.get("flops") or measured["bytes"]
        for by in ("xla", "torch"):
            if "seconds" in measured[by]:
                told[f"{name} by {by}"] = f"{work / measured[by]['seconds'] / scale:,.0f} {unit}"
    return told


def _table(cases: list[dict], peak: dict[str, float]) -> list[str]:
    peers = list(dict.fromkeys(p for case in cases for p in case["by"] if p != case["kernel"]))
    head = ["op", "shape", "kernel", "share of floor", "kernel alone", "worst block", *peers]
    rows = [head, ["---"] * len(head)]
    for case in cases:
        ours = case["by"].get(case["kernel"], {"absent": "no kernel"})
        work, scale, unit, ceiling = _work(case, peak)
        row = [case["op"], case["shape"], _rate(ours, work, scale, unit)]
        if "seconds" in ours:
            row.append(f"{work / ours['seconds'] / ceiling:.0%}" if ceiling else "–")
            alone = ours["kernel_seconds"]
            row.append(f"{work / alone / scale:,.0f} {unit}" if alone else "–")
            row.append(f"{ours['error']:.1e}")
        else:
            row += ["–"] * 3
        row += [_against(ours, case["by"].get(peer), work, scale, unit) for peer in peers]
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


def _work(case: dict, peak: dict[str, float]) -> tuple[float, float, str, float]:
    """(operations or bytes, whichever takes longer; their unit, its name, the most a second)."""
    moved = case["least_bytes"], 1e9, "GB/s", peak["copy"]
    if not case["flops"]:
        return moved
    multiplied = case["flops"], 1e12, "TFLOP/s", peak[FASTEST[case["multiplies"]]]
    (flops, *_, flop_rate), (num_bytes, *_, byte_rate) = multiplied, moved
    return moved if num_bytes * flop_rate > flops * byte_rate else multiplied


def _rate(figures: dict, work: float, scale: float, unit: str) -> str:
    if "wrong" in figures:
        return f"**wrong**: {figures['wrong']}"
    if "seconds" not in figures:
        return "–"
    return f"{work / figures['seconds'] / scale:,.0f} {unit}"


def _against(ours: dict, theirs: dict | None, work: float, scale: float, unit: str) -> str:
    """A peer's rate, and how many times as fast ours is."""
    if theirs is None:
        return ""
    rate = _rate(theirs, work, scale, unit)
    if "seconds" in ours and "seconds" in theirs:
        rate += f" ({theirs['seconds'] / ours['seconds']:.2f}x)"
    return rate
