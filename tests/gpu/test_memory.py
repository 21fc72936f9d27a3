"""The card's memory as its driver counts it: segments that come and go, and a card on which there is none left."""

from pathlib import Path

import pytest

from edgekv.core.sequence import FinishReason
from tests.gpu.bed import Bed
from tests.gpu.models import make_model

engines = pytest.importorskip("tests.gpu.engines", exc_type=ImportError)

MIB = 1 << 20
SEGMENT_BLOCKS = 2048  # 32 MiB of the tiny model's
NUM_SEGMENTS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("gpu-memory"))


@pytest.fixture
def engine(folder: Path, bed: Bed):
    made = engines.make_engine(bed, folder, blocks=NUM_SEGMENTS * SEGMENT_BLOCKS, segment_blocks=SEGMENT_BLOCKS)
    assert made.memory.block_bytes * SEGMENT_BLOCKS == 32 * MIB
    made.memory.poison(made.block_ids())
    return made


def test_the_driver_has_what_the_pool_gave_back_and_lends_it_again(engine, folder: Path, bed: Bed) -> None:
    own = engines.prompts(7, 40, 9)
    numbers = [engine.submit(prompt, 12) for prompt in own]
    engine.step()
    before = bed.free_bytes()
    engine.resize(shrink_bytes=3 * 32 * MIB)
    shrunk = bed.free_bytes()
    engine.resize(grow_bytes=2 * 32 * MIB)
    grown = bed.free_bytes()
    engine.run()
    print(f"given back {(shrunk - before) / MIB:.1f} MiB of 96, taken again {(shrunk - grown) / MIB:.1f} of 64")
    assert 0.9 * 96 * MIB <= shrunk - before <= 1.2 * 96 * MIB
    assert 0.9 * 64 * MIB <= shrunk - grown <= 1.2 * 64 * MIB
    wanted = engines.reference_tokens(folder, own, 12)
    assert [engine.outputs[number] for number in numbers] == [[each.token_id for each in one] for one in wanted]


def test_a_pool_that_cannot_grow_says_so_and_goes_on(engine, folder: Path, bed: Bed) -> None:
    [prompt] = engines.prompts(8, 50)
    number = engine.submit(prompt, 12)
    engine.step()
    engine.resize(shrink_bytes=2 * 32 * MIB)
    with bed.crowded():
        growth = engine.segments.grow(2 * 32 * MIB)
        engine.run()
    assert growth.num_bytes == 0
    assert growth.shortfall is not None
    assert "the device had them not" in growth.shortfall
    assert engine.segments.grow(2 * 32 * MIB).num_bytes == 2 * 32 * MIB
    [wanted] = engines.reference_tokens(folder, [prompt], 12)
    assert engine.outputs[number] == [each.token_id for each in wanted]


def test_a_card_that_is_full_from_the_first_step_on_loses_no_request(folder: Path, bed: Bed) -> None:
    """Whatever libraries take at first use, they have to take from the pool: see edgekv/engine/shortage.py."""
    own = engines.prompts(9, 44, 21, 9)
    engine = engines.make_engine(
        bed, folder, blocks=NUM_SEGMENTS * SEGMENT_BLOCKS, segment_blocks=SEGMENT_BLOCKS, graphs=False
    )
    with bed.crowded():
        numbers = [engine.submit(prompt, 12) for prompt in own]
        engine.run()
    assert set(engine.ended.values()) == {FinishReason.LENGTH}
    wanted = engines.reference_tokens(folder, own, 12)
    assert [engine.outputs[number] for number in numbers] == [[each.token_id for each in one] for one in wanted]


def test_graphs_that_find_no_memory_are_done_without(folder: Path, bed: Bed) -> None:
    [prompt] = engines.prompts(10, 30)
    engine = engines.make_engine(bed, folder, graphs=False)
    with bed.crowded():
        engine.runner.capture(1 << 40)
    number = engine.submit(prompt, 8)
    engine.run()
    [wanted] = engines.reference_tokens(folder, [prompt], 8)
    assert engine.outputs[number] == [each.token_id for each in wanted]
