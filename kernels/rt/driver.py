"""The driver of the card, through ctypes: code is loaded, kernels are launched.

Runs in: the thread in which the device is set (torch.cuda.set_device, and one allocation so that it has a context);
owns: modules. Memory, streams and graphs are torch's.
"""

import ctypes
import os
from ctypes import POINTER, Structure, addressof, byref, c_char_p, c_int, c_size_t, c_void_p, sizeof
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgekv.kernels.rt.device_error import DeviceLost, DriverError, device_error

DriverKind = Literal["cuda", "hip"]
Grid = tuple[int, int, int]

_NAMES: dict[DriverKind, dict[str, str]] = {
    "cuda": {
        "version": "cuDriverGetVersion",
        "load": "cuModuleLoadData",
        "unload": "cuModuleUnload",
        "function": "cuModuleGetFunction",
        "attribute": "cuFuncGetAttribute",
        "launch": "cuLaunchKernel",
        "error name": "cuGetErrorName",
        "error text": "cuGetErrorString",
    },
    "hip": {
        "version": "hipRuntimeGetVersion",
        "load": "hipModuleLoadData",
        "unload": "hipModuleUnload",
        "function": "hipModuleGetFunction",
        "attribute": "hipFuncGetAttribute",
        "launch": "hipModuleLaunchKernel",
        "error name": "hipGetErrorName",
        "error text": "hipGetErrorString",
    },
}
_POINTER, _INT = POINTER(c_void_p), POINTER(c_int)
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "version": (_INT,),
    "load": (_POINTER, c_char_p),
    "unload": (c_void_p,),
    "function": (_POINTER, c_void_p, c_char_p),
    "attribute": (_INT, c_int, c_void_p),
}
# CUfunction_attribute and hipFunction_attribute agree on these.
_MAX_THREADS, _SHARED_BYTES, _LOCAL_BYTES, _REGISTERS = 0, 1, 3, 4
_CUDA_DYNAMIC_SHARED_BYTES = 8
_NOT_INITIALISED = 3


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel takes of a multiprocessor; `local_bytes` are a thread's: spilled registers, usually."""

    registers: int
    local_bytes: int
    shared_bytes: int
    max_threads: int


class Driver:
    """One driver library; `version` is the number that it gives itself.

    After an error from which the device does not recover, `lost` is that error, and nothing is loaded any more.
    """

    def __init__(self, kind: DriverKind, path: Path | str) -> None:
        """Raises OSError where the file is no such library or does not load, DriverError where it does not answer."""
        self.kind, self.path = kind, path
        self.lost: DeviceLost | None = None
        self._library, self._process = ctypes.CDLL(str(path)), os.getpid()
        try:
            self._functions = {what: getattr(self._library, name) for what, name in _NAMES[kind].items()}
        except AttributeError as error:
            raise OSError(f"{path} is not the driver's library: {error}") from None
        for what, arguments in _ARGUMENTS.items():
            self._functions[what].argtypes = arguments
        for what in ("error name", "error text"):
            if kind == "cuda":
                self._functions[what].argtypes = (c_int, POINTER(c_char_p))
            else:
                self._functions[what].argtypes, self._functions[what].restype = (c_int,), c_char_p
        version = c_int()
        self.call("version", byref(version))
        self.version = version.value

    def load(self, code: bytes) -> "Module":
        """Onto the device that is set. Raises DriverError: OutOfDeviceMemory, DeviceLost, or it is no such code."""
        if self.lost is not None:
            raise self.lost.with_traceback(None)
        if os.getpid() != self._process:  # what a device holds does not go through a fork; HIP hangs, CUDA answers this
            raise self.error("load", _NOT_INITIALISED)
        return Module(self, code)

    def function(self, what: str) -> Any:
        """One of the library's functions, by what it is for."""
        return self._functions[what]

    def optional(self, name: str) -> Any | None:
        """A function of the library that older drivers do not have."""
        return getattr(self._library, name, None)

    def call(self, what: str, *arguments: object) -> None:
        """Raises DriverError."""
        if number := self._functions[what](*arguments):
            raise self.error(what, number)

    def error(self, what: str, number: int) -> DriverError:
        """What a call answered, as an error of its kind; one that the device does not recover from is remembered."""
        name, text = self._say("error name", number) or "unknown", self._say("error text", number) or ""
        error = device_error(_NAMES[self.kind].get(what, what), number, name, text)
        if isinstance(error, DeviceLost):
            self.lost = error
        return error

    def _say(self, what: str, number: int) -> str | None:
        if self.kind == "hip":
            text: bytes | None = self._functions[what](number)
        else:
            answer = c_char_p()
            text = None if self._functions[what](number, byref(answer)) else answer.value
        return None if text is None else text.decode(errors="replace")


