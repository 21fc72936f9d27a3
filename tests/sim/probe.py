"""A Python process of its own that loads a simulated driver, and is asked one expression after another."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Answers go to a copy of standard output: amdsmi prints there when its import fails.
_LOOP = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
names = {}
for line in sys.stdin:
    try:
        source = json.loads(line)
        try:
            answer = {"value": eval(source, names)}
        except SyntaxError:
            exec(source, names)
            answer = {"value": None}
        text = json.dumps(answer, default=repr)
    except Exception as error:
        text = json.dumps({"raised": type(error).__name__, "message": str(error)})
    answers.write(text + "\\n")
"""


class Raised(Exception):
    """What the process raised: the name of its class, and its message."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


class Probe:
    """The process; it keeps the names that statements made."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.pid = process.pid
        self._process = process

    def ask(self, source: str) -> Any:
        """The value of an expression (JSON's types; other things as their repr), None for statements.

        Raises Raised; RuntimeError when the process died.
        """
        self.send(source)
        return self.answer()

    def send(self, source: str) -> None:
        """Ask, and do not wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(source) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Wait for the answer to what was sent."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the probe died with {self._process.wait()}")
        answer = json.loads(line)
        if "raised" in answer:
            raise Raised(answer["raised"], answer["message"])
        return answer["value"]


@contextmanager
def probe(environment: dict[str, str], patience_s: float = 60.0) -> Iterator[Probe]:
    """Start one, with `environment` over this process's own; it is ended after `patience_s` whatever happens."""
    process = subprocess.Popen(
        [sys.executable, "-c", _LOOP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **environment},
    )
    deadline = threading.Timer(patience_s, process.kill)
    deadline.start()
    try:
        yield Probe(process)
    finally:
        deadline.cancel()
        process.kill()  # it may hang in a driver call
        process.communicate()
