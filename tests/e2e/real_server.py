"""The real program in a process of its own, as a person starts it, with the bundled demo model."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx2

ROOT = Path(__file__).parents[2]
START_S = 120.0  # patience on a busy machine; how long it takes is printed by the server and measured in benches


class RealServer:
    """A running `edgekv serve`; `module` is what is run instead of edgekv."""

    def __init__(self, *arguments: str, variables: Mapping[str, str] | None = None, module: str = "edgekv") -> None:
        command = [sys.executable, "-m", module, "serve", "--port", "0", *arguments]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EDGEKV_")}
        environment |= variables or {}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, name="server output")
        self._reader.start()
        if not self._ready.wait(START_S) or self.process.poll() is not None:
            self.kill()
            raise AssertionError("the server did not start:\n" + "\n".join(self.lines))
        match = re.search(r"ready: (http://\S+)/v1", self.output)
        assert match is not None
        self.url = match[1]

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=30)

    def post(self, path: str, body: object) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=120)

    def chat(self, text: str, **fields: object) -> httpx2.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert values, f"no metric {name}"
        return sum(map(float, values))

    def wait_until_quiet(self, timeout_s: float = 30.0) -> None:
        """Until no sequence runs or waits."""
        deadline = time.monotonic() + timeout_s
        while self.metric("vllm:num_requests_running") or self.metric("vllm:num_requests_waiting"):
            assert time.monotonic() < deadline, "sequences still run"
            time.sleep(0.05)

    @property
    def num_threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    @property
    def rss_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM, and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        finally:
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if "ready: " in line:
                self._ready.set()
        self._ready.set()


@contextmanager
def real_server(
    *arguments: str, variables: Mapping[str, str] | None = None, module: str = "edgekv"
) -> Iterator[RealServer]:
    """A server that ends with the block, cleanly. `variables` are set in its environment; see `RealServer`."""
    server = RealServer(*arguments, variables=variables, module=module)
    try:
        yield server
        assert server.stop() == 0, server.output
    finally:
        server.kill()
