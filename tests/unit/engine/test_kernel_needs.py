"""What only the native CPU kernels can serve is refused without them, with the cause and what to do about it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekv.demo import target_path
from edgekv.engine.kernel_needs import NOT_IN_USE, Lacking, NotServedHere, only_native, why_not_native
from edgekv.engine.settings import EngineSettings, plan_engine
from edgekv.kernels.cpu import library
from edgekv.kernels.cpu.library import VARIABLE, KernelsUnavailable
from edgekv.model.hf_config import read_spec
from edgekv.smi.device import Place

CPU = Place("cpu", "cpu", "CPU", 8 << 30)
CARD = Place("card", "cuda:0", "GeForce RTX 4090", 8 << 30)


def asked(**changes: Any) -> EngineSettings:
    return replace(EngineSettings(target_path(), CPU), **changes)


def refused(settings: EngineSettings, **shape: Any) -> str:
    with pytest.raises(NotServedHere) as caught:
        plan_engine(settings, replace(read_spec(target_path()), **shape))
    return str(caught.value)


def test_settings_that_need_the_kernels() -> None:
    assert dict(only_native(asked(weight_format="int4", kv_dtype="int8"))) == {"weights": "int4", "kv.dtype": "int8"}
    assert list(only_native(asked(dtype="float16", kv_dtype="bfloat16"))) == []


def test_a_card_is_the_cause() -> None:
    assert refused(asked(weight_format="int8", place=CARD)) == (
        "weights: int8 needs the native CPU kernels, but they run models on the CPU only, and this one goes to GeForce "
        "RTX 4090. Set device to cpu; or set weights to auto"
    )


def test_the_block_size_is_the_cause() -> None:
    assert refused(asked(kv_dtype="int8", block_size=8)) == (
        "kv.dtype: int8 needs the native CPU kernels, but they cannot run this model: the KV block size of 8 is no "
        "multiple of 16. Set kv.block_size to 16 or another multiple of it; or set kv.dtype to auto"
    )


def test_the_model_is_the_cause() -> None:
    for block_size in (16, 8):
        told = refused(asked(kv_dtype="int8", block_size=block_size), head_dim=24)
        assert told.endswith("its head dim of 24 is no multiple of 16. Set kv.dtype to auto")


def test_the_variable_is_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    for native in (None, False):  # what was not decided yet, and what was
        assert refused(asked(weight_format="int4", native=native)) == (
            "weights: int4 needs the native CPU kernels, but they are switched off by EDGEKV_CPU_KERNELS=off. Unset "
            "EDGEKV_CPU_KERNELS; or set weights to auto"
        )


def test_a_compiler_that_failed_is_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KernelsUnavailable("g++ could not compile them: no such flag", "set CXX to another")

    monkeypatch.setattr(library, "load_library", fail)
    told = refused(asked(weight_format="int4", native=False))
    assert told.endswith("but g++ could not compile them: no such flag. Set CXX to another; or set weights to auto")


def test_a_run_without_the_kernels_says_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load_library", lambda: None)
    assert NOT_IN_USE.reason in refused(asked(weight_format="int4", native=False))


def test_nothing_is_compiled_to_find_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "available", lambda: True)
    monkeypatch.setattr(library, "is_ready", lambda: False)
    monkeypatch.setattr(library, "load_library", lambda: pytest.fail("would compile"))
    assert why_not_native(asked(), read_spec(target_path())) is None


def test_a_library_that_is_none_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernels.so").write_bytes(b"no library")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "kernels.so"))
    lacking = why_not_native(asked(), read_spec(target_path()))
    assert isinstance(lacking, Lacking)
    assert (lacking.reason.startswith(f"{VARIABLE}: "), lacking.remedy) == (
        True,
        f"unset {VARIABLE}, or correct the path",
    )
