"""Writes tests/golden/quantize.*, FP8 tiles by torch's arithmetic, or checks them.

Runs in the oracle interpreter (`make oracle`: torch CPU) and imports nothing of dsjax. What a scale
and a number are is DeepSeek's published formula: a tile's largest magnitude over 448 in float32, or
the next power of two (V3.1); numbers over scale, brought to [-448, 448], rounded by torch. What the
formula leaves open is ours, as `pallas_kernels.quantize` says it: scales of tiles of zeros, of tiny
tiles and of tiles that are not finite.

`quantize.safetensors` holds, for each case and way of `WAYS`

    CASE/x                      float32 [M, K], the input
    CASE/DTYPE/SCALE/WAY/q      uint8 [M, K] or [K, M], the FP8 numbers' bits, of x rounded to DTYPE
    CASE/DTYPE/SCALE/WAY/scale  float32

and `quantize.json` the versions and, for each known fault of a program that does the same, how many
numbers and scales of these it gets wrong: none of them must be unseen.

    make_quantize_golden.py --check              computes the files again and compares
    make_quantize_golden.py --of=IN --out=OUT    the same of other inputs, `CASE/x` in IN
"""

import argparse
import json
import pathlib
import platform
import sys

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden"
TILE, LARGEST = 128, 448.0
SMALLEST_NORMAL, SMALLEST_SCALE = 2.0**-126, 2.0**-116
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCALES = ("float32", "power_of_two")
WAYS = {  # tile, transposed
    "rows": ((1, TILE), False),
    "columns": ((1, TILE), True),
    "blocks": ((TILE, TILE), False),
}


