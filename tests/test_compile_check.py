"""What compilers say of a model on devices that are not there."""

import json
import os

import pytest

from experiments import command, compile_check
from experiments.ahead_of_time import topologies

TOKENS, LAYERS, DEVICES = 131_072, 61, 8
VOCAB, WIDTH = 129_280, 7168
# 671B are not asked for here: of 256 experts there are 16, of weights in BF16.
V3 = (
    *("--preset=deepseek_v3", f"--cached={TOKENS}"),
    *("--set=mesh.rules=decode", f"--set=mesh.tensor={DEVICES}"),
    *("--set=precision.param_dtype=bfloat16", "--set=precision.compute_dtype=bfloat16"),
    "--set=model.stacks.moe.blocks.0.ffn.num_experts=16",
)


def needs_compilers():
    if not (topologies.AOT / ".stamp").exists():
        reason = "no compilers for accelerators: `make aot` installs them"
        if os.environ.get("DSJAX_REQUIRE_AOT"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _allocator_left_alone(monkeypatch):
    monkeypatch.setattr(command, "keep_freed_memory", lambda: False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("topology", "more", "entry"),
    [
        ("h100:1x8", (), 1152),
        # TPUs keep whole tiles of 128 along an entry: 640 numbers where 576 are asked for.
        ("v6e:2x4", (), 1280),
        pytest.param("h100:1x8", ("--set=infer.cache=fp8",), 656, marks=pytest.mark.nightly),
        pytest.param("v6e:2x4", ("--set=infer.cache=fp8",), 800, marks=pytest.mark.nightly),
        pytest.param(
            "h100:1x8",
            ("--program=prefill", "--set=infer.prefill_chunk=2048"),
            1152,
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["h100", "v6e", "h100-fp8", "v6e-fp8", "h100-prefill"],
)
def test_v3_with_128k_cached_on_eight_devices(tmp_path, topology, more, entry):
    """An eighth of all layers' latents lies on each device, where a kernel reads it."""
    needs_compilers()
    out = tmp_path / "found.json"
    arguments = [f"--topology={topology}", *V3, *more, f"--json_out={out}"]
    assert compile_check.main(["compile_check", *arguments]) == 0
    found = json.loads(out.read_text())
    told = found["bytes_per_device"]
    cache = TOKENS * entry * LAYERS // DEVICES
    assert told["aliased"] == cache  # it is written where it lies, and has no other copy
    # Beside it are the weights, norms and tables that TPUs pad. A prefill has no use for the head.
    head = VOCAB * WIDTH * 2 // DEVICES if "--program=prefill" in more else 0
    wanted = told["weights"] - head + cache
    assert wanted <= told["arguments"] <= 1.001 * wanted
    print(topology, more, found["kernels"], told)
    assert found["kernels"]
    if "--program=prefill" in more:
        # Keys and values of this device's 16 heads, in BF16: once as they come, once as keys.
        assert told["temporaries"] < 2.2 * TOKENS * 16 * (192 + 128) * 2
    elif topology.startswith("v6e"):
        assert told["temporaries"] < cache / 5
    else:
        # XLA turns the weights of two products around for a single row (docs/attention.md).
        assert told["temporaries"] < 1.2 * TOKENS * 1152 * LAYERS // DEVICES


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--topology is needed"),
        (["--topology=h200:1x8"], "unknown topology 'h200:1x8'; known: h100:NODESxDEVICES"),
        (["--topology=v6e:8y"], "unknown topology"),
        (["--topology=h100:1x2x4"], "unknown topology 'h100:1x2x4'"),
        (["--topology=v6e:2x4", "--aot=nowhere"], "no compilers at nowhere; `make aot` installs"),
    ],
)
def test_what_cannot_be_compiled_is_said(arguments, told, capsys, tmp_path):
    (tmp_path / ".stamp").touch()
    given = [f"--aot={tmp_path}", *arguments]
    assert compile_check.main(["compile_check", *given]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--topology=tpu7x:2x2x1"], "the mesh has 1 devices, tpu7x:2x2x1 has 8"),
        (["--topology=v6e:3x5"], "no topology 'v6e:3x5': "),
    ],
)
def test_what_only_the_compiler_knows_is_said_too(arguments, told, capsys):
    needs_compilers()
    assert compile_check.main(["compile_check", "--preset=nano", *arguments]) == 2
    assert told in capsys.readouterr().err
