"""config.json and generation_config.json: published configs read right, and every wrong field is named."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgekv.errors import ModelError
from edgekv.model.hf_config import SUPPORTED_ARCHITECTURES, read_generation_config, read_spec
from edgekv.model.spec import GenerationDefaults, LinearScaling, Llama3Scaling, ModelSpec, RopeSpec, YarnScaling

LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA_32_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN_25_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA_2_2B: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "vocab_size": 256000,
}
GEMMA_3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
ALL = (LLAMA_2_7B, LLAMA_32_1B, MISTRAL_7B, QWEN_25_05B, QWEN_3_06B, GEMMA_2_2B, GEMMA_3_1B)


def write(folder: Path, config: object, name: str = "config.json") -> Path:
    (folder / name).write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def read(folder: Path, config: dict[str, Any], **changes: Any) -> ModelSpec:
    return read_spec(write(folder, {**config, **changes}))


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_32_1B, 1_235_814_400),
        (MISTRAL_7B, 7_241_732_096),
        (QWEN_25_05B, 494_032_768),
        (QWEN_3_06B, 596_049_920),
        (GEMMA_2_2B, 2_614_341_888),
        (GEMMA_3_1B, 999_885_952),
    ],
    ids=lambda value: value["architectures"][0] if isinstance(value, dict) else "",
)
def test_published_models_have_the_published_number_of_parameters(
    config: dict[str, Any], num_parameters: int, tmp_path: Path
) -> None:
    assert read(tmp_path, config).num_parameters == num_parameters


def test_llama_2_defaults(tmp_path: Path) -> None:
    spec = read(tmp_path, LLAMA_2_7B)
    assert (spec.num_kv_heads, spec.head_dim, spec.tie_word_embeddings, spec.dtype) == (32, 128, False, "float16")
    assert spec.windows == (None,) * 32
    assert spec.ropes == (RopeSpec(10_000.0),) * 32
    assert spec.attention_scale == pytest.approx(128**-0.5)


def test_llama_3_rope_in_both_forms(tmp_path: Path) -> None:
    expected = RopeSpec(500_000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192))
    assert read(tmp_path, LLAMA_32_1B).ropes[0] == expected
    parameters = {"rope_theta": 500_000.0, **LLAMA_32_1B["rope_scaling"]}
    new = {name: value for name, value in LLAMA_32_1B.items() if name not in ("rope_scaling", "rope_theta")}
    assert read(tmp_path, new, rope_parameters=parameters).ropes[0] == expected


def test_scalings(tmp_path: Path) -> None:
    linear = read(tmp_path, LLAMA_2_7B, rope_scaling={"type": "linear", "factor": 2})
    assert linear.ropes[0].scaling == LinearScaling(2.0)
    yarn = read(tmp_path, QWEN_25_05B, rope_scaling={"type": "yarn", "factor": 4.0})
    assert yarn.ropes[0] == RopeSpec(1e6, YarnScaling(4.0, 32768, 0.1 * math.log(4.0) + 1.0))
    assert read(tmp_path, LLAMA_2_7B, rope_scaling={"type": "dynamic", "factor": 2}).ropes[0].scaling is None


def test_mistral_slides_in_every_layer_or_in_none(tmp_path: Path) -> None:
    assert read(tmp_path, MISTRAL_7B).windows == (4096,) * 32
    assert read(tmp_path, MISTRAL_7B, sliding_window=None).windows == (None,) * 32
    silent = {field: value for field, value in MISTRAL_7B.items() if field != "sliding_window"}
    assert read(tmp_path, silent).windows == (4096,) * 32, "transformers' default"


def test_qwen_slides_from_max_window_layers_on_where_it_is_asked_to(tmp_path: Path) -> None:
    assert set(read(tmp_path, QWEN_25_05B).windows) == {None}
    assert read(tmp_path, QWEN_25_05B, use_sliding_window=True).windows == (None,) * 21 + (32768,) * 3
    types = ["sliding_attention"] + ["full_attention"] * 23
    spec = read(tmp_path, QWEN_25_05B, use_sliding_window=True, layer_types=types)
    assert spec.windows == (32768,) + (None,) * 23
    assert spec.qkv_bias
    assert not spec.output_bias


def test_gemma_2_slides_in_every_other_layer(tmp_path: Path) -> None:
    spec = read(tmp_path, GEMMA_2_2B)
    assert spec.windows == (4096, None) * 13
    assert (spec.attention_softcap, spec.final_softcap, spec.attention_scale) == (50.0, 30.0, 256**-0.5)
    silent = {field: value for field, value in GEMMA_2_2B.items() if "softcapping" not in field}
    spec = read(tmp_path, silent)
    assert (spec.attention_softcap, spec.final_softcap) == (50.0, 30.0), "transformers' defaults"
    spec = read(tmp_path, GEMMA_2_2B, attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (spec.attention_softcap, spec.final_softcap) == (None, None)
    assert spec.tie_word_embeddings
    assert spec.activation == "gelu_tanh"


def test_gemma_3_has_five_local_layers_to_a_global_one(tmp_path: Path) -> None:
    spec = read(tmp_path, GEMMA_3_1B, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert spec.windows[:7] == (512, 512, 512, 512, 512, None, 512)
    assert spec.ropes[5] == RopeSpec(1e6, LinearScaling(8.0))
    assert spec.ropes[4] == RopeSpec(1e4)


def test_an_unknown_architecture_lists_the_supported(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read(tmp_path, LLAMA_2_7B, architectures=["MambaForCausalLM"])
    for word in ("config.json", "'architectures'", "MambaForCausalLM", *SUPPORTED_ARCHITECTURES):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (LLAMA_2_7B, "hidden_size", "4096"),
        (LLAMA_2_7B, "hidden_size", 4096.0),
        (LLAMA_2_7B, "hidden_size", True),
        (LLAMA_2_7B, "hidden_size", 0),
        (LLAMA_2_7B, "hidden_size", None),
        (LLAMA_2_7B, "hidden_size", 1 << 40),
        (LLAMA_2_7B, "vocab_size", 10**400),
        (LLAMA_2_7B, "num_hidden_layers", -1),
        (LLAMA_2_7B, "num_hidden_layers", 10**6),
        (LLAMA_2_7B, "max_position_embeddings", 1 << 40),
        (LLAMA_2_7B, "num_key_value_heads", 5),
        (LLAMA_2_7B, "num_key_value_heads", 64),
        (LLAMA_2_7B, "head_dim", 127),
        (LLAMA_2_7B, "head_dim", 4096),
        (LLAMA_2_7B, "rms_norm_eps", 0),
        (LLAMA_2_7B, "rms_norm_eps", "1e-5"),
        (LLAMA_2_7B, "hidden_act", "gelu"),
        (LLAMA_2_7B, "torch_dtype", "int8"),
        (LLAMA_2_7B, "architectures", "LlamaForCausalLM"),
        (LLAMA_2_7B, "rope_theta", 0),
        (LLAMA_2_7B, "rope_scaling", "linear"),
        (LLAMA_2_7B, "partial_rotary_factor", 0.5),
        (LLAMA_2_7B, "quantization_config", {"quant_method": "bitsandbytes"}),
        (LLAMA_2_7B, "tie_word_embeddings", "no"),
        (MISTRAL_7B, "sliding_window", 0),
        (MISTRAL_7B, "num_key_value_heads", None),
        (QWEN_25_05B, "layer_types", ["full_attention"]),
        (QWEN_25_05B, "layer_types", ["linear_attention"] * 24),
        (GEMMA_2_2B, "use_bidirectional_attention", True),
        (GEMMA_2_2B, "hidden_activation", "gelu"),
    ],
)
def test_a_wrong_field_is_named(config: dict[str, Any], field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"config.json: field '{field}'"):
        read(tmp_path, config, **{field: value})


@pytest.mark.parametrize(
    ("scaling", "field"),
    [
        ({"type": "longrope"}, "rope_type"),
        ({"type": "linear"}, "factor"),
        ({"type": "linear", "factor": -1}, "factor"),
        ({"type": "linear", "factor": 2, "mrope_section": [1]}, "mrope_section"),
        ({"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}, "high_freq_factor"),
        ({"full_attention": {}}, "full_attention"),
    ],
)
def test_a_wrong_rope_field_is_named(scaling: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"config.json: field 'rope_scaling.{field}'"):
        read(tmp_path, LLAMA_2_7B, rope_scaling=scaling)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"architectures": ["LlamaForCausalLM"], "architectures": []}',
        '{"rms_norm_eps": NaN}',
        '{"rms_norm_eps": -Infinity}',
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a": ' + "9" * 10_000 + "}",
        "\ud800",
        " " * (5 << 20),
    ],
    ids=range(11),
)
def test_what_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError, match=r"config\.json"):
        read_spec(tmp_path)


def test_a_missing_folder_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such model folder"):
        read_spec(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        read_spec(tmp_path)


def test_no_mutated_config_does_anything_but_parse_or_raise_a_model_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    values: list[Any] = [
        None,
        -1,
        0,
        1,
        2,
        3,
        0.5,
        1e300,
        2**63,
        10**50,
        "",
        "x",
        [],
        ["x"],
        {},
        {"type": "yarn"},
        True,
    ]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1000):
        config = dict(rng.choice(ALL))
        for _ in range(rng.randint(1, 3)):
            config[rng.choice(list(config))] = rng.choice(values)
        try:
            read_spec(write(tmp_path, config))
            outcomes["read"] += 1
        except ModelError as fault:
            if "config.json" not in str(fault):
                raise
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 50


def test_generation_defaults(tmp_path: Path) -> None:
    write(tmp_path, LLAMA_32_1B)
    assert read_generation_config(tmp_path) == GenerationDefaults((128001, 128008, 128009), 128000)
    given = {"eos_token_id": 7, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": 0.05}
    write(tmp_path, given, "generation_config.json")
    assert read_generation_config(tmp_path) == GenerationDefaults(
        (7,), 128000, do_sample=True, temperature=0.6, top_p=0.9, top_k=None, min_p=0.05
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", "hot"), ("top_p", 1.5), ("top_k", -2), ("eos_token_id", [1, "2"]), ("eos_token_id", -1)],
)
def test_a_wrong_generation_field_is_named(field: str, value: Any, tmp_path: Path) -> None:
    write(write(tmp_path, LLAMA_2_7B), {field: value}, "generation_config.json")
    with pytest.raises(ModelError, match=rf"generation_config\.json: field '{field}'"):
        read_generation_config(tmp_path)


def test_reading_a_config_imports_no_torch() -> None:
    code = "import sys, edgekv.model.hf_config, edgekv.model.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
