"""AWQ and GPTQ checkpoints: every weight is what its parts mean, and parts that do not fit together are refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgekv.errors import ModelError
from edgekv.kernels.attn.dense import DenseAttention
from edgekv.kernels.quant.dequantise import dequantise
from edgekv.model.checkpoint import Checkpoint
from edgekv.model.loader import load_model
from edgekv.model.stored import StoredTensor
from tests.model.quantised_models import make_quantised
from tests.model.tiny_models import edit_config

CPU = torch.device("cpu")
K_PROJ = "model.layers.1.self_attn.k_proj"
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("awq", {}),
    ("awq", {"symmetric": True}),
    ("gptq", {}),
    ("gptq", {"symmetric": True}),
    ("gptq", {"version": 2}),
]


def read(tensor: StoredTensor, first: int, stop: int) -> Tensor:
    """Rows of a matrix as the numbers they mean."""
    raw = torch.empty(stop - first, tensor.encoding.row_bytes(tensor.shape[1]), dtype=torch.uint8)
    tensor.read_rows(first, raw.view(-1).numpy().data)
    return dequantise(tensor.encoding, raw, tensor.shape[1])


def logits(folder: Path) -> Tensor:
    positions = torch.arange(20)
    model = load_model(folder, dtype=torch.float32, device=CPU)
    return model.forward(positions * 7, positions, DenseAttention(), positions)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    return make_quantised(tmp_path, "awq", 64)[0]


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    return make_quantised(tmp_path, "gptq", 64)[0]


@pytest.mark.parametrize(("method", "changes"), KINDS, ids=lambda part: str(part))
@pytest.mark.parametrize(("group", "name"), [(32, "32"), (64, "64"), (128, "128"), (-1, "128")])
def test_every_row_is_what_its_parts_mean(
    method: str, changes: dict[str, Any], group: int, name: str, tmp_path: Path
) -> None:
    made, meant = make_quantised(tmp_path, method, group, **changes)
    expected = load_file(meant / "model.safetensors")
    with Checkpoint(made) as checkpoint:
        assert checkpoint.tensors.keys() == expected.keys()
        for key, weight in expected.items():
            if key.endswith("_proj.weight"):
                tensor = checkpoint.tensors[key]
                assert (tensor.shape, tensor.encoding.name) == (tuple(weight.shape), f"affine4_{name}")
                assert tensor.num_bytes == weight.shape[0] * tensor.encoding.row_bytes(weight.shape[1])
                assert torch.equal(read(tensor, 0, len(weight)), weight)


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("strip_bytes", [1, 3000, 512 << 10])
def test_any_rows_can_be_asked_for(
    method: str, strip_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that share an int32 with others, whichever strips they are read in."""
    monkeypatch.setattr("edgekv.model.awq_gptq._STRIP_BYTES", strip_bytes)
    made, meant = make_quantised(tmp_path, method, 32)
    name = "model.layers.0.mlp.down_proj.weight"
    expected = load_file(meant / "model.safetensors")[name]
    with Checkpoint(made) as checkpoint:
        for first, stop in [(0, 1), (7, 9), (8, 16), (13, 104), (127, 128)]:
            assert torch.equal(read(checkpoint.tensors[name], first, stop), expected[first:stop])


@pytest.mark.parametrize(("method", "changes"), KINDS, ids=lambda part: str(part))
def test_a_quantised_model_says_what_its_meaning_says(method: str, changes: dict[str, Any], tmp_path: Path) -> None:
    made, meant = make_quantised(tmp_path, method, 32, **changes)
    assert torch.equal(logits(made), logits(meant))


def test_symmetric_parts_need_no_zeros(tmp_path: Path) -> None:
    """Some tools write none, others write nonsense that no kernel for symmetric weights reads."""
    made, meant = make_quantised(tmp_path, "gptq", 64, symmetric=True)
    expected = logits(meant)
    edit(made, lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if name.endswith("qzeros")])
    assert torch.equal(logits(made), expected)
    edit(made, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("qzeros")])
    assert torch.equal(logits(made), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_another_dtype_are_rounded_to_float16(dtype: torch.dtype, awq: Path) -> None:
    before = logits(awq)
    edit(awq, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items() if n.endswith("scales")}))
    error = (logits(awq) - before).abs().max()
    assert (error == 0) == (dtype == torch.float32)
    assert error < 0.2 * before.abs().max()


