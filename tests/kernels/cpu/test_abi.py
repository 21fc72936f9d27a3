"""kernels/cpu/abi.py against what the compiler makes of src/ek.h: sizes, offsets, numbers; nothing is missing."""

import ctypes
import json
import re
import subprocess
from enum import IntEnum

import pytest

from edgekv.kernels.cpu import abi
from edgekv.kernels.cpu.build import SOURCES, find_compiler
from tests.kernels.cpu.room import library

HEADER = (SOURCES / "ek.h").read_text(encoding="utf-8")
STRUCTURES = {
    f"ek_{each.__name__.lower()}": each
    for each in vars(abi).values()
    if isinstance(each, type) and issubclass(each, ctypes.Structure) and each is not ctypes.Structure
}
ENUMS: dict[str, tuple[str, type[IntEnum]]] = {
    "ek_error": ("EK_ERROR_", abi.Error),
    "ek_format": ("EK_", abi.Format),
    "ek_epilogue": ("EK_", abi.Epilogue),
    "ek_kv_format": ("EK_KV_", abi.KvFormat),
    "ek_op_kind": ("EK_OP_", abi.OpKind),
}
CONSTANTS = {"EK_ABI_VERSION": abi.ABI_VERSION, "EK_PANEL": abi.PANEL, "EK_GROUP": abi.GROUP, "EK_SUPER": abi.SUPER} | {
    f"EK_FORM_{form.name}": int(form) for form in abi.Form
}


def fields(name: str) -> list[str]:
    """A structure's fields, as the header declares them."""
    body = re.search(rf"typedef struct {name} \{{(.*?)\}} {name};", HEADER, re.DOTALL)
    assert body is not None
    declarations = re.sub(r"//.*", "", body[1]).split(";")
    return [re.split(r"[\s*]+", part)[-1] for line in declarations for part in line.split(",") if part.strip()]


def members(name: str) -> list[str]:
    body = re.search(rf"enum {name} \{{(.*?)\}};", HEADER, re.DOTALL)
    assert body is not None
    return re.findall(r"\bEK_\w+", re.sub(r"//.*", "", body[1]))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the compiler makes of sizes, offsets and names."""
    wanted = {name: f"(long)({name})" for name in CONSTANTS}
    for name, structure in STRUCTURES.items():
        wanted[f"sizeof {name}"] = f"(long)sizeof({name})"
        wanted |= {f"{name}.{field[0]}": f"(long)offsetof({name}, {field[0]})" for field in structure._fields_}
    wanted |= {member: f"(long)({member})" for enum in ENUMS for member in members(enum)}
    prints = (f'  std::printf("%s\\"{name}\\": %ld", gap, {value}); gap = ", ";\n' for name, value in wanted.items())
    folder = tmp_path_factory.mktemp("abi")
    source, program = folder / "layout.cpp", folder / "layout"
    main = f'int main() {{\n  const char* gap = "{{";\n{"".join(prints)}  std::puts("}}");\n}}\n'
    source.write_text(f'#include <cstddef>\n#include <cstdio>\n#include "ek.h"\n{main}')
    compiler = find_compiler()
    assert compiler is not None
    subprocess.run([*compiler, "-std=c++17", f"-I{SOURCES}", str(source), "-o", str(program)], check=True)
    found: dict[str, int] = json.loads(subprocess.run([program], capture_output=True, check=True).stdout)
    return found


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_lie_in_memory_as_the_compiler_lays_them(compiled: dict[str, int], name: str) -> None:
    structure = STRUCTURES[name]
    assert [field[0] for field in structure._fields_] == fields(name)
    assert ctypes.sizeof(structure) == compiled[f"sizeof {name}"]
    offsets = {field[0]: getattr(structure, field[0]).offset for field in structure._fields_}
    assert offsets == {field: compiled[f"{name}.{field}"] for field in offsets}


def test_every_structure_but_the_tiers_is_mirrored() -> None:
    assert set(re.findall(r"typedef struct (ek_\w+) \{", HEADER)) == {*STRUCTURES, "ek_tier"}


@pytest.mark.parametrize("name", ENUMS)
def test_numbers_have_the_same_names(compiled: dict[str, int], name: str) -> None:
    prefix, mirror = ENUMS[name]
    found = {member.removeprefix(prefix): compiled[member] for member in members(name) if member != "EK_OK"}
    assert found == {each.name: each.value for each in mirror}


def test_constants(compiled: dict[str, int]) -> None:
    assert {name: compiled[name] for name in CONSTANTS} == CONSTANTS


def test_the_library_has_this_version() -> None:
    assert library().functions.ek_abi_version() == abi.ABI_VERSION


def test_structures_are_of_plain_types() -> None:
    """No pointer types: an address that Python keeps is one number."""
    plain = (ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, abi.Acts)
    assert all(field[1] in plain for structure in STRUCTURES.values() for field in structure._fields_)
