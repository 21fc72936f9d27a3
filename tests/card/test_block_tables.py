"""What a card is told of block tables: what is new of them, and nothing that it has already."""

from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.engine.card_buffers import StepBuffers
from edgekv.engine.card_inputs import BlockTables, Staging
from edgekv.model.card_memory import CardLimits, MatrixFacts
from edgekv.model.hf_config import read_spec
from tests.card.host_card import HostCard

Tiny = Callable[[str], Path]
Table = tuple[int, ...]


class Tables:
    """They, and what a step would do with them."""

    def __init__(self, folder: Path) -> None:
        card, limits = HostCard(), CardLimits(step_tokens=16, sequences=3, context_blocks=8)
        self.buffers = StepBuffers(card, read_spec(folder), limits, MatrixFacts(0, 0), "float32")
        self.staging = Staging(card, limits)
        self.tables = BlockTables(self.buffers)
        self.table = self.tables.table

    def step(self, *sequences: tuple[int, Table]) -> list[int]:
        """The rows on the card are right; how many entries each sequence's was told of."""
        self.staging.begin()
        numbers = self.tables.assign(list(sequences), self.staging)
        told = {row: end - begin for row, begin, end, _ in self.tables._spans}
        self.staging.send(self.buffers.inputs)
        self.tables.write()
        for number, (_, table) in zip(numbers, sequences, strict=True):
            assert tuple(self.table[number, : len(table)].tolist()) == table
        return [told.get(number, 0) for number in numbers]


@pytest.fixture
def tables(tiny: Tiny) -> Tables:
    return Tables(tiny("llama"))


def test_only_what_is_new_is_told(tables: Tables) -> None:
    assert tables.step((1, (5, 6)), (2, (7,))) == [2, 1]
    assert tables.step((1, (5, 6)), (2, (7, 8, 9))) == [0, 2]
    assert tables.step((2, (7, 8, 9)), (3, (5,))) == [0, 1]


def test_a_block_that_was_taken_back_and_another_in_its_place(tables: Tables) -> None:
    """As when blocks of proposals that were wrong are taken back, and the next ones are others."""
    assert tables.step((1, (5, 6, 7))) == [3]
    assert tables.step((1, (5, 6))) == [0]
    assert tables.step((1, (5, 6, 9))) == [1]
    assert tables.step((1, (5, 6, 4, 3))) == [2], "without a step between"


def test_a_sequence_that_was_moved_or_comes_again_is_told_of_anew(tables: Tables) -> None:
    assert tables.step((1, (5, 6, 7)), (2, (8,))) == [3, 1]
    assert tables.step((2, (8,))) == [0]
    assert tables.step((1, (2, 3, 7)), (2, (8,))) == [3, 0]
    assert tables.step((1, (2, 14, 15)), (2, (9,))) == [2, 1]


def test_after_a_step_that_failed_everything_is_told_again(tables: Tables) -> None:
    tables.step((1, (5, 6)))
    tables.tables.forget()
    assert tables.step((1, (5, 6))) == [2]


def test_a_table_that_is_too_long_is_refused(tables: Tables) -> None:
    with pytest.raises(ValueError, match="of 9 entries is longer than a row of 8"):
        tables.step((1, tuple(range(9))))