def quantize(x, tile, scale_format, fault=None):
    """(FP8, scales) of a matrix in float32."""
    (rows, cols), (height, width) = x.shape, tile
    m, k = -(-rows // height), -(-cols // width)
    padded = torch.zeros(m * height, k * width)
    padded[:rows, :cols] = x
    blocks = padded.reshape(m, height, k, width)
    amax = blocks.abs().amax((1, 3))
    scale = amax * (1 / torch.tensor(LARGEST)) if fault == "scale by reciprocal" else amax / LARGEST
    scale = scale.clamp(min=SMALLEST_SCALE)
    scale[amax < SMALLEST_NORMAL] = 1.0
    if scale_format == "power_of_two":
        mantissa, exponent = torch.frexp(scale)  # mantissa in [1/2, 1)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        scale = torch.ldexp(torch.ones_like(scale), exponent)
    scale[~torch.isfinite(amax)] = torch.nan
    divisor = scale[:, None, :, None]
    scaled = blocks * (1 / divisor) if fault == "numbers by reciprocal" else blocks / divisor
    if fault == "through float16":
        scaled = scaled.half().float()
    if fault == "ties away from zero":
        scaled = scaled * (1 + 2.0**-23)
    q = scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return q.reshape(m * height, k * width)[:rows, :cols], scale


FAULTS = (
    "scale by reciprocal",
    "numbers by reciprocal",
    "through float16",
    "ties away from zero",
)


def quantized(x, fault=None):
    """All outputs of a case as numpy, by DTYPE/SCALE/WAY/..."""
    found = {}
    for dtype_name, dtype in DTYPES.items():
        rounded = torch.from_numpy(x).to(dtype).float()
        for scale_format in SCALES:
            for way, (tile, transposed) in WAYS.items():
                matrix = rounded.T.contiguous() if transposed else rounded
                q, scale = quantize(matrix, tile, scale_format, fault)
                name = f"{dtype_name}/{scale_format}/{way}"
                found[f"{name}/q"] = q.contiguous().view(torch.uint8).numpy()
                found[f"{name}/scale"] = scale.numpy()
    return found


# --- inputs ---------------------------------------------------------------------------------------


def every_fp8():
    """The 127 magnitudes of e4m3, ascending."""
    return torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def ties():
    """Tiles of scale 1 with each tie between neighbours, and what is next to it on both sides."""
    magnitudes = every_fp8()
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    toward = [np.nextafter(middle, np.float32(limit)) for limit in (0.0, 1e9)]
    numbers = np.concatenate([magnitudes, middle, *toward]).astype(np.float32)
    numbers = np.concatenate([numbers, -numbers])
    # A tie between neighbours stays one, and a number stays one, at any power of two.
    rows = -(-len(numbers) // (TILE - 1))
    x = np.zeros((rows, TILE), np.float32)
    x[:, 0] = LARGEST
    x[:, 1:].flat[: len(numbers)] = numbers
    return np.concatenate([x, x * np.float32(2.0**-100)], axis=1)


def edges():
    """One oddity a row, in the first of two tiles; the second is plain."""
    random = np.random.RandomState(2)
    smallest = np.float32(2.0**-149)
    plain = random.standard_normal(TILE).astype(np.float32)
    signs = np.where(np.arange(TILE) % 3 == 0, -1, 1).astype(np.float32)
    some = np.linspace(-1, 1, TILE, dtype=np.float32)
    first = [
        np.zeros(TILE),
        np.zeros(TILE) * signs,
        np.where(np.arange(TILE) % 2 == 0, 0.0 * signs, plain),
        some * 448,
        some * np.nextafter(np.float32(448), np.float32(1e9)),
        some * np.nextafter(np.float32(448), np.float32(0)),
        some * np.float32(448 * 2.0**-10),
        signs * smallest,  # subnormal numbers count as zeros
        signs * smallest * np.arange(TILE),
        signs * np.float32(2.0**-126),  # the smallest normal one
        signs * np.float32(2.0**-126) * (1 + 2.0**-23),
        np.where(np.arange(TILE) % 2 == 0, signs * np.float32(2.0**-127), 2.0**-117),
        some * np.float32(2.0**-110),  # under the smallest scale
        some * np.float32(448 * 2.0**-116),  # just at it
        some * np.float32(449 * 2.0**-116),
        some * np.finfo(np.float32).max,
        np.where(np.arange(TILE) == 5, np.finfo(np.float32).max, plain),
        np.where(np.arange(TILE) == 7, np.nan, plain),
        np.where(np.arange(TILE) == 0, -np.nan, plain),
        np.where(np.arange(TILE) == 127, np.inf, plain),
        np.where(np.arange(TILE) == 64, -np.inf, 0.0 * signs),
        np.full(TILE, np.nan),
        np.where(np.arange(TILE) == 9, 1e30, plain),  # everything else becomes zero, of its sign
    ]
    return np.stack([np.concatenate([row, plain]) for row in first]).astype(np.float32)


def cases():
    """Inputs by name."""
    normal, wide = np.random.RandomState(0), np.random.RandomState(1)
    powers = 2.0 ** wide.uniform(-135, 120, (40, 1))
    return {
        "normal": normal.standard_normal((40, 300)).astype(np.float32),
        "tall": normal.standard_normal((260, 33)).astype(np.float32),
        "wide": (wide.standard_normal((40, 200)) * powers).astype(np.float32),
        "ties": ties(),
        "edges": edges(),
    }


# --- files ----------------------------------------------------------------------------------------


def different(a, b):
    """How many entries differ; any NaN equals any other."""
    if a.dtype == np.uint8:
        nan = (a & 0x7F == 0x7F) & (b & 0x7F == 0x7F)
    else:
        nan = np.isnan(a) & np.isnan(b)
        a, b = a.view(np.uint32), b.view(np.uint32)
    return int(((a != b) & ~nan).sum())


def compute():
    """(tensors, facts) of the golden files."""
    tensors, wrong = {}, dict.fromkeys(FAULTS, 0)
    for case, x in cases().items():
        found = quantized(x)
        tensors[f"{case}/x"] = x
        tensors |= {f"{case}/{name}": tensor for name, tensor in found.items()}
        for fault in FAULTS:
            faulty = quantized(x, fault)
            wrong[fault] += sum(different(faulty[name], found[name]) for name in found)
    if min(wrong.values()) == 0:
        raise RuntimeError(f"a fault goes unseen: {wrong}")
    return tensors, {"wrong_under": wrong}


def check(folder):
    """Complaints about the golden files."""
    golden, (tensors, _) = load_file(folder / "quantize.safetensors"), compute()
    if golden.keys() != tensors.keys():
        return [f"names differ: {sorted(golden.keys() ^ tensors.keys())[:5]}"]
    return [
        f"{name} differs in {different(tensors[name], golden[name])} places"
        for name in golden
        if different(tensors[name], golden[name])
    ]


def main(argv=None):
    """Makes or checks the golden files, or does the same of other inputs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--folder", type=pathlib.Path, default=GOLDEN)
    parser.add_argument("--of", type=pathlib.Path, help="other inputs, CASE/x")
    parser.add_argument("--out", type=pathlib.Path, help="where their outputs go")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.of:
        outputs = {}
        for name, x in load_file(args.of).items():
            case = name.removesuffix("/x")
            outputs |= {f"{case}/{key}": tensor for key, tensor in quantized(x).items()}
        save_file(outputs, args.out)
        return 0
    if args.check:
        complaints = check(args.folder)
        for complaint in complaints:
            print(complaint, file=sys.stderr)
        print("goldens agree" if not complaints else f"{len(complaints)} complaints")
        return 1 if complaints else 0
    tensors, facts = compute()
    path = args.folder / "quantize.safetensors"
    save_file(tensors, path)
    path.chmod(0o644)  # safetensors writes 0600
    info = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "facts": facts,
        "notes": ["wrong_under: entries of all outputs that differ under a fault; none is unseen."],
    }
    (args.folder / "quantize.json").write_text(json.dumps(info, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
