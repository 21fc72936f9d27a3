"""What `edgekv doctor` finds about a card's own kernels: compiler, driver, and where compiled ones are kept.

Runs in: the main thread; owns: nothing. torch is not imported, and nothing is put on a card.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgekv.cli.finding import Finding
from edgekv.kernels.private_folder import is_private
from edgekv.kernels.rt.cache import cache_folder
from edgekv.kernels.rt.compiler import CALLED, CompilerKind, CompilerMissing
from edgekv.kernels.rt.device_error import DriverError
from edgekv.kernels.rt.driver import DriverKind
from edgekv.kernels.rt.installed import DriverMissing, find_compiler, find_driver
from edgekv.kernels.rt.prebuilt import PREBUILT, prebuilt_targets
from edgekv.model.card_shape import has_kernels
from edgekv.smi.torch_code import why_no_code

if TYPE_CHECKING:
    from edgekv.smi.cards import Survey
    from edgekv.smi.torch_build import TorchBuild

_SLOWER = "models run several times slower, through torch"
_KEEP = "set XDG_CACHE_HOME to a folder that is yours alone"


def kernel_findings(survey: "Survey", build: "TorchBuild") -> Iterator[Finding]:
    """Of the cards of one vendor, which `build` drives."""
    folders = (build.libraries,) if build.libraries is not None else ()
    targets = [card.target for card in survey.cards if card.target is not None]
    if targets and not any(map(has_kernels, targets)):
        yield Finding("ok", "GPU kernels", f"none for {', '.join(targets)}, only from sm_75 and gfx1030 on; {_SLOWER}")
        return
    kind: DriverKind = "cuda" if survey.vendor == "nvidia" else "hip"
    yield _compiler("nvrtc" if kind == "cuda" else "hiprtc", folders, build, targets)
    yield _driver(kind, folders, build)
    yield _cache()


def _compiler(kind: CompilerKind, folders: tuple[Path, ...], build: "TorchBuild", targets: list[str]) -> Finding:
    called = CALLED[kind]
    try:
        compiler = find_compiler(kind, folders, major=_major(build))
    except CompilerMissing as error:
        if targets and all(map(_is_prebuilt, targets)):
            return Finding("ok", called, f"{error.reason}; the kernels that came with edgekv are used")
        return Finding("warn", called, f"{error.reason}; {_SLOWER}", error.remedy)
    _, version, _ = compiler.identity.split()
    lacking = next((each for each in targets if why_no_code(each, compiler.targets or ()) is not None), None)
    if lacking is not None:
        lost = f"{version} does not compile for {lacking}; {_SLOWER}"
        return Finding("warn", called, lost, "install a torch that was built for this card")
    return Finding("ok", called, version)


def _driver(kind: DriverKind, folders: tuple[Path, ...], build: "TorchBuild") -> Finding:
    called = "CUDA driver" if kind == "cuda" else "HIP runtime"
    try:
        driver = find_driver(kind, folders)
    except DriverMissing as error:
        return Finding("warn", called, error.reason, error.remedy)
    except DriverError as error:
        return Finding("warn", called, str(error), "restart the machine; if it stays so, install the driver again")
    if kind == "hip":
        return Finding("ok", called, f"{driver.version // 10_000_000}.{driver.version // 100_000 % 100}, {driver.path}")
    # cuda.h, CUDA_VERSION: 1000 times major, 10 times minor.
    version, wanted = f"{driver.version // 1000}.{driver.version % 1000 // 10}", _major(build)
    if wanted is not None and driver.version // 1000 < wanted:
        older = f"it speaks CUDA {version}, and torch was built with {build.cuda}"
        fix = f"update NVIDIA's driver, or install a torch for CUDA {driver.version // 1000}"
        return Finding("warn", called, older, fix)
    return Finding("ok", called, f"CUDA {version}")


def _cache() -> Finding:
    folder = cache_folder()
    if folder is None:
        return Finding("warn", "GPU kernels", "there is no home folder to keep compiled ones in", _KEEP)
    if folder.exists() and not is_private(folder):
        return Finding("warn", "GPU kernels", f"made anew at every start: others may write to {folder}", _KEEP)
    return Finding("ok", "GPU kernels", f"compiled when first needed, kept in {folder}")


def _is_prebuilt(target: str) -> bool:
    return any((PREBUILT / name).is_dir() for name in prebuilt_targets(target))


def _major(build: "TorchBuild") -> int | None:
    """CUDA's, that torch was built with."""
    return None if build.cuda is None else int(build.cuda.split(".")[0])
