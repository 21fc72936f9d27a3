"""Weights on their way into panels: what each becomes, where its rows go, and what that takes.

A packer that keeps the rows as they come stands for the library, whose own tests are beside the kernels.
"""

import re
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import edgekv.demo
from edgekv.errors import ModelError
from edgekv.kernels.cpu.formats import PanelFormat, panel_format
from edgekv.kernels.quant.dequantise import dequantise
from edgekv.kernels.quant.encodings import Encoding
from edgekv.model.hf_config import read_spec
from edgekv.model.matrix_layout import WeightForm
from edgekv.model.open_weights import open_weights
from edgekv.model.packed_weights import MatrixSource, PackedMatrix, PackedPart
from edgekv.model.packing import load_packed
from edgekv.model.spec import ModelSpec
from edgekv.model.weight_names import weight_names
from tests.model.gguf_files import make_gguf
from tests.model.quantised_models import SHAPE, make_quantised
from tests.model.tiny_models import edit_config, make_tiny

TOKENIZER = Path(edgekv.demo.__file__).parent / "draft"
Q_PROJ, K_PROJ, V_PROJ, O_PROJ = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo")
GATE, UP, DOWN = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class RowKeeper:
    """A packer that keeps what rows mean, and checks that each arrives once."""

    def __init__(self) -> None:
        self.parts: dict[int, tuple[PackedPart, Tensor]] = {}

    def pack(
        self, encoding: Encoding, rows: npt.NDArray[np.uint8], part_rows: npt.NDArray[np.int64], part: PackedPart
    ) -> None:
        assert panel_format(encoding) == part.format
        assert encoding.group == part.group
        assert part.data.ctypes.data % 64 == 0
        part.data[::4096] = 1  # it can be written to, all of it
        _, kept = self.parts.setdefault(id(part), (part, torch.full((part.rows, part.cols), torch.nan)))
        assert kept[part_rows].isnan().all()
        kept[part_rows] = dequantise(encoding, torch.from_numpy(rows), part.cols)

    def rows(self, part: PackedPart) -> Tensor:
        return self.parts[id(part)][1]


class Recorder:
    """A lowering that keeps its answers by the first name asked for."""

    def __init__(self, spec: ModelSpec, source: MatrixSource[PackedMatrix]) -> None:
        self.matrices: dict[str, PackedMatrix] = {}
        self.vectors: dict[str, npt.NDArray[np.float32]] = {}
        for asked in weight_names(spec):
            name, shapes = asked.names[0], asked.shapes
            if asked.kind == "norm":
                self.vectors[name] = source.vector(name, shapes[0])
            elif asked.kind == "bias":
                self.vectors[name] = source.bias(asked.names, shapes, gated=name.endswith("gate_proj.bias"))
            else:
                self.matrices[name] = source.matrix(asked.names, shapes, gated=asked.kind == "gated")

    @property
    def num_bytes(self) -> int:
        vectors = sum(vector.nbytes for vector in self.vectors.values())
        return vectors + sum(matrix.num_bytes for matrix in self.matrices.values())


def packed(path: Path, form: WeightForm) -> tuple[Recorder, RowKeeper]:
    keeper = RowKeeper()
    return load_packed(path, read_spec(path), Recorder, form=form, packer=keeper), keeper


def formats(matrix: PackedMatrix) -> list[str]:
    return [PanelFormat(part.format).name for part in matrix.parts]


