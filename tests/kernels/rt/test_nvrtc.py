"""The real NVRTC, as pip brings it, in a process that finds nothing else: no toolkit, no PATH, no torch."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgekv.kernels.rt.registry import KERNELS

PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")

ASK = """
import ctypes, json, struct, sys
from pathlib import Path
from edgekv.kernels.rt.compiler import CompileFailed
from edgekv.kernels.rt.installed import find_compiler
from edgekv.kernels.rt.registry import KernelSpec, Loader

compiler = find_compiler("nvrtc")
spec = KernelSpec("fused/rope.h", "ek_rope", 128, ctypes.Structure, {"EK_ACT": 0})
answer = {"path": str(compiler.path), "identity": compiler.identity, "targets": compiler.targets}
try:
    code = Loader(sys.argv[2], compiler, driver=None, sources=Path(sys.argv[1])).code(spec)
    machine = struct.unpack_from("<H", code, 18)[0]
    answer |= {"magic": code[:4].hex(), "machine": machine, "has": b".text.ek_rope" in code}
except CompileFailed as error:
    answer |= {"summary": error.summary, "log": error.log}
answer["torch"] = "torch" in sys.modules
print(json.dumps(answer))
"""


def ask(sources: Path, target: str = "sm_89") -> Any:
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": "", "CUDA_HOME": "", "HOME": "/nowhere"}
    command = [sys.executable, "-c", ASK, str(sources), target]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(autouse=True)
def _is_installed() -> None:
    for package in PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return
    pytest.skip("needs one of " + ", ".join(PACKAGES))


def test_a_kernel_of_ours_becomes_machine_code() -> None:
    answer = ask(KERNELS)
    assert "/nvidia/" in answer["path"]
    assert answer["identity"].startswith("nvrtc 1")
    assert {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120"} <= set(answer["targets"])
    assert (answer["magic"], answer["machine"], answer["has"]) == ("7f454c46", 190, True)  # ELF, EM_CUDA
    assert not answer["torch"]


def test_an_error_is_told_with_our_file_and_line(tmp_path: Path) -> None:
    for part in ("common", "fused"):
        shutil.copytree(KERNELS / part, tmp_path / part, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    header = tmp_path / "common" / "act.h"
    lines = header.read_text().splitlines()
    header.write_text("\n".join([*lines, "EK_DEV int ek_wrong() { return ek_missing; }", ""]))
    answer = ask(tmp_path)
    assert answer["summary"].startswith(f'common/act.h({len(lines) + 1}): error: identifier "ek_missing" is undefined')
    assert answer["summary"] in answer["log"]
