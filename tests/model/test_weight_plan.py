"""Bytes of weights that a plan tells are those that a load takes, to the byte, for every kind of file and setting."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from edgekv.errors import ModelError
from edgekv.kernels.quant.encodings import AFFINE4_128, BF16, F16, Encoding
from edgekv.model.declared_matrices import DeclaredMatrices
from edgekv.model.hf_config import read_spec
from edgekv.model.loader import ARCHITECTURES as CLASSES
from edgekv.model.loader import load_model
from edgekv.model.lowering import lower
from edgekv.model.matrix_layout import WeightForm
from edgekv.model.open_weights import open_weights
from edgekv.model.packing import load_packed
from edgekv.model.weight_names import weight_names
from edgekv.model.weight_plan import native_bytes, plain_bytes
from edgekv.model.weight_table import read_weight_table
from edgekv.model.weights import DeclaredWeights
from tests.model.quantised_models import SHAPE, make_quantised
from tests.model.test_packing import Recorder, RowKeeper, make_mixed_gguf
from tests.model.test_plan_is_actual import tensors_of
from tests.model.tiny_models import ARCHITECTURES, edit_config, make_tiny
from tests.unit.cli.shapes import LLAMA_3_8B, write_shape
from tests.unit.model.test_quantised_config import AWQ, GPTQ

# Sizes that are no whole panels, and one that is no whole groups of 32.
ODD: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 6, "num_key_value_heads": 2}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param), head_dim=16, **ODD)


def test_the_names_are_those_that_torch_models_and_lowerings_ask_for(folder: Path) -> None:
    spec = read_spec(folder)
    shapes = {
        name: shape for each in weight_names(spec) for name, shape in zip(each.names, each.shapes, strict=True)
    }
    with closing(open_weights(folder)) as stored:
        declared, lowered = DeclaredWeights(stored), DeclaredMatrices(stored, WeightForm(None))
        CLASSES[spec.architecture](spec, declared)
        lower(spec, lowered)
        assert declared.asked.names == lowered.asked.names == shapes.keys()
        assert {name: tensor.shape for name, tensor in stored.tensors.items() if name in shapes} == shapes


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_native_bytes_are_those_that_are_loaded(folder: Path, dtype: Any, weights: Any) -> None:
    check_native(folder, WeightForm(dtype, weights))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: make_quantised(path, "awq", 64)[0],
        lambda path: make_quantised(path, "gptq", 32)[0],
        lambda path: make_mixed_gguf(path, {"*": "Q8_0", "blk.*.ffn_up*": "Q4_K", "token_embd*": "F16"}),
        lambda path: make_mixed_gguf(path, {"*": "Q4_0", "blk.*.attn_v*": "Q5_1", "output.weight": "Q4_K"}),
    ],
    ids=["awq", "gptq", "gguf-q8", "gguf-q4"],
)
def test_native_bytes_of_quantised_files(make: Any, tmp_path: Path) -> None:
    path = make(tmp_path)
    spec = read_spec(path)
    assert read_weight_table(path, spec).is_quantised
    for form in (WeightForm(None), WeightForm("bfloat16")):
        check_native(path, form)
    check_plain(path)


def check_native(path: Path, form: WeightForm) -> None:
    spec = read_spec(path)
    planned = native_bytes(read_weight_table(path, spec), spec, form)
    with closing(open_weights(path)) as stored:
        declared = DeclaredMatrices(stored, form)
        assert lower(spec, declared).weight_bytes == declared.num_bytes == planned.total
    loaded = load_packed(path, spec, Recorder, form=form, packer=RowKeeper())
    assert loaded.num_bytes == planned.total
    embedding = loaded.matrices["model.embed_tokens.weight"].num_bytes
    assert planned.step == planned.total - (0 if spec.tie_word_embeddings else embedding)
    assert sum(planned.kinds.values()) == planned.total
    assert list(planned.kinds.values()) == sorted(planned.kinds.values(), reverse=True)


def test_plain_bytes_are_those_that_torch_holds(folder: Path) -> None:
    check_plain(folder)


def check_plain(path: Path) -> None:
    spec = read_spec(path)
    for dtype in ("float32", "bfloat16", "float16"):
        planned = plain_bytes(spec, dtype)  # type: ignore[arg-type]
        model = load_model(path, dtype=getattr(torch, dtype), device=torch.device("cpu"))
        del model._rotary  # computed from the config, not read
        held = {each.data_ptr(): each.numel() * each.itemsize for each in tensors_of(model)}
        assert sum(held.values()) == planned.total
        embedding = model._embedding.nbytes
        assert planned.step == planned.total - (0 if spec.tie_word_embeddings else embedding)


def encodings(path: Path) -> dict[str, Encoding]:
    table = read_weight_table(path, read_spec(path))
    return {name: tensor.encoding for name, tensor in table.tensors.items()}


def test_a_configuration_alone_is_taken_at_its_word(tmp_path: Path) -> None:
    plain = write_shape(tmp_path / "plain", LLAMA_3_8B)
    spec = read_spec(plain)
    table = read_weight_table(plain, spec)
    assert (table.is_assumed, table.is_quantised) == (True, False)
    assert set(encodings(plain).values()) == {BF16}
    # Norms are float32.
    assert native_bytes(table, spec, WeightForm(None)).total == 2 * spec.num_parameters + 2 * 65 * 4096

    kept = AWQ | {"modules_to_not_convert": ["v_proj"]}
    awq = write_shape(tmp_path / "awq", LLAMA_3_8B | {"torch_dtype": "float16", "quantization_config": kept})
    found = encodings(awq)
    assert found["model.layers.3.self_attn.q_proj.weight"] == AFFINE4_128
    assert found["model.layers.0.mlp.down_proj.weight"] == AFFINE4_128
    assert found["model.layers.3.self_attn.v_proj.weight"] == found["lm_head.weight"] == F16
    assert found["model.norm.weight"] == found["model.embed_tokens.weight"] == F16
    gptq = write_shape(tmp_path / "gptq", LLAMA_3_8B | {"quantization_config": GPTQ})
    assert encodings(gptq)["model.layers.31.self_attn.v_proj.weight"] == AFFINE4_128
    assert read_weight_table(gptq, spec).is_quantised


def test_an_index_without_shards_is_a_configuration_and_with_one_it_is_not(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path, max_shard_size="60KB", **SHAPE)
    spec = read_spec(folder)
    assert not read_weight_table(folder, spec).is_assumed
    first, *others = sorted(folder.glob("*.safetensors"))
    others[0].unlink()
    with pytest.raises(ModelError, match="the shard is missing"):
        read_weight_table(folder, spec)
    for path in (first, *others[1:]):
        path.unlink()
    assert read_weight_table(folder, spec).is_assumed
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match="not usable JSON"):
        read_weight_table(folder, spec)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 7}))
    with pytest.raises(ModelError, match="weight_map"):
        read_weight_table(folder, spec)


def test_files_that_do_not_fit_the_configuration_are_refused_by_a_plan_too(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path, **SHAPE)
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"tensor 'model\.layers\.1\..*': is not part of the model"):
        read_weight_table(folder, read_spec(folder))
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"tensor 'model\.layers\.2\..*': is missing"):
        read_weight_table(folder, read_spec(folder))


def test_a_table_says_what_the_files_hold(tmp_path: Path) -> None:
    path = make_mixed_gguf(tmp_path, {"*": "Q8_0", "token_embd*": "F16"})
    table = read_weight_table(path, read_spec(path))
    kinds = table.kinds
    assert list(kinds) == ["f16", "q8_0", "f32"] or list(kinds) == ["q8_0", "f16", "f32"]
    assert kinds["f16"] == 4096 * 256 * 2
    with pytest.raises(ModelError, match=r"token_embd\.weight': is not open"):
        table.tensors["model.embed_tokens.weight"].read_rows(0, memoryview(bytearray(512)))