def gated_rows(gate: Tensor, up: Tensor) -> Tensor:
    """As a gated part has them: 16 and 16, each filled up with NaN here."""
    rows = []
    for first in range(0, len(gate), 16):
        for half in (gate, up):
            panel = torch.full((16, gate.shape[1]), torch.nan)
            panel[: len(half[first : first + 16])] = half[first : first + 16]
            rows.append(panel)
    return torch.cat(rows)


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(-77), other.nan_to_num(-77))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with all biases, an untied head, and sizes that are no whole panels."""
    shape = SHAPE | {"intermediate_size": 160 + 32 * 3 + 8}
    return make_tiny("llama", tmp_path_factory.mktemp("llama"), **shape)


def test_what_is_stored_arrives_where_it_belongs(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    made, keeper = packed(llama, WeightForm(None))
    [qkv] = made.matrices[Q_PROJ].parts
    assert (qkv.format, qkv.rows, qkv.cols) == (PanelFormat.F32, 128 + 64 + 64, 128)
    assert torch.equal(keeper.rows(qkv), torch.cat([tensors[name] for name in (Q_PROJ, K_PROJ, V_PROJ)]))
    assert made.matrices[GATE].gated
    [pair] = made.matrices[GATE].parts
    assert pair.rows == 2 * 272
    assert same(keeper.rows(pair), gated_rows(tensors[GATE], tensors[UP]))
    [table] = made.matrices[EMBEDDING].parts
    assert torch.equal(keeper.rows(table), tensors[EMBEDDING])
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(torch.from_numpy(made.vectors[norm]), tensors[norm])
    biases = [name.replace("weight", "bias") for name in (Q_PROJ, K_PROJ, V_PROJ, GATE, UP)]
    assert torch.equal(torch.from_numpy(made.vectors[biases[0]]), torch.cat([tensors[name] for name in biases[:3]]))
    gate, up = (tensors[name][:, None] for name in biases[3:])
    assert torch.equal(torch.from_numpy(made.vectors[biases[3]]), gated_rows(gate, up).nan_to_num(0)[:, 0])


@pytest.mark.parametrize("saved", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_plain_matrices_are_rounded_to_the_dtype_and_vectors_never(
    saved: torch.dtype, dtype: Any, tmp_path: Path
) -> None:
    folder = make_tiny("qwen3", tmp_path, dtype=saved)
    tensors = load_file(folder / "model.safetensors")
    kept = saved if dtype is None else getattr(torch, dtype)
    made, keeper = packed(folder, WeightForm(dtype))
    [part] = made.matrices[DOWN].parts
    assert part.format == {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[kept]
    assert torch.equal(keeper.rows(part), tensors[DOWN].to(kept).float())
    name = "model.layers.1.self_attn.q_norm.weight"
    assert torch.equal(torch.from_numpy(made.vectors[name]), tensors[name].float())


@pytest.mark.parametrize(("weights", "bound"), [("int8", 0.006), ("int4", 0.09)])
def test_linear_layers_are_quantised_and_embedding_and_head_to_int8(weights: Any, bound: float, llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    made, keeper = packed(llama, WeightForm("bfloat16", weights))
    wanted = "Q8" if weights == "int8" else "Q4"
    names = {Q_PROJ: wanted, O_PROJ: wanted, GATE: wanted, EMBEDDING: "Q8", HEAD: "Q8"}
    for name, form in names.items():
        assert formats(made.matrices[name]) == [form]
        [part] = made.matrices[name].parts
        given = tensors[name]
        kept = keeper.rows(part)[: len(given)] if name != GATE else keeper.rows(part).view(-1, 2, 16, 128)[0, 0]
        error = (kept - given[: len(kept)]).square().mean().sqrt() / given.std()
        assert 0 < error < (0.006 if form == "Q8" else bound)
    # 264 inputs are no whole groups of 32.
    assert formats(made.matrices[DOWN]) == ["BF16"]
    assert torch.equal(keeper.rows(made.matrices[DOWN].parts[0]), tensors[DOWN].bfloat16().float())


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_what_is_quantised_stays_as_it_is(method: str, tmp_path: Path) -> None:
    made_folder, meant = make_quantised(tmp_path, method, 64)
    tensors = load_file(meant / "model.safetensors")
    for dtype in (None, "bfloat16"):
        made, keeper = packed(made_folder, WeightForm(dtype))  # type: ignore[arg-type]
        [qkv] = made.matrices[Q_PROJ].parts
        assert (qkv.format, qkv.group) == (PanelFormat.Q4Z, 64)
        assert torch.equal(keeper.rows(qkv), torch.cat([tensors[name] for name in (Q_PROJ, K_PROJ, V_PROJ)]))
        [pair] = made.matrices[GATE].parts
        assert same(keeper.rows(pair), gated_rows(tensors[GATE], tensors[UP]))
        assert formats(made.matrices[HEAD]) == ["F32" if dtype is None else "BF16"]


def random_q4_k(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Any bytes are a block, given scales that are numbers."""
    blocks = np.random.default_rng(1).integers(0, 256, (rows.size // 256, 144), np.uint8)
    blocks[:, :4] = np.array([0.01, 0.02], np.float16).view(np.uint8)
    return blocks.reshape(len(rows), -1)


def make_mixed_gguf(folder: Path, types: dict[str, str]) -> Path:
    shape = SHAPE | {"hidden_size": 256, "intermediate_size": 512}
    plain = make_tiny("llama", folder / "plain", vocab_size=4096, mlp_bias=False, attention_bias=False, **shape)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, plain)
    return make_gguf(plain, folder / "mixed.gguf", types=types, quantise={"Q4_K": random_q4_k})


def test_neighbours_of_one_format_are_one_part_and_others_parts_of_their_own(tmp_path: Path) -> None:
    path = make_mixed_gguf(
        tmp_path,
        {
            "*": "Q8_0", "blk.1.attn_v*": "F16", "blk.1.attn_k*": "Q5_0", "blk.0.attn_k*": "Q4_K",
            "blk.1.ffn_up*": "Q4_K",
        },
    )  # fmt: skip
    made, keeper = packed(path, WeightForm(None))
    # Q5_0 goes into the panels of Q8_0.
    assert formats(made.matrices[Q_PROJ]) == ["Q8", "F16"]
    assert [part.rows for part in made.matrices[Q_PROJ].parts] == [256 + 128, 128]
    assert formats(made.matrices[Q_PROJ.replace("1", "0")]) == ["Q8", "Q4K", "Q8"]
    assert formats(made.matrices[GATE.replace("1", "0")]) == ["Q8"]
    # A gated pair has to be one part.
    assert formats(made.matrices[GATE]) == ["BF16"]
    with closing(open_weights(path)) as stored:
        gate, up = (exact(stored.tensors[name]) for name in (GATE, UP))
    assert same(keeper.rows(made.matrices[GATE].parts[0]), gated_rows(gate, up).bfloat16().float())


def exact(tensor: Any) -> Tensor:
    """What a stored matrix means."""
    raw = torch.empty(tensor.shape[0], tensor.num_bytes // tensor.shape[0], dtype=torch.uint8)
    tensor.read_rows(0, raw.view(-1).numpy().data)
    return dequantise(tensor.encoding, raw, tensor.shape[1])


def test_chunks_change_nothing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[int, int, str]] = []
    for weights in ("auto", "int8", "int4"):
        form = WeightForm("bfloat16", weights)  # type: ignore[arg-type]
        whole, keeper = packed(llama, form)
        with monkeypatch.context() as patched:
            patched.setattr("edgekv.model.stored_rows._CHUNK_BYTES", 3000)  # rows of some, less than one of others
            chunked = RowKeeper()
            spec = read_spec(llama)
            again = load_packed(
                llama, spec, Recorder, form=form, packer=chunked, progress=lambda *report: heard.append(report)
            )
        for name, matrix in whole.matrices.items():
            for one, other in zip(matrix.parts, again.matrices[name].parts, strict=True):
                assert same(keeper.rows(one), chunked.rows(other))
    total = sum(tensor.nbytes for tensor in load_file(llama / "model.safetensors").values())
    assert heard[:2] == [(0, 0, "checking files"), (0, total, "reading weights")]
    assert heard[-1] == (total, total, "reading weights")


def test_what_is_quantised_already_is_not_quantised_again(tmp_path: Path) -> None:
    made, _ = make_quantised(tmp_path, "awq", 64)
    with pytest.raises(ModelError, match=r"_proj\.qweight': is in affine4_64 already, and weights: int4 is for"):
        packed(made, WeightForm(None, "int4"))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_tensor_that_cannot_be_quantised_is_named(weights: Any, tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path, **SHAPE)
    tensors = load_file(folder / "model.safetensors")
    tensors[UP][3, 7] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=rf"tensor '{re.escape(UP)}': holds infinities, NaN or values too large"):
        packed(folder, WeightForm(None, weights))


