"""A C++ compiler that compiles nothing: its linker hands out the library that the tests have already."""

import os
from pathlib import Path

from tests.kernels.cpu.room import library


def install(folder: Path, *, link: str = "", compile: str = "") -> Path:
    """A `c++` in `folder`, which runs `compile` for every source, and `link`, and notes the latter in `linked`."""
    script = folder / "c++"
    script.write_text(
        "#!/bin/sh\n"
        f"PATH={os.environ['PATH']}\n"
        "output=; kind=compile; previous=\n"
        'for word in "$@"; do\n'
        '  [ "$previous" = -o ] && output=$word; [ "$word" = -shared ] && kind=link; previous=$word\n'
        "done\n"
        f"if [ $kind = link ]; then\n  {link or ':'}\n  echo $$ >> {folder}/linked\n"
        f'  cp {library().path} "$output"\n'
        f'else\n  {compile or ":"}\n  [ -n "$output" ] && : > "$output"\nfi\n:\n'
    )
    script.chmod(0o755)
    return script


def count_linked(folder: Path) -> int:
    """Libraries that it was asked for."""
    log = folder / "linked"
    return len(log.read_text().splitlines()) if log.exists() else 0
