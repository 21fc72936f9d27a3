"""What a plan says of real files' weights is what becomes of them."""

from pathlib import Path
from typing import Any

import pytest

from edgekv.engine.settings import EngineSettings, weigh
from edgekv.model.hf_config import read_spec
from edgekv.model.weight_table import read_weight_table
from edgekv.smi.device import Place
from tests.model.gguf_files import make_gguf
from tests.model.quantised_models import SHAPE
from tests.model.tiny_models import make_tiny

CPU = Place("cpu", "cpu", "CPU", 8 << 30)
MIXED = {"*": "F16", "output.weight": "BF16"}
ROUNDED = "the checkpoint's float16 is rounded to bfloat16"


@pytest.fixture(autouse=True)
def _no_model_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekv.core.dtype_choice.EXACT_NATIVE_BYTES", 0)


@pytest.mark.parametrize(
    ("types", "changes", "reason", "kinds"),
    [
        ({"*": "BF16"}, {}, "as the checkpoint", {"bf16", "f32"}),
        (MIXED, {}, ROUNDED, {"bf16", "f32"}),
        ({"*": "F16"}, {}, f"{ROUNDED}; dtype float16 keeps it", {"bf16", "f32"}),
        ({"*": "F16"}, {"dtype": "float16"}, "as configured", {"f16", "f32"}),
        ({"*": "Q8_0", "output.weight": "F16"}, {}, "the weights stay quantised", {"q8_0", "f16", "f32"}),
        (MIXED, {"weight_format": "int8"}, "the weights are quantised to int8 as they are loaded", {"q8_0", "f32"}),
    ],
)
def test_the_reason_for_a_dtype_is_true(
    types: dict[str, str], changes: dict[str, Any], reason: str, kinds: set[str], tmp_path: Path
) -> None:
    file = make_gguf(make_tiny("llama", tmp_path / "made", **SHAPE), tmp_path / "model.gguf", types=types)
    spec = read_spec(file)
    table = read_weight_table(file, spec)
    choice, weights = weigh(EngineSettings(file, CPU, **changes), spec, table, native=True)
    assert choice.reason == reason
    assert set(weights.kinds) == kinds


def test_the_dtypes_of_a_table_are_those_of_its_plain_matrices(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "made", **SHAPE)
    for types, dtypes in ((MIXED, ("float16", "bfloat16")), ({"*": "Q8_0"}, ()), ({"*": "F32"}, ("float32",))):
        file = make_gguf(folder, tmp_path / "model.gguf", types=types)
        assert read_weight_table(file, read_spec(file)).dtypes == dtypes, "vectors are float32 in any"