class Module:
    """Code on the device. Stays there until `close`, since a captured graph may go on using it."""

    def __init__(self, driver: Driver, code: bytes) -> None:
        """Use Driver.load."""
        self.driver = driver
        self._code = code  # HIP reads it again later
        self._handle = c_void_p()
        driver.call("load", byref(self._handle), code)

    def function(self, name: str) -> "Function":
        """A kernel by its extern "C" name. Raises DriverError where there is none of that name."""
        handle = c_void_p()
        self.driver.call("function", byref(handle), self._handle, name.encode())
        return Function(self, name, handle)

    def close(self) -> None:
        """Unload it; its functions, and graphs that contain them, must not be launched again."""
        if self._handle.value is not None:
            self.driver.call("unload", self._handle)
            self._handle = c_void_p()


class Function:
    """A kernel on the device."""

    def __init__(self, module: Module, name: str, handle: c_void_p) -> None:
        """Use Module.function."""
        self.module, self.name, self.handle = module, name, handle
        self._driver = module.driver

    def resources(self) -> Resources:
        """Raises DriverError."""
        read = self._attribute
        return Resources(read(_REGISTERS), read(_LOCAL_BYTES), read(_SHARED_BYTES), read(_MAX_THREADS))

    def launcher(self, args: type[Structure], threads: int, shared_bytes: int = 0) -> "Launcher":
        """Ready to be launched in blocks of `threads`, each with `shared_bytes` beside those that the kernel declares.

        Raises DriverError, ValueError where the kernel's argument is of another size than `args` (as far as the driver
        can tell).
        """
        size = self._parameter_bytes()
        if size is not None and size != sizeof(args):
            raise ValueError(f"{self.name} takes {size} bytes, and {args.__name__} has {sizeof(args)}")
        if shared_bytes and self._driver.kind == "cuda":
            allow = self._driver.optional("cuFuncSetAttribute")
            # Without asking, 48 KiB are all that CUDA gives.
            if allow is not None and (number := allow(self.handle, _CUDA_DYNAMIC_SHARED_BYTES, shared_bytes)):
                raise self._driver.error("cuFuncSetAttribute", number)
        return Launcher(self, args, threads, shared_bytes)

    def _attribute(self, which: int) -> int:
        value = c_int()
        self._driver.call("attribute", byref(value), which, self.handle)
        return value.value

    def _parameter_bytes(self) -> int | None:
        """None where the driver does not say: HIP's, and CUDA's before 12.4."""
        ask = self._driver.optional("cuFuncGetParamInfo") if self._driver.kind == "cuda" else None
        offset, size = c_size_t(), c_size_t()
        if ask is None or ask(self.handle, c_size_t(0), byref(offset), byref(size)):
            return None
        return size.value


class Launcher:
    """A kernel with everything that its launches have in common prepared: one is a single call of the driver.

    For one thread at a time. What a launch is given is copied before it returns, also into a graph that is being
    captured.
    """

    __slots__ = ("_args", "_function", "_handle", "_launch", "_pointers", "_pointers_argument", "_shared", "_threads")

    def __init__(self, function: Function, args: type[Structure], threads: int, shared_bytes: int) -> None:
        """Use Function.launcher."""
        self._function, self._args, self._threads, self._shared = function, args, threads, shared_bytes
        # The foreign function has no argtypes, and pointers are made arguments here: converting eleven of them at every
        # launch would cost more than the launch.
        self._launch = function.module.driver.function("launch")
        self._handle = c_void_p.from_param(function.handle.value)
        self._pointers = (c_void_p * 1)()
        self._pointers_argument = byref(self._pointers)

    @property
    def function(self) -> Function:
        """What is launched."""
        return self._function

    def __call__(self, grid: Grid, args: Structure, stream: int) -> None:
        """Launch `grid` blocks on a stream (torch's `cuda_stream`). Does not wait. Raises DriverError.

        An error may be that of an earlier launch: drivers tell when they know.
        """
        if type(args) is not self._args:
            raise TypeError(f"{self._function.name} takes {self._args.__name__}, not {type(args).__name__}")
        self._pointers[0] = addressof(args)
        x, y, z = grid
        if number := self._launch(
            self._handle,
            x,
            y,
            z,
            self._threads,
            1,
            1,
            self._shared,
            c_void_p.from_param(stream),
            self._pointers_argument,
            None,
        ):
            raise self._function.module.driver.error("launch", number)
