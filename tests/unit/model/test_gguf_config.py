"""A GGUF file's metadata gives the spec that the folder gave which it was made from; every wrong key is named."""

import math
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgekv.errors import ModelError
from edgekv.model.gguf_keys import as_written
from edgekv.model.hf_config import read_generation_config, read_spec
from edgekv.model.rope import RotaryEmbedding, inverse_frequencies
from edgekv.model.spec import FrequencyFactors, GenerationDefaults, LinearScaling, RopeSpec, YarnScaling
from tests.model.gguf_files import make_gguf, write_metadata
from tests.model.tiny_models import make_tiny

LLAMA_METADATA: dict[str, object] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 16,
    "llama.rope.freq_base": 10_000.0,
}
EMBEDDING = {"token_embd.weight": np.zeros((32, 64)), "output.weight": np.zeros((32, 64))}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models; Gemma's heads are as wide as its scale says, which is all that a GGUF can tell."""
    root = tmp_path_factory.mktemp("tiny")
    scale: dict[str, Any] = {"gemma2": {"query_pre_attn_scalar": 12}, "gemma3": {"query_pre_attn_scalar": 14}}
    names = ("llama", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
    return {name: make_tiny(name, root / name, **scale.get(name, {})) for name in names}


def llama(folder: Path, tensors: dict[str, np.ndarray] | None = None, /, **changes: Any) -> Path:
    """A file of the metadata above; `changes` by the name behind "llama.", `None` leaves one out."""
    changed = {name if "." in name else f"llama.{name}": value for name, value in changes.items()}
    metadata = {**LLAMA_METADATA, **changed}
    given = EMBEDDING if tensors is None else tensors
    return write_metadata(folder / "model.gguf", metadata, given)


def change(folder: Path, key: str, value: object) -> Path:
    whole = key if key.startswith(("llama.", "general.", "tokenizer.")) else f"llama.{key}"
    return llama(folder, None, **{whole: value})


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3"])
def test_a_converted_model_has_the_same_spec(name: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    assert read_spec(make_gguf(tiny[name], tmp_path / "model.gguf")) == read_spec(tiny[name])


def test_what_converters_leave_out_is_all_that_differs(tiny: dict[str, Path], tmp_path: Path) -> None:
    # Neither Mistral's windows nor Qwen's are in the files that llama.cpp's converter makes.
    mistral = make_gguf(tiny["mistral"], tmp_path / "mistral.gguf")
    theirs = read_spec(tiny["mistral"])
    assert read_spec(mistral) == replace(theirs, architecture="LlamaForCausalLM", windows=(None,) * 3)
    told = make_gguf(tiny["mistral"], tmp_path / "told.gguf", metadata={"llama.attention.sliding_window": 64})
    assert read_spec(told).windows == theirs.windows
    qwen = make_gguf(tiny["qwen2"], tmp_path / "qwen2.gguf")
    assert read_spec(qwen) == replace(read_spec(tiny["qwen2"]), windows=(None,) * 3)


def test_a_gemma_of_another_scale_needs_the_key(tmp_path: Path) -> None:
    folder = make_tiny("gemma3", tmp_path / "gemma3")
    assert read_spec(make_gguf(folder, tmp_path / "told.gguf")).attention_scale == pytest.approx(20**-0.5)
    silent = make_gguf(folder, tmp_path / "silent.gguf", metadata={"gemma3.attention.scale": None})
    assert read_spec(silent).attention_scale == 14**-0.5


@pytest.mark.parametrize(("arch", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_by_their_width(arch: str, layers: int, tmp_path: Path) -> None:
    metadata = {key.replace("llama", arch): value for key, value in LLAMA_METADATA.items()}
    metadata |= {"general.architecture": arch, f"{arch}.attention.key_length": 32, f"{arch}.rope.dimension_count": 32}
    for count, per_head in ((layers, 16), (layers - 1, 32)):
        metadata[f"{arch}.block_count"] = count
        spec = read_spec(write_metadata(tmp_path / "model.gguf", metadata, EMBEDDING))
        assert spec.attention_scale == per_head**-0.5


@pytest.mark.parametrize(("arch", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemma_with_more_heads_than_columns_is_refused(arch: str, layers: int, tmp_path: Path) -> None:
    metadata = {key.replace("llama", arch): value for key, value in LLAMA_METADATA.items()}
    metadata |= {"general.architecture": arch, f"{arch}.block_count": layers, f"{arch}.attention.key_length": 16}
    metadata |= {f"{arch}.attention.head_count": 128}
    path = write_metadata(tmp_path / "model.gguf", metadata, EMBEDDING)
    with pytest.raises(ModelError, match=rf"'{arch}\.attention\.head_count'.*more heads than embedding_length has"):
        read_spec(path)
    told = write_metadata(tmp_path / "told.gguf", metadata | {f"{arch}.attention.scale": 0.25}, EMBEDDING)
    assert read_spec(told).attention_scale == 0.25


def test_llama_3_comes_with_its_factors_worked_out(tiny: dict[str, Path], tmp_path: Path) -> None:
    ours, theirs = read_spec(make_gguf(tiny["llama3"], tmp_path / "model.gguf")), read_spec(tiny["llama3"])
    assert replace(ours, ropes=theirs.ropes) == theirs
    [rope] = set(ours.ropes)
    assert isinstance(rope.scaling, FrequencyFactors)
    assert len(set(rope.scaling.factors)) == 3, "kept, blended and divided frequencies"
    expected = inverse_frequencies(theirs.ropes[0], theirs.head_dim)
    assert torch.allclose(inverse_frequencies(rope, ours.head_dim), expected, rtol=1e-6, atol=0)
    positions = torch.tensor([0, 3, 900])
    x = torch.randn(3, 2, ours.head_dim, generator=torch.Generator().manual_seed(0))
    rotated = [RotaryEmbedding(r, ours.head_dim, torch.device("cpu")).at(positions).apply(x) for r in
               (rope, theirs.ropes[0])]  # fmt: skip
    assert torch.allclose(rotated[0], rotated[1], atol=1e-3)


@pytest.mark.parametrize(
    "factors",
    [np.ones(7), np.ones((8, 1)), np.array([1.0] * 7 + [0.0]), np.array([1.0] * 7 + [math.nan]), np.array([-1.0] * 8)],
    ids=["too few", "a matrix", "zero", "nan", "negative"],
)
def test_wrong_factors_are_refused(factors: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tensor 'rope_freqs.weight'"):
        read_spec(llama(tmp_path, {**EMBEDDING, "rope_freqs.weight": factors}))


def test_rope_scalings(tmp_path: Path) -> None:
    def scaling(**keys: object) -> object:
        changes = {f"llama.rope.scaling.{name}": value for name, value in keys.items()}
        return read_spec(llama(tmp_path, None, **changes)).ropes[0].scaling

    assert scaling() is None
    assert scaling(type="linear", factor=8.0) == LinearScaling(8.0)
    assert scaling(factor=4.0) == LinearScaling(4.0), "no type is linear"
    assert scaling(type="none", factor=4.0) is None
    assert scaling(type="linear", factor=0.0) is None
    assert scaling(type="linear", factor=1.0) is None
    assert read_spec(change(tmp_path, "rope.scale_linear", 2.0)).ropes[0].scaling == LinearScaling(2.0), "the old name"
    magnitude = 0.1 * math.log(4.0) + 1
    assert scaling(type="yarn", factor=4.0, original_context_length=1024) == YarnScaling(4.0, 1024, magnitude)
    assert scaling(type="yarn", factor=4.0) == YarnScaling(4.0, 4096, magnitude), "else the context's length"
    made = scaling(type="yarn", factor=4.0, yarn_attn_factor=1.5, yarn_beta_fast=20.0, yarn_beta_slow=2.0)
    assert made == YarnScaling(4.0, 4096, 1.5, beta_fast=20.0, beta_slow=2.0)
    made = scaling(type="yarn", factor=4.0, yarn_log_multiplier=1.0)
    assert made == YarnScaling(4.0, 4096, 1.0), "mscale over mscale_all_dim"
    made = scaling(type="yarn", factor=4.0, yarn_attn_factor=1.5, attn_factor=2.0)
    assert made == YarnScaling(4.0, 4096, 3.0)


def test_gemma_3_turns_its_local_layers_by_a_base_of_their_own(tiny: dict[str, Path], tmp_path: Path) -> None:
    spec = read_spec(make_gguf(tiny["gemma3"], tmp_path / "model.gguf"))
    assert spec.windows == (64, 64, 64, 64, 64, None, 64)
    assert spec.ropes[5] == RopeSpec(1e6, LinearScaling(8.0))
    assert set(spec.ropes[:5]) == {RopeSpec(1e4)}
    silent = make_gguf(tiny["gemma3"], tmp_path / "silent.gguf", metadata={"gemma3.rope.freq_base_swa": None})
    assert read_spec(silent).ropes == spec.ropes, "10,000 where nothing is said"
    wide = make_gguf(tiny["gemma3"], tmp_path / "wide.gguf", metadata={"gemma3.attention.sliding_window": None})
    assert set(read_spec(wide).windows) == {None}


def test_which_layers_slide_may_be_said(tmp_path: Path) -> None:
    def windows(pattern: object) -> tuple[int | None, ...]:
        keys = {"llama.attention.sliding_window": 100, "llama.attention.sliding_window_pattern": pattern}
        return read_spec(llama(tmp_path, None, **keys, **{"llama.block_count": 4})).windows

    assert windows(None) == (100,) * 4
    assert windows(2) == (100, None, 100, None)
    assert windows(1) == (None,) * 4
    assert windows([True, True, False, True]) == (100, 100, None, 100)
    with pytest.raises(ModelError, match=r"llama\.attention\.sliding_window_pattern.*has 1 entries for 4 layers"):
        windows([True])
    with pytest.raises(ModelError, match=r"llama\.attention\.sliding_window_pattern.*found other numbers"):
        windows([0, 1, 2, 1])
    with pytest.raises(ModelError, match=r"llama\.attention\.sliding_window_pattern.*found an array of 4 string"):
        windows(["a", "b", "c", "d"])
    assert set(read_spec(change(tmp_path, "attention.sliding_window", 0)).windows) == {None}


def test_caps_of_gemma_2(tiny: dict[str, Path], tmp_path: Path) -> None:
    def caps(**changes: object) -> tuple[float | None, float | None]:
        metadata = {f"gemma2.{name}_logit_softcapping": value for name, value in changes.items()}
        spec = read_spec(make_gguf(tiny["gemma2"], tmp_path / "model.gguf", metadata=metadata))
        return spec.attention_softcap, spec.final_softcap

    assert caps(attn=None, final=None) == (50.0, 30.0), "llama.cpp's defaults"
    assert caps(attn=10.0, final=20.0) == (10.0, 20.0)
    assert caps(attn=0.0, final=0.0) == (None, None)
    with pytest.raises(ModelError, match=r"gemma3\.attn_logit_softcapping"):
        read_spec(
            make_gguf(tiny["gemma3"], tmp_path / "g.gguf", metadata={"gemma3.attn_logit_softcapping": 50.0})
        )


def test_the_head_is_tied_where_it_is_not_there(tmp_path: Path) -> None:
    assert not read_spec(llama(tmp_path)).tie_word_embeddings
    assert read_spec(llama(tmp_path, {"token_embd.weight": np.zeros((32, 64))})).tie_word_embeddings


def test_biases_are_there_where_their_tensors_are(tmp_path: Path) -> None:
    for name, field in (("attn_q", "qkv_bias"), ("attn_output", "output_bias"), ("ffn_down", "mlp_bias")):
        spec = read_spec(llama(tmp_path, {**EMBEDDING, f"blk.0.{name}.bias": np.zeros(64)}))
        found = {name for name in ("qkv_bias", "output_bias", "mlp_bias") if getattr(spec, name)}
        assert found == {field}


@pytest.mark.parametrize(
    ("types", "dtype"),
    [
        ({"*": "F32"}, "float32"),
        ({"*": "F16"}, "float16"),
        ({"*": "BF16"}, "bfloat16"),
        ({"*": "F16", "output.weight": "F32"}, "bfloat16"),
        ({"*": "Q8_0"}, "bfloat16"),
    ],
)
def test_the_dtype_is_that_of_the_matrices(types: dict[str, str], dtype: str, tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "llama", hidden_size=64, intermediate_size=96, num_attention_heads=4)
    assert read_spec(make_gguf(folder, tmp_path / "model.gguf", types=types)).dtype == dtype


def test_numbers_are_those_that_were_written(tmp_path: Path) -> None:
    for number in (1e-6, 1e-5, 1e-12, 0.1, 30.0, 500_000.0, 1e6, 0.05, 1 / 3, 2.0**-24):
        assert as_written(float(np.float32(number))) == float(str(np.float32(number))), "numpy's shortest decimal"
    assert as_written(1 / 3) == 1 / 3, "of a float64 nothing is taken"
    assert as_written(1e300) == 1e300
    assert read_spec(change(tmp_path, "attention.layer_norm_rms_epsilon", 1e-6)).rms_norm_eps == 1e-6


def test_a_number_for_each_layer_may_be_given_where_they_are_equal(tmp_path: Path) -> None:
    spec = read_spec(change(tmp_path, "attention.head_count", [4, 4]))
    assert spec.num_heads == 4
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        with pytest.raises(ModelError, match=rf"'llama\.{key}'.*differs from layer to layer"):
            read_spec(change(tmp_path, key, [4, 2]))
        with pytest.raises(ModelError, match=rf"'llama\.{key}'.*3 entries for 2 layers"):
            read_spec(change(tmp_path, key, [4, 4, 4]))


def test_what_is_left_out_means_what_llama_cpp_takes_it_to_mean(tmp_path: Path) -> None:
    silent = {f"llama.{name}": None for name in ("attention.head_count_kv", "rope.dimension_count", "rope.freq_base")}
    spec = read_spec(llama(tmp_path, None, **silent))
    assert (spec.num_kv_heads, spec.head_dim, spec.ropes[0]) == (4, 16, RopeSpec(10_000.0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.architecture", None),
        ("general.architecture", "mamba"),
        ("general.architecture", 3),
        ("general.type", "adapter"),
        ("general.type", "mmproj"),
        ("block_count", None),
        ("block_count", 0),
        ("block_count", 10**6),
        ("block_count", "2"),
        ("block_count", 2.0),
        ("block_count", True),
        ("context_length", None),
        ("context_length", 2**31),
        ("embedding_length", None),
        ("embedding_length", 2**20),
        ("feed_forward_length", None),
        ("feed_forward_length", 0),
        ("attention.head_count", None),
        ("attention.head_count", 0),
        ("attention.head_count_kv", 3),
        ("attention.head_count_kv", 8),
        ("attention.key_length", 15),
        ("attention.key_length", 4096),
        ("attention.value_length", 8),
        ("attention.key_length_swa", 8),
        ("attention.layer_norm_rms_epsilon", None),
        ("attention.layer_norm_rms_epsilon", 0.0),
        ("attention.layer_norm_rms_epsilon", math.nan),
        ("attention.layer_norm_rms_epsilon", "1e-5"),
        ("attention.scale", -1.0),
        ("attention.sliding_window", -1),
        ("attention.causal", False),
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("rope.dimension_count", 8),
        ("rope.dimension_sections", [4, 4, 4, 4]),
        ("rope.freq_base", 0.0),
        ("rope.freq_base", math.inf),
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.factor", -1.0),
        ("rope.scaling.attn_factor", 1.2),
        ("expert_count", 8),
        ("expert_count", [0, 0]),
        ("attention.temperature_scale", 0.1),
        ("rope.scaling.alpha", 1000.0),
        ("embedding_scale", 12.0),
        ("residual_scale", 0.22),
        ("logit_scale", 0.5),
    ],
)
def test_a_wrong_key_is_named(key: str, value: object, tmp_path: Path) -> None:
    named = key if key.startswith("general.") else f"llama.{key}"
    with pytest.raises(ModelError, match=rf"model\.gguf: key '{named}'"):
        read_spec(change(tmp_path, key, value))


def test_harmless_values_of_what_is_not_supported_are_accepted(tmp_path: Path) -> None:
    harmless = {"expert_count": 0, "attention.causal": True, "logit_scale": 1.0, "attention.clamp_kqv": 0.0}
    harmless |= {"attention.temperature_scale": 0.0, "rope.scaling.alpha": 0.0, "attention.max_alibi_bias": 0.0}
    harmless |= {"embedding_scale": 1.0, "residual_scale": 1.0}
    read_spec(llama(tmp_path, None, **{f"llama.{name}": value for name, value in harmless.items()}))
    read_spec(change(tmp_path, "general.type", "model"))


def test_scalings_that_exclude_each_other_are_refused(tmp_path: Path) -> None:
    path = llama(tmp_path, {**EMBEDDING, "rope_freqs.weight": np.ones(8)}, **{"llama.rope.scaling.factor": 2.0})
    with pytest.raises(ModelError, match=r"'llama\.rope\.scaling\.type'.*rope_freqs\.weight"):
        read_spec(path)
    keys = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5}
    with pytest.raises(ModelError, match=r"'llama\.rope\.scaling\.yarn_ext_factor'"):
        read_spec(llama(tmp_path, None, **keys))


def test_the_vocabulary_is_as_long_as_the_embedding(tmp_path: Path) -> None:
    assert read_spec(llama(tmp_path)).vocab_size == 32
    with pytest.raises(ModelError, match=r"'tokenizer\.ggml\.tokens'.*3 tokens, but token_embd\.weight has 32 rows"):
        read_spec(change(tmp_path, "tokenizer.ggml.tokens", ["a", "b", "c"]))
    with pytest.raises(ModelError, match=r"'token_embd\.weight': is missing"):
        read_spec(llama(tmp_path, {"output.weight": np.zeros((32, 64))}))


def test_generation_defaults(tmp_path: Path) -> None:
    tokens = ["<s>", "</s>", "<|eot_id|>", "<|end|>", "<|im_end|>", "<|eom_id|>", "a"]
    metadata: dict[str, object] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 1, 4, 3, 1],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 6,
        "general.sampling.temp": 0.6,
        "general.sampling.top_p": 0.9,
        "general.sampling.top_k": 20,
        "general.sampling.min_p": 0.05,
        "general.sampling.penalty_repeat": 1.1,
    }
    read = read_generation_config(write_metadata(tmp_path / "model.gguf", metadata))
    # What ends a turn by its text is so as a token with a part to play: the "<|end|>" here is a word like another.
    assert read == GenerationDefaults(
        (6, 2, 4, 5), 0, temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.1
    )
    metadata |= {"tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.eom_token_id": 5}
    metadata = {key: value for key, value in metadata.items() if "sampling" not in key}
    read = read_generation_config(write_metadata(tmp_path / "model.gguf", metadata))
    assert read == GenerationDefaults((6, 1, 5, 2, 4), 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("general.sampling.temp", -1.0), ("general.sampling.top_p", 1.5), ("tokenizer.ggml.eos_token_id", 3)],
)
def test_a_wrong_generation_key_is_named(key: str, value: object, tmp_path: Path) -> None:
    path = write_metadata(tmp_path / "model.gguf", {"tokenizer.ggml.tokens": ["a", "b", "c"], key: value})
    with pytest.raises(ModelError, match=f"key '{key}'"):
        read_generation_config(path)


def test_a_folder_stands_for_the_one_file_in_it(tiny: dict[str, Path], tmp_path: Path) -> None:
    file = make_gguf(tiny["llama"], tmp_path / "a.gguf")
    assert read_spec(tmp_path) == read_spec(file)
    shutil.copy(file, tmp_path / "b.gguf")
    with pytest.raises(ModelError, match=r"several GGUF files, name one: a\.gguf, b\.gguf"):
        read_spec(tmp_path)
    shutil.copy(tiny["qwen3"] / "config.json", tmp_path)
    assert read_spec(tmp_path).architecture == "Qwen3ForCausalLM", "with a config.json it is a folder like another"
    with pytest.raises(ModelError, match=r"nothing\.gguf: cannot be read: No such file"):
        read_spec(tmp_path / "nothing.gguf")


def test_no_mutated_metadata_does_anything_but_parse_or_raise_a_model_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    values: list[Any] = [None, -1, 0, 1, 2, 3, 0.5, 1e30, 2**31, "", "x", "yarn", [1], ["x"], [1.5], True, math.nan]
    keys = [*LLAMA_METADATA, "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.attention.sliding_window",
            "llama.attention.sliding_window_pattern", "llama.attention.scale", "tokenizer.ggml.tokens"]  # fmt: skip
    outcomes = {"read": 0, "refused": 0}
    for _ in range(500):
        changes = {rng.choice(keys): rng.choice(values) for _ in range(rng.randint(1, 3))}
        try:
            read_spec(llama(tmp_path, None, **changes))
            outcomes["read"] += 1
        except ModelError as fault:
            if "model.gguf" not in str(fault):
                raise
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 25


def test_reading_metadata_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, edgekv.model.gguf_config; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
