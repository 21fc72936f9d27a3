"""Steps of a card that verify proposals: whatever is proposed, sequences say what they say without."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgekv.core.scheduler import Limits
from edgekv.core.sequence import FinishReason
from edgekv.core.step import Sampled
from edgekv.engine.card_model import CardModel
from tests.card.engine import CardHarness, card_model
from tests.card.guesser import Guesser
from tests.card.host_card import HostCard
from tests.card.test_card_engine import SAMPLING, prompts

Tiny = Callable[[str], Path]
Said = tuple[list[Sampled], FinishReason]

LIMITS = Limits(max_sequences=4, max_step_tokens=48, mixed_step_tokens=24, max_proposed=12)
OPTIONS = {**SAMPLING, "greedy": {}, "least and biased": {"min_tokens": 4, "stop_token_ids": frozenset(range(3, 60)),
           "logit_bias": ((70, 3.0),), "temperature": 1.2, "seed": 13, "logprobs": 2}}  # fmt: skip


@dataclass
class Asked:
    """Prompts with their settings, and what is answered where nothing is proposed."""

    model: CardModel
    card: HostCard
    prompts: list[list[int]]
    options: list[dict[str, Any]]
    said: list[Said] = field(default_factory=list)

    @property
    def answers(self) -> dict[tuple[int, ...], list[int]]:
        pairs = zip(self.prompts, self.said, strict=True)
        return {tuple(prompt): [each.token_id for each in said] for prompt, (said, _) in pairs}

    def only(self, *names: str) -> "Asked":
        """Of `everything`, for tests in which it would take long."""
        places = [list(OPTIONS).index(name) for name in names]
        own, options, said = ([each[place] for place in places] for each in (self.prompts, self.options, self.said))
        return replace(self, prompts=own, options=options, said=said)

    def run(self, engine: CardHarness, between: Callable[[int], None] = lambda steps: None) -> list[Said]:
        asked = zip(self.prompts, self.options, strict=True)
        numbers = [engine.submit(prompt, **options) for prompt, options in asked]
        engine.run(between)
        return [(engine.sampled.get(number, []), engine.ended[number]) for number in numbers]

    def guessed(self, k: int, right: float, **options: Any) -> tuple[CardHarness, Guesser]:
        guesser = Guesser(self.answers, k, right)
        return CardHarness(self.model, self.card, proposer=guesser, **{"limits": LIMITS, **options}), guesser


def ask(folder: Path, own: list[list[int]], options: list[dict[str, Any]]) -> Asked:
    card = HostCard()
    asked = Asked(card_model(folder, card), card, own, options)
    asked.said = asked.run(CardHarness(asked.model, card))
    return asked


@pytest.fixture(scope="module")
def everything(tiny: Tiny) -> Asked:
    """Every way to sample."""
    own = prompts(2, *(9 + 3 * i for i in range(len(OPTIONS))))
    return ask(tiny("llama"), own, [{"max_tokens": 11, **options} for options in OPTIONS.values()])


def same(got: list[Said], want: list[Said]) -> None:
    for (said, reason), (expected, expected_reason) in zip(got, want, strict=True):
        assert [each.token_id for each in said] == [each.token_id for each in expected]
        assert reason is expected_reason
        for one, other in zip(said, expected, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top_logprobs] == [token for token, _ in other.top_logprobs]


@pytest.mark.parametrize("k", range(1, 9))
def test_every_way_of_sampling_for_every_number_of_proposals(k: int, everything: Asked) -> None:
    engine, guesser = everything.guessed(k, 0.7)
    same(everything.run(engine), everything.said)
    assert 0 < guesser.accepted < guesser.proposed


@pytest.mark.parametrize("k", [2, 8])
def test_a_sequence_alone(k: int, everything: Asked) -> None:
    own = everything.only("top-k", "greedy penalties", "least and biased")
    engine, guesser = own.guessed(k, 0.7, limits=replace(LIMITS, max_sequences=1))
    same(own.run(engine), own.said)
    assert 0 < guesser.accepted < guesser.proposed


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_whether_proposals_are_never_or_always_right(right: float, everything: Asked) -> None:
    own = everything.only("seeded", "penalties", "greedy penalties", "logprobs")
    engine, guesser = own.guessed(4, right)
    same(own.run(engine), own.said)
    assert guesser.proposed > 20
    assert (guesser.accepted > 0) == (right > 0)
    assert (guesser.accepted < guesser.proposed) == (right < 1)
    stats = engine.core.stats()
    assert (stats.proposed_tokens, stats.accepted_tokens) == (guesser.proposed, guesser.accepted)


def test_a_graph_is_replayed_for_steps_that_verify(everything: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    own = everything.only("top-p", "penalties", "bias", "greedy")
    engine, _ = own.guessed(3, 0.7)
    assert engine.runner.graphs.sizes == (1, 2, 4, 8, 16)
    replay, replayed = engine.runner.graphs.replay, []

    def watch(rows: int) -> bool:
        assert replay(rows), f"no graph of {rows} rows"
        replayed.append(rows)
        return True

    monkeypatch.setattr(engine.runner.graphs, "replay", watch)
    same(own.run(engine), own.said)
    assert max(replayed) == 16, "four sequences with three proposals each"
    assert replayed.count(16) > 1


def test_steps_that_verify_and_steps_begun_ahead_take_turns(everything: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the card counts on by itself is right, whatever came between."""
    engine, guesser = everything.guessed(3, 0.6)
    speculation = engine.core._speculation
    assert speculation is not None
    monkeypatch.setattr(speculation, "wants", lambda: guesser.is_on)

    def turn(steps: int) -> None:
        guesser.is_on = steps % 5 < 2

    same(everything.run(engine, turn), everything.said)
    assert engine.core.stats().ahead_steps > 5
    assert 0 < guesser.accepted < guesser.proposed


