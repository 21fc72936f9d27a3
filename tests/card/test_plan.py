"""What a plan counts on a card is what loading a model there takes, to the byte."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from edgekv.cli.app import app
from edgekv.core.kv_format import CARD_ALIGNMENT, KV_FORMATS, KVFormatName
from edgekv.demo import draft_path
from edgekv.engine.card_buffers import StepBuffers
from edgekv.engine.card_model import CardModel
from edgekv.engine.card_pool import CARD_FORMATS, CardKVPool
from edgekv.engine.card_runner import CardRunner
from edgekv.engine.draft_settings import DraftSettings
from edgekv.engine.settings import EngineSettings, card_limits, lease, plan_engine, weight_form
from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuLayout
from edgekv.model import card_layout
from edgekv.model.card_layout import allocation_bytes, slab_bytes, slabs_of
from edgekv.model.card_matrices import load_on_card
from edgekv.model.card_memory import CardLimits, buffer_bytes, matrix_facts, total_bytes, workspace_bytes
from edgekv.model.hf_config import read_spec
from edgekv.model.weight_table import read_weight_table
from edgekv.smi.device import Place
from tests.card.conftest import SHAPE
from tests.card.host_card import HostCard
from tests.model.gguf_files import make_gguf
from tests.model.quantised_models import quantise_folder
from tests.model.test_packing import random_q4_k
from tests.model.tiny_models import make_tiny
from tests.unit.cli.shapes import LLAMA_3_8B, write_shape

MIB, GIB = 1 << 20, 1 << 30
CARD = Place("card", "cuda:0", "a card", 23 * GIB, total_bytes=24 * GIB)
WIDE = SHAPE | {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


class CountingCard(HostCard):
    """`sizes`: of every allocation, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def allocate(self, num_bytes: int) -> Tensor:
        self.sizes.append(num_bytes)
        return super().allocate(num_bytes)


def plain(folder: Path, arch: str = "llama", dtype: torch.dtype = torch.bfloat16, **shape: Any) -> Path:
    made = make_tiny(arch, folder / "plain", dtype=dtype, **{"vocab_size": 512} | WIDE | shape)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(draft_path() / name, made)
    return made


def random_q6_k(values: np.ndarray) -> np.ndarray:
    """Any codes and scales, and a step that is a number."""
    rng = np.random.default_rng(6)
    blocks = rng.integers(0, 256, (len(values), values.shape[1] // 256, 210), dtype=np.uint8)
    blocks[..., 208:] = np.full(1, 0.01, np.float16).view(np.uint8)
    return blocks.reshape(len(values), -1)


def mixed_gguf(folder: Path) -> Path:
    """As llama.cpp's Q4_K_M, and with neighbours of other formats; a gated pair of two becomes plain numbers."""
    types = {
        "*": "Q4_K", "*.ffn_down*": "Q6_K", "*.attn_v*": "Q6_K", "blk.1.ffn_gate*": "Q8_0", "blk.0.attn_q*": "F16",
        "output*": "Q6_K", "token_embd*": "Q5_0",
    }  # fmt: skip
    made = plain(folder, mlp_bias=False, attention_bias=False)
    return make_gguf(made, folder / "mixed.gguf", types=types, quantise={"Q4_K": random_q4_k, "Q6_K": random_q6_k})


MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": plain,
    "float16": lambda folder: plain(folder, dtype=torch.float16),
    "qwen2": lambda folder: plain(folder, "qwen2"),  # biases
    "qwen3": lambda folder: plain(folder, "qwen3", head_dim=64),  # norms of queries and keys
    "gemma3": lambda folder: plain(folder, "gemma3", num_hidden_layers=7),  # a tied head, four norms, two kinds of rope
    "narrow": lambda folder: plain(folder, hidden_size=72, vocab_size=509),  # no tensor ends where the next may begin
    "odd": lambda folder: plain(folder, intermediate_size=264),  # no whole blocks of 32 columns
    "awq": lambda folder: quantise_folder(plain(folder), "awq", 64)[0],
    "gguf": mixed_gguf,
}
KINDS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in MODELS),
    ("llama", {"dtype": "float32"}),
    ("llama", {"weight_format": "int8", "kv_dtype": "int8"}),
    ("gemma3", {"weight_format": "int4", "kv_dtype": "int4"}),
    ("odd", {"weight_format": "int4", "kv_dtype": "fp8"}),
    ("awq", {"dtype": "float16", "block_size": 32}),
    ("llama", {"draft": DraftSettings(tokens=9)}),
    ("gemma3", {"draft": DraftSettings(tokens=2), "weight_format": "int4"}),
]


