"""From a kernel's name to a launch, with compilers and drivers that are not there."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from ctypes import Structure
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from edgekv.kernels.rt.apart import CompilerApart
from edgekv.kernels.rt.cache import CodeCache
from edgekv.kernels.rt.compiler import CompileFailed, Compiler, CompilerMissing
from edgekv.kernels.rt.device_error import DeviceLost, OutOfDeviceMemory
from edgekv.kernels.rt.driver import Driver, DriverKind
from edgekv.kernels.rt.prebuilt import prebuilt_name
from edgekv.kernels.rt.registry import KernelSpec, KernelUnavailable, Loader, spec_key
from edgekv.kernels.rt.rtc import RuntimeCompiler
from edgekv.kernels.rt.source import read_source
from tests.kernels.rt.fakes import SOURCE, Args, Calls, fake, install, write_kernels

SCALE = KernelSpec("attn/scale.h", "ek_scale", 128, Args, {"EK_KV": 0, "EK_D": 128})
MISSING = CompilerMissing("there is no NVRTC", "install one")


@dataclass
class Machine:
    """One with a card, a compiler and a cache; each `loader` is a new start of the server."""

    folder: Path
    calls: Calls
    kind: DriverKind = "cuda"

    @property
    def sources(self) -> Path:
        return self.folder / "kernels"

    @property
    def cache(self) -> CodeCache:
        (self.folder / "cache").mkdir(exist_ok=True)
        return CodeCache(self.folder / "cache")

    def compiler(self) -> Compiler:
        if self.kind == "hip":
            return CompilerApart(RuntimeCompiler("hiprtc", fake("hiprtc")))
        return RuntimeCompiler("nvrtc", fake("nvrtc"))

    def loader(
        self, compiler: Compiler | CompilerMissing | None = None, *, target: str = "sm_90", keeps: bool = True
    ) -> Loader:
        return Loader(
            target,
            compiler or self.compiler(),
            Driver(self.kind, fake(self.kind)),
            self.cache if keeps else None,
            prebuilt=self.folder / "prebuilt",
            sources=self.sources,
        )

    def prebuild(self, target: str, spec: KernelSpec = SCALE) -> bytes:
        """What a build with clang would have left for it."""
        text = read_source(self.sources, spec.source)
        code = f"FAKE for {target}\n{text}".encode()
        path = self.folder / "prebuilt" / target / prebuilt_name(spec.source, spec_key(spec, text), code)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(code)
        return code

    @property
    def compilations(self) -> int:
        return sum("CompileProgram" in line for line in self.calls.read())


@pytest.fixture
def machine(tmp_path: Path, calls: Calls) -> Machine:
    write_kernels(tmp_path / "kernels")
    return Machine(tmp_path, calls)


@pytest.fixture
def amd(machine: Machine) -> Machine:
    machine.kind = "hip"
    return machine


def test_a_kernel_is_compiled_for_the_card_with_its_defines_and_launched(machine: Machine) -> None:
    loader = machine.loader()
    args = Args(to=4096, rows=3)
    loader.launcher(SCALE)((2, 1, 1), args, 16)
    lines = loader.code(SCALE).decode().splitlines()
    assert lines[:5] == ["FAKE", "--gpu-architecture=sm_90", "-std=c++17", "-DEK_D=128", "-DEK_KV=0"]
    assert "typedef int i32;" in lines
    assert [line for line in machine.calls.read() if "Launch" in line] == [
        f"cuLaunchKernel ek_scale (2 1 1) (128 1 1) 0 0x10 1 {bytes(args).hex()}"
    ]


def test_an_amd_card_gets_its_own_options(amd: Machine) -> None:
    lines = amd.loader(target="gfx1100").code(SCALE).decode().splitlines()
    assert lines[1:3] == ["--offload-arch=gfx1100", "-std=c++17"]


def test_it_is_compiled_once_for_all_starts(machine: Machine) -> None:
    codes = [machine.loader().code(SCALE) for _ in range(3)]
    assert machine.compilations == 1
    assert len(set(codes)) == 1
    assert machine.loader().launcher(SCALE)


def test_without_a_cache_it_is_compiled_at_every_start(machine: Machine) -> None:
    for _ in range(2):
        loader = machine.loader(keeps=False)
        assert loader.launcher(SCALE) is loader.launcher(SCALE)
    assert machine.compilations == 2


def test_kernels_of_one_source_are_one_module(machine: Machine) -> None:
    loader = machine.loader()
    shift = replace(SCALE, entry="ek_shift", threads=64)
    assert loader.launcher(SCALE).function.module is loader.launcher(shift).function.module
    assert machine.calls.read().count("cuModuleLoadData") == 1
    other = replace(SCALE, defines={"EK_KV": 1, "EK_D": 128})
    assert loader.launcher(other).function.module is not loader.launcher(SCALE).function.module


def changed_source(machine: Machine) -> Loader:
    write_kernels(machine.sources, SOURCE + "// changed")
    return machine.loader()


def changed_header(machine: Machine) -> Loader:
    (machine.sources / "common" / "types.h").write_text("typedef long i32;")
    return machine.loader()


def another_build_of_the_compiler(machine: Machine) -> Loader:
    path = install("nvrtc", machine.folder / "compiler")
    with path.open("ab") as file:
        file.write(b"\0")
    return machine.loader(RuntimeCompiler("nvrtc", path))


def another_version_of_the_compiler(machine: Machine) -> Loader:
    os.environ["FAKE_VERSION"] = "12.9"
    try:
        return machine.loader()
    finally:
        del os.environ["FAKE_VERSION"]


@pytest.mark.parametrize(
    "change",
    [
        changed_source,
        changed_header,
        another_build_of_the_compiler,
        another_version_of_the_compiler,
        lambda machine: machine.loader(target="sm_80"),
    ],
)
def test_what_was_compiled_from_or_with_or_for_something_else_is_not_taken(
    machine: Machine, change: Callable[[Machine], Loader]
) -> None:
    machine.loader().code(SCALE)
    change(machine).code(SCALE)
    assert machine.compilations == 2
    machine.loader().code(SCALE)


@pytest.mark.parametrize("defines", [{"EK_KV": 1, "EK_D": 128}, {"EK_KV": 0}, {"EK_KV": 0, "EK_D": 128, "EK_G": 4}])
def test_other_defines_are_another_kernel(machine: Machine, defines: dict[str, int]) -> None:
    machine.loader().code(SCALE)
    machine.loader().code(replace(SCALE, defines=defines))
    assert machine.compilations == 2


def test_the_order_of_defines_says_nothing(machine: Machine) -> None:
    machine.loader().code(SCALE)
    same = replace(SCALE, defines={"EK_D": 128, "EK_KV": 0})
    assert same == SCALE
    assert hash(same) == hash(SCALE)
    machine.loader().code(same)
    assert machine.compilations == 1


def test_defines_cannot_be_changed_afterwards() -> None:
    defines = {"EK_KV": 0}
    spec = KernelSpec("attn/scale.h", "ek_scale", 128, Args, defines)
    defines["EK_KV"] = 1
    assert str(spec) == "attn/scale.h (EK_KV=0)"
    with pytest.raises(TypeError):
        spec.defines["EK_KV"] = 1  # type: ignore[index]


class OtherArgs(Structure):
    _fields_ = Args._fields_


@pytest.mark.parametrize(
    "other",
    [
        replace(SCALE, source="attn/other.h"),
        replace(SCALE, entry="ek_shift"),
        replace(SCALE, threads=64),
        replace(SCALE, args=OtherArgs),
        replace(SCALE, defines={"EK_KV": 0, "EK_D": 64}),
        replace(SCALE, shared_bytes=1024),
    ],
)
def test_kernels_that_differ_in_anything_are_launched_apart(machine: Machine, other: KernelSpec) -> None:
    assert other != SCALE
    assert hash(other) != hash(SCALE)
    if other.source == SCALE.source:
        loader = machine.loader()
        assert loader.launcher(other) is not loader.launcher(SCALE)
        assert loader.launcher(replace(other)) is loader.launcher(other)


def test_a_damaged_file_of_the_cache_is_compiled_anew(machine: Machine) -> None:
    code = machine.loader().code(SCALE)
    (path,) = (machine.folder / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert machine.loader().code(SCALE) == code
    assert machine.compilations == 2
    assert machine.loader().launcher(SCALE)
    assert machine.compilations == 2


def test_the_first_compilation_is_announced_once(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    loader = machine.loader()
    with caplog.at_level(logging.INFO):
        for value in range(3):
            loader.code(replace(SCALE, defines={"EK_KV": value}))
    assert [record.getMessage() for record in caplog.records] == [
        "compiling the GPU kernels for sm_90 (once, about a second each)"
    ]


def test_a_source_that_does_not_compile_is_quoted(machine: Machine) -> None:
    write_kernels(machine.sources, SOURCE + "#error no such fragment")
    with pytest.raises(CompileFailed, match=r"attn/scale\.h\(3\): error: no such fragment"):
        machine.loader().launcher(SCALE)
    assert list((machine.folder / "cache").iterdir()) == []


# ---- cards that the compiler does not know


@pytest.mark.parametrize(
    ("target", "compiled"),
    [("sm_80", "sm_80"), ("sm_89", "sm_86"), ("sm_121", "sm_120"), ("sm_103", "sm_100"), ("sm_87", "sm_87")],
)
def test_a_card_newer_than_the_compiler_runs_its_nearest_older_relatives_code(
    machine: Machine, target: str, compiled: str
) -> None:
    lines = machine.loader(target=target).code(SCALE).decode().splitlines()
    assert lines[1] == f"--gpu-architecture={compiled}"


@pytest.mark.parametrize("target", ["sm_70", "sm_130"])
def test_a_card_without_relatives_is_refused_with_the_compilers_version(machine: Machine, target: str) -> None:
    message = rf"attn/scale\.h .*: nvrtc 12\.8 does not know {target}, and .*; install a torch that was built for this"
    with pytest.raises(KernelUnavailable, match=message):
        machine.loader(target=target).launcher(SCALE)


def test_a_compiler_that_does_not_say_is_asked(machine: Machine) -> None:
    old = RuntimeCompiler("nvrtc", fake("nvrtc", old=True))
    assert "--gpu-architecture=sm_89" in machine.loader(old, target="sm_89").code(SCALE).decode()


# ---- no compiler


def test_without_a_compiler_what_came_with_the_package_is_launched(amd: Machine) -> None:
    code = amd.prebuild("gfx1100")
    loader = amd.loader(MISSING, target="gfx1100")
    loader.launcher(SCALE)((1, 1, 1), Args(), 0)
    assert loader.code(SCALE) == code
    assert amd.compilations == 0
    assert "hipModuleLaunchKernel" in amd.calls.read()[-1]


def test_without_either_the_kernel_is_refused_with_a_remedy(machine: Machine) -> None:
    with pytest.raises(KernelUnavailable) as raised:
        machine.loader(MISSING).launcher(SCALE)
    assert str(raised.value) == (
        "attn/scale.h (EK_D=128, EK_KV=0): "
        "there is no NVRTC, and edgekv brings no compiled kernel for sm_90; install one"
    )
    assert (raised.value.spec, raised.value.remedy) == (SCALE, "install one")
    assert machine.calls.read() == []


@pytest.mark.parametrize("what", ["source", "define", "object", "card"])
def test_what_was_prebuilt_of_something_else_is_not_taken(amd: Machine, what: str) -> None:
    amd.prebuild("gfx1100")
    spec, target = SCALE, "gfx1100"
    match what:
        case "source":
            write_kernels(amd.sources, SOURCE + "// changed")
        case "define":
            spec = replace(SCALE, defines={"EK_KV": 3, "EK_D": 128})
        case "object":
            (path,) = (amd.folder / "prebuilt" / "gfx1100").iterdir()
            path.write_bytes(path.read_bytes() + b"\0")
        case "card":
            target = "gfx1101"
    with pytest.raises(KernelUnavailable):
        amd.loader(MISSING, target=target).launcher(spec)


def test_a_compiler_that_crashes_is_replaced_by_what_came_with_the_package(
    amd: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    write_kernels(amd.sources, SOURCE + "#crash")
    with pytest.raises(CompileFailed, match="crashed"):
        amd.loader(target="gfx1100").launcher(SCALE)
    code = amd.prebuild("gfx11-generic")
    assert amd.loader(target="gfx1100").code(SCALE) == code
    assert "HIPRTC could not compile attn/scale.h" in caplog.text
    assert list((amd.folder / "cache").iterdir()) == []


# ---- the device


def test_out_of_memory_while_loading_costs_that_attempt(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = machine.loader()
    monkeypatch.setenv("FAKE_FAIL", "cuModuleLoadData:2")
    with pytest.raises(OutOfDeviceMemory):
        loader.launcher(SCALE)
    assert loader.launcher(SCALE)
    assert machine.compilations == 1


def test_a_lost_device_gets_nothing_loaded_any_more(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = machine.loader()
    launcher = loader.launcher(SCALE)
    monkeypatch.setenv("FAKE_FAIL", "cuLaunchKernel:700")
    with pytest.raises(DeviceLost):
        launcher((1, 1, 1), Args(), 0)
    with pytest.raises(DeviceLost):
        loader.launcher(replace(SCALE, defines={"EK_KV": 1}))


def test_closing_unloads_every_module_once_and_all_can_be_loaded_again(machine: Machine) -> None:
    loader = machine.loader()
    for value in range(3):
        loader.launcher(replace(SCALE, defines={"EK_KV": value}))
    machine.calls.forget()
    loader.close()
    loader.close()
    assert machine.calls.read() == ["cuModuleUnload"] * 3
    loader.launcher(SCALE)((1, 1, 1), Args(), 0)


# ---- all together, in a process that finds nothing but torch's wheels

START = """
import ctypes, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from edgekv.kernels.rt import libraries, registry
libraries._SYSTEM = ()
registry.KERNELS = registry.Loader.__init__.__kwdefaults__["sources"] = Path(sys.argv[2])

