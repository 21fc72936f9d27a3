"""Servers that are compared: started once, and frozen while another is measured.

Runs in: the main thread; owns: the processes it starts.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

STOP_S = 20.0


class ServerFailed(Exception):
    """It did not start, or is gone."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a server: `command` and `environ` on top of our own; it answers GET `health` with 200 when ready."""

    command: Sequence[str]
    port: int
    health: str = "/v1/models"
    environ: Mapping[str, str] = field(default_factory=dict)
    start_s: float = 600.0

    @property
    def url(self) -> str:
        """Its OpenAI endpoint."""
        return f"http://127.0.0.1:{self.port}/v1"


class Server:
    """One running server; what it says goes to a log file."""

    def __init__(self, launch: Launch, log: Path) -> None:
        """Raises ServerFailed, with the end of the log, if it does not answer in time."""
        self.launch, self._log = launch, log
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                launch.command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, **launch.environ},
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def freeze(self) -> None:
        """Stop all of its processes where they are: some spin while they have nothing to do."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on. Raises ServerFailed where it has ended."""
        if self._process.poll() is not None:
            raise ServerFailed(f"{self.launch.command[0]} ended with {self._process.returncode}; {self._tail()}")
        self._signal(signal.SIGCONT)

    @contextlib.contextmanager
    def awake(self) -> Iterator[str]:
        """Its endpoint, for as long as the block lasts."""
        self.thaw()
        try:
            yield self.launch.url
        finally:
            self.freeze()

    def stop(self) -> None:
        """End it and all of its processes."""
        workers = self._workers()
        self._signal(signal.SIGCONT)
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for worker in workers:  # one whose parent left it behind; psutil sees when a number is another process by now
            with contextlib.suppress(psutil.Error):
                worker.kill()

    def _wait(self) -> None:
        address = f"http://127.0.0.1:{self.launch.port}{self.launch.health}"
        deadline = time.monotonic() + self.launch.start_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(address, timeout=5) as got:
                if got.status == 200:
                    return
            time.sleep(0.25)
        raise ServerFailed(f"{' '.join(self.launch.command)} did not start; {self._tail()}")

    def _workers(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.Error:
            return []

    def _signal(self, number: signal.Signals) -> None:
        workers = self._workers()
        if self._process.poll() is None:
            self._process.send_signal(number)
        for worker in workers:
            with contextlib.suppress(psutil.Error):
                worker.send_signal(number)

    def _tail(self) -> str:
        return f"{self._log} ends with:\n{self._log.read_text(errors='replace')[-2000:]}"


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
