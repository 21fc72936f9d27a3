"""A GGUF file's tensors come back under the names, in the order of rows and with the values that went into it.

The names on the way in are those of the gguf package's own map, the changes those of llama.cpp's converter.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from edgekv.errors import ModelError
from edgekv.formats.gguf_checkpoint import GgufCheckpoint
from edgekv.kernels.quant.dequantise import dequantise
from edgekv.model.gguf_tensors import GgufTensors
from edgekv.model.stored import StoredTensor, StoredTensors
from tests.unit.formats import gguf_image as image
from tests.unit.formats.gguf_image import Image, Tensor

HEADS, KV_HEADS, DIM, HIDDEN, INNER, VOCABULARY, LAYERS = 4, 2, 16, 256, 512, 40, 2
MATRICES = {
    "self_attn.q_proj": (HEADS * DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * DIM * 4),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
BIASES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA_NORMS = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
HEAD_NORMS = {"self_attn.q_norm": DIM, "self_attn.k_norm": DIM}
GEMMA_NORMS = {**LLAMA_NORMS, "pre_feedforward_layernorm": HIDDEN, "post_feedforward_layernorm": HIDDEN}
KINDS = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_K, Kind.Q6_K, Kind.BF16, Kind.F16, Kind.Q5_K, Kind.IQ4_XS, Kind.F32, Kind.MXFP4)


@dataclass(frozen=True)
class Family:
    name: str
    arch: gguf.MODEL_ARCH
    norms: dict[str, int]
    biases: tuple[str, ...] = ()

    @property
    def is_gemma(self) -> bool:
        return self.name.startswith("gemma")


FAMILIES = [
    Family("llama", gguf.MODEL_ARCH.LLAMA, LLAMA_NORMS, BIASES),
    Family("qwen2", gguf.MODEL_ARCH.QWEN2, LLAMA_NORMS, BIASES),
    Family("qwen3", gguf.MODEL_ARCH.QWEN3, {**LLAMA_NORMS, **HEAD_NORMS}),
    Family("gemma2", gguf.MODEL_ARCH.GEMMA2, GEMMA_NORMS),
    Family("gemma3", gguf.MODEL_ARCH.GEMMA3, {**GEMMA_NORMS, **HEAD_NORMS}),
]


@dataclass(frozen=True)
class Wanted:
    kind: Kind
    shape: tuple[int, ...]
    rows: NDArray[np.uint8]  # as Hugging Face's code orders them, [rows, row_bytes]

    def values(self) -> NDArray[np.float32]:
        with np.errstate(all="ignore"):
            return gguf.quants.dequantize(self.rows, self.kind).reshape(self.shape)


def some_rows(rng: np.random.Generator, kind: Kind, shape: tuple[int, ...]) -> Wanted:
    """Quantised noise where the gguf package can quantise, else blocks of random bytes with sane scales."""
    noise = rng.normal(size=shape).astype(np.float32)
    try:
        data = gguf.quants.quantize(noise, kind)
    except NotImplementedError:
        cols, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // cols, size), np.uint8)
        scales = {Kind.Q6_K: (208,), Kind.IQ4_XS: (0,)}.get(kind, (0, 2))
        for place in scales:
            blocks[..., place : place + 2] = rng.normal(size=(*blocks.shape[:-1], 1)).astype(np.float16).view(np.uint8)
        data = blocks.reshape(*shape[:-1], -1)
    return Wanted(kind, shape, np.ascontiguousarray(data).view(np.uint8).reshape(shape[0], -1))


def permuted(rows: NDArray[np.uint8], heads: int) -> NDArray[np.uint8]:
    """The converter's LlamaModel.permute."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def make(folder: Path, family: Family, *, head: bool = True, seed: int = 0) -> tuple[Path, dict[str, Wanted]]:
    """A file of the family and, by Hugging Face's names, what is in it."""
    rng, names = np.random.default_rng(seed), gguf.get_tensor_name_map(family.arch, LAYERS)
    wanted = {"model.embed_tokens.weight": some_rows(rng, Kind.Q6_K, (VOCABULARY, HIDDEN))}
    wanted["model.norm.weight"] = some_rows(rng, Kind.F32, (HIDDEN,))
    if head and family.name != "gemma2":  # whose files never have one
        wanted["lm_head.weight"] = some_rows(rng, Kind.Q4_0, (VOCABULARY, HIDDEN))
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for index, (part, shape) in enumerate(MATRICES.items()):
            kind = KINDS[(layer * len(MATRICES) + index) % len(KINDS)]
            wanted[f"{prefix}.{part}.weight"] = some_rows(rng, kind, shape)
        for part in family.biases:
            wanted[f"{prefix}.{part}.bias"] = some_rows(rng, Kind.F32, MATRICES[part][:1])
        for part, size in family.norms.items():
            wanted[f"{prefix}.{part}.weight"] = some_rows(rng, Kind.F32, (size,))
    writer = gguf.GGUFWriter(folder / "model.gguf", family.name)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    for name, tensor in wanted.items():
        rows = tensor.rows
        if family.name == "llama" and (".q_proj." in name or ".k_proj." in name):
            rows = permuted(rows, HEADS if ".q_proj." in name else KV_HEADS)
        if family.is_gemma and name.endswith("norm.weight"):
            rows = (rows.view(np.float32) + 1).view(np.uint8)
        if tensor.kind in (Kind.F32, Kind.F16):
            data = rows.view(np.float32 if tensor.kind == Kind.F32 else np.float16).reshape(tensor.shape)
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), data)
        else:
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), rows, raw_dtype=tensor.kind)
    if family.name == "llama":
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, DIM // 2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf", wanted