def test_a_layer_that_was_left_as_it_was_is_read_as_it_is(awq: Path) -> None:
    with Checkpoint(awq) as checkpoint:
        weight = read(checkpoint.tensors[f"{K_PROJ}.weight"], 0, 64)
    before = logits(awq)

    def restore(tensors: dict[str, Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{K_PROJ}.{part}"]
        tensors[f"{K_PROJ}.weight"] = weight

    edit(awq, restore)
    assert torch.equal(logits(awq), before)


def test_biases_that_tools_add_are_ignored_where_they_are_zero(gptq: Path) -> None:
    edit_config(gptq, mlp_bias=False)
    edit(gptq, lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "mlp" in name and "bias" in name])
    logits(gptq)
    name = "model.layers.1.mlp.up_proj.bias"
    edit(gptq, lambda tensors: tensors[name].__setitem__(3, 0.5))
    with pytest.raises(ModelError, match=f"tensor '{re.escape(name)}': is not part of the model"):
        logits(gptq)


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("qzeros", None, "'{k}.qzeros': is missing, though there is a qweight"),
        ("scales", None, "'{k}.scales': is missing, though there is a qweight"),
        ("qzeros", lambda part: part[:, :-1], "'{k}.qzeros': is I32 [2, 7], but beside a qweight of"),
        ("qzeros", lambda part: part.float(), "it has to be I32 [2, 8]"),
        ("scales", lambda part: part[:1], "'{k}.scales': is F16 [1, 64], but"),
        ("scales", lambda part: part.repeat(2, 1), "GPTQ, 4 bits, groups of 64, it has to be F16 or BF16 or F32 [2, "),
        ("scales", lambda part: part * float("inf"), "'{k}.scales': holds infinities"),
        ("qweight", lambda part: part.long(), "'{k}.qweight': is I64 [16, 64], not a matrix of I32"),
        ("qweight", lambda part: part[:, 0], "'{k}.qweight': is I32 [16], not a matrix"),
        ("qweight", lambda part: part[:, :60], "its 60 outputs of 128 inputs are no whole number"),
        ("qweight", lambda part: part[:13], "its 64 outputs of 104 inputs are no whole number"),
        ("qweight", lambda part: part[:8], "'{k}.scales': is F16 [2, 64], but"),
        ("g_idx", lambda part: part.flip(0), "'{k}.g_idx': the inputs are in the order of their activations (desc"),
        ("g_idx", lambda part: part[:-1], "'{k}.g_idx': is I32 [127], but"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_together(
    part: str, change: Callable[[Tensor], Tensor] | None, told: str, gptq: Path
) -> None:
    name = f"{K_PROJ}.{part}"

    def apply(tensors: dict[str, Tensor]) -> None:
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name]).contiguous()

    edit(gptq, apply)
    with pytest.raises(ModelError) as caught:
        logits(gptq)
    assert told.format(k=K_PROJ) in str(caught.value)


def test_a_matrix_of_another_shape_than_the_config_says(awq: Path) -> None:
    edit_config(awq, intermediate_size=512)
    with pytest.raises(ModelError, match=r"gate_proj.qweight': has shape \[256, 128\], but config.json asks for \[512"):
        logits(awq)


def test_a_weight_beside_its_quantised_self(awq: Path) -> None:
    edit(awq, lambda tensors: tensors.update({f"{K_PROJ}.weight": torch.zeros(64, 128)}))
    with pytest.raises(ModelError, match=r"k_proj\.qweight': is there beside a weight that is not quantised"):
        logits(awq)


@pytest.mark.parametrize("name", ["qweight", ".qweight"])
def test_a_quantised_weight_of_no_layer(name: str, awq: Path) -> None:
    edit(awq, lambda tensors: tensors.update({name: torch.zeros(2, 2, dtype=torch.int32)}))
    with pytest.raises(ModelError, match=rf"tensor '{re.escape(name)}': "):
        logits(awq)


def test_parts_of_nothing_are_left_over(awq: Path) -> None:
    edit(awq, lambda tensors: tensors.update({"model.layers.0.mlp.gate.scales": torch.zeros(2, 2)}))
    with pytest.raises(ModelError, match=r"'model\.layers\.0\.mlp\.gate\.scales': is not part of the model"):
        logits(awq)


def test_a_group_size_that_is_not_that_of_the_file(awq: Path) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    edit_config(awq, quantization_config=config)
    with pytest.raises(ModelError, match=r"scales': is F16 \[4, 128\], but .* has to be .* \[8, 128\]"):
        logits(awq)


def test_quantised_tensors_without_a_word_in_the_config(awq: Path) -> None:
    edit_config(awq, quantization_config=None)
    with pytest.raises(ModelError, match=r"qweight': is quantised, but config.json has no quantization_config"):
        logits(awq)
