"""Which builds of torch run on which cards, and which to install instead."""

import pytest

from edgekv.smi.torch_code import driven_as, why_no_code

CUDA_126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CUDA_128 = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
CUDA_130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
ROCM_72 = (
    "gfx900", "gfx906", "gfx908", "gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1101", "gfx1102", "gfx1200", "gfx1201",
    "gfx950", "gfx1150", "gfx1151",
)  # fmt: skip


@pytest.mark.parametrize(
    ("built_for", "runs", "fails"),
    [
        (CUDA_126, "sm_50 sm_52 sm_61 sm_75 sm_86 sm_87 sm_89 sm_90", "sm_37 sm_100 sm_120"),
        (CUDA_128, "sm_70 sm_72 sm_89 sm_103 sm_120 sm_121", "sm_61 sm_110"),
        (CUDA_130, "sm_75 sm_89 sm_120 sm_121 sm_130", "sm_61 sm_70 sm_110"),
        (("sm_86",), "sm_86 sm_89", "sm_80 sm_90"),
        (("compute_75",), "sm_75 sm_89 sm_120", "sm_70"),
        (("sm_90a",), "sm_90", "sm_89 sm_100"),
        (("sm_100f",), "sm_100 sm_103", "sm_90 sm_110"),
        (ROCM_72, "gfx90a gfx1030 gfx1100 gfx1151", "gfx1010 gfx1031 gfx1103 gfx1152"),
        (("gfx90a:xnack-", "gfx942"), "gfx90a gfx942", "gfx908"),
        (("gfx11-generic", "gfx10-3-generic", "gfx9-generic"), "gfx1100 gfx1153 gfx1036", "gfx1010 gfx1200 gfx908"),
        (("gfx1100",), "gfx1100", "sm_89"),
        ((), "sm_37 gfx803", ""),
    ],
)
def test_what_a_build_runs_on(built_for: tuple[str, ...], runs: str, fails: str) -> None:
    assert {target: why_no_code(target, built_for) for target in runs.split()} == dict.fromkeys(runs.split())
    for target in fails.split():
        lacking = why_no_code(target, built_for)
        assert lacking is not None, target
        assert lacking.reason == f"has code for {', '.join(built_for)} and none for {target}"


@pytest.mark.parametrize(
    ("target", "built_for", "fix"),
    [
        ("sm_61", CUDA_130, "pip install 'torch<2.15' --index-url https://download.pytorch.org/whl/cu126"),
        ("sm_70", CUDA_130, "whl/cu126"),
        ("sm_120", CUDA_126, "install a torch for a newer CUDA"),
        ("sm_37", CUDA_126, "no build for it that edgekv could run with: device: cpu"),
        ("sm_89", ("sm_75", "sm_90"), "install an official build"),
        (
            "gfx1103",
            ROCM_72,
            "pip install 'torch[device-gfx1103]' --index-url https://repo.amd.com/rocm/whl-multi-arch/",
        ),
        ("gfx1032", ROCM_72, "torch[device-gfx1032]"),
        ("gfx803", ROCM_72, "no official build for it: device: cpu"),
    ],
)
def test_what_to_install_instead(target: str, built_for: tuple[str, ...], fix: str) -> None:
    lacking = why_no_code(target, built_for)
    assert lacking is not None
    assert fix in lacking.remedy


@pytest.mark.parametrize(
    ("target", "environ", "seen"),
    [
        ("gfx1031", {}, "gfx1031"),
        ("gfx1031", {"HSA_OVERRIDE_GFX_VERSION": "10.3.0"}, "gfx1030"),
        ("gfx90c", {"HSA_OVERRIDE_GFX_VERSION": " 9.0.10 "}, "gfx90a"),
        ("gfx1031", {"HSA_OVERRIDE_GFX_VERSION": ""}, "gfx1031"),
        ("gfx1031", {"HSA_OVERRIDE_GFX_VERSION": "gfx1030"}, None),
        ("gfx1031", {"HSA_OVERRIDE_GFX_VERSION_1": "10.3.0"}, None),
        ("sm_89", {"HSA_OVERRIDE_GFX_VERSION": "10.3.0"}, "sm_89"),
        (None, {}, None),
    ],
)
def test_what_amds_runtime_takes_a_card_for(target: str | None, environ: dict[str, str], seen: str | None) -> None:
    assert driven_as(target, environ) == seen
