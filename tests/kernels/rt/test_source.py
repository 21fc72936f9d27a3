"""Sources with their headers put in, against what a real preprocessor makes of them."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from edgekv.kernels.rt.registry import KERNELS
from edgekv.kernels.rt.source import read_source

FILES = {
    "attn/kernel.h": """#pragma once
#include "common/types.h"
#include "../fused/act.h"
  #  include "beside.h"
#ifdef EK_OTHER
#include "common/late.h"
#endif
#include "common/late.h"
int kernel(i32 x); // at line 9
""",
    "attn/beside.h": '#pragma once\n#include "common/types.h"\nint beside;\n',
    "fused/act.h": '#pragma once\n#include "common/types.h"\n#include "common/round.h"\nint act;\n',
    "common/round.h": '#pragma once\n#include "common/types.h"\nint round_;\n',
    "common/types.h": """#pragma once
#include <stddef.h>
#if EK_WIDE
#include "common/wide.h"
#else
#include "common/narrow.h"
#endif
int types;
""",
    "common/wide.h": '#pragma once\n#include "common/round.h"\ntypedef long i32;\n',
    "common/narrow.h": "#pragma once\ntypedef int i32;\n",
    "common/late.h": "#pragma once\nint late;\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def preprocessor() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        pytest.skip("needs a C++ compiler")
    return [*command, "-E", "-x", "c++", "-w"]


def tokens(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("defines", [(), ("-DEK_WIDE=1",), ("-DEK_OTHER=1",), ("-DEK_OTHER=1", "-DEK_WIDE=1")])
def test_it_means_what_the_files_mean(root: Path, defines: tuple[str, ...]) -> None:
    command = [*preprocessor(), *defines, f"-I{root}"]
    flat = read_source(root, "attn/kernel.h")
    one = subprocess.run([*command, "-"], input=flat, capture_output=True, text=True, check=True).stdout
    many = subprocess.run([*command, str(root / "attn/kernel.h")], capture_output=True, text=True, check=True).stdout
    assert tokens(one) == tokens(many)
    assert "int late;" in one


def test_no_header_of_ours_is_included_any_more_and_others_are(root: Path) -> None:
    included = [line for line in read_source(root, "attn/kernel.h").splitlines() if "include" in line]
    assert included == ["#include <stddef.h>"] * len(included)


def test_lines_keep_their_numbers_and_files(root: Path) -> None:
    flat = read_source(root, "attn/kernel.h").replace("int kernel(i32 x);", "\n#error kernel\n")
    done = subprocess.run([*preprocessor(), f"-I{root}", "-"], input=flat, capture_output=True, text=True, check=False)
    assert "attn/kernel.h:10" in done.stderr


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_change_of_any_file_is_a_change_of_the_source(root: Path, name: str) -> None:
    before = read_source(root, "attn/kernel.h")
    (root / name).write_text(FILES[name] + "// changed\n")
    assert read_source(root, "attn/kernel.h") != before


def test_files_may_include_each_other(root: Path) -> None:
    (root / "attn" / "beside.h").write_text('#pragma once\n#include "attn/kernel.h"\nint beside;\n')
    assert read_source(root, "attn/kernel.h").count("int beside;") == 1


def test_a_header_that_is_not_there_is_named_with_who_includes_it(root: Path) -> None:
    (root / "common" / "narrow.h").unlink()
    with pytest.raises(FileNotFoundError, match=r"common/types\.h includes common/narrow\.h, which is not there"):
        read_source(root, "attn/kernel.h")


def test_files_of_others_are_not_read(root: Path) -> None:
    secret = root.parent / f"{root.name}-secret.h"
    secret.write_text("secret")
    (root / "attn" / "beside.h").write_text(f'#include "../../{secret.name}"\n')
    with pytest.raises(ValueError, match="is not among the kernels"):
        read_source(root, "attn/kernel.h")


OURS = [path for part in ("attn", "gemm", "fused") for path in sorted((KERNELS / part).glob("*.h"))]


@pytest.mark.parametrize("name", [path.relative_to(KERNELS).as_posix() for path in OURS])
def test_every_kernel_of_ours_can_be_read(name: str) -> None:
    assert not [line for line in read_source(KERNELS, name).splitlines() if line.lstrip().startswith('#include "')]
