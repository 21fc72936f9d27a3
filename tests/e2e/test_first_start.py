"""The first start on a machine: the kernels are compiled, and whoever waits sees that and may stop it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.kernels.cpu.library import available
from tests.e2e.real_server import ROOT
from tests.kernels.cpu import compiler

if not available(compile=True):
    pytest.skip("no compiled kernels here", allow_module_level=True)


@pytest.mark.parametrize(
    "end",
    [
        lambda server: server.send_signal(signal.SIGTERM),
        lambda server: os.killpg(server.pid, signal.SIGINT),  # as a terminal does it: to everybody in the group
    ],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_stop_during_the_compilation_is_as_clean_as_at_any_other_time(
    tmp_path: Path, end: Callable[["subprocess.Popen[str]"], None]
) -> None:
    started = tmp_path / "started"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EDGEKV_")}
    environment |= {
        "CXX": str(compiler.install(tmp_path, compile=f"echo >> {started}; sleep 60")),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "edgekv", "serve", "--port", "0", "--set", "logging.level=warning"]
    server = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    patience = threading.Timer(60, server.kill)
    patience.start()
    try:
        assert server.stdout is not None
        told = ""
        while "loading: compiling the CPU kernels (once)\n" not in told:
            told += (line := server.stdout.readline())
            assert line, told
        while not started.exists() and server.poll() is None:  # a compiler: the signal must not reach it
            time.sleep(0.01)
        end(server)
        told += server.communicate(timeout=30)[0]
    finally:
        patience.cancel()
        patience.join()
        server.kill()
        server.wait()
    assert server.returncode == 0, told
    assert told.endswith("edgekv has stopped\n")
    assert "could not compile" not in told
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["lock"]
