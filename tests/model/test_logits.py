"""Float32 logits of every architecture equal those of Hugging Face transformers, however the prompt is chunked."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgekv.kernels.attn.dense import DenseAttention
from edgekv.model.causal_lm import CausalLM
from edgekv.model.hf_config import read_spec
from edgekv.model.loader import load_model
from tests.model.tiny_models import ARCHITECTURES, edit_config, make_tiny, to_old_style

CPU = torch.device("cpu")
PROMPT_TOKENS = 300
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tensor:
    return hf_logits(folder)


def prompt(vocab_size: int = 199) -> Tensor:
    return torch.randint(vocab_size, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(5))


def hf_logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    with torch.inference_mode():
        logits: Tensor = model(prompt().unsqueeze(0), use_cache=False).logits[0]
    return logits


def load(folder: Path) -> CausalLM:
    return load_model(folder, dtype=torch.float32, device=CPU)


def our_logits(model: CausalLM, chunks: list[int]) -> Tensor:
    """The logits of every row, the prompt fed in chunks of these sizes."""
    attention, ids, start, rows = DenseAttention(), prompt(), 0, []
    for size in chunks:
        positions = torch.arange(start, start + size)
        rows.append(model.forward(ids[positions], positions, attention, torch.arange(size)))
        start += size
    assert start == PROMPT_TOKENS
    return torch.cat(rows)


@pytest.mark.parametrize(
    "chunks",
    [[300], [1, 63, 1, 64, 65, 1, 105], [7] * 42 + [6], [290] + [1] * 10],
    ids=["whole", "ragged", "small", "then-decode"],
)
def test_logits_equal_transformers(folder: Path, expected: Tensor, chunks: list[int]) -> None:
    logits = our_logits(load(folder), chunks)
    assert logits.dtype == torch.float32
    assert expected.std() > 0.1  # a model whose logits are all alike would agree with anything
    assert (logits - expected).abs().max() <= TOLERANCE


def test_old_and_new_config_say_the_same(folder: Path, expected: Tensor, tmp_path: Path) -> None:
    old = shutil.copytree(folder, tmp_path / "old")
    to_old_style(old)
    assert "rope_parameters" not in (old / "config.json").read_text()
    model = load(old)
    assert model.spec == read_spec(folder)
    assert (hf_logits(old) - expected).abs().max() <= TOLERANCE  # transformers, too, takes them for the same
    assert (our_logits(model, [300]) - expected).abs().max() <= TOLERANCE


def test_only_the_sampled_rows_come_out_in_their_order(folder: Path, expected: Tensor) -> None:
    model, positions = load(folder), torch.arange(PROMPT_TOKENS)
    rows = torch.tensor([299, 5, 5])
    logits = model.forward(prompt(), positions, DenseAttention(), rows)
    assert (logits - expected[rows]).abs().max() <= TOLERANCE
    assert model.forward(prompt(), positions, DenseAttention(), rows[:0]).shape == (0, model.spec.vocab_size)


class TwoSequences:
    """The rows of the first `split` tokens are one sequence, the others another."""

    def __init__(self, split: int) -> None:
        self.split, self.first, self.second = split, DenseAttention(), DenseAttention()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        s = self.split
        return torch.cat(
            (self.first(layer, q[:s], k[:s], v[:s], **kwargs), self.second(layer, q[s:], k[s:], v[s:], **kwargs))
        )


def test_sequences_of_one_batch_do_not_touch(folder: Path, expected: Tensor) -> None:
    ids = torch.cat((prompt()[:100], prompt()))
    positions = torch.cat((torch.arange(100), torch.arange(PROMPT_TOKENS)))
    logits = load(folder).forward(ids, positions, TwoSequences(100), torch.arange(400))
    assert (logits - torch.cat((expected[:100], expected))).abs().max() <= TOLERANCE


def test_every_parameter_is_counted(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert read_spec(folder).num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_bfloat16_is_as_near_to_float32_as_that_of_transformers(folder: Path, expected: Tensor) -> None:
    ours = our_logits(load_model(folder, dtype=torch.bfloat16, device=CPU), [300])
    theirs = hf_logits(folder, torch.bfloat16).float()
    assert ours.dtype == torch.float32
    assert (ours - expected).abs().mean() <= 1.25 * (theirs - expected).abs().mean()


@pytest.mark.parametrize("arch", ["llama3", "gemma2"])
def test_a_bfloat16_checkpoint_is_widened(arch: str, tmp_path: Path) -> None:
    folder = make_tiny(arch, tmp_path, dtype=torch.bfloat16)
    assert read_spec(folder).dtype == "bfloat16"
    assert (our_logits(load(folder), [300]) - hf_logits(folder)).abs().max() <= TOLERANCE


def test_shards_are_one_model(tmp_path: Path) -> None:
    whole = make_tiny("qwen3", tmp_path / "whole")
    shards = make_tiny("qwen3", tmp_path / "shards", max_shard_size="60KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    assert torch.equal(our_logits(load(whole), [300]), our_logits(load(shards), [300]))


@pytest.mark.parametrize(
    ("arch", "overrides"),
    [
        ("llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 1, "attention_bias": False, "mlp_bias": False}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 2e4}}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 1}),
        ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": False}),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 33, "max_window_layers": 2}),
        ("gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
        ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
        ("gemma3", {"attention_bias": True, "final_logit_softcapping": 5.0, "tie_word_embeddings": False}),
    ],
    ids=str,
)
def test_variants_equal_transformers(arch: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    folder = make_tiny(arch, tmp_path, seed=3, **overrides)
    expected = hf_logits(folder)
    assert (our_logits(load(folder), [170, 130]) - expected).abs().max() <= TOLERANCE


def test_makers_are_reproducible(tmp_path: Path) -> None:
    one, same = make_tiny("llama", tmp_path / "1"), make_tiny("llama", tmp_path / "2")
    other = make_tiny("llama", tmp_path / "3", seed=1)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (one, same, other)]
    assert weights[0] == weights[1] != weights[2]


def test_a_wrong_window_or_scale_shows(tmp_path: Path) -> None:
    """The negative control: the comparison sees each of these small lies."""
    folder = make_tiny("gemma2", tmp_path / "model")
    expected = hf_logits(folder)
    for name, lie in {
        "sliding_window": 65,
        "query_pre_attn_scalar": 21,
        "final_logit_softcapping": 31.0,
        "attn_logit_softcapping": 49.0,
        "rms_norm_eps": 1e-3,
    }.items():
        liar = shutil.copytree(folder, tmp_path / name)
        edit_config(liar, **{name: lie})
        assert (our_logits(load(liar), [300]) - expected).abs().max() > TOLERANCE, name
