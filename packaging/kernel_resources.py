"""What a compiled kernel takes of a card: read from a cubin's ELF notes and ptxas' log, or from clang's assembly.

Neither nvdisasm nor llvm-readelf is needed.
"""

import re
import struct
from collections.abc import Container
from dataclasses import dataclass

import yaml

WARP = 32


@dataclass(frozen=True)
class Resources:
    """`local_bytes` is a thread's memory of its own: registers that were spilled, or an array with computed indices."""

    registers: int
    spills: int
    local_bytes: int
    shared_bytes: int
    forbidden: tuple[str, ...] = ()  # instructions
    scalar_spills: int = 0  # AMD's scalar registers, into lanes of vector registers while there are any


# ---- NVIDIA

_SECTION = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr
_SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym
_FORM_SIZED, _FRAME_SIZE, _REGISTERS = 0x04, 0x11, 0x2F  # EIFMT_SVAL, EIATTR_FRAME_SIZE, EIATTR_REGCOUNT
_SPILLS = re.compile(
    r"Function properties for '?(\w+)'?\s*\n[^\n]*?\b\d+ bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads"
)


def cubin_resources(cubin: bytes, log: str) -> dict[str, Resources]:
    """By the kernel's name. `log` is that of a compilation with --ptxas-options=--verbose. Raises ValueError."""
    sections = _sections(cubin)
    symbols = _symbols(cubin, sections)
    registers, frames = dict[str, int](), dict[str, int]()
    info = sections.get(".nv.info")
    for attribute, index, value in _attributes(cubin[info[0] : info[0] + info[1]] if info else b""):
        if attribute == _REGISTERS:
            registers[symbols[index]] = value
        elif attribute == _FRAME_SIZE:
            frames[symbols[index]] = value
    spills = {name: int(stores) + int(loads) for name, stores, loads in _SPILLS.findall(log)}
    kernels = [name.removeprefix(".text.") for name in sections if name.startswith(".text.")]
    if missing := [name for name in kernels if name not in spills]:
        raise ValueError(f"the compiler's log does not speak of {', '.join(missing)}: {log!r}")
    shared = {name: sections.get(f".nv.shared.{name}", (0, 0))[1] for name in kernels}
    return {name: Resources(registers[name], spills[name], frames.get(name, 0), shared[name]) for name in kernels}


def _sections(elf: bytes) -> dict[str, tuple[int, int]]:
    """Offset and size by name."""
    if elf[:5] != b"\x7fELF\x02":
        raise ValueError("no ELF file of 64 bits")
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [_SECTION.unpack_from(elf, offset + i * size) for i in range(count)]
    names = headers[names_index][4]
    return {_text(elf, names + header[0]): (header[4], header[5]) for header in headers}


def _symbols(elf: bytes, sections: dict[str, tuple[int, int]]) -> list[str]:
    start, size = sections[".symtab"]
    names = sections[".strtab"][0]
    entries = [_SYMBOL.unpack_from(elf, start + at) for at in range(0, size, _SYMBOL.size)]
    return [_text(elf, names + entry[0]) for entry in entries]


def _text(elf: bytes, start: int) -> str:
    return elf[start : elf.index(b"\0", start)].decode()


def _attributes(info: bytes) -> list[tuple[int, int, int]]:
    """Attribute, symbol and value of those records of .nv.info that consist of these."""
    found, at = [], 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != _FORM_SIZED:  # the size is the value
            continue
        if size == 8:
            found.append((attribute, *struct.unpack_from("<II", info, at)))
        at += size
    return found


# ---- AMD

_METADATA = re.compile(r"\.amdgpu_metadata\n(.*?)\n\s*\.end_amdgpu_metadata", re.DOTALL)
_LABEL = re.compile(r"^(\w+):", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+((?:flat|scratch)_\w+|buffer_gl[01]_inv|buffer_inv|global_inv)\b", re.MULTILINE)


def assembly_resources(assembly: str) -> dict[str, Resources]:
    """By the kernel's name. Raises ValueError.

    Forbidden are FLAT accesses, which wait for LDS as well, those of scratch memory, and invalidations of caches.
    """
    metadata = _METADATA.search(assembly)
    if metadata is None:
        raise ValueError("no metadata in the assembly")
    kernels = {kernel[".name"]: kernel for kernel in yaml.safe_load(metadata[1])["amdhsa.kernels"]}
    return {
        name: Resources(
            kernel[".vgpr_count"],
            kernel[".vgpr_spill_count"],
            kernel[".private_segment_fixed_size"],
            kernel[".group_segment_fixed_size"],
            tuple(sorted(set(_INSTRUCTION.findall(_code_of(name, assembly, kernels))))),
            kernel[".sgpr_spill_count"],
        )
        for name, kernel in kernels.items()
    }


def _code_of(kernel: str, assembly: str, kernels: Container[str]) -> str:
    """From the kernel's label to the next kernel's, or to the end of all code."""
    labels = [match for match in _LABEL.finditer(assembly) if match[1] in kernels]
    starts = [match.start() for match in labels if match[1] == kernel]
    if len(starts) != 1:
        raise ValueError(f"{kernel} begins {len(starts)} times")
    ends = (match.start() for match in labels if match.start() > starts[0])
    return assembly[starts[0] : next(ends, len(assembly))]


# ---- occupancy


@dataclass(frozen=True)
class Card:
    """Of a multiprocessor (NVIDIA: SM, AMD: WGP). Registers are of 32 lanes; they are given out in `granule`s."""

    registers: int
    granule: int
    warps: int
    blocks: int
    shared_bytes: int
    shared_granule: int
    shared_reserved: int  # of each block

    def resident_warps(self, resources: Resources, threads: int) -> int:
        """How many of the card's `warps` there can be at once of a kernel with blocks of so many threads."""
        warps = -(-threads // WARP)
        each = _up(max(resources.registers, 1), self.granule) * warps
        shared = _up(resources.shared_bytes + self.shared_reserved, self.shared_granule)
        by_shared = self.shared_bytes // shared if shared else self.blocks
        return warps * min(self.registers // each, self.blocks, self.warps // warps, by_shared)


def _up(value: int, granule: int) -> int:
    return -(-value // granule) * granule


def _sm(warps: int, blocks: int, shared_kib: int, *, reserved: int = 1024) -> Card:
    """65,536 registers of a lane are 2,048 of a warp, given out by 8 (CUDA programming guide, compute capabilities)."""
    return Card(2048, 8, warps, blocks, shared_kib << 10, 128, reserved)


def _wgp(registers: int, granule: int) -> Card:
    """Four SIMDs of 16 waves, and 128 KiB of LDS for all of them (LLVM, AMDGPUBaseInfo.cpp; AMD, RDNA 3 ISA)."""
    return Card(4 * registers, granule, 4 * 16, 32, 128 << 10, 1024, 0)


CARDS = {
    "sm_75": _sm(32, 16, 64, reserved=0),
    "sm_80": _sm(64, 32, 164),
    "sm_86": _sm(48, 16, 100),
    "sm_89": _sm(48, 24, 100),
    "sm_90": _sm(64, 32, 228),
    "sm_120": _sm(48, 24, 100),
    "gfx1030": _wgp(1024, 16),
    "gfx1100": _wgp(1536, 24),
    "gfx1101": _wgp(1536, 24),
    "gfx1151": _wgp(1536, 24),
    "gfx1200": _wgp(1536, 24),
    "gfx1201": _wgp(1536, 24),
}