def test_wrong_files_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path, **SHAPE)
    edit_config(folder, num_hidden_layers=3)
    heard: list[int] = []
    with pytest.raises(ModelError, match=r"tensor 'model\.layers\.2\..*': is missing"):
        load_packed(
            folder,
            read_spec(folder),
            Recorder,
            form=WeightForm(None),
            packer=RowKeeper(),
            progress=lambda done, total, stage: heard.append(done),
        )
    assert heard == [0]


MEASURE = """
import gc, os, sys
from pathlib import Path
import torch
from edgekv.model.hf_config import read_spec
from edgekv.model.matrix_layout import WeightForm
from edgekv.model.packing import load_packed
from edgekv.model.weight_names import weight_names

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

class Writer:
    def pack(self, encoding, rows, part_rows, part):
        step = part.data.size // part.rows
        for row in part_rows:
            part.data[row * step : row * step + step] = 1

def keep(spec, source):
    kept = [source.vector(asked.names[0], asked.shapes[0]) for asked in weight_names(spec) if asked.kind == "norm"]
    for asked in weight_names(spec):
        if asked.kind in ("matrix", "gated"):
            kept.append(source.matrix(asked.names, asked.shapes, gated=asked.kind == "gated"))
    return kept

folder = Path(sys.argv[1])
for weights in sys.argv[2:]:
    gc.collect()
    before, peak = resident_bytes(), 0
    def watch(done, total, stage):
        global peak
        peak = max(peak, resident_bytes())
    form = WeightForm("bfloat16", weights)
    made = load_packed(folder, read_spec(folder), keep, form=form, packer=Writer(), progress=watch)
    print(peak - before, sum(getattr(each, "num_bytes", 0) for each in made))
    del made
gc.collect()
print(resident_bytes() - before, 0)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_holds_the_panels_once_and_gives_them_back(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"vocab_size": 24_000, "hidden_size": 192, "intermediate_size": 40_000}
    folder = make_tiny("llama3", tmp_path, dtype=torch.float32, num_hidden_layers=2, **shape)
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, "auto", "int8", "int4"], capture_output=True, text=True, check=True
    )
    *loads, (left, _) = [tuple(map(int, line.split())) for line in measured.stdout.splitlines()]
    assert [num_bytes > 27e6 for _, num_bytes in loads] == [True] * 3
    for peak, num_bytes in loads:
        # 17e6 of staging, 8e6 or less of what it becomes, and what quantising a slice takes. The file has 200e6.
        assert 0.9 * num_bytes < peak < num_bytes + 50e6
    assert left < 45e6
