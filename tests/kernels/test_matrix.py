"""Every kernel compiles for every card it is meant for, and nothing of it is spilled or lies where it must not."""

import re
import sys
from collections.abc import Sequence
from ctypes import Structure, c_int64, c_uint64
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from edgekv.kernels.rt.registry import KERNELS, KernelSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "packaging"))

import kernel_compilers
from kernel_compilers import NotCompiled, Unit, compiler
from kernel_matrix import TARGETS, Row, compile_here, main, row, rows, variant_name
from kernel_resources import CARDS, Resources, assembly_resources, cubin_resources
from kernel_variants import NEIGHBOURS, PACKAGES, variants

from edgekv.kernels.rt.compiler import CompilerMissing

WRONG = Path(__file__).parent / "matrix_cases" / "wrong.h"


class EkWrong(Structure):
    _fields_ = (("in", c_uint64), ("out", c_uint64), ("typed", c_uint64), ("count", c_int64))


def rows_of(target: str, specs: Sequence[KernelSpec]) -> list[Row]:
    """In this process alone: tests run beside each other already."""
    try:
        compiler(target)
    except CompilerMissing as error:
        pytest.skip(str(error))
    return list(rows(target, specs, compile_here(Unit.of(target, spec) for spec in specs)))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_and_keep_to_registers(target: str) -> None:
    found = rows_of(target, variants(target))
    wrong = [f"{variant_name(each.spec)}: {'; '.join(each.problems)}" for each in found if each.problems]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_in_the_matrix(target: str) -> None:
    """Several of one source are compiled together, and all of them are looked at."""
    written = {
        path.relative_to(KERNELS).as_posix()
        for package in PACKAGES
        for path in (KERNELS / package).glob("*.h")
        if re.search(r"^EK_KERN(_BLOCKS)?\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(written) > 5
    assert written <= {spec.source for spec in variants(target)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entry", "target", "problem"),
    [
        ("ek_spills", "sm_80", "bytes spilled"),
        ("ek_spills", "gfx1030", "registers spilled"),
        ("ek_spills", "gfx1100", "registers spilled"),
        ("ek_array", "sm_89", "memory of its own"),
        ("ek_array", "gfx1100", "memory of its own"),
        ("ek_flat", "gfx1100", "flat_"),
        ("ek_invalidates", "gfx1100", "buffer_gl0_inv"),
        ("ek_invalidates", "gfx1201", "global_inv"),
        ("ek_right", "gfx1030", None),
        ("ek_right", "gfx1100", None),
        ("ek_right", "gfx1201", None),
        ("ek_right", "sm_75", None),
    ],
)
def test_what_is_wrong_is_found(entry: str, target: str, problem: str | None) -> None:
    threads = 1024 if entry == "ek_spills" else 64
    found = rows_of(target, [KernelSpec(str(WRONG), entry, threads, EkWrong)])[0]
    if problem is None:
        assert not found.problems
    else:
        assert re.search(problem, "; ".join(found.problems)), found


@pytest.mark.slow
def test_the_table_has_a_line_for_each_variant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target", "gfx1100", "--target", "sm_89", "--kernel", "mma_cases"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"mma_cases.product F16=0 1w +\d+ +\d+ +\d+ +\d+ +2,304", table)
    assert re.search(r"4 kernels for 2 cards, 0 with something wrong", table)


@pytest.mark.parametrize("target", ["sm_90", "gfx1100"])
def test_what_was_compiled_is_not_compiled_again(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_compilers, "RESULTS", tmp_path)
    wrong = KernelSpec(str(WRONG), "ek_right", 64, EkWrong)
    (first, *_) = rows_of(target, [wrong])

    def refuse(*_: object) -> NoReturn:
        raise AssertionError

    monkeypatch.setattr(type(compiler(target)), "resources", refuse)
    assert rows_of(target, [wrong])[0] == first
    with pytest.raises(AssertionError):
        rows_of(target, [replace(wrong, defines={"EK_OTHER": 1})])


def test_what_does_not_compile_or_fit_is_wrong() -> None:
    spec = KernelSpec("attn/none.h", "ek_none", 1024, EkWrong)
    assert row("sm_80", spec, NotCompiled("line 1\nnone.h(3): error: no\n")).problems == (
        "does not compile: none.h(3): error: no",
    )
    assert row("sm_80", spec, {}).problems == ("there is no ek_none in what was compiled",)
    assert row("sm_80", spec, {"ek_none": Resources(65, 0, 0, 0)}).problems == ("not even one block fits",)
    assert row("sm_80", spec, {"ek_none": Resources(64, 0, 0, 0)}).problems == ()


def test_neighbours_have_one_variant_of_each_kernel() -> None:
    for target in NEIGHBOURS:
        few, every = variants(target), variants(target, everything=True)
        assert {(spec.source, spec.entry) for spec in few} == {(spec.source, spec.entry) for spec in every}
        assert len({(spec.source, spec.entry) for spec in few}) == len(few) < len(every)


LOG = """ptxas info    : 3 bytes gmem
ptxas info    : Compiling entry function 'ek_one' for 'sm_80'
ptxas info    : Function properties for ek_one
ptxas         .     224 bytes stack frame, 284 bytes spill stores, 532 bytes spill loads
ptxas info    : Used 24 registers, 16 bytes smem, 480 bytes cmem[0], 8 bytes cmem[2]
"""


def test_a_log_without_a_word_about_a_kernel_is_an_error() -> None:
    """So a compiler that says nothing does not pass for one that spills nothing."""
    with pytest.raises(ValueError, match="no ELF file"):
        cubin_resources(b"", LOG)


ASSEMBLY = """
ek_one:
\ts_load_dwordx4 s[0:3], s[4:5], 0x0
\tflat_load_dword v1, v[2:3]
\tbuffer_gl0_inv
\ts_endpgm
; a comment about flat_load_dword
\t.amdgpu_metadata
---
amdhsa.kernels:
  - .args: []
    .group_segment_fixed_size: 512
    .name:           ek_one
    .private_segment_fixed_size: 16
    .sgpr_spill_count: 1
    .vgpr_count:     40
    .vgpr_spill_count: 2
amdhsa.target:   amdgcn-amd-amdhsa--gfx1100
...
\t.end_amdgpu_metadata
"""


def test_assembly_says_what_a_kernel_takes() -> None:
    assert assembly_resources(ASSEMBLY) == {
        "ek_one": Resources(40, 2, 16, 512, ("buffer_gl0_inv", "flat_load_dword"), 1),
    }
    with pytest.raises(ValueError, match="no metadata"):
        assembly_resources("s_endpgm")


@pytest.mark.parametrize(
    ("target", "registers", "shared_bytes", "threads", "warps"),
    [
        ("sm_80", 32, 0, 128, 64),  # all that a multiprocessor has
        ("sm_80", 128, 0, 128, 16),  # 65,536 registers / (128 · 32)
        ("sm_80", 32, 40 << 10, 128, 16),  # four blocks of 41 KiB in 164
        ("sm_86", 255, 0, 128, 8),
        ("sm_75", 64, 0, 1024, 32),
        ("gfx1100", 96, 0, 128, 64),
        ("gfx1100", 97, 0, 128, 48),  # 120 of 1,536: 12 waves of each SIMD
        ("gfx1030", 128, 0, 128, 32),
        ("gfx1100", 96, 32 << 10, 128, 16),  # four blocks in 128 KiB
    ],
)
def test_resident_warps(target: str, registers: int, shared_bytes: int, threads: int, warps: int) -> None:
    assert CARDS[target].resident_warps(Resources(registers, 0, 0, shared_bytes), threads) == warps
