"""Loading and launching against a driver library without a card."""

import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekv.kernels.rt.device_error import DeviceLost, DriverError, OutOfDeviceMemory
from edgekv.kernels.rt.driver import Driver, DriverKind, Launcher, Resources
from tests.kernels.rt.fakes import SOURCE, Args, Calls, fake

KINDS: list[DriverKind] = ["cuda", "hip"]
CODE = f"FAKE {SOURCE}".encode()
LOAD = {"cuda": "cuModuleLoadData", "hip": "hipModuleLoadData"}
FUNCTION = {"cuda": "cuModuleGetFunction", "hip": "hipModuleGetFunction"}
LAUNCH = {"cuda": "cuLaunchKernel", "hip": "hipModuleLaunchKernel"}
UNLOAD = {"cuda": "cuModuleUnload", "hip": "hipModuleUnload"}


@pytest.fixture(params=KINDS)
def driver(request: pytest.FixtureRequest, calls: Calls) -> Driver:
    return Driver(request.param, fake(request.param))


def prepared(driver: Driver, *, threads: int = 128, shared_bytes: int = 0) -> Launcher:
    return driver.load(CODE).function("ek_scale").launcher(Args, threads, shared_bytes)


def test_a_kernel_is_loaded_found_and_launched_with_what_it_was_given(driver: Driver, calls: Calls) -> None:
    launcher = prepared(driver, threads=96)
    kind = driver.kind
    assert calls.read() == [LOAD[kind], f"{FUNCTION[kind]} ek_scale"]
    calls.forget()
    first, second = Args(0x7F00_1234_5678_9ABC, -3, 0.5, 7), Args(1, 2, 3.0, 4)
    launcher((2, 3, 4), first, 0x7FFF_0000_1110)
    launcher((2**31 - 1, 1, 65535), second, 0)
    assert calls.read() == [
        f"{LAUNCH[kind]} ek_scale (2 3 4) (96 1 1) 0 0x7fff00001110 1 {bytes(first).hex()}",
        f"{LAUNCH[kind]} ek_scale (2147483647 1 65535) (96 1 1) 0 0 1 {bytes(second).hex()}",
    ]


def test_a_structure_can_be_changed_and_launched_again(driver: Driver, calls: Calls) -> None:
    launcher, args = prepared(driver), Args(rows=1)
    calls.forget()
    for rows in (5, 6):
        args.rows = rows
        launcher((1, 1, 1), args, 0)
    assert [line.rsplit(maxsplit=1)[1] for line in calls.read()] == [bytes(Args(rows=rows)).hex() for rows in (5, 6)]


def test_kernels_of_a_module_are_launched_apart(driver: Driver, calls: Calls) -> None:
    module = driver.load(CODE)
    scale, shift = (module.function(name).launcher(Args, 64) for name in ("ek_scale", "ek_shift"))
    calls.forget()
    shift((1, 1, 1), Args(), 0)
    scale((1, 1, 1), Args(), 0)
    assert [line.split()[1] for line in calls.read()] == ["ek_shift", "ek_scale"]


class Other(ctypes.Structure):
    _fields_ = Args._fields_


class Larger(ctypes.Structure):
    _fields_ = (*Args._fields_, ("more", ctypes.c_int64))


def test_another_structure_is_refused_before_it_is_launched(driver: Driver, calls: Calls) -> None:
    launcher = prepared(driver)
    calls.forget()
    with pytest.raises(TypeError, match="ek_scale takes Args, not Other"):
        launcher((1, 1, 1), Other(), 0)
    assert calls.read() == []


def test_a_mirror_of_the_wrong_size_is_refused_where_the_driver_knows(driver: Driver) -> None:
    function = driver.load(CODE).function("ek_scale")
    if driver.kind == "cuda":
        with pytest.raises(ValueError, match="ek_scale takes 24 bytes, and Larger has 32"):
            function.launcher(Larger, 128)
    else:
        assert function.launcher(Larger, 128)


def test_a_driver_before_cuda_12_4_does_not_know_sizes() -> None:
    old = Driver("cuda", fake("cuda", old=True))
    assert old.load(CODE).function("ek_scale").launcher(Larger, 128)


def test_more_shared_memory_than_usual_is_asked_for(driver: Driver, calls: Calls) -> None:
    launcher = prepared(driver, shared_bytes=65536)
    asked = [line for line in calls.read() if "SetAttribute" in line]
    assert asked == (["cuFuncSetAttribute ek_scale 8 65536"] if driver.kind == "cuda" else [])
    calls.forget()
    launcher((1, 1, 1), Args(), 0)
    assert "(128 1 1) 65536 " in calls.read()[0]


def test_what_a_kernel_takes_can_be_read(driver: Driver) -> None:
    assert driver.load(CODE).function("ek_scale").resources() == Resources(
        registers=96, local_bytes=16, shared_bytes=2048, max_threads=1024
    )


def test_the_version_is_the_drivers(driver: Driver) -> None:
    assert driver.version == {"cuda": 12080, "hip": 70253211}[driver.kind]


