"""Whether a build of torch has code for a card, and which build to install where it has none.

Runs in: anywhere (no torch); owns: nothing. What official builds are for is what pytorch.org's release matrix
(RELEASE.md) and its scripts (.ci/manywheel/build_cuda.sh, .ci/docker/manywheel/build.sh) say of torch 2.9 to 2.14:

    CUDA 12.6   sm_50 to sm_90; the last for sm_50 to sm_70, and not built any more from torch 2.15 on
    CUDA 12.8   sm_70 (from torch 2.11 on sm_75) to sm_120; until torch 2.11
    CUDA 13     sm_75 to sm_120 and what is younger
    ROCm        gfx900, gfx906 (before 7.14), gfx908, gfx90a, gfx942, gfx950, gfx1030, gfx1100 to gfx1102 (from torch
                2.14 on gfx1103), gfx1150, gfx1151, gfx1200, gfx1201; AMD's own index has builds for more
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_PYTORCH, _AMD = "https://download.pytorch.org/whl", "https://repo.amd.com/rocm/whl-multi-arch/"
_OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
# The generations of which AMD's index has all (gfx1010 to gfx1012, gfx1030 to gfx1036, ...), and the server cards.
_AMD_BUILDS = re.compile(r"gfx(101[0-2]|103[0-6]|110[0-3]|115[0-3]|120[01]|908|90a|942|950)")


@dataclass(frozen=True, slots=True)
class NoCode:
    """Why a build of torch does not run on a card, and what to do about it."""

    reason: str
    remedy: str


def driven_as(target: str | None, environ: Mapping[str, str]) -> str | None:
    """What AMD's runtime takes the card for: HSA_OVERRIDE_GFX_VERSION=10.3.0 makes a gfx1030 of any.

    None where that is not known, as where the variable speaks of a card by number.
    """
    if target is None or not target.startswith("gfx"):
        return target
    if any(name.startswith(f"{_OVERRIDE}_") for name in environ):
        return None
    told = environ.get(_OVERRIDE)
    if not told:
        return target
    match = _VERSION.fullmatch(told.strip())
    return f"gfx{int(match[1])}{int(match[2]):x}{int(match[3]):x}" if match else None


def why_no_code(target: str, built_for: Sequence[str]) -> NoCode | None:
    """Why a build with code for `built_for` (see TorchBuild) does not run on the card `target`; None where it does.

    Nothing is known of a build that does not say what it is for.
    """
    if not built_for or any(_runs(each, target) for each in built_for):
        return None
    remedy = _amd_remedy(target) if target.startswith("gfx") else _nvidia_remedy(target, built_for)
    return NoCode(f"has code for {', '.join(built_for)} and none for {target}", remedy)


def _runs(built: str, target: str) -> bool:
    """CUDA programming guide, binary and PTX compatibility; LLVM's AMDGPU usage, generic processors."""
    if target.startswith("gfx") or built.startswith("gfx"):
        name = built.split(":")[0]  # features, as in gfx90a:xnack-, are for the runtime to look at
        family = name.removesuffix("-generic").replace("-", "")
        # gfx9-generic is the one that does not run on all that begin alike (gfx908 is none of them).
        return name == target or (name.endswith("-generic") and family != "gfx9" and target.startswith(family))
    kind, number = built.split("_")
    own, card = _capability(number), _capability(target)
    if number.endswith("a"):  # for this very one
        return own == card
    if number.endswith("f") or kind == "sm":  # machine code, within a major version
        return own[0] == card[0] and own[1] <= card[1]
    return own <= card  # PTX, which the driver compiles for all that are younger


def _nvidia_remedy(target: str, built_for: Sequence[str]) -> str:
    card, newest = _capability(target), max(map(_capability, built_for), default=(0, 0))
    if card > newest:
        return f"install a torch for a newer CUDA: pip install -U torch --index-url {_PYTORCH}/cu130"
    if card < (5, 0):
        return "there is no build for it that edgekv could run with: device: cpu"
    if card < (7, 5):
        return f"CUDA 12.6 is the last with it: pip install 'torch<2.15' --index-url {_PYTORCH}/cu126"
    return f"install an official build: pip install torch --index-url {_PYTORCH}/cu130"


def _amd_remedy(target: str) -> str:
    if _AMD_BUILDS.fullmatch(target):
        return f"AMD builds it for this card: pip install 'torch[device-{target}]' --index-url {_AMD}"
    return "there is no official build for it: device: cpu"


def _capability(target: str) -> tuple[int, int]:
    """(8, 9) of sm_89, compute_89, or 89a."""
    number = int(re.sub(r"\D", "", target))
    return number // 10, number % 10
