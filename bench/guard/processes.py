"""The two programs that a played trace is about: server and clients. Runs in: the player; owns: their processes."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from bench.guard.measure import Answers
from tests.sim import SimulatedCard

ROOT = Path(__file__).parents[2]
START_S = 120.0
FINISH_S = 90.0
STOP_S = 30.0


class NotServing(Exception):
    """The server did not start, or is gone; what it said last."""


class Server:
    """A running `bench.guard.server` on a card. Always ends with `stop`."""

    def __init__(self, card: SimulatedCard, steps: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("EDGEKV_")}
        # One arena: those of threads would look like small segments to who reads the process's mappings.
        environment |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "MALLOC_ARENA_MAX": "1"}
        environment |= card.environment()
        command = [sys.executable, "-m", "bench.guard.server", str(card.folder), str(steps)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, name="server output")
        self._reader.start()
        self._ready.wait(START_S)
        found = re.search(r"ready: (http://\S+)/v1", self.output)
        if found is None:
            self.stop()
            raise NotServing(f"the server did not start:\n{self.output}")
        self.url = found[1]

    @property
    def output(self) -> str:
        """All that it has printed."""
        return "\n".join(self.lines)

    def memory(self) -> dict[str, Any]:
        """What it says of its memory. Raises OSError."""
        with urllib.request.urlopen(f"{self.url}/api/edgekv/memory", timeout=10) as response:
            return dict(json.load(response))

    def stop(self) -> int:
        """End it; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self._reader.join()
            assert self.process.stdout is not None
            self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if "ready: " in line:
                self._ready.set()
        self._ready.set()


class Clients:
    """Running `bench.guard.clients`."""

    def __init__(self, url: str, clients: int, questions: int, expected: Path | None = None) -> None:
        command = [sys.executable, "-m", "bench.guard.clients", url, str(clients), "--questions", str(questions)]
        command += ["--expected", str(expected)] if expected else []
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.answers = Answers()
        self.texts: dict[str, str] = {}
        self._reader = threading.Thread(target=self._read, name="clients output")
        self._reader.start()

    def finish(self) -> bool:
        """Let what is under way end, and end; whether it did within FINISH_S."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._end(FINISH_S)

    def wait(self, timeout_s: float) -> bool:
        """Until each question was asked once; whether that was in time."""
        deadline = time.monotonic() + timeout_s
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return self._end(0.0)

    def _end(self, timeout_s: float) -> bool:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
        return self._process.returncode == 0

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            self.answers = Answers(**{**told["answers"], "faults": tuple(told["answers"]["faults"])})
            self.texts = told.get("texts") or self.texts
