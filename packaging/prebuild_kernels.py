"""Compiles the GPU kernels for AMD cards with clang, for machines whose torch has no HIPRTC that works.

    python packaging/prebuild_kernels.py [--target gfx1100] [--kernel decode_split] [--clang clang-22] [--out FOLDER]

No ROCm is needed: clang of LLVM 17 or later with its AMDGPU target, and lld; both are in the `ziglang` package of PyPI.
What is compiled are the kernels of models that people run (kernel_models.py). A target's folder is replaced by what is
compiled now.
"""

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgekv.kernels.rt.compiler import compiler_options, define_options
from edgekv.kernels.rt.prebuilt import PREBUILT, prebuilt_name
from edgekv.kernels.rt.registry import KERNELS, KernelSpec, spec_key
from edgekv.kernels.rt.source import read_source

# Cards people have, and a family's common code for the rest of it.
CARDS = ("gfx1030", "gfx1100", "gfx1101", "gfx1151", "gfx1200", "gfx1201")
FAMILIES = ("gfx10-3-generic", "gfx11-generic", "gfx12-generic")
_WITHOUT_BF16 = "gfx10"
_NEWEST, _OLDEST = 24, 17


@dataclass(frozen=True)
class Clang:
    """Commands."""

    compiler: tuple[str, ...]
    linker: tuple[str, ...]

    @classmethod
    def find(cls, asked: str | None = None) -> "Clang":
        """`asked` or the newest on the path, with the lld of the same version; else those inside `ziglang`."""
        names = [f"clang-{number}" for number in range(_NEWEST, _OLDEST - 1, -1)] + ["clang"]
        for command in [shlex.split(asked)] if asked else [[name] for name in names]:
            program = shutil.which(command[0])
            if program is None:
                continue
            version = Path(command[0]).name.removeprefix("clang")
            linker = shutil.which(f"ld.lld{version}") or shutil.which("ld.lld")
            if linker is not None:
                return cls(tuple(command), (linker,))
        if asked is None and importlib.util.find_spec("ziglang") is not None:
            zig = (sys.executable, "-m", "ziglang")
            return cls((*zig, "clang"), (*zig, "ld.lld"))
        raise SystemExit("clang and ld.lld are needed: apt install clang lld, or pip install ziglang")

    def compile(self, text: str, spec: KernelSpec, target: str, folder: Path) -> bytes:
        """The object; `folder` is for what comes in between. Raises SystemExit with what was said."""
        source, assembly, part, result = (folder / f"kernel.{ending}" for ending in ("hip", "s", "o", "hsaco"))
        source.write_text(text, encoding="utf-8")
        options = (*compiler_options("hiprtc", target), *define_options(spec.defines))
        # What ROCm 6.0 loads already; a family's code is only in objects of version 6. No name made of the file's path.
        objects = (f"-mcode-object-version={6 if target in FAMILIES else 5}", "-fuse-cuid=none")
        bare = ("-x", "hip", "--cuda-device-only", "-nogpuinc", "-nogpulib", *objects)
        # In three steps, since zig's clang starts no linker that knows AMD's objects.
        self._run(*self.compiler, *bare, *options, "-S", str(source), "-o", str(assembly))
        machine = ("--target=amdgcn-amd-amdhsa", f"-mcpu={target}")
        self._run(*self.compiler, *machine, "-c", str(assembly), "-o", str(part))
        self._run(*self.linker, "-m", "elf64_amdgpu", "--no-undefined", "-shared", str(part), "-o", str(result))
        return result.read_bytes()

    @staticmethod
    def _run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}\n{done.stderr}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", help="may be repeated; all that are shipped if not said")
    parser.add_argument("--kernel", action="append", help="the name of a source, without its ending")
    parser.add_argument("--clang", help="the command")
    parser.add_argument("--out", type=Path, default=PREBUILT)
    asked = parser.parse_args(arguments)
    clang = Clang.find(asked.clang)
    for target in asked.target or (*CARDS, *FAMILIES):
        files = prebuild(clang, shipped(target, asked.kernel), target, asked.out)
        print(f"{target:16} {len(files):4} objects  {sum(file.stat().st_size for file in files):12,} bytes", flush=True)


def shipped(target: str, kernels: Sequence[str] | None = None) -> list[KernelSpec]:
    """What models need on a card, of these kernels or of all."""
    from kernel_models import model_kernels  # with all kernels' Python halves, and torch

    specs = model_kernels(has_bf16=not target.startswith(_WITHOUT_BF16))
    return [spec for spec in specs if not kernels or PurePosixPath(spec.source).stem in kernels]


def prebuild(clang: Clang, specs: Iterable[KernelSpec], target: str, out: Path) -> list[Path]:
    """All objects for one card, in place of those that were there before."""
    out.mkdir(parents=True, exist_ok=True)
    texts: dict[str, str] = {}
    # Several kernels of a source are in one object.
    unique = {}
    for spec in specs:
        if spec.source not in texts:
            texts[spec.source] = read_source(KERNELS, spec.source)
        unique[spec_key(spec, texts[spec.source])] = spec
    with tempfile.TemporaryDirectory(prefix="new-", dir=out) as name:
        finished = Path(name, target)
        finished.mkdir()

        def make(key: str) -> None:
            spec = unique[key]
            with tempfile.TemporaryDirectory(dir=name) as between:
                code = clang.compile(texts[spec.source], spec, target, Path(between))
            (finished / prebuilt_name(spec.source, key, code)).write_bytes(code)

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(make, unique))
        shutil.rmtree(out / target, ignore_errors=True)
        finished.rename(out / target)
    return sorted((out / target).iterdir())


if __name__ == "__main__":
    main()
