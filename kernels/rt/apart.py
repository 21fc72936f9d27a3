"""A compiler in a process of its own for each program: what crashes there takes nothing with it.

Runs in: any thread, several at once; owns: the process, for as long as it compiles. Debian's HIPRTC 5.2.3 crashes for
gfx1100, for one, and a crash in the server would be the end of it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekv.kernels.rt.compiler import CALLED, Compiled, CompileFailed, CompilerKind
from edgekv.kernels.rt.rtc import RuntimeCompiler

_PATIENCE_SECONDS = 120.0  # the largest kernel takes a few
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from edgekv.kernels.rt.apart import answer
answer()
"""


class CompilerApart:
    """Compiles as `compiler` does, elsewhere."""

    def __init__(self, compiler: RuntimeCompiler, *, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        self.kind: CompilerKind = compiler.kind
        self.path, self.identity, self.targets = compiler.path, compiler.identity, compiler.targets
        self._patience_seconds = patience_seconds

    def compile(self, source: str, name: str, headers: Mapping[str, str], options: Sequence[str]) -> Compiled:
        """As RuntimeCompiler.compile; a crash, and more time than any kernel takes, are CompileFailed too."""
        asked = {
            "kind": self.kind,
            "path": str(self.path),
            "source": source,
            "name": name,
            "headers": dict(headers),
            "options": list(options),
        }
        # Nothing is imported from the folder that the server happens to be started in.
        places = [entry for entry in sys.path if os.path.isabs(entry)]
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-c", _PROGRAM, json.dumps(places)],
                input=json.dumps(asked).encode(),
                capture_output=True,
                timeout=self._patience_seconds,
                # Ctrl-C in a terminal is the server's to heed.
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            summary = f"{CALLED[self.kind]} was still busy after {self._patience_seconds:g} s"
            raise CompileFailed(name, summary, "") from None
        except OSError as error:
            raise CompileFailed(name, f"no process could be started for {CALLED[self.kind]}: {error}", "") from None
        head, _, code = done.stdout.partition(b"\n")
        if done.returncode or not head:
            said = done.stderr.decode(errors="replace")
            raise CompileFailed(name, f"{CALLED[self.kind]} {_how_it_ended(done.returncode)}", said)
        answered = json.loads(head)
        if answered["summary"] is not None:
            raise CompileFailed(name, answered["summary"], answered["log"])
        return Compiled(code, answered["log"])


def answer() -> None:
    """The other process: one program from standard input, its code to standard output."""
    # LLVM prints what it likes to where it likes.
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)
        asked = json.loads(sys.stdin.buffer.read())
        summary, compiled = _compile(asked)
        output.write(json.dumps({"summary": summary, "log": compiled.log}).encode() + b"\n" + compiled.code)


def _compile(asked: dict[str, Any]) -> tuple[str | None, Compiled]:
    """What went wrong, if anything did, and what came of it."""
    try:
        compiler = RuntimeCompiler(asked["kind"], Path(asked["path"]))
        return None, compiler.compile(asked["source"], asked["name"], asked["headers"], asked["options"])
    except CompileFailed as error:
        return error.summary, Compiled(b"", error.log)
    except OSError as error:
        return str(error), Compiled(b"", "")


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with {status} and no answer"
    try:
        return f"crashed ({signal.Signals(-status).name})"
    except ValueError:
        return f"crashed (signal {-status})"
