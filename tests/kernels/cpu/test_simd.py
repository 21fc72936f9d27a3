"""The sixteen lanes are the same on all instruction sets: results, bit for bit, beside those of plain C.

The linear layers are compared on what no other test runs: Arm, in an emulator, if there are one and a compiler.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from edgekv.kernels.cpu.build import SOURCES, find_compiler
from edgekv.kernels.cpu.library import load_library

SIMD, LINEAR = (Path(__file__).parent / "csrc" / name for name in ("simd_cases.cpp", "linear_cases.cpp"))
FLAGS = ("-std=c++17", "-O1", "-w", "-ffp-contract=off", "-I", str(SOURCES))
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = tuple(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "bf16"))
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM_COMPILER, ARM_RUNNER = "aarch64-linux-gnu-g++", "qemu-aarch64"



def results(
    folder: Path, compiler: list[str], source: Path, flags: tuple[str, ...], *, runner: tuple[str, ...] = ()
) -> list[str]:
    program = folder / "cases"
    subprocess.run([*compiler, *FLAGS, *flags, str(source), "-o", str(program), "-lm"], check=True)
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def plain_results(folder: Path, source: Path) -> list[str]:
    """With fused multiplication where the machine has it, so that it rounds as the others do."""
    compiler = find_compiler()
    if compiler is None or (IS_X86 and "avx2" not in load_library().tiers):
        pytest.skip("nothing to compare")
    return results(folder, compiler, source, ("-DEK_SIMD_PLAIN", *(("-mfma",) if IS_X86 else ())))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return plain_results(tmp_path_factory.mktemp("plain"), SIMD)


def has_vnni() -> bool:
    """AVX-VNNI, which is not AVX-512's."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and " avx_vnni " in cpu.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("tier", "flags"),
    [("avx2", AVX2), ("avx2", (*AVX2, "-mavxvnni")), ("avx512", AVX512)],
    ids=["avx2", "vnni", "avx512"],
)
def test_x86(plain: list[str], tmp_path: Path, tier: str, flags: tuple[str, ...]) -> None:
    compiler = find_compiler()
    if compiler is None or tier not in load_library().tiers or ("-mavxvnni" in flags and not has_vnni()):
        pytest.skip("this machine does not have it")
    assert results(tmp_path, compiler, SIMD, flags) == plain


def on_arm(folder: Path, source: Path, flags: tuple[str, ...]) -> list[str]:
    if shutil.which(ARM_COMPILER) is None or shutil.which(ARM_RUNNER) is None:
        pytest.skip(f"needs {ARM_COMPILER} and {ARM_RUNNER}")
    return results(folder, [ARM_COMPILER, "-static"], source, flags, runner=(ARM_RUNNER, "-cpu", "max"))


@pytest.mark.parametrize("flags", [(), ("-march=armv8.2-a+dotprod",), ("-march=armv8.6-a",)], ids=["8", "8.2", "8.6"])
def test_arm(plain: list[str], tmp_path: Path, flags: tuple[str, ...]) -> None:
    assert on_arm(tmp_path, SIMD, flags) == plain


@pytest.mark.slow
def test_linear_layers_on_arm(tmp_path: Path) -> None:
    found = on_arm(tmp_path, LINEAR, ("-march=armv8.2-a+dotprod",))
    assert found == plain_results(tmp_path, LINEAR)