@pytest.mark.parametrize("layers_per_slab", ["all", "one"])
@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=str)
def test_weights_buffers_and_blocks_take_what_was_planned(
    kind: str, changes: dict[str, Any], layers_per_slab: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layers_per_slab == "one":
        monkeypatch.setattr(card_layout, "_SLAB_BYTES", 1)
    path = MODELS[kind](tmp_path)
    spec = read_spec(path)
    settings = EngineSettings(path, CARD, max_step_tokens=48, max_sequences=3, context_tokens=100, **changes)
    choice, memory = plan_engine(settings, spec)
    form, card = weight_form(settings, choice), CountingCard()
    if kind == "gguf":
        assert memory.weights.kinds.keys() == {"q4_K", "q6_K", "q5_0", "bf16", "f32"}

    lowered = load_on_card(path, spec, form=form, dtype=choice.name, allocate=card.allocate)
    model = CardModel(lowered, choice.name, card.allocate)
    assert sum(memory.weights.kinds.values()) == sum(card.sizes)
    assert memory.weight_bytes == sum(map(allocation_bytes, card.sizes))
    layers = spec.num_layers + (1 if spec.tie_word_embeddings else 2)
    assert len(card.sizes) == (2 if layers_per_slab == "all" else layers + 1), "matrices and vectors"

    facts, limits = matrix_facts(read_weight_table(path, spec), spec, form, choice.name), card_limits(settings, spec)
    assert facts == model.facts
    card.sizes.clear()
    assert limits.sampled == 3 + settings.max_proposed
    buffers = StepBuffers(card, spec, limits, model.facts, choice.name)
    assert card.sizes == [buffers.num_bytes] == [total_bytes(buffer_bytes(spec, limits, facts, choice.name).values())]
    assert memory.workspace_bytes == workspace_bytes(spec, limits, facts, choice.name)
    assert memory.workspace_bytes - allocation_bytes(buffers.num_bytes) == 40 * MIB, "for libraries"

    pool = CardKVPool(
        spec, kv_format=memory.kv_dtype, device=card.device, block_size=settings.block_size,
        segment_blocks=memory.kv.segment_blocks,
    )  # fmt: skip
    assert pool.block_bytes == memory.kv.block_bytes
    assert CardRunner(card, model, pool, buffers).kernels(), "every program finds room in the buffers"


@given(
    st.sampled_from(sorted(CARD_FORMATS)),
    st.sampled_from((16, 32)),
    st.integers(1, 128),
    st.integers(1, 64),
    st.integers(1, 8).map(lambda groups: 32 * groups),
)
def test_a_block_has_as_many_bytes_as_its_layout(
    name: KVFormatName, block_size: int, layers: int, kv_heads: int, head_dim: int
) -> None:
    layout = GpuLayout(CARD_FORMATS[name], BlockOrder.BLOCK_MAJOR, layers, kv_heads, head_dim, block_size, 4)
    counted = KV_FORMATS[name].block_bytes(_Shape(layers, kv_heads, head_dim), block_size, alignment=CARD_ALIGNMENT)
    assert counted == layout.block_stride


class _Shape:
    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim


def test_every_format_that_a_card_is_planned_with_is_one_that_its_pool_has() -> None:
    assert {name for name, kept in KV_FORMATS.items() if "card" in kept.engines} == CARD_FORMATS.keys()


def test_a_step_has_no_more_sampled_rows_than_tokens() -> None:
    asked = EngineSettings(draft_path(), CARD, max_sequences=12, context_tokens=100, draft=DraftSettings(tokens=8))
    spec = read_spec(asked.folder)
    assert card_limits(asked, spec) == CardLimits(512, 12, 7, proposed=12)
    assert card_limits(replace(asked, max_step_tokens=16), spec) == CardLimits(16, 12, 7, proposed=4)
    assert card_limits(replace(asked, max_step_tokens=16, draft=None), spec) == CardLimits(16, 12, 7)


@pytest.mark.parametrize(
    ("sequences", "proposed", "decodes", "ragged"),
    [
        (1, 0, (1,), (1,)),
        (12, 0, (1, 2, 4, 8, 12), (12,)),
        (1, 8, (1, 2, 4, 8, 9), (1, 9)),
        (12, 12, (1, 2, 4, 8, 12, 16, 24), (12, 24)),
        (16, 16, (1, 2, 4, 8, 16, 32), (16, 32)),
    ],
)
def test_programs_are_made_for_steps_without_proposals_and_with_as_many_as_there_may_be(
    sequences: int, proposed: int, decodes: tuple[int, ...], ragged: tuple[int, ...]
) -> None:
    limits = CardLimits(512, sequences, 7, proposed)
    assert limits.decode_sizes == decodes
    assert limits.sampled_sizes == ragged


def test_small_layers_share_an_allocation_and_large_ones_have_their_own() -> None:
    sizes = {"embedding": 1000 * MIB, "0": 20 * MIB, "1": 11 * MIB, "2": 2 * MIB, "3": 31 * MIB, "head": 5 * MIB}
    assert slabs_of(sizes) == {"embedding": 0, "0": 1, "1": 1, "2": 1, "3": 2, "head": 2}
    assert slab_bytes(sizes) == [1000 * MIB, 33 * MIB, 36 * MIB]
    assert slab_bytes({}) == []


def test_a_tiny_model_takes_a_few_pages_and_not_one_for_each_layer() -> None:
    path = draft_path()
    spec = read_spec(path)
    weights = plan_engine(EngineSettings(path, CARD), spec)[1].weights
    assert sum(weights.kinds.values()) < 4 * MIB == weights.total


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8", "int8", "int4"])
@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
def test_the_plan_for_a_card_of_24_gib_is_what_is_leased_and_taken(weights: str, kv_dtype: str, tmp_path: Path) -> None:
    llama = write_shape(tmp_path / "llama", LLAMA_3_8B)
    asked = ["plan", str(llama), "--vram", "24GiB", "--others", "1GiB", "--weights", weights, "--kv-dtype", kv_dtype]
    made = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    kept = None if kv_dtype == "auto" else kv_dtype
    settings = replace(EngineSettings(llama, CARD), weight_format=weights, kv_dtype=kept)  # type: ignore[arg-type]
    memory = plan_engine(settings, read_spec(llama))[1]
    ledger = lease(memory)
    assert ledger.statement() == made["leases"]
    # Segments come in whole pages, which no lease counts.
    segments = [blocks * memory.kv.block_bytes for blocks in memory.kv.segments]
    assert [each.num_bytes for each in ledger.leases("kv.target")] == segments
    taken = sum(map(allocation_bytes, segments))
    assert 0 <= taken - sum(segments) < 0.01 * sum(segments) + 2 * MIB
    assert ledger.budget_bytes < sum(made["leases"].values()) + 2 * MIB, "all of it is used"