@pytest.fixture(scope="module")
def long(tiny: Tiny) -> Asked:
    """Prompts that begin alike, and are longer than what a step has of them."""
    [prefix], tails = prompts(20, 36), prompts(21, 33, 9, 24, 5)
    options = [{"temperature": 0.9, "seed": 3}, {}, SAMPLING["penalties"], SAMPLING["logprobs"]]
    return ask(tiny("qwen3"), [prefix + tail for tail in tails], [{"max_tokens": 20, **own} for own in options])


def test_prefix_hits_chunked_prompts_preemption_and_moved_segments(long: Asked) -> None:
    limits = Limits(max_sequences=3, max_step_tokens=20, mixed_step_tokens=16, max_proposed=6)
    engine, guesser = long.guessed(3, 0.7, limits=limits, blocks=12, segment_blocks=4)
    size = engine.memory.block_bytes

    def squeeze(step: int) -> None:
        if step in (9, 19):
            engine.resize(shrink_bytes=4 * size)
        if step in (14, 25):
            engine.resize(grow_bytes=4 * size)

    same(long.run(engine, squeeze), long.said)
    stats = engine.core.stats()
    assert stats.preemptions > 0
    assert stats.cached_prompt_tokens > 0
    assert 0 < guesser.accepted < guesser.proposed


def test_max_tokens_and_stop_tokens_in_the_middle_of_what_is_accepted(everything: Asked) -> None:
    options = [{"max_tokens": 12, "temperature": 1.5, "seed": number} for number in range(4)]
    asked = replace(everything, prompts=everything.prompts[:4], options=options)
    asked.said = asked.run(CardHarness(asked.model, asked.card))
    ends = replace(asked, options=[])
    wanted: list[Said] = []
    for number, (said, _) in enumerate(asked.said):
        last = next(place for place in (6, 7, 8) if said[place].token_id not in {e.token_id for e in said[:place]})
        stop = {"max_tokens": last + 1} if number % 2 else {"stop_token_ids": frozenset({said[last].token_id})}
        ends.options.append(options[number] | stop)
        wanted.append((said[: last + 1], FinishReason.LENGTH if number % 2 else FinishReason.STOP))
    engine, guesser = ends.guessed(3, 1.0)
    same(ends.run(engine), wanted)
    assert engine.core.stats().steps < 6
    assert guesser.accepted == guesser.proposed


def poisoned(asked: Asked, token: int, folder: Path) -> Asked:
    """The same prompts for a model of which one token spoils whatever attends to it."""
    card = HostCard()
    model = card_model(folder, card)
    table = model.operations[0].op.matrix
    assert table is not None
    assert table.parts[0].plain is not None
    table.parts[0].plain[token] = torch.nan
    return replace(asked, model=model, card=card)


def test_a_wrong_proposal_that_spoils_the_rows_behind_it_costs_nothing(everything: Asked, tiny: Tiny) -> None:
    said = {each.token_id for own, _ in everything.said for each in own}
    seen = said | {token for prompt in everything.prompts for token in prompt}
    poison = next(token for token in range(3, 190) if token not in seen)
    spoilt = poisoned(everything.only("seeded", "penalties", "greedy", "logprobs"), poison, tiny("llama"))
    engine, guesser = spoilt.guessed(4, 1.0)
    guesser.planted = {1: poison}
    same(spoilt.run(engine), spoilt.said)
    assert guesser.accepted == guesser.proposed > 10, "those before it"


def test_a_sequence_ends_at_its_first_row_that_is_not_finite(everything: Asked, tiny: Tiny) -> None:
    """The token before it is said, also where both are verified at once, and the others go on."""
    asked = replace(everything, prompts=everything.prompts[:3], options=[{"max_tokens": 12}] * 3)
    asked.said = asked.run(CardHarness(asked.model, asked.card))
    first, *others = ([each.token_id for each in said] for said, _ in asked.said)
    seen = {token for prompt in asked.prompts for token in prompt} | {token for own in others for token in own}
    place = next(place for place in range(2, 12) if first[place] not in {*seen, *first[:place]})
    spoilt = poisoned(asked, first[place], tiny("llama"))
    wanted = [(asked.said[0][0][: place + 1], FinishReason.ERROR), *asked.said[1:]]
    for k in (1, 5):
        engine, guesser = spoilt.guessed(k, 1.0)
        same(spoilt.run(engine), wanted)
        assert guesser.accepted > 0
