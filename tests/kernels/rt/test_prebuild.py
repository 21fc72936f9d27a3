"""packaging/prebuild_kernels.py: with a clang that compiles nothing, and with a real one where there is one."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgekv.kernels.rt.compiler import CompilerMissing
from edgekv.kernels.rt.driver import Driver
from edgekv.kernels.rt.prebuilt import find_prebuilt
from edgekv.kernels.rt.registry import KERNELS, KernelSpec, Loader, spec_key
from edgekv.kernels.rt.source import read_source
from tests.kernels.rt.fakes import Args, Calls, fake, write_kernels

SCRIPT = Path(__file__).parents[3] / "packaging" / "prebuild_kernels.py"
SPECS = [
    KernelSpec("attn/scale.h", "ek_scale", 128, Args, {"EK_KV": 0}),
    KernelSpec("attn/scale.h", "ek_shift", 128, Args, {"EK_KV": 0}),  # of the same object
    KernelSpec("attn/scale.h", "ek_scale", 128, Args, {"EK_KV": 1}),
]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("prebuild_kernels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "prebuild_kernels", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "KERNELS", write_kernels(tmp_path / "kernels"))
    return module


@pytest.fixture
def clang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hands on what it is given to compile, and notes what it is asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    copy = (
        "#!/bin/sh\n"
        f'echo "$(basename "$0") $*" >> {folder}/asked\n'
        'input=; output=; previous=\nfor word in "$@"; do\n'
        '  case "$word" in *.hip|*.s|*.o) [ "$previous" = -o ] || input=$word;; esac\n'
        '  [ "$previous" = -o ] && output=$word; previous=$word\n'
        'done\n{ echo FAKE; cat "$input"; } > "$output"\n'
    )
    for name in ("clang-19", "clang", "ld.lld-19"):
        (folder / name).write_text(copy)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_what_it_leaves_is_what_a_machine_without_a_compiler_loads(
    script: ModuleType, clang: Path, tmp_path: Path, calls: Calls
) -> None:
    out = tmp_path / "prebuilt"
    files = script.prebuild(script.Clang.find(), SPECS, "gfx1100", out)
    assert len(files) == 2
    assert sorted(path.name for path in out.iterdir()) == ["gfx1100"]
    missing = CompilerMissing("none", "none")
    loader = Loader("gfx1100", missing, Driver("hip", fake("hip")), prebuilt=out, sources=tmp_path / "kernels")
    for spec in SPECS:
        loader.launcher(spec)((1, 1, 1), Args(), 0)
    assert sum("LaunchKernel" in line for line in calls.read()) == 3


def test_clang_gets_the_options_that_hiprtc_would_get(script: ModuleType, clang: Path, tmp_path: Path) -> None:
    script.prebuild(script.Clang.find(), SPECS[:1], "gfx1100", tmp_path / "prebuilt")
    compile_, assemble, link = (clang / "asked").read_text().splitlines()
    assert compile_.startswith("clang-19 -x hip --cuda-device-only -nogpuinc -nogpulib -mcode-object-version=5 ")
    assert " --offload-arch=gfx1100 -std=c++17 -O3 -DEK_KV=0 " in compile_
    assert "-mcpu=gfx1100" in assemble
    assert link.startswith("ld.lld-19 ")


def test_what_was_there_before_is_replaced(script: ModuleType, clang: Path, tmp_path: Path) -> None:
    out, found = tmp_path / "prebuilt", script.Clang.find()
    before = script.prebuild(found, SPECS, "gfx1100", out)
    other = script.prebuild(found, SPECS, "gfx1101", out)
    after = script.prebuild(found, SPECS[:1], "gfx1100", out)
    assert after == before[:1] or after == before[1:]
    assert all(path.exists() for path in other)


def test_a_clang_that_fails_leaves_what_was_there_and_is_quoted(
    script: ModuleType, clang: Path, tmp_path: Path
) -> None:
    out = tmp_path / "prebuilt"
    before = script.prebuild(script.Clang.find(), SPECS, "gfx1100", out)
    (clang / "ld.lld-19").write_text("#!/bin/sh\necho undefined symbol: ek_tanh >&2; exit 1\n")
    with pytest.raises(SystemExit, match="undefined symbol: ek_tanh"):
        script.prebuild(script.Clang.find(), SPECS, "gfx1100", out)
    assert all(path.exists() for path in before)
    assert [path.name for path in out.iterdir()] == ["gfx1100"]


def test_what_is_not_named_is_what_models_need(
    script: ModuleType,
    clang: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "KERNELS", KERNELS)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    models = importlib.import_module("kernel_models")
    for name, count in (("SHAPES", 1), ("FILES", 2), ("COMPUTE_UNITS", 1)):
        monkeypatch.setattr(models, name, getattr(models, name)[:count])
    sources = {spec.source for spec in script.shipped("gfx1100")}
    assert {"attn/decode_split.h", "gemm/gemv.h", "fused/sample.h"} <= sources
    assert {spec.defines.get("EK_ACT", 1) for spec in script.shipped("gfx1030")} == {1}, "it computes in float16"
    script.main(["--target", "gfx1100", "--kernel", "gated", "--out", str(tmp_path / "out")])
    (path, _) = sorted((tmp_path / "out" / "gfx1100").iterdir())
    assert path.name.startswith("gated-")
    assert capsys.readouterr().out.startswith("gfx1100             2 objects ")


def test_without_a_clang_it_is_said_where_to_get_one(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install ziglang"):
        script.Clang.find()


ROPE = KernelSpec("fused/rope.h", "ek_rope", 128, Args, {"EK_ACT": 0})
NORM = KernelSpec("fused/rmsnorm.h", "ek_rmsnorm", 256, Args, {"EK_ACT": 1, "EK_ADD": 1, "EK_VECTORS": 2})


@pytest.mark.parametrize(("target", "version"), [("gfx1030", 3), ("gfx1100", 3), ("gfx1201", 3), ("gfx11-generic", 4)])
def test_a_real_clang_makes_objects_of_our_kernels_that_are_found_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, version: int
) -> None:
    try:
        clang = script.Clang.find(os.environ.get("EDGEKV_CLANG"))
    except SystemExit:
        pytest.skip("needs clang with lld, or ziglang")
    monkeypatch.setattr(script, "KERNELS", KERNELS)
    files = script.prebuild(clang, [ROPE, NORM], target, tmp_path)
    assert len(files) == 2
    card = {"gfx11-generic": "gfx1103"}.get(target, target)
    for spec in (ROPE, NORM):
        code = find_prebuilt(tmp_path, card, spec.source, spec_key(spec, read_source(KERNELS, spec.source)))
        assert code is not None
        assert (code[:4], code[7], code[8]) == (b"\x7fELF", 64, version)  # of HSA, code objects 5 and 6
        assert int.from_bytes(code[16:18], "little") == 3  # a shared object
        assert int.from_bytes(code[18:20], "little") == 224  # of an AMD GPU
        assert f"{spec.entry}.kd".encode() in code
    if target == "gfx1030":
        assert [path.name for path in script.prebuild(clang, [ROPE], target, tmp_path / "again")] == [files[1].name]
