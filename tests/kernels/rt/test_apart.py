"""A compiler in a process of its own: what it cannot do to this one. That it compiles is in test_rtc.py."""

import os
from pathlib import Path

import pytest

from edgekv.kernels.rt.apart import CompilerApart
from edgekv.kernels.rt.compiler import CompileFailed
from edgekv.kernels.rt.rtc import RuntimeCompiler
from tests.kernels.rt.fakes import Calls, fake, install

NAME = "attn/scale.h"


@pytest.fixture
def compiler(calls: Calls) -> CompilerApart:
    return CompilerApart(RuntimeCompiler("hiprtc", fake("hiprtc")))


def test_it_is_the_same_compiler(compiler: CompilerApart) -> None:
    here = RuntimeCompiler("hiprtc", fake("hiprtc"))
    assert (compiler.kind, compiler.identity, compiler.targets) == (here.kind, here.identity, here.targets)


def test_a_crash_is_a_failure_to_compile(compiler: CompilerApart) -> None:
    with pytest.raises(CompileFailed, match=r"HIPRTC crashed \(SIGABRT\)"):
        compiler.compile("#crash", NAME, {}, [])
    assert compiler.compile("int x;", NAME, {}, []).code


def test_one_that_never_ends_is_ended() -> None:
    compiler = CompilerApart(RuntimeCompiler("hiprtc", fake("hiprtc")), patience_seconds=0.5)
    with pytest.raises(CompileFailed, match=r"HIPRTC was still busy after 0\.5 s"):
        compiler.compile("#hang", NAME, {}, [])


def test_what_it_prints_does_not_get_into_the_code(compiler: CompilerApart) -> None:
    assert compiler.compile("#chatter", NAME, {}, []).code == b"FAKE\n\n#chatter\n"


def test_modules_in_the_folder_of_the_server_are_not_run(
    compiler: CompilerApart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json.py", "edgekv.py", "sitecustomize.py"):
        (tmp_path / name).write_text("raise SystemExit('planted')")
    monkeypatch.chdir(tmp_path)
    assert compiler.compile("int x;", NAME, {}, []).code


def test_it_needs_nothing_of_the_environment(compiler: CompilerApart, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name not in ("FAKE_LOG", "PYTEST_CURRENT_TEST"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "")
    assert compiler.compile("int x;", NAME, {}, []).code


def test_a_library_that_has_gone_is_a_failure_to_compile(tmp_path: Path) -> None:
    path = install("hiprtc", tmp_path)
    compiler = CompilerApart(RuntimeCompiler("hiprtc", path))
    path.unlink()
    with pytest.raises(CompileFailed, match=path.name):
        compiler.compile("int x;", NAME, {}, [])


def test_where_no_process_can_be_started_nothing_is_compiled(
    compiler: CompilerApart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(CompileFailed, match="no process could be started for HIPRTC"):
        compiler.compile("int x;", NAME, {}, [])
