"""Rotary frequencies are bit for bit those of transformers; the rotation is the formula's."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from edgekv.model.json_fields import Fields
from edgekv.model.rope import RotaryEmbedding, inverse_frequencies
from edgekv.model.rope_config import read_rope
from edgekv.model.spec import FrequencyFactors, RopeSpec

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("head_dim", [4, 64, 96, 128])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
        {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3},
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "beta_fast": 20, "beta_slow": 2, "truncate": False},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "attention_factor": 1.5},
    ],
    ids=lambda parameters: f"{parameters['rope_type']}-{len(parameters)}",
)
def test_frequencies_and_angles_equal_those_of_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=4096, rope_parameters=dict(parameters))
    rope = read_rope(Fields("config.json", {"max_position_embeddings": 4096, "rope_parameters": dict(parameters)}))
    if parameters["rope_type"] != "default":
        expected, _ = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
        assert torch.equal(inverse_frequencies(rope, head_dim), expected)
    positions = torch.tensor([0, 1, 17, 4095])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions.unsqueeze(0))
    q, k = torch.randn(2, 4, 3, head_dim, generator=torch.Generator().manual_seed(0))
    expected_q, expected_k = apply_rotary_pos_emb(q.unsqueeze(0), k.unsqueeze(0), cos, sin, unsqueeze_dim=2)
    rotation = RotaryEmbedding(rope, head_dim, torch.device("cpu")).at(positions)
    assert torch.allclose(rotation.apply(q), expected_q[0], atol=1e-6, rtol=0)
    assert torch.allclose(rotation.apply(k), expected_k[0], atol=1e-6, rtol=0)


def test_a_factor_of_its_own_divides_each_frequency() -> None:
    factors = (1.0, 1.5, 8.0, 3.0)
    plain = inverse_frequencies(RopeSpec(1e4), 8)
    assert torch.equal(inverse_frequencies(RopeSpec(1e4, FrequencyFactors(factors)), 8), plain / torch.tensor(factors))


def test_rotation_leaves_its_argument_alone_and_keeps_its_dtype() -> None:
    rotation = RotaryEmbedding(RopeSpec(1e4), 8, torch.device("cpu")).at(torch.tensor([3, 4]))
    x = torch.randn(2, 3, 8)
    before = x.clone()
    assert rotation.apply(x).dtype == torch.float32
    assert rotation.apply(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(x, before)
