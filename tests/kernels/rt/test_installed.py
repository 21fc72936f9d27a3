"""Which compiler and driver are taken, in folders laid out as torch's wheels are."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekv.kernels.rt import libraries
from edgekv.kernels.rt.apart import CompilerApart
from edgekv.kernels.rt.compiler import CompilerMissing
from edgekv.kernels.rt.installed import DriverMissing, find_compiler, find_driver
from edgekv.kernels.rt.rtc import RuntimeCompiler
from tests.kernels.rt.fakes import Calls, install


@pytest.fixture
def site(tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of Python packages, beside which this machine has nothing, and has loaded nothing."""
    monkeypatch.setattr(libraries, "_SYSTEM", ())
    monkeypatch.setattr(libraries, "_LOADED", tmp_path / "nothing")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.setattr(libraries, "_wheel_folders", lambda: site_only(tmp_path / "site"))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    for name in ("PATH", "CUDA_HOME", "CUDA_PATH", "ROCM_PATH"):
        monkeypatch.setenv(name, "")
    return tmp_path / "site"


def site_only(site: Path) -> list[Path]:
    """As the real one, of one folder of sys.path: this environment may have libraries of its own."""
    return [each for pattern in libraries._WHEELS for each in sorted(site.glob(pattern), reverse=True)]


@pytest.mark.parametrize(
    "place",
    [
        "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
        "nvidia/cu13/lib/libnvrtc.so.13",
        "torch/lib/libnvrtc-b51b459d.so.12",
        "torch/lib/libnvrtc.so",
    ],
)
def test_nvrtc_is_found_where_wheels_put_it(site: Path, place: str) -> None:
    path = install("nvrtc", (site / place).parent, Path(place).name)
    compiler = find_compiler("nvrtc")
    assert isinstance(compiler, RuntimeCompiler)
    assert compiler.path == path


@pytest.mark.parametrize("place", ["torch/lib/libhiprtc.so", "_rocm_sdk_core/lib/libhiprtc.so.7"])
def test_hiprtc_is_found_where_wheels_put_it_and_run_apart(site: Path, place: str) -> None:
    path = install("hiprtc", (site / place).parent, Path(place).name)
    compiler = find_compiler("hiprtc")
    assert isinstance(compiler, CompilerApart)
    assert compiler.path == path
    assert compiler.compile("int x;", "x.h", {}, []).code


def test_the_compiler_of_torchs_own_cuda_is_preferred(site: Path, tmp_path: Path) -> None:
    older = install("nvrtc", site / "nvidia/cuda_nvrtc/lib", "libnvrtc.so.12")
    newer = install("nvrtc", site / "nvidia/cu13/lib", "libnvrtc.so.13")
    own = install("nvrtc", tmp_path / "torch", "libnvrtc.so.11")
    for major, expected in ((12, older), (13, newer), (11, own), (10, own), (None, own)):
        found = find_compiler("nvrtc", [tmp_path / "torch"], major=major)
        assert isinstance(found, RuntimeCompiler)
        assert found.path == expected


def test_one_that_does_not_load_is_passed_over(site: Path, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "libnvrtc.so.12").write_text("no library")
    path = install("nvrtc", site / "nvidia/cuda_nvrtc/lib")
    found = find_compiler("nvrtc", [tmp_path / "torch"])
    assert isinstance(found, RuntimeCompiler)
    assert found.path == path


def test_without_a_compiler_it_is_said_what_to_do(site: Path) -> None:
    with pytest.raises(CompilerMissing) as raised:
        find_compiler("nvrtc")
    assert raised.value.reason == "there is no NVRTC"
    assert "pip install nvidia-cuda-nvrtc" in raised.value.remedy
    with pytest.raises(CompilerMissing, match="there is no HIPRTC; torch's ROCm builds bring it"):
        find_compiler("hiprtc")


def test_a_compiler_that_does_not_load_is_named_with_why(site: Path) -> None:
    (site / "torch" / "lib").mkdir(parents=True)
    (site / "torch" / "lib" / "libhiprtc.so").write_text("no library")
    with pytest.raises(CompilerMissing, match=r"HIPRTC does not load \(.*/torch/lib/libhiprtc\.so"):
        find_compiler("hiprtc")


@pytest.mark.parametrize("place", ["torch/lib/libamdhip64.so", "_rocm_sdk_core/lib/libamdhip64.so.7"])
def test_the_hip_runtime_is_torchs(site: Path, place: str) -> None:
    path = install("hip", (site / place).parent, Path(place).name)
    assert find_driver("hip").path == path


def test_the_hip_runtime_that_is_loaded_is_the_one(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another copy would have no device set, and would not know torch's streams."""
    install("hip", site / "torch/lib")
    loaded = install("hip", tmp_path / "elsewhere")
    ctypes.CDLL(str(loaded))
    monkeypatch.setattr(libraries, "_LOADED", Path("/proc/self/maps"))
    monkeypatch.setattr(libraries, "_loaded_files", lambda real=libraries._loaded_files: only(real(), tmp_path))
    assert find_driver("hip").path == loaded


def only(paths: list[Path], folder: Path) -> list[Path]:
    """Of this test: those of others are loaded, too."""
    return [path for path in paths if path.is_relative_to(folder)]


def test_without_a_driver_it_is_said_what_to_do(site: Path) -> None:
    with pytest.raises(DriverMissing) as raised:
        find_driver("hip")
    assert raised.value.reason == "there is no HIP runtime"
    assert "ROCm" in raised.value.remedy


ASK = """
import sys
from edgekv.kernels.rt.installed import DriverMissing, find_driver
try:
    driver = find_driver("cuda")
    print(driver.version, driver.path)
except DriverMissing as error:
    print(error)
"""


def ask(**variables: str) -> str:
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": ""} | variables
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_libcuda_is_found_as_the_loader_finds_it(tmp_path: Path) -> None:
    install("cuda", tmp_path)
    assert ask(LD_LIBRARY_PATH=str(tmp_path)) == "12080 libcuda.so.1\n"


def test_a_stub_for_building_is_no_driver(tmp_path: Path) -> None:
    install("cuda", tmp_path)
    told = ask(LD_LIBRARY_PATH=str(tmp_path), FAKE_FAIL="cuDriverGetVersion:34:0")
    assert told.startswith("NVIDIA driver (libcuda.so.1) does not load (cuDriverGetVersion: CUDA_ERROR_STUB_LIBRARY")
    assert "this libcuda is a stub for building" in told
