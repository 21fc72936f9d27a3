"""The bindings of NVRTC and HIPRTC against libraries that compile nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgekv.kernels.rt.apart import CompilerApart
from edgekv.kernels.rt.compiler import CompileFailed, Compiler, CompilerKind, compiler_options, define_options
from edgekv.kernels.rt.rtc import RuntimeCompiler
from tests.kernels.rt.fakes import Calls, fake, install

KINDS: list[CompilerKind] = ["nvrtc", "hiprtc"]
NAME = "attn/scale.h"
OPTIONS = ["--gpu-architecture=sm_89", "-std=c++17", "-DEK_D=128"]
ERROR = {"nvrtc": "NVRTC_ERROR_OUT_OF_MEMORY", "hiprtc": "HIPRTC_ERROR_OUT_OF_MEMORY"}
CODE = {"nvrtc": "CUBIN", "hiprtc": "Code"}


@pytest.fixture(params=KINDS)
def runtime(request: pytest.FixtureRequest, calls: Calls) -> RuntimeCompiler:
    return RuntimeCompiler(request.param, fake(request.param))


@pytest.fixture(params=["here", "apart"])
def compiler(request: pytest.FixtureRequest, runtime: RuntimeCompiler) -> Compiler:
    return runtime if request.param == "here" else CompilerApart(runtime)


def test_code_is_what_the_compiler_makes_of_all_that_it_is_given(compiler: Compiler) -> None:
    headers = {"common/types.h": "typedef int i32;", "a.h": "α"}
    compiled = compiler.compile("int main; // β", NAME, headers, OPTIONS)
    lines = ["FAKE", *OPTIONS, "common/types.h", "typedef int i32;", "a.h", "α", "", "int main; // β", ""]
    assert compiled.code.decode() == "\n".join(lines)
    assert compiled.log == ""


def test_a_program_is_made_compiled_and_destroyed(runtime: RuntimeCompiler, calls: Calls) -> None:
    runtime.compile("int x;", NAME, {}, OPTIONS)
    assert calls.read() == [f"{runtime.kind}{call}Program {NAME}" for call in ("Create", "Compile", "Destroy")]


def test_what_the_compiler_says_is_handed_on(compiler: Compiler) -> None:
    assert compiler.compile("#warn a loop was not unrolled", NAME, {}, []).log == "a loop was not unrolled"


def test_an_error_is_quoted_with_its_line_and_the_whole_log(compiler: Compiler, calls: Calls) -> None:
    with pytest.raises(CompileFailed) as raised:
        compiler.compile("#error no such thing\nint x;", NAME, {}, OPTIONS)
    error = raised.value
    assert error.summary == f"{NAME}(3): error: no such thing"
    assert error.log.splitlines() == [f"{NAME}: note: compiling", error.summary, "1 error detected."]
    assert error.log.strip() in str(error)
    assert calls.read()[-1] == f"{compiler.kind}DestroyProgram {NAME}"


@pytest.mark.parametrize("call", ["CreateProgram", "CompileProgram", "Get{}Size", "Get{}"])
def test_a_call_that_fails_is_named_and_leaks_no_program(
    runtime: RuntimeCompiler, call: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = runtime.kind + call.format(CODE[runtime.kind])
    monkeypatch.setenv("FAKE_FAIL", f"{function}:1")
    with pytest.raises(CompileFailed, match=f"^{NAME}: .*{ERROR[runtime.kind]}") as raised:
        runtime.compile("int x;", NAME, {}, [])
    if call != "CompileProgram":
        assert function in raised.value.summary
    has_destroyed = f"{runtime.kind}DestroyProgram {NAME}" in calls.read()
    assert has_destroyed == (call != "CreateProgram")
    assert runtime.compile("int x;", NAME, {}, []).code


@pytest.mark.parametrize("call", ["GetProgramLogSize", "GetProgramLog"])
def test_a_log_that_is_not_to_be_had_hides_no_error(
    runtime: RuntimeCompiler, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", f"{runtime.kind}{call}:1")
    with pytest.raises(CompileFailed, match="ERROR_COMPILATION"):
        runtime.compile("#error x", NAME, {}, [])
    monkeypatch.setenv("FAKE_FAIL", f"{runtime.kind}{call}:1:1")
    assert runtime.compile("int x;", NAME, {}, []).code


def test_an_error_that_the_compiler_has_no_name_for(runtime: RuntimeCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", f"{runtime.kind}CreateProgram:77")
    with pytest.raises(CompileFailed, match="error 77"):
        runtime.compile("int x;", NAME, {}, [])


def test_no_code_is_an_error(compiler: Compiler) -> None:
    with pytest.raises(CompileFailed, match="made no code"):
        compiler.compile("#nothing", NAME, {}, [])


def test_a_library_that_is_no_compiler_is_refused(runtime: RuntimeCompiler, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is not "):
        RuntimeCompiler(runtime.kind, fake("cuda"))
    text = tmp_path / "libnvrtc.so.12"
    text.write_text("no library")
    with pytest.raises(OSError):
        RuntimeCompiler(runtime.kind, text)


def test_a_library_that_does_not_say_its_version_is_refused(
    runtime: RuntimeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", f"{runtime.kind}Version:1")
    with pytest.raises(OSError, match="does not say its version"):
        RuntimeCompiler(runtime.kind, runtime.path)


def test_nvrtc_says_what_it_compiles_for_and_others_do_not(runtime: RuntimeCompiler) -> None:
    if runtime.kind == "hiprtc":
        assert runtime.targets is None
        return
    assert runtime.targets == ("sm_75", "sm_80", "sm_86", "sm_87", "sm_90", "sm_100", "sm_101", "sm_120")
    assert RuntimeCompiler("nvrtc", fake("nvrtc", old=True)).targets is None


def test_the_identity_changes_with_the_version_and_with_any_of_its_files(
    runtime: RuntimeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = runtime.kind
    path = install(kind, tmp_path / "first")
    (tmp_path / "first" / "libother.so").write_text("not a part of it")
    first = RuntimeCompiler(kind, path).identity
    again = install(kind, tmp_path / "second")
    assert RuntimeCompiler(kind, again).identity == first  # where and when it was installed says nothing
    part = {"nvrtc": "libnvrtc-builtins.so.11.0", "hiprtc": "libamd_comgr.so.3"}[kind]
    (tmp_path / "second" / part).write_text("part of it")
    second = RuntimeCompiler(kind, again).identity
    (tmp_path / "second" / part).write_text("another part of it")
    third = RuntimeCompiler(kind, again).identity
    monkeypatch.setenv("FAKE_VERSION", "12.9")
    fourth = RuntimeCompiler(kind, path).identity
    assert len({first, second, third, fourth}) == 4
    assert fourth.startswith(f"{kind} 12.9 ")


BUILTINS = """
import sys
from pathlib import Path
from edgekv.kernels.rt.rtc import RuntimeCompiler
print(len(RuntimeCompiler("nvrtc", Path(sys.argv[1])).compile("int x;", "x.h", {}, []).code))
"""


@pytest.mark.parametrize("has_builtins", [True, False])
def test_nvrtcs_second_library_is_loaded_from_beside_it(tmp_path: Path, has_builtins: bool) -> None:
    path = install("nvrtc", tmp_path)
    if has_builtins:
        install("builtins", tmp_path)
    shutil.copy(fake("builtins"), tmp_path / "libnvrtc-builtins.so.13.0")  # not of this version
    environment = {"FAKE_BUILTINS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": ""}
    command = [sys.executable, "-c", BUILTINS, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == has_builtins, done.stderr
    assert has_builtins or "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE" in done.stderr


def test_options_name_target_language_and_defines() -> None:
    assert compiler_options("nvrtc", "sm_89") == ("--gpu-architecture=sm_89", "-std=c++17")
    assert compiler_options("hiprtc", "gfx1100")[:2] == ("--offload-arch=gfx1100", "-std=c++17")
    assert define_options({"EK_KV": 2, "EK_D": 128}) == ("-DEK_D=128", "-DEK_KV=2")