def rows_of(tensor: StoredTensor, first: int = 0, count: int | None = None) -> NDArray[np.uint8]:
    count = tensor.shape[0] - first if count is None else count
    found = np.empty((count, tensor.num_bytes // tensor.shape[0]), np.uint8)
    tensor.read_rows(first, found.reshape(-1).data)
    return found


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def made(family: Family, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Wanted]]:
    return make(tmp_path_factory.mktemp(family.name), family)


def test_every_tensor_comes_back(family: Family, made: tuple[Path, dict[str, Wanted]]) -> None:
    path, wanted = made
    stored: StoredTensors = GgufTensors(GgufCheckpoint(path))
    assert stored.source == path
    assert stored.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        found = stored.tensors[name]
        assert (found.path, found.shape, found.num_bytes) == (path, tensor.shape, tensor.rows.size)
        assert found.encoding.name.upper() == tensor.kind.name.upper()
        rows, expected = rows_of(found), tensor.values()
        if family.is_gemma and name.endswith("norm.weight"):
            expected = (expected + np.float32(1)) - np.float32(1)  # what float32 keeps of it
        else:
            assert rows.tobytes() == tensor.rows.tobytes(), name
        cols = tensor.shape[1] if len(tensor.shape) == 2 else 1
        values = dequantise(found.encoding, torch.from_numpy(rows), cols).numpy().reshape(tensor.shape)
        np.testing.assert_array_equal(values, expected, name)
    stored.close()


def test_any_span_of_rows_is_that_span(made: tuple[Path, dict[str, Wanted]]) -> None:
    stored = GgufTensors(GgufCheckpoint(made[0]))
    rng = np.random.default_rng(3)
    for name, tensor in stored.tensors.items():
        whole, size = rows_of(tensor), tensor.shape[0]
        spans = [(0, 0), (size, 0), (size - 1, 1), (0, 1)]
        for first, stop in np.sort(rng.integers(0, size + 1, (12, 2)), axis=1).tolist():
            spans.append((first, stop - first))
        for first, count in spans:
            assert rows_of(tensor, first, count).tobytes() == whole[first : first + count].tobytes(), (
                name,
                first,
                count,
            )
    stored.close()


def test_rows_outside_of_a_tensor_and_parts_of_rows_are_a_callers_mistake(made: tuple[Path, dict[str, Wanted]]) -> None:
    path, _ = made
    stored = GgufTensors(GgufCheckpoint(path))
    for name in ("self_attn.q_proj", "self_attn.v_proj"):
        tensor = stored.tensors[f"model.layers.0.{name}.weight"]
        with pytest.raises(ValueError, match=" asked of "):
            rows_of(tensor, tensor.shape[0] - 1, 2)
        with pytest.raises(ValueError, match=" asked of "):
            rows_of(tensor, -1, 1)
        with pytest.raises(ValueError, match=r"no whole rows|reshape"):
            tensor.read_rows(0, memoryview(bytearray(5)))
    stored.close()


def test_a_tied_head_is_absent(tmp_path: Path, family: Family) -> None:
    path, _ = make(tmp_path, family, head=False)
    stored = GgufTensors(GgufCheckpoint(path))
    assert "lm_head.weight" not in stored.tensors
    stored.close()


def test_rope_factors_are_no_tensor_of_the_model(made: tuple[Path, dict[str, Wanted]]) -> None:
    stored = GgufTensors(GgufCheckpoint(made[0]))
    assert not any("rope" in name for name in stored.tensors)
    stored.close()


def test_closing_closes_the_file(made: tuple[Path, dict[str, Wanted]]) -> None:
    stored = GgufTensors(GgufCheckpoint(made[0]))
    stored.close()
    stored.close()
    with pytest.raises(ValueError, match="closed"):
        rows_of(stored.tensors["model.norm.weight"])


def opened(
    folder: Path,
    architecture: str,
    *tensors: Tensor,
    heads: int | list[int] = 2,
    kv_heads: int | list[int] | None = None,
) -> GgufTensors:
    keys = [image.Key("general.architecture", image.STRING, architecture)]
    keys.append(image.Key(f"{architecture}.block_count", image.U32, 2))
    for name, value in (("head_count", heads), ("head_count_kv", kv_heads)):
        if value is not None:
            kind = image.ARRAY if isinstance(value, list) else image.U32
            keys.append(image.Key(f"{architecture}.attention.{name}", kind, value))
    path = folder / "model.gguf"
    path.write_bytes(Image(keys, tensors).build())
    with ExitStack() as opening:
        stored = GgufTensors(opening.enter_context(GgufCheckpoint(path)))
        opening.pop_all()
    return stored


@pytest.mark.parametrize(
    ("architecture", "tensor", "message"),
    [
        (
            "phi3",
            Tensor("a", "f32", (1,)),
            "key 'general.architecture' at byte 56: 'phi3' is not supported: llama, qwen2,",
        ),
        (
            "llama",
            Tensor("blk.0.ffn_gate_exps.weight", "f32", (1,)),
            "'blk.0.ffn_gate_exps.weight': is not part of a ll",
        ),
        ("llama", Tensor("blk.0.post_ffw_norm.weight", "f32", (1,)), "is not part of a llama model"),
        ("gemma3", Tensor("blk.00.attn_norm.weight", "f32", (1,)), "is not part of a gemma3 model"),
        ("qwen3", Tensor("blk.0.attn_q.scale", "f32", (1,)), "is not part of a qwen3 model"),
        ("qwen3", Tensor("mm.weight", "f32", (1,)), "tensor 'mm.weight': is not part of a qwen3 model"),
        ("qwen2", Tensor("output.weight", "f32", (2, 2, 2)), "f32 [2, 2, 2]: expected a matrix or a vector of plain"),
        ("qwen2", Tensor("output_norm.weight", "q8_0", (32,)), "q8_0 [32]: expected a matrix or a vector of plain"),
        ("llama", Tensor("blk.0.attn_q.weight", "f32", (6, 2)), "6 rows cannot be 2 heads of an even number of rows"),
        ("llama", Tensor("blk.0.attn_k.weight", "f32", (5, 2)), "5 rows cannot be 2 heads of an even number of rows"),
        ("llama", Tensor("blk.0.attn_k.bias", "f32", (8194,)), "8,194 rows cannot be 2 heads"),
        ("gemma2", Tensor("blk.0.attn_norm.weight", "f16", (4,)), "a norm of type f16, which must be f32"),
    ],
)
def test_what_is_no_tensor_of_the_model_is_refused(
    tmp_path: Path, architecture: str, tensor: Tensor, message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        opened(tmp_path, architecture, tensor)
    assert str(caught.value).startswith(f"{tmp_path / 'model.gguf'}: ")
    assert message in str(caught.value)


def test_heads_of_keys_are_as_many_as_of_queries_where_nothing_is_said(tmp_path: Path) -> None:
    rows = np.arange(8, dtype=np.uint8).repeat(4)
    tensor = Tensor("blk.0.attn_k.weight", "f32", (8, 1), rows.tobytes())
    for kv_heads, order in ((None, [0, 2, 1, 3, 4, 6, 5, 7]), (1, [0, 2, 4, 6, 1, 3, 5, 7])):
        stored = opened(tmp_path, "llama", tensor, kv_heads=kv_heads)
        assert rows_of(stored.tensors["model.layers.0.self_attn.k_proj.weight"])[:, 0].tolist() == order
        stored.close()


def test_heads_may_be_counted_for_each_layer(tmp_path: Path) -> None:
    rows = np.arange(8, dtype=np.uint8).repeat(4)
    tensor = Tensor("blk.0.attn_k.weight", "f32", (8, 1), rows.tobytes())
    stored = opened(tmp_path, "llama", tensor, heads=[4, 4], kv_heads=[1, 1])
    assert rows_of(stored.tensors["model.layers.0.self_attn.k_proj.weight"])[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    stored.close()
    for key, counts in (("head_count", {"heads": [4, 2]}), ("head_count_kv", {"kv_heads": [1, 2]})):
        with pytest.raises(ModelError, match=rf"key 'llama\.attention\.{key}'.*differs from layer to layer"):
            opened(tmp_path, "llama", tensor, **counts)
    with pytest.raises(ModelError, match=r"key 'llama\.attention\.head_count'.*has 3 entries for 2 layers"):
        opened(tmp_path, "llama", tensor, heads=[4, 4, 4])


def test_a_saved_table_of_rotations_is_ignored(tmp_path: Path) -> None:
    stored = opened(tmp_path, "llama", Tensor("blk.0.attn_rot_embd.weight", "f32", (4,)))
    assert not stored.tensors
    stored.close()


def test_a_norm_that_is_not_finite_is_read_without_a_warning(tmp_path: Path) -> None:
    data = np.array([0x7F800001, 0xFF800000, 0x3F800000], np.uint32).tobytes()
    stored = opened(tmp_path, "gemma2", Tensor("output_norm.weight", "f32", (3,), data))
    values = rows_of(stored.tensors["model.norm.weight"]).view(np.float32).reshape(-1)
    assert np.isnan(values[0])
    assert values[1:].tolist() == [-np.inf, 0.0]
    stored.close()
