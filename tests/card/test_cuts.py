"""How a step's attention is shared out among thread blocks; and whatever is cut, the tokens are the same."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgekv.core.scheduler import Limits
from edgekv.engine.card_cuts import StepCuts, cut_number, splits_of
from edgekv.engine.card_inputs import Staging, lay_out
from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuCache, GpuKvFormat, GpuLayout
from edgekv.kernels.attn.splits import parts_bytes
from edgekv.model.card_memory import CardLimits, MatrixFacts, buffer_bytes
from edgekv.model.hf_config import read_spec
from tests.card.engine import CardHarness, card_model
from tests.card.guesser import Guesser
from tests.card.host_card import HostCard
from tests.card.test_card_engine import greedy, prompts

Tiny = Callable[[str], Path]

LIMITS = CardLimits(step_tokens=64, sequences=5, context_blocks=2048)
H100 = 132  # multiprocessors


def cache_of(kv_heads: int) -> GpuCache:
    layout = GpuLayout(GpuKvFormat.BF16, BlockOrder.BLOCK_MAJOR, 1, kv_heads, 32, 16, 4)
    return GpuCache(layout, {}, torch.empty(0, dtype=torch.int64))


def test_each_kind_of_layer_is_cut_for_what_it_sees(tiny: Tiny) -> None:
    card, spec = HostCard(multiprocessors=H100), replace(read_spec(tiny("llama")), windows=(None, 400, 1024, None))
    place = Staging(card, LIMITS)
    place.begin()
    place.contexts[:4] = [100, 30000, 7, 900]
    place.lengths[:3] = [0, 33, 20]
    StepCuts(card, spec, cache_of(8)).write(place)
    for window, blocks, parts in ((None, 40, [1, 47, 1, 2, 1]), (400, 8, [1, 8, 1, 8, 1])):
        cut = place.cuts[cut_number(window)]
        assert cut[0] == blocks
        assert cut[1] == 0
        assert (cut[2:] - cut[1:-1]).tolist() == parts
    assert place.tiles.tolist() == [0, 0, 2, 3, 3, 3]


def test_where_no_layer_has_a_window_there_is_one_cut(tiny: Tiny) -> None:
    card, spec = HostCard(), read_spec(tiny("llama"))
    assert set(spec.windows) == {None}
    place = Staging(card, LIMITS)
    place.begin()
    StepCuts(card, spec, cache_of(2)).write(place)
    assert place.cuts[0].tolist() == [8, 0, 1, 2, 3, 4, 5]
    assert not place.cuts[1].any()


@pytest.mark.parametrize("multiprocessors", [1, 132, 256, 10_000])
@pytest.mark.parametrize("kv_heads", [1, 2, 8, 40])
@pytest.mark.parametrize("proposed", [0, 11])
def test_all_parts_have_room_in_the_buffers(proposed: int, multiprocessors: int, kv_heads: int, tiny: Tiny) -> None:
    spec = replace(read_spec(tiny("llama")), num_kv_heads=kv_heads, num_heads=2 * kv_heads)
    limits = replace(LIMITS, proposed=proposed)
    sizes = buffer_bytes(spec, limits, MatrixFacts(0, 0), "bfloat16")
    slots = splits_of(HostCard(multiprocessors=multiprocessors), cache_of(kv_heads)).most_parts(5 + proposed, 2048)
    assert parts_bytes(slots, 2 * kv_heads, 32) <= sizes["part_values"] + sizes["part_states"]
    assert slots * 2 * kv_heads * 2 * 4 <= sizes["part_states"]


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("arch", ["llama", "mistral"])
def test_a_long_context_among_short_ones_is_cut_and_gives_the_same_tokens(arch: str, k: int, tiny: Tiny) -> None:
    """Also where several of its rows are verified."""
    card, own = HostCard(multiprocessors=H100), prompts(8, 9, 215, 30)
    guesser = Guesser({tuple(prompt): greedy(tiny(arch), prompt, 5) for prompt in own}, k)
    limits = Limits(max_sequences=3, max_step_tokens=48, mixed_step_tokens=24, max_proposed=9)
    engine = CardHarness(card_model(tiny(arch), card), card, limits=limits, proposer=guesser)
    numbers = [engine.submit(prompt, 5) for prompt in own]
    most = 0
    while engine.core.busy:
        engine.step()
        cut = lay_out(engine.buffers.inputs, engine.buffers.limits).cuts[0]
        most = max(most, int(cut[1:].diff().max()))
    assert most == 2, "nothing was cut"
    for number, prompt in zip(numbers, own, strict=True):
        assert engine.outputs[number] == greedy(tiny(arch), prompt, 5)
    assert (guesser.accepted > 0) == (k > 0)
