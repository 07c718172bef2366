"""What kernels are compiled to for devices that are not here, and the scripts that say so."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments import bench_kernels, command, kernel_resources
from experiments.kernels import ahead, bench, figures, measure, table
from experiments.kernels.cases import SMOKE, cases

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "kernels.md"
TABLE = REPOSITORY / "docs" / "kernel_resources.json"
AOT = REPOSITORY / ".aot"


@pytest.fixture(autouse=True)
def _allocator_left_alone(monkeypatch):
    monkeypatch.setattr(command, "keep_freed_memory", lambda: False)


# ---- the comparison -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)  # 80 s of two cores that nobody else uses
@pytest.mark.parametrize("platform", kernel_resources.TARGETS)
@pytest.mark.parametrize("how", ["--brief", pytest.param("", marks=pytest.mark.nightly)])
def test_kernels_compile_to_what_the_table_says(platform, how):
    if not (AOT / ".stamp").exists():
        reason = "no compilers for accelerators: `make aot` installs them"
        if os.environ.get("DSJAX_REQUIRE_AOT"):
            pytest.fail(reason)
        pytest.skip(reason)
    chosen = kernel_resources.TARGETS[platform][-1:] if how else kernel_resources.TARGETS[platform]
    targets = [*(f"--target={target}" for target in chosen), *([how] if how else [])]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.kernel_resources", *targets],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "FIGURES ARE NOT COMPARED" not in done.stdout  # versions are pinned


def test_the_compilers_are_those_of_the_constraints():
    def versions(name):
        lines = (REPOSITORY / name).read_text().split()
        return dict(line.split("==") for line in lines)

    pinned, jax = versions(".ci/aot-requirements.txt"), versions("constraints.txt")["jax"]
    assert pinned["jax-cuda13-plugin"] == pinned["jax-cuda13-pjrt"] == jax
    told = json.loads(TABLE.read_text())
    assert told["h100"]["compiler"] == (
        f"jax {jax}, jax-cuda13-plugin {jax}, ptxas {pinned['nvidia-cuda-nvcc']}"
    )
    for target in kernel_resources.TARGETS["tpu"]:
        assert told[target]["compiler"] == f"jax {jax}, libtpu {pinned['libtpu']}"


def test_the_table_holds_every_case_and_no_fault():
    told = json.loads(TABLE.read_text())
    known = {case.name: case for case in cases() if case.compiled}
    assert list(told) == [t for targets in kernel_resources.TARGETS.values() for t in targets]
    for target, kernel in {"h100": "hopper", "tpu7x": "tpu"}.items():
        assert {f"{name} ({kernel})" for name in known} <= told[target]["cases"].keys()
    for figures_ in told.values():
        for name, found in figures_["cases"].items():
            assert table.faults(name, found, known[name.rsplit(" (", 1)[0]].multiplies) == []


def test_the_page_has_the_tables_that_are_made():
    text = PAGE.read_text()
    assert table.with_tables(text, json.loads(TABLE.read_text())) == text


# ---- reading what compilers say -----------------------------------------------------------------

# Of a 128x256 tile a warpgroup, which is too large: what ptxas 13.0.88 said.
SPILLED = """\
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized \
due to insufficient register resources for the wgmma pipeline in the function \
'body_mosaic_gpu_kernel'
ptxas warning : Registers are spilled to local memory in function 'body_mosaic_gpu_kernel', \
1900 bytes spill stores, 1612 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'body_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for body_mosaic_gpu_kernel
    1360 bytes stack frame, 1900 bytes spill stores, 1612 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 1360 bytes cumulative stack size, 1 bytes smem
