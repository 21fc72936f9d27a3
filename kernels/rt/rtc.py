"""NVRTC and HIPRTC, the compilers inside torch's wheels. No toolkit is needed, and none of its headers.

Runs in: any thread, several at once (NVRTC itself compiles one after the other); owns: the loaded library, which is
never unloaded. A compilation takes about a second, leaves the GIL to others and cannot be stopped.
"""

import ctypes
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from edgekv.kernels.rt.compiler import CALLED, Compiled, CompileFailed, CompilerKind
from edgekv.kernels.rt.libraries import library_version

_STRINGS, _SIZE, _PROGRAM, _INT = POINTER(c_char_p), POINTER(c_size_t), POINTER(c_void_p), POINTER(c_int)
# What the two call the same; all but GetErrorString answer an error.
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "Version": (_INT, _INT),
    "GetErrorString": (c_int,),
    "CreateProgram": (_PROGRAM, c_char_p, c_char_p, c_int, _STRINGS, _STRINGS),
    "CompileProgram": (c_void_p, c_int, _STRINGS),
    "GetProgramLogSize": (c_void_p, _SIZE),
    "GetProgramLog": (c_void_p, c_void_p),
    "DestroyProgram": (_PROGRAM,),
}
# NVRTC's cubin is machine code; its PTX the driver would have to compile once more.
_CODE: dict[CompilerKind, str] = {"nvrtc": "GetCUBIN", "hiprtc": "GetCode"}
# Of which files a compiler consists: HIPRTC itself only hands on to comgr, which holds LLVM.
_PARTS: dict[CompilerKind, re.Pattern[str]] = {
    "nvrtc": re.compile(r"libnvrtc(-builtins)?(-[0-9a-f]{8})?\.so(\.\d+)*"),
    "hiprtc": re.compile(r"lib(hiprtc|hiprtc-builtins|amd_comgr)(-[0-9a-f]{8})?\.so(\.\d+)*"),
}


class RuntimeCompiler:
    """One library of either kind, in this process.

    `version` is (major, minor) as it says itself, `targets` what it can compile for (None: it does not say), `identity`
    names this very build.
    """

    def __init__(self, kind: CompilerKind, path: Path) -> None:
        """Raises OSError where the file is no such library, or does not load."""
        self.kind, self.path = kind, path
        library = ctypes.CDLL(str(path))
        code = _CODE[kind]
        signatures = {**_FUNCTIONS, f"{code}Size": (c_void_p, _SIZE), code: (c_void_p, c_void_p)}
        try:
            self._functions = {name: getattr(library, kind + name) for name in signatures}
        except AttributeError as error:
            raise OSError(f"{path} is not {CALLED[kind]}: {error}") from None
        for name, arguments in signatures.items():
            self._functions[name].argtypes = arguments
        self._functions["GetErrorString"].restype = c_char_p
        major, minor = c_int(), c_int()
        if status := self._functions["Version"](byref(major), byref(minor)):
            raise OSError(f"{path} does not say its version: {self._error_name(status)}")
        self.version = (major.value, minor.value)
        self.targets = _supported_targets(library) if kind == "nvrtc" else None
        self.identity = self._describe_files()
        self._preload_builtins()

    def compile(self, source: str, name: str, headers: Mapping[str, str], options: Sequence[str]) -> Compiled:
        """Raises CompileFailed. `headers` are texts by what the source includes them as; errors speak of `name`."""
        program, size = c_void_p(), c_size_t()
        texts, names = _strings(headers.values()), _strings(headers)
        self._call("CreateProgram", name, byref(program), source.encode(), name.encode(), len(headers), texts, names)
        try:
            error = self._functions["CompileProgram"](program, len(options), _strings(options))
            log = self._log(program)
            if error:
                raise CompileFailed(name, line_that_matters(log) or self._error_name(error), log)
            self._call(f"{_CODE[self.kind]}Size", name, program, byref(size))
            if not size.value:
                raise CompileFailed(name, f"{CALLED[self.kind]} made no code of it", log)
            code = ctypes.create_string_buffer(size.value)
            self._call(_CODE[self.kind], name, program, code)
            return Compiled(code.raw, log)
        finally:
            self._functions["DestroyProgram"](byref(program))

    def _call(self, function: str, program_name: str, *arguments: object) -> None:
        if error := self._functions[function](*arguments):
            raise CompileFailed(program_name, f"{self.kind}{function}: {self._error_name(error)}", "")

    def _error_name(self, error: int) -> str:
        text: bytes | None = self._functions["GetErrorString"](error)
        return text.decode(errors="replace") if text else f"error {error}"

    def _log(self, program: c_void_p) -> str:
        """What was said; nothing where that is not to be had: the error itself must not get lost over it."""
        size = c_size_t()
        if self._functions["GetProgramLogSize"](program, byref(size)) or not size.value:
            return ""
        text = ctypes.create_string_buffer(size.value)
        if self._functions["GetProgramLog"](program, text):
            return ""
        return text.value.decode(errors="replace")

    def _describe_files(self) -> str:
        """Kind, version, and a hash of the names and sizes of its files: HIPRTC says the same version year by year."""
        sums = hashlib.sha256()
        for file in sorted(self._parts()):
            with suppress(OSError):
                sums.update(f"{file.name} {file.stat().st_size}\n".encode())
        return f"{self.kind} {self.version[0]}.{self.version[1]} {sums.hexdigest()[:12]}"

    def _parts(self) -> set[Path]:
        real = self.path.resolve()
        with suppress(OSError):
            beside = {file.resolve() for file in real.parent.iterdir() if _PARTS[self.kind].fullmatch(file.name)}
            return {real, *beside}
        return {real}

    def _preload_builtins(self) -> None:
        """NVRTC asks for its second library by name when it compiles; one that is loaded is found by its name."""
        for file in self._parts() if self.kind == "nvrtc" else ():
            if "-builtins" in file.name and library_version(file)[:2] == self.version:
                with suppress(OSError):  # if it cannot do without, it will say so itself
                    ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)


def line_that_matters(log: str) -> str | None:
    """The first error that a compiler speaks of, else its first line; None where it says nothing."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else None)


def _supported_targets(nvrtc: ctypes.CDLL) -> tuple[str, ...] | None:
    count = c_int()
    try:
        if nvrtc.nvrtcGetNumSupportedArchs(byref(count)):
            return None
        numbers = (c_int * count.value)()
        if nvrtc.nvrtcGetSupportedArchs(numbers):
            return None
    except AttributeError:
        return None
    return tuple(f"sm_{number}" for number in sorted(numbers))


def _strings(texts: Iterable[str]) -> "ctypes.Array[c_char_p]":
    encoded = [text.encode() for text in texts]
    return (c_char_p * len(encoded))(*encoded)
