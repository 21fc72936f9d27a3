"""Turns between priorities are shared by weight; within one it is first come, first served."""

import itertools

import pytest

from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence, SequenceSpec, Stage
from edgekv.core.waiting import WaitingLines

WEIGHTS = {0: 10, 10: 1}


class Queue:
    """Lines, and whoever was served."""

    def __init__(self, weights: dict[int, int]) -> None:
        self.lines = WaitingLines(weights)
        self.born = 0

    def add(self, priority: int, stage: Stage = Stage.WAITING) -> Sequence:
        self.born += 1
        sequence = Sequence.from_spec(SequenceSpec(self.born, (1,), SamplingParams(1), priority), self.born)
        sequence.stage = stage
        self.lines.add(sequence)
        self.lines.check_integrity()
        return sequence

    def serve(self) -> Sequence:
        sequence = next(self.lines.turns())
        self.lines.serve(sequence)
        return sequence


def test_under_a_constant_stream_every_eleventh_is_of_the_second_line() -> None:
    queue = Queue(WEIGHTS)
    for _ in range(5):
        queue.add(0)
        queue.add(10)
    served = []
    for _ in range(220):
        served.append(queue.serve().spec.priority)
        queue.add(served[-1])
    assert served.count(10) == 20
    second = [place for place, priority in enumerate(served) if priority == 10]
    assert {later - earlier for earlier, later in itertools.pairwise(second)} == {11}


def test_a_line_alone_is_served_without_waiting_for_its_turn() -> None:
    queue = Queue(WEIGHTS)
    for _ in range(5):
        queue.add(10)
    assert [queue.serve().spec.priority for _ in range(5)] == [10] * 5


def test_a_line_in_which_nobody_waited_has_saved_no_turns_up() -> None:
    queue = Queue(WEIGHTS)
    for _ in range(50):
        queue.add(0)
        queue.serve()
    for _ in range(30):
        queue.add(0)
        queue.add(10)
    served = [queue.serve().spec.priority for _ in range(30)]
    assert served.count(10) == 3


def test_neither_has_a_line_that_was_passed_over_for_long() -> None:
    queue = Queue(WEIGHTS)
    too_large = [queue.add(10) for _ in range(40)]
    for _ in range(400):
        queue.add(0)
        sequence = next(s for s in queue.lines.turns() if s not in too_large)
        queue.lines.serve(sequence)
    for _ in range(40):
        queue.add(0)
    served = [queue.serve().spec.priority for _ in range(22)]
    assert [place for place, priority in enumerate(served) if priority == 10] == [0, 11], "one at once, then its share"


def test_within_a_line_priority_counts_then_preemption_then_arrival() -> None:
    queue = Queue(WEIGHTS)
    late, urgent, early = queue.add(3), queue.add(-1), queue.add(2)
    preempted = queue.add(3, Stage.PREEMPTED)
    assert [queue.serve() for _ in range(4)] == [urgent, early, preempted, late]


def test_a_preempted_sequence_does_not_pay_twice() -> None:
    queue = Queue({0: 1, 10: 1})
    for _ in range(3):
        queue.add(0)
        queue.add(10, Stage.PREEMPTED)
    assert [queue.serve().spec.priority for _ in range(6)] == [0, 10, 10, 10, 0, 0]


@pytest.mark.parametrize(("priority", "line"), [(-7, 0), (5, 0), (6, 10), (99, 10)])
def test_other_priorities_join_the_nearest_line(priority: int, line: int) -> None:
    queue = Queue(WEIGHTS)
    joined = queue.add(priority)
    other = 10 if line == 0 else 0
    queue.add(other)
    order = [queue.serve() is joined, queue.serve() is joined]
    assert order == ([True, False] if line == 0 else [False, True])


def test_without_weights_priority_alone_decides() -> None:
    queue = Queue({})
    for priority in (10, 0, 10, 0):
        queue.add(priority)
    assert [queue.serve().spec.priority for _ in range(4)] == [0, 0, 10, 10]


def test_whoever_is_removed_waits_no_more() -> None:
    queue = Queue(WEIGHTS)
    first, second = queue.add(10), queue.add(0)
    queue.lines.remove(first)
    assert list(queue.lines) == [second]
    assert len(queue.lines) == 1


def test_a_weight_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        WaitingLines({0: 1, 10: 0})
