import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bench.peers.process import Launch, Server, ServerFailed, free_port

# Answers with a number that grows, and has a child that counts, too.
SCRIPT = """
import http.server, itertools, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    numbers = itertools.count()
    def do_GET(self):
        data = str(next(self.numbers)).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(data))); self.end_headers()
        self.wfile.write(data)
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    port = free_port()
    server = Server(Launch([sys.executable, "-c", SCRIPT, str(port)], port), tmp_path / "log")
    yield server
    server.stop()


def processes(port: int) -> list[psutil.Process]:
    found = [child for child in psutil.Process().children() if str(port) in child.cmdline()]
    return [*found, *(grandchild for child in found for grandchild in child.children())]


def test_a_frozen_server_and_its_children_stand_still_and_go_on(server: Server) -> None:
    port = server.launch.port
    everyone = processes(port)
    assert len(everyone) == 2
    server.freeze()
    wait_for(lambda: {process.status() for process in everyone} == {psutil.STATUS_STOPPED})
    with server.awake() as url:
        assert url == f"http://127.0.0.1:{port}/v1"
        with urllib.request.urlopen(url, timeout=5) as answer:
            assert answer.status == 200
    wait_for(lambda: {process.status() for process in everyone} == {psutil.STATUS_STOPPED})


def test_a_stopped_server_leaves_nobody_behind_even_frozen(server: Server) -> None:
    everyone = processes(server.launch.port)
    server.freeze()
    server.stop()
    wait_for(lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in everyone))


def test_a_server_that_ended_is_told_with_its_last_words(server: Server) -> None:
    everyone = processes(server.launch.port)
    for process in everyone:
        process.kill()
    wait_for(lambda: everyone[0].status() == psutil.STATUS_ZOMBIE)
    with pytest.raises(ServerFailed, match="ended with -9"):
        server.thaw()


def test_one_that_does_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    launch = Launch([sys.executable, "-c", "raise SystemExit('no such flag')"], free_port())
    with pytest.raises(ServerFailed, match="no such flag"):
        Server(launch, tmp_path / "log")


def wait_for(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