@pytest.mark.parametrize("what", ["version", "load", "function", "shared", "resources", "launch", "close"])
def test_a_call_that_fails_is_named_with_its_error(driver: Driver, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = driver.kind
    names = {
        "version": ("cuDriverGetVersion", "hipRuntimeGetVersion"),
        "load": (LOAD["cuda"], LOAD["hip"]),
        "function": (FUNCTION["cuda"], FUNCTION["hip"]),
        "shared": ("cuFuncSetAttribute", None),
        "resources": ("cuFuncGetAttribute", "hipFuncGetAttribute"),
        "launch": (LAUNCH["cuda"], LAUNCH["hip"]),
        "close": (UNLOAD["cuda"], UNLOAD["hip"]),
    }
    name = names[what][kind == "hip"]
    if name is None:
        return
    monkeypatch.setenv("FAKE_FAIL", f"{name}:1")
    invalid = {"cuda": "CUDA_ERROR_INVALID_VALUE", "hip": "hipErrorInvalidValue"}[kind]
    with pytest.raises(DriverError, match=rf"^{name}: {invalid} \(1\)$") as raised:
        do_all(driver.kind, driver.path)
    assert (raised.value.call, raised.value.number, raised.value.name) == (name, 1, invalid)
    assert type(raised.value) is DriverError
    do_all(driver.kind, driver.path)  # it was that call alone


def do_all(kind: DriverKind, path: Path | str) -> None:
    driver = Driver(kind, path)
    module = driver.load(CODE)
    launcher = module.function("ek_scale").launcher(Args, 128, 1024)
    launcher.function.resources()
    launcher((1, 1, 1), Args(), 0)
    module.close()
    module.close()  # once is enough


def test_a_kernel_that_is_not_in_the_code_is_an_error(driver: Driver) -> None:
    with pytest.raises(DriverError, match=r"ModuleGetFunction: .* \(500\)"):
        driver.load(CODE).function("ek_missing")


def test_what_is_no_code_is_refused_with_a_remedy(driver: Driver) -> None:
    with pytest.raises(DriverError, match=r"\(200\); the driver does not take this code: update the driver"):
        driver.load(b"\x7fELF")


def test_an_error_that_the_driver_has_no_name_for(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", f"{LOAD[driver.kind]}:4242")
    with pytest.raises(DriverError, match=r"\(4242\)"):
        driver.load(CODE)


@pytest.mark.parametrize("where", ["load", "launch"])
def test_out_of_memory_is_an_error_of_its_own_and_passes(
    driver: Driver, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = prepared(driver)
    monkeypatch.setenv("FAKE_FAIL", f"{(LOAD if where == 'load' else LAUNCH)[driver.kind]}:2")

    def attempt() -> None:
        if where == "load":
            driver.load(CODE)
        else:
            launcher((1, 1, 1), Args(), 0)

    with pytest.raises(OutOfDeviceMemory, match="out of memory"):
        attempt()
    attempt()
    assert driver.lost is None


@pytest.mark.parametrize("number", [700, 719])
def test_a_lost_device_stays_lost(driver: Driver, number: int, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = prepared(driver)
    monkeypatch.setenv("FAKE_FAIL", f"{LAUNCH[driver.kind]}:{number}:3")
    for _ in range(2):
        launcher((1, 1, 1), Args(), 0)
    for _ in range(2):
        with pytest.raises(DeviceLost) as raised:
            launcher((1, 1, 1), Args(), 0)
        assert raised.value.number == number
    assert driver.lost is raised.value
    calls.forget()
    for _ in range(2):
        with pytest.raises(DeviceLost):
            driver.load(CODE)
    assert calls.read() == []  # the driver may hang by now


@pytest.mark.parametrize("number", [214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 999])
def test_these_errors_mean_that_the_device_is_lost(
    driver: Driver, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", f"{LOAD[driver.kind]}:{number}")
    with pytest.raises(DeviceLost):
        driver.load(CODE)


@pytest.mark.parametrize("number", [1, 3, 201, 209, 701, 704, 708, 712, 720, 801, 900, 908, 911])
def test_these_errors_cost_one_call(driver: Driver, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", f"{LOAD[driver.kind]}:{number}")
    with pytest.raises(DriverError) as raised:
        driver.load(CODE)
    assert not isinstance(raised.value, DeviceLost | OutOfDeviceMemory)
    assert driver.lost is None


def test_code_lives_as_long_as_its_module(driver: Driver) -> None:
    """HIP reads what it was given again when a kernel is asked for."""
    module = driver.load(b"".join((CODE, b" " * 5000)))
    gc.collect()
    held = [bytes([value]) * (len(CODE) + 5000) for value in range(1, 64)]
    assert module.function("ek_scale")
    assert held


def test_what_is_unloaded_is_not_launched_again(driver: Driver) -> None:
    module = driver.load(CODE)
    launcher = module.function("ek_scale").launcher(Args, 128)
    module.close()
    with pytest.raises(DriverError, match=r"\(400\)"):
        launcher((1, 1, 1), Args(), 0)


FORK = """
import os, sys
from edgekv.kernels.rt.driver import Driver, DriverError
driver = Driver(sys.argv[1], sys.argv[2])
if (child := os.fork()) == 0:
    try:
        driver.load(b"FAKE")
    except DriverError as error:
        print(error)
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
driver.load(b"FAKE")
"""


def test_a_fork_is_refused_what_only_its_parent_can_do(driver: Driver, calls: Calls) -> None:
    command = [sys.executable, "-c", FORK, driver.kind, str(driver.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "(3); the driver is not initialised in this process" in done.stdout
    assert "not before a fork" in done.stdout
    assert calls.read() == [LOAD[driver.kind]]


def test_a_library_that_is_no_driver_is_refused(driver: Driver, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is not the driver's library"):
        Driver(driver.kind, fake("nvrtc"))
    text = tmp_path / "libcuda.so.1"
    text.write_text("no library")
    with pytest.raises(OSError):
        Driver(driver.kind, text)
