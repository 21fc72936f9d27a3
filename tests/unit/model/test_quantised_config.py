"""What config.json may say of a quantised checkpoint, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from edgekv.errors import ModelError
from edgekv.model.hf_config import read_spec
from edgekv.model.json_fields import Fields
from edgekv.model.quantised_config import GroupQuantisation, folder_quantisation, read_quantisation
from tests.unit.cli.shapes import LLAMA_3_8B, write_shape

# As published: casperhansen/llama-3-8b-instruct-awq; Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4; a GPTQModel of today.
AWQ = {
    "quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True,
    "modules_to_not_convert": None,
}  # fmt: skip
GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "sym": True,
    "static_groups": False, "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model",
    "dataset": None, "batch_size": 1, "block_name_to_quantize": None, "cache_block_outputs": True,
}  # fmt: skip
GPTQ_V2 = {
    "quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, "lm_head": True,
    "checkpoint_format": "gptq_v2", "meta": {"quantizer": ["gptqmodel:1.4.0"]}, "dynamic": {},
}  # fmt: skip


def read(config: dict[str, Any] | None) -> GroupQuantisation | None:
    return read_quantisation(Fields("config.json", {} if config is None else {"quantization_config": config}))


def test_published_configurations() -> None:
    assert read(None) is None
    assert read(AWQ) == GroupQuantisation("awq", 128, None, 0)
    assert read(AWQ | {"zero_point": False, "modules_to_not_convert": ["visual"]}) == GroupQuantisation(
        "awq", 128, 8, 0, ("visual",)
    )
    assert read(GPTQ) == GroupQuantisation("gptq", 128, 8, 1, ("lm_head",))
    assert read(GPTQ_V2) == GroupQuantisation("gptq", 32, None, 0)
    assert read(GPTQ | {"group_size": -1}) == GroupQuantisation("gptq", None, 8, 1, ("lm_head",))


@pytest.mark.parametrize(
    ("group", "cols", "name"),
    [(128, 4096, "128"), (64, 192, "64"), (32, 96, "32"), (96, 192, "32"), (256, 512, "128"), (None, 96, "32"),
     (128, 192, None), (None, 48, None), (None, 11008, "128")],
)  # fmt: skip
def test_the_encoding_is_the_widest_that_a_group_holds(group: int | None, cols: int, name: str | None) -> None:
    found = GroupQuantisation("awq", group, None, 0).encoding(cols)
    assert (found and found.name) == (name and f"affine4_{name}")


def test_titles() -> None:
    assert GroupQuantisation("awq", 128, None, 0).title == "AWQ, 4 bits, groups of 128"
    assert GroupQuantisation("gptq", None, 8, 1).title == "GPTQ, 4 bits, a scale for each row"


@pytest.mark.parametrize(
    ("config", "field", "told"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "", "quantised by 'bitsandbytes' are not supported"),
        ({"quant_method": "fp8"}, "", "by 'fp8' are not supported: supported are awq and gptq with 4 bits, and GGUF"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "", "weights: int8 or int4"),
        ({"bits": 4}, "", "quantised without a quant_method are not"),
        (AWQ | {"version": "gemv"}, ".version", "'gemv' is not supported, only gemm"),
        (AWQ | {"bits": 3}, ".bits", "3 bits are not supported, only 4"),
        (AWQ | {"bits": None}, ".bits", "is null"),
        (GPTQ | {"bits": 8}, ".bits", "8 bits are not supported, only 4"),
        (GPTQ | {"group_size": 48}, ".group_size", "groups of 48 are not supported, only multiples of 32"),
        (GPTQ | {"group_size": 16}, ".group_size", "groups of 16"),
        (GPTQ | {"group_size": 0}, ".group_size", "groups of 0"),
        (GPTQ | {"group_size": -2}, ".group_size", "expected an integer"),
        (GPTQ | {"checkpoint_format": "marlin"}, ".checkpoint_format", "'marlin' is not supported, only gptq and"),
        (GPTQ | {"is_marlin_format": True}, ".checkpoint_format", "'marlin' is not supported"),
        (GPTQ | {"dynamic": {"-:lm_head": {}}}, ".dynamic", "bits that differ from layer to layer"),
        (GPTQ | {"sym": "yes"}, ".sym", "expected true or false"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(config: dict[str, Any], field: str, told: str, tmp_path: Path) -> None:
    folder = write_shape(tmp_path, LLAMA_3_8B | {"quantization_config": config})
    for reader in (folder_quantisation, read_spec):
        with pytest.raises(ModelError) as caught:
            reader(folder)  # type: ignore[operator]
        assert f"config.json: field 'quantization_config{field}': " in str(caught.value)
        assert told in str(caught.value)


def test_the_shape_of_a_quantised_model_is_that_of_the_original(tmp_path: Path) -> None:
    plain = read_spec(write_shape(tmp_path / "plain", LLAMA_3_8B))
    assert read_spec(write_shape(tmp_path / "awq", LLAMA_3_8B | {"quantization_config": AWQ})) == plain
    assert json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"] == AWQ