ptxas info    : Compile time = 622.616 ms
"""
CODE = """\
.maxntid 384, 1, 1
setmaxnreg.dec.sync.aligned.u32 40;
setmaxnreg.inc.sync.aligned.u32 232;
wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3 {%r1}, %rd22, %rd23, p, 1, 1;
"""
LAUNCH = """\
    %c262176_i32 = arith.constant 262176 : i32
    %55 = gpu.launch async [%5] blocks() in () dynamic_shared_memory_size %c262176_i32 {
"""


@pytest.fixture
def dumped(tmp_path):
    """A kernel's dump, as Mosaic leaves it."""

    def dump(told):
        (tmp_path / "body_0.ptx").write_text(CODE)
        (tmp_path / "body_0.ptxas").write_text(told)
        (tmp_path / "body_0.before_layout_inference.txt").write_text(LAUNCH)
        return ahead.read_kernel(tmp_path / "body_0.ptx")

    return dump


def test_a_kernels_dump_is_read(dumped):
    assert dumped(SPILLED) == {
        "name": "body",
        "threads": 384,
        "registers": 255,
        "spill_bytes": 1900 + 1612,
        "stack_bytes": 1360,
        "shared_bytes": 262176,
        "wgmma": ["m64n256k32 e4m3"],
        "setmaxnreg": ["dec 40", "inc 232"],
        "advice": [
            "C7511 Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
            "insufficient register resources for the wgmma pipeline"
        ],
    }


def compiled(*kernels):
    return {"status": "compiled", "temp_bytes": 0, "kernels": list(kernels)}


def test_faults_are_named(dumped):
    kernel = dumped(SPILLED)
    told = table.faults("x (hopper)", compiled(kernel), "e4m3")
    assert told[0] == "body spills 3512 bytes of registers"
    assert told[1] == "body keeps 1360 bytes in local memory"
    assert told[2].startswith("body: ptxas says C7511 Potential")
    assert len(told) == 3
    clean = kernel | {"spill_bytes": 0, "stack_bytes": 0, "advice": ["C7519 a fence"]}
    assert table.faults("x (hopper)", compiled(clean), "e4m3") == []
    assert table.faults("x (hopper)", compiled(clean), None) == []
    wrong = ["wgmma of e4m3, not of bf16"]
    assert table.faults("x (hopper)", compiled(clean), "bf16") == wrong
    none = clean | {"wgmma": []}
    assert table.faults("x (hopper)", compiled(none), "bf16") == ["wgmma of nothing, not of bf16"]
    assert table.faults("x (tpu)", compiled(), "e4m3") == ["no kernel in the compiled program"]
    assert table.faults("x (tpu)", {"status": "failed", "why": "because"}, None) == ["because"]
    assert table.faults("x (xla)", {"status": "compiled", "temp_bytes": 1}, "e4m3") == []


def test_tpu_kernels_are_read():
    call = (
        '  %product.1 = bf16[8,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", '
        'backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0",'
        '"size":"2830336"},{"memory_space":"3","offset":"0","size":"7"}]}\n'
    )
    assert ahead.read_tpu_kernels(call + "  %y = bf16[8] add(%a, %b)\n") == [
        {"name": "product", "vmem_bytes": 2830336}
    ]


def test_differences_are_named():
    def of(compiler, **found):
        return {"h100": {"compiler": compiler, "cases": found}}

    before = of("a 1", x=compiled({"name": "k", "registers": 168, "wgmma": ["m64n128k32 e4m3"]}))
    assert table.differences(before, before) == []
    now = of("a 1", x=compiled({"name": "k", "registers": 170, "wgmma": []}))
    assert table.differences(before, now) == [
        "h100: x: kernels.0.registers was 168, is 170",
        "h100: x: kernels.0.wgmma was ['m64n128k32 e4m3'], is []",
    ]
    later = {"h100": now["h100"] | {"compiler": "a 2"}}
    assert table.differences(before, later) == []
    assert table.other_compilers(before, now) == []
    (loud,) = table.other_compilers(before, later)
    assert loud == "h100: compiled by a 2, the table's by a 1: FIGURES ARE NOT COMPARED"
    assert table.differences({}, now) == ["h100: not in the table"]
    assert table.differences(of("a 1"), now) == ["h100: x: not in the table"]
    assert table.gone(before, of("a 1")) == ["h100: x: in the table, and no case any more"]


REFUSED = [
    (kernel_resources, ["--only=fp8_matmull"], "--only=fp8_matmull: no such call; ops: fp8_matmul"),
    (kernel_resources, ["--target=h200"], "flag --target=h200: "),
    (kernel_resources, ["--aot=/nowhere"], "no compilers at /nowhere; `make aot` installs them"),
    (bench_kernels, ["--part=decoding"], "flag --part=decoding: "),
    (bench_kernels, ["--smoke", "--page=x.md"], "--page takes figures of an accelerator"),
    (bench_kernels, ["--target_out=x"], "--target_out describes a GPU; here is none"),
    (bench_kernels, ["--read=/nowhere/a.json"], "--read=/nowhere/a.json: "),
]


@pytest.mark.parametrize(("script", "arguments", "expected"), REFUSED)
def test_scripts_refuse_what_they_cannot_use(script, arguments, expected, capsys):
    assert script.main(["script", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"script: {expected}")
    assert err.count("\n") == 1


# ---- the benchmark ------------------------------------------------------------------------------


PARTS = ("product", "decode", "attention")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A smoke test's result: no device, no peer; some of the parts."""
    out = tmp_path_factory.mktemp("smoke") / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "keep_freed_memory", lambda: False)
        parts = [f"--part={part}" for part in PARTS]
        assert bench_kernels.main(["bench", "--torch=", f"--json_out={out}", *parts]) == 0
    return json.loads(out.read_text())


@pytest.mark.slow
def test_the_benchmark_runs_without_a_device(smoke):
    assert smoke["smoke"]
    assert smoke["machine"]["device"] == "cpu"
    assert smoke["not reached"] == []
    assert [(case["op"], case["shape"]) for case in smoke["cases"]] == [
        (case.op, case.shape) for case in cases(SMOKE) if case.part in PARTS
    ]
    for case in smoke["cases"]:
        assert case["by"][case["plain"]]["seconds"] > 0
        bound = bench.BOUNDS.get(case["part"], 5e-3)
        assert case["by"][case["plain"]]["error"] < bound
        if case["op"].startswith("fp8_matmul"):
            assert case["definition's error"] < 2e-3  # BF16's rounding


@pytest.mark.slow
def test_figures_make_a_page_but_a_smoke_test_does_not(smoke):
    empty = f"text\n{figures.BEGIN}\nold\n{figures.END}\nmore\n"
    with pytest.raises(ValueError, match="mean nothing"):
        figures.with_figures(empty, [smoke])
    real = smoke | {"smoke": False}
    for case in real["cases"]:
        case["kernel"] = case["plain"]
    text = figures.with_figures(empty, [real])
    assert text.startswith(f"text\n{figures.BEGIN}\n\n**cpu**")
    assert text.endswith(f"{figures.END}\nmore\n")
    assert "old" not in text
    assert figures.with_figures(text, [real]) == text
    rows = re.findall(r"^\| fp8_matmul \| 128x256x384 \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 1
    rate, share, *_ = rows[0].split(" | ")
    assert rate.endswith("TFLOP/s")
    assert share.endswith("%")
    other = real | {"machine": real["machine"] | {"device": "another"}}
    with pytest.raises(ValueError, match="another, cpu do not go on one page"):
        figures.with_figures(empty, [real, other])


def test_a_wrong_kernel_is_said_to_be_wrong_and_not_timed(monkeypatch):
    case = next(case for case in cases(SMOKE) if case.op == "fp8_matmul")
    import jax

    inputs = [case.make(jax.random.key(0))]
    wanted = case.call("reference", *inputs[0])
    bound = bench._bound(case, wanted)

    def ours(call):
        wrong = case._replace(call=call)
        return bench._ours(wrong, "xla", inputs, wanted, bound, smoke=True)

    right = ours(case.call)
    assert right["seconds"] > 0
    assert right["error"] < bound

    def one_tile_off(name, *arguments):
        return case.call(name, *arguments).at[:128, 128:].multiply(1.05)

    for call in (one_tile_off, lambda name, a, b: case.call(name, a, b) * float("nan")):
        found = ours(call)
        assert set(found) == {"wrong"}
        assert found["wrong"].startswith("a block is off by")

    def broken(name, *arguments):
        raise RuntimeError("no\nsuch thing")

    assert ours(broken) == {"wrong": "RuntimeError: no such thing"}


def test_inputs_are_enough_to_pass_the_cache():
    for num_bytes in (1 << 20, 1 << 24, 1 << 28, 1 << 32):
        count = measure.copies(num_bytes, seconds=1e-5)
        assert count >= 2
        assert count * num_bytes >= min(4 * measure.CACHE_BYTES, 48 * num_bytes)
        assert count * num_bytes <= measure.MOST_BYTES
    assert measure.copies(1 << 24, seconds=1e-2) == 15