class Args(ctypes.Structure):
    _fields_ = (("to", ctypes.c_uint64), ("rows", ctypes.c_int64), ("by", ctypes.c_float), ("flags", ctypes.c_int32))

loader = registry.open_loader(sys.argv[3], sys.argv[4], [Path(sys.argv[1]) / "torch" / "lib"])
spec = registry.KernelSpec("attn/scale.h", "ek_scale", 128, Args)
try:
    loader.launcher(spec)((1, 1, 1), Args(), 0)
    print("launched")
except registry.KernelUnavailable as error:
    print(error)
"""


def start(machine: Machine, target: str) -> str:
    """With PATH and CUDA_HOME emptied, and no other variable but where its modules and its cache are."""
    variables = {
        "PATH": "",
        "CUDA_HOME": "",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "LD_LIBRARY_PATH": str(machine.folder / "driver"),
        "XDG_CACHE_HOME": str(machine.folder / "home"),
        "FAKE_LOG": str(machine.calls.path),
    }
    command = [sys.executable, "-c", START, str(machine.folder / "site"), str(machine.sources), machine.kind, target]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_machine_with_a_card_and_no_toolkit_compiles_once(machine: Machine) -> None:
    install("cuda", machine.folder / "driver")
    install("nvrtc", machine.folder / "site" / "nvidia" / "cuda_nvrtc" / "lib")
    assert [start(machine, "sm_90") for _ in range(2)] == ["launched\n"] * 2
    assert machine.compilations == 1


def test_so_does_one_of_amd(amd: Machine) -> None:
    for library in ("hip", "hiprtc"):
        install(library, amd.folder / "site" / "torch" / "lib")
    assert [start(amd, "gfx1100") for _ in range(2)] == ["launched\n"] * 2
    assert amd.compilations == 1


def test_one_without_a_compiler_is_told_what_to_do(amd: Machine) -> None:
    install("hip", amd.folder / "site" / "torch" / "lib")
    told = start(amd, "gfx1100")
    assert "there is no HIPRTC, and edgekv brings no compiled kernel for gfx1100; torch's ROCm builds bring it" in told
