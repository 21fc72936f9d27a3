"""A kernel's source as one text: our own headers put in where they are included.

Runs in: anywhere; owns: nothing. NVRTC, HIPRTC and clang each have their own idea of where a header that is given as a
text looks for another; a text without includes means the same to all of them, and a hash of it is one of everything.
"""

import re
from pathlib import Path

_INCLUDE = re.compile(r'\s*#\s*include\s*"([^"]+)"')
_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")
_OPENS, _CLOSES = re.compile(r"\s*#\s*if"), re.compile(r"\s*#\s*endif\b")


def read_source(root: Path, name: str) -> str:
    """The file `name` of the folder `root` with all that it includes of that folder, each file once.

    Compilers' messages name file and line as if nothing had been put in. Raises OSError for a file that is not there,
    ValueError for one outside the folder.
    """
    source = _Source(root.resolve())
    source.add(name)
    return "".join(source.parts)


class _Source:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.parts: list[str] = []
        self._open: list[str] = []  # the file being read, and those that include it
        self._certain: set[str] = set()  # files that are in whatever is defined

    def add(self, name: str, *, is_certain: bool = True) -> None:
        """`is_certain`: outside of any #if. A file that is in but within one may have to be put in again."""
        if name in self._open or name in self._certain:
            return
        text = (self.root / name).read_text(encoding="utf-8")
        guard = "EK_ONCE_" + re.sub(r"\W", "_", name).upper()
        self._open.append(name)
        self.parts.append(f'#ifndef {guard}\n#define {guard}\n#line 1 "{name}"\n')
        depth = 0
        for number, line in enumerate(text.splitlines(), 1):
            if _OPENS.match(line):
                depth += 1
            elif _CLOSES.match(line):
                depth -= 1
            if included := _INCLUDE.match(line):
                self.add(self._resolve(name, included[1]), is_certain=is_certain and depth == 0)
                self.parts.append(f'#line {number + 1} "{name}"\n')
            else:
                self.parts.append("\n" if _ONCE.match(line) else f"{line}\n")
        self.parts.append("#endif\n")
        self._open.pop()
        if is_certain:
            self._certain.add(name)

    def _resolve(self, includer: str, spelled: str) -> str:
        """The included file's name from the root on: beside the one that includes it, else from the root on."""
        beside = (self.root / includer).parent / spelled
        path = (beside if beside.exists() else self.root / spelled).resolve()
        if not path.is_relative_to(self.root):
            raise ValueError(f"{includer} includes {spelled}, which is not among the kernels")
        if not path.exists():
            raise FileNotFoundError(f"{includer} includes {spelled}, which is not there")
        return path.relative_to(self.root).as_posix()
