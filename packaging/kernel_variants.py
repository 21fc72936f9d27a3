"""Which variants of the kernels stand for all in the compile matrix: every format, each shape that changes the code.

A kernel's Python half says so itself, by `variants()`. Sources in tests/ that hold what of kernels/common no kernel may
use are compiled as well.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from types import ModuleType

import torch

from edgekv.kernels.rt.registry import KERNELS, KernelSpec

PACKAGES = ("attn", "gemm", "fused")
# Cards with the instructions and registers of another one (sm_89, gfx1100, gfx1200): only one variant of each kernel is
# compiled for them, unless all are asked for.
NEIGHBOURS = ("sm_80", "sm_86", "gfx1101", "gfx1151", "gfx1201")
_WITHOUT_BF16_UNITS = ("sm_75",)


def variants(target: str, *, everything: bool = False) -> list[KernelSpec]:
    """What is compiled for a card, each once, in a steady order."""
    operands = (torch.float16,) if target in _WITHOUT_BF16_UNITS else (torch.bfloat16, torch.float16)
    specs = list(dict.fromkeys((*of_kernels(operands), *of_tests(operands))))
    if everything or target not in NEIGHBOURS:
        return specs
    first = {(spec.source, spec.entry): spec for spec in reversed(specs)}
    return [spec for spec in specs if first[spec.source, spec.entry] is spec]


def of_kernels(operands: Iterable[torch.dtype]) -> Iterator[KernelSpec]:
    """What modules say; those that ask for it are told a type that the card's matrix units multiply."""
    for module in kernel_modules():
        say = getattr(module, "variants", None)
        if say is None:
            continue
        if inspect.signature(say).parameters:
            for dtype in operands:
                yield from say(dtype)
        else:
            yield from say()


def kernel_modules() -> Iterator[ModuleType]:
    for package in PACKAGES:
        for module in pkgutil.iter_modules([str(KERNELS / package)]):
            yield importlib.import_module(f"edgekv.kernels.{package}.{module.name}")


def of_tests(operands: Iterable[torch.dtype]) -> Iterator[KernelSpec]:
    """All of compat.h and mma.h: what no kernel uses yet has to compile as well."""
    cases = importlib.import_module("tests.kernels.fibers.cases")
    yield cases.numbers_case()
    yield cases.warps_case()
    for dtype in operands:
        yield cases.product_case(is_f16=dtype == torch.float16)
