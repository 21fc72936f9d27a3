"""What only some kernels can serve is refused without them, with the cause and what to do about it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekv.demo import target_path
from edgekv.engine.kernel_needs import NOT_IN_USE, Lacking, NotServedHere, not_served, why_not_native
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
    both = asked(weight_format="int4", kv_dtype="int8")
    assert dict(not_served(both, native=False)) == {"weights": "int4", "kv.dtype": "int8"}
    assert dict(not_served(both, native=True)) == {}
    for native in (True, False):
        assert list(not_served(asked(dtype="float16", kv_dtype="bfloat16"), native=native)) == []


@pytest.mark.parametrize("kv_dtype", ["fp8", "int4"])
def test_formats_that_only_cards_have(kv_dtype: str) -> None:
    assert dict(not_served(asked(kv_dtype=kv_dtype), native=True)) == {"kv.dtype": kv_dtype}
    assert refused(asked(kv_dtype=kv_dtype)) == (
        f"kv.dtype: {kv_dtype} needs a card's kernels, but this model runs on the CPU. Set kv.dtype to int8; or set "
        "kv.dtype to auto"
    )
    on_card = asked(kv_dtype=kv_dtype, weight_format="int8", place=CARD)
    assert dict(not_served(on_card, native=True)) == {}
    assert dict(not_served(on_card, native=False)) == {"weights": "int8", "kv.dtype": kv_dtype}
    assert plan_engine(on_card, read_spec(target_path()))[1].kv_dtype == kv_dtype


def test_a_card_that_main_memory_plays_has_no_kernels() -> None:
    played = replace(CARD, torch_name="cpu", title="a card of paper")
    assert refused(asked(kv_dtype="int8", place=played)) == (
        "kv.dtype: int8 needs a card's kernels, but main memory plays a card of paper. Set kv.dtype to auto"
    )
    assert plan_engine(asked(place=played), read_spec(target_path()))[1].kv_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"block_size": 8}, "they cannot run this model: the KV block size of 8 is neither 16 nor 32. Set "
                            "kv.block_size to 16 or 32; or set weights to auto"),
        ({"native": False}, "they are not in use in this run. Set weights to auto"),
        ({"place": replace(CARD, title="GTX 1080", target="sm_61")},
         "they are for cards from sm_75 and gfx1030 on, and GTX 1080 is sm_61. Set weights to auto"),
    ],
)  # fmt: skip
def test_why_a_cards_kernels_do_not_run_it(changes: dict[str, Any], told: str) -> None:
    refusal = refused(replace(asked(weight_format="int8", place=CARD), **changes))
    assert refusal == f"weights: int8 needs a card's kernels, but {told}"


def test_a_model_that_no_cards_kernel_fits_is_the_cause() -> None:
    for block_size in (16, 8):
        told = refused(asked(kv_dtype="int8", block_size=block_size, place=CARD), head_dim=80)
        assert told.endswith("its head dim of 80 is no multiple of 32 up to 256. Set kv.dtype to auto")


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
