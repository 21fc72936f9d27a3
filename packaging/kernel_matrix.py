"""Compiles the GPU kernels for every card they are meant for, and says what they take of it.

    python packaging/kernel_matrix.py [--target sm_89] [--kernel decode_split] [--all]

Both compilers come with pip: NVRTC in nvidia-cuda-nvrtc, clang in ziglang. No card is needed, nor anything of CUDA or
ROCm. It fails where registers are spilled, a thread has memory of its own (or an array in LDS that nobody declared),
or, on AMD's cards, where there are FLAT accesses or a cache is invalidated.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the kernels of this very tree, and its tests'

from kernel_compilers import NotCompiled, Unit, compiled, compiler
from kernel_resources import CARDS, WARP, Resources
from kernel_variants import variants
from rich.console import Console
from rich.progress import track

from edgekv.kernels.rt.compiler import CompilerMissing
from edgekv.kernels.rt.registry import KernelSpec

TARGETS = tuple(CARDS)
Outcome = dict[str, Resources] | NotCompiled


@dataclass(frozen=True)
class Row:
    """A kernel for a card; `problems` are reasons to fail."""

    spec: KernelSpec
    target: str
    resources: Resources | None
    problems: tuple[str, ...]
    log: str = ""

    @property
    def warps(self) -> int:
        """Resident ones on a multiprocessor; on AMD's cards on a SIMD, of which it has four."""
        if self.resources is None:
            return 0
        warps = CARDS[self.target].resident_warps(self.resources, self.spec.threads)
        return warps if self.target.startswith("sm_") else warps // 4


def rows(target: str, specs: Iterable[KernelSpec], outcomes: Mapping[Unit, Outcome]) -> Iterator[Row]:
    """Those of `specs`, and behind them what else is in their sources: once, and where something is wrong with it.

    Kernels that nobody named are taken to have blocks of as many threads.
    """
    specs = list(specs)
    named, seen = {(Unit.of(target, spec), spec.entry) for spec in specs}, set[tuple[str, str]]()
    for spec in specs:
        unit = Unit.of(target, spec)
        outcome = outcomes[unit]
        yield row(target, spec, outcome)
        for entry in () if isinstance(outcome, NotCompiled) else outcome:
            if (unit, entry) in named:
                continue
            named.add((unit, entry))
            other = row(target, replace(spec, entry=entry), outcome)
            if other.problems or (spec.source, entry) not in seen:
                yield other
            seen.add((spec.source, entry))


def row(target: str, spec: KernelSpec, outcome: Outcome) -> Row:
    """One kernel for one card."""
    if isinstance(outcome, NotCompiled):
        return Row(spec, target, None, (f"does not compile: {outcome.summary}",), str(outcome))
    if spec.entry not in outcome:
        return Row(spec, target, None, (f"there is no {spec.entry} in what was compiled",))
    found = Row(spec, target, outcome[spec.entry], tuple(_problems(target, outcome[spec.entry])))
    return found if found.warps else replace(found, problems=(*found.problems, "not even one block fits"))


def _problems(target: str, found: Resources) -> Iterator[str]:
    if found.spills:
        yield f"{found.spills} {'bytes' if target.startswith('sm_') else 'registers'} spilled"
    if found.scalar_spills:
        yield f"{found.scalar_spills} scalar registers spilled"
    if found.local_bytes:
        yield f"{found.local_bytes} bytes of memory of its own for each thread"
    yield from found.forbidden


def compile_here(units: Iterable[Unit]) -> dict[Unit, Outcome]:
    """One after the other, in this process. Raises CompilerMissing."""
    return {unit: compiled(unit) for unit in units}


def compile_all(units: Sequence[Unit], processes: int) -> dict[Unit, Outcome]:
    """With a bar on a terminal."""
    console = Console(stderr=True)
    # NVRTC compiles one at a time in a process; theirs begin empty, since one that has threads must not be copied.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        outcomes = pool.map(compiled, units, chunksize=4)
        shown = track(outcomes, "compiling", len(units), console=console, disable=not console.is_terminal)
        return dict(zip(units, shown, strict=True))


def table(shown: Sequence[Row], targets: Sequence[str]) -> str:
    """A line for each variant; in a cell registers and resident warps."""
    by_variant: dict[str, dict[str, Row]] = {}
    for each in shown:
        by_variant.setdefault(variant_name(each.spec), {})[each.target] = each
    width = max(map(len, by_variant), default=0)
    limits = [CARDS[target].warps // (1 if target.startswith("sm_") else 4) for target in targets]
    header = [f"{'registers, warps of':{width}}", *(f"{target:>8}" for target in targets), "   shared"]
    most = [f"{'at most':{width}}", *(f"{limit:>8}" for limit in limits), ""]
    lines = [" ".join(header), " ".join(most)]
    for name, cells in by_variant.items():
        shared = max((each.resources.shared_bytes for each in cells.values() if each.resources), default=0)
        texts = (_cell(cells.get(target)) for target in targets)
        lines.append(" ".join([f"{name:{width}}", *texts, f"{shared:9,}"]))
    return "\n".join(lines)


def _cell(shown: Row | None) -> str:
    if shown is None:
        return f"{'·':>8}"
    if shown.resources is None:
        return f"{'FAILED':>8}"
    return f"{shown.resources.registers:>4} {shown.warps:>2}{'!' if shown.problems else ' '}"


def variant_name(spec: KernelSpec) -> str:
    """As decode_split.decode_split D=128 KV=0 4w."""
    defines = " ".join(f"{name.removeprefix('EK_')}={value}" for name, value in spec.defines.items())
    return f"{PurePosixPath(spec.source).stem}.{spec.entry.removeprefix('ek_')} {defines} {spec.threads // WARP}w"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated; all of them if not said")
    parser.add_argument("--kernel", action="append", help="the name of a source, without its ending")
    parser.add_argument("--all", action="store_true", help="all variants for cards that are nearly like another, too")
    parser.add_argument("--processes", type=int, default=2, help="how many compile at the same time")
    asked = parser.parse_args(arguments)
    targets = asked.target or TARGETS
    specs = {target: variants(target, everything=asked.all) for target in targets}
    if asked.kernel:
        specs = {
            target: [spec for spec in each if PurePosixPath(spec.source).stem in asked.kernel]
            for target, each in specs.items()
        }
    try:
        for target in targets:
            compiler(target)
    except CompilerMissing as error:
        raise SystemExit(str(error)) from None
    units = list(dict.fromkeys(Unit.of(target, spec) for target in targets for spec in specs[target]))
    outcomes = compile_all(units, asked.processes)
    found = [each for target in targets for each in rows(target, specs[target], outcomes)]
    print(table(found, targets))
    failures = [each for each in found if each.problems]
    for each in failures:
        print(f"{each.target} {variant_name(each.spec)}: {'; '.join(each.problems)}")
        if each.log and len(targets) == 1:
            print(each.log)
    print(f"{len(found)} kernels for {len(targets)} cards, {len(failures)} with something wrong")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
