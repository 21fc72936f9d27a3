"""Prompts that are computed at load and stay: how they come in, how long they stay, what they hold on the ledger."""

import pytest
import torch
from torch import Tensor

from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.ledger import Ledger
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits, Scheduler
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import StepPlan
from edgekv.engine.core import EngineCore
from edgekv.engine.pinned import PinnedPrefixes, PinnedPrompt, PinnedPromptFailed, PinnedPromptRefused, PinnedState
from edgekv.engine.sampler import Sampler
from edgekv.engine.settings import KV_LEASE

VOCAB = 50
BLOCK_BYTES = 400
HOUSE = tuple(range(10))
PORCH = (*range(4), 40, 41, 42, 43)


class Runner:
    """A model that always says 1, unless it is `broken`; counts the tokens that it is shown."""

    def __init__(self) -> None:
        self.tokens = 0
        self.broken = False

    def forward(self, plan: StepPlan) -> Tensor:
        self.tokens += plan.num_tokens
        logits = torch.zeros(sum(chunk.samples for chunk in plan.chunks), VOCAB)
        logits[:, 1] = float("nan") if self.broken else 9.0
        return logits


class Harness:
    """An engine with a small pool, and its pinned prompts."""

    def __init__(self, blocks: int = 12, *, prefix: bool = True, max_step_tokens: int = 512) -> None:
        pool = BlockPool(block_size=4, segment_blocks=16)
        pool.add_segment(blocks)
        self.runner = Runner()
        self.ledger = Ledger(blocks * BLOCK_BYTES)
        self.ledger.reserve(KV_LEASE, blocks * BLOCK_BYTES)
        self.cache = KVCache(pool, PrefixCache(4) if prefix else None)
        scheduler = Scheduler(self.cache, Limits(max_step_tokens=max_step_tokens))
        self.core = EngineCore(scheduler, self.runner, Sampler(VOCAB, torch.device("cpu")), VOCAB)
        self.pins = PinnedPrefixes(self.cache, self.ledger, block_bytes=BLOCK_BYTES)
        self.progress: list[tuple[int, int, str]] = []

    def load(self, *prompts: PinnedPrompt, context_tokens: int | None = 16, now_s: float = 0.0) -> None:
        def note(done: int, total: int, stage: str) -> None:
            self.progress.append((done, total, stage))

        self.pins.load(self.core, prompts, context_tokens=context_tokens, model_tokens=1000, now_s=now_s, progress=note)
        self.cache.check_integrity(())

    def ask(self, *prompt: int, salt: bytes = b"tenant") -> int:
        """Run a request; returns how many tokens of its prompt were cached."""
        self.core.submit(SequenceSpec(7, prompt, SamplingParams(max_tokens=1), salt=salt))
        report = self.core.step()
        assert [(f.sequence_id, f.reason) for f in report.finished] == [(7, FinishReason.LENGTH)]
        return report.started[0].cached_tokens

    def state(self, now_s: float) -> PinnedState:
        [state] = self.pins.states(now_s)
        return state

    @property
    def earmark(self) -> int:
        return self.ledger.earmarks.get("prefix.pinned", ("", 0))[1]


def test_a_pinned_prompt_is_computed_once_and_then_cached_for_everybody() -> None:
    harness = Harness()
    harness.load(PinnedPrompt("house", HOUSE))
    assert (harness.runner.tokens, harness.core.busy) == (10, False)
    for salt in (b"", b"one", b"other"):
        harness.cache.flush()
        assert harness.ask(*HOUSE[:8], 30, 31, salt=salt) == 8
    assert harness.cache.pinned_blocks == 2, "only whole blocks are pinned"
    assert harness.ledger.earmarks == {"prefix.pinned": (KV_LEASE, 2 * BLOCK_BYTES)}


def test_what_pinned_prompts_share_is_computed_and_counted_once() -> None:
    harness = Harness()
    harness.load(PinnedPrompt("house", HOUSE), PinnedPrompt("porch", PORCH))
    assert harness.runner.tokens == 10 + 4
    assert (harness.cache.pinned_blocks, harness.earmark) == (3, 3 * BLOCK_BYTES)


def test_the_progress_is_told_in_bytes_of_keys_and_values() -> None:
    harness = Harness(max_step_tokens=4)
    harness.load(PinnedPrompt("house", HOUSE), PinnedPrompt("porch", PORCH))
    assert [done for done, _, _ in harness.progress] == [0, 400, 800, 1000, 1000, 1800]
    assert {total for _, total, _ in harness.progress} == {1800}
    assert harness.progress[-1][2] == "pinned prompt 'porch'"


def test_a_pin_is_given_up_when_nobody_used_it_for_its_ttl_and_a_hit_renews_it() -> None:
    harness = Harness()
    harness.load(PinnedPrompt("house", HOUSE, ttl_s=60.0), now_s=1000.0)
    harness.pins.observe(1059.0)
    assert harness.state(1059.0) == PinnedState("house", 2, is_pinned=True, left_s=1.0)
    harness.ask(*HOUSE[:8], 30)
    harness.pins.observe(1059.5)
    harness.pins.observe(1119.0)
    assert harness.state(1119.0).left_s == pytest.approx(0.5)
    harness.pins.observe(1119.5)
    assert harness.state(1119.5) == PinnedState("house", 2, is_pinned=False)
    assert (harness.cache.pinned_blocks, harness.earmark) == (0, 0)
    assert harness.ask(*HOUSE[:8], 31) == 8, "it is still cached"


def test_a_request_that_begins_otherwise_renews_nothing() -> None:
    harness = Harness()
    harness.load(PinnedPrompt("house", HOUSE, ttl_s=60.0))
    harness.ask(*HOUSE[:4], 30, 31, 32, 33, 34)
    harness.pins.observe(60.0)
    assert not harness.state(60.0).is_pinned


def test_a_prefix_that_is_used_after_its_pin_was_given_up_is_pinned_again() -> None:
    harness = Harness()
    harness.load(PinnedPrompt("house", HOUSE, ttl_s=60.0))
    harness.pins.observe(60.0)
    harness.ask(*HOUSE[:8], 30)
    harness.pins.observe(70.0)
    assert harness.state(70.0) == PinnedState("house", 2, is_pinned=True, left_s=60.0)
    assert harness.earmark == 2 * BLOCK_BYTES
    harness.pins.observe(130.0)
    harness.cache.flush()
    harness.ask(*HOUSE[:8], 30)
    harness.pins.observe(140.0)
    assert not harness.state(140.0).is_pinned, "it was evicted; a tenant's own blocks are not the operator's"
    harness.cache.check_integrity(())


def test_a_prefix_is_not_pinned_again_while_an_admitted_request_counts_on_its_blocks() -> None:
    harness = Harness(blocks=12)
    now_s = 0.0
    harness.core.clock = lambda: now_s
    harness.load(PinnedPrompt("house", HOUSE, ttl_s=60.0))
    harness.core.keep(harness.pins)
    now_s = 60.0
    harness.core.step()
    long = SequenceSpec(1, tuple(range(20, 26)), SamplingParams(max_tokens=42, temperature=0.0))  # all 12 blocks
    short = SequenceSpec(2, (*HOUSE[:8], 30), SamplingParams(max_tokens=1))
    harness.core.submit(long)
    harness.core.submit(short)
    finished = [last for _ in range(60) for last in harness.core.step().finished]
    assert [(last.sequence_id, last.reason) for last in finished] == [
        (2, FinishReason.LENGTH), (1, FinishReason.LENGTH),
    ]  # fmt: skip
    harness.ask(*HOUSE[:8], 30)
    harness.cache.check_integrity(())


def test_a_prefix_whose_blocks_were_counted_on_is_pinned_again_once_they_are_not() -> None:
    harness = Harness(blocks=12)
    harness.load(PinnedPrompt("house", HOUSE, ttl_s=60.0))
    harness.pins.observe(60.0)
    harness.ask(*HOUSE[:8], 30)
    harness.pins.observe(61.0, lambda: 1)
    assert not harness.state(61.0).is_pinned
    harness.pins.observe(62.0, lambda: 2)
    assert harness.state(62.0).is_pinned


def test_a_prefix_that_was_used_and_evicted_between_two_looks_is_not_pinned_again() -> None:
    harness = Harness()
    harness.load(PinnedPrompt("house", HOUSE, ttl_s=60.0))
    harness.pins.observe(60.0)
    harness.ask(*HOUSE[:8], 30)
    harness.cache.flush()
    harness.pins.observe(70.0)
    assert not harness.state(70.0).is_pinned


def test_a_pin_without_ttl_stays() -> None:
    harness = Harness()
    harness.load(PinnedPrompt("house", HOUSE))
    harness.pins.observe(1e9)
    assert harness.state(1e9) == PinnedState("house", 2, is_pinned=True)


def test_the_priority_of_a_prefix_whose_time_is_over_is_kept() -> None:
    harness = Harness(blocks=8)
    harness.load(PinnedPrompt("house", HOUSE[:8], ttl_s=1.0, priority=1), PinnedPrompt("porch", PORCH[4:], ttl_s=1.0))
    harness.pins.observe(1.0)
    harness.ask(*PORCH[4:], 0)
    harness.ask(*(45,) * 21)
    assert harness.ask(*PORCH[4:], 30) == 0
    assert harness.ask(*HOUSE[:8], 30) == 8, "although it was used less recently"


@pytest.mark.parametrize(
    ("lengths", "context_tokens", "numbers"),
    [
        ([32], None, "has 32 tokens. The KV pool holds 48, of which 24 are kept for one context: that leaves 24"),
        ([12], 40, "has 12 tokens. The KV pool holds 48, of which 40 are kept for one context: that leaves 8"),
        ([23, 8], 24, "has 8 tokens (28 with those before it). The KV pool holds 48, of which 24"),
        ([32], 30, "has 32 tokens, and a request may have 30 in all"),
    ],
)
def test_a_prompt_that_leaves_no_room_for_a_context_is_refused_before_anything_is_computed(
    lengths: list[int], context_tokens: int | None, numbers: str
) -> None:
    harness = Harness()
    prompts = [PinnedPrompt(f"of {length}", (length,) * length) for length in lengths]
    with pytest.raises(PinnedPromptRefused) as refusal:
        harness.load(*prompts, context_tokens=context_tokens)
    assert numbers in str(refusal.value)
    assert harness.runner.tokens == 0


def test_prompts_that_fit_only_because_they_share_blocks_do_fit() -> None:
    prompts = [PinnedPrompt(str(n), (*range(20), *(n,) * 4)) for n in (40, 41)]
    harness = Harness(blocks=14)
    harness.load(*prompts, context_tokens=28)
    assert harness.cache.pinned_blocks == 7
    with pytest.raises(PinnedPromptRefused, match="leaves 24 to be pinned"):
        Harness(blocks=13).load(*prompts, context_tokens=28)


def test_a_prompt_shorter_than_a_block_is_refused() -> None:
    with pytest.raises(PinnedPromptRefused, match="share 3 tokens, and only whole blocks of 4 are pinned"):
        Harness().load(PinnedPrompt("house", HOUSE[:3]))


def test_pinned_prompts_need_the_prefix_cache() -> None:
    with pytest.raises(PinnedPromptRefused, match="prefix cache, and it is off"):
        Harness(prefix=False).load(PinnedPrompt("house", HOUSE))


def test_a_prompt_whose_numbers_are_not_finite_is_not_pinned() -> None:
    harness = Harness()
    harness.runner.broken = True
    with pytest.raises(PinnedPromptFailed, match="could not be computed: the model's output is not finite"):
        harness.load(PinnedPrompt("house", HOUSE))
    assert harness.cache.pinned_blocks == 0


def test_an_engine_that_has_no_blocks_for_it_is_not_waited_for() -> None:
    harness = Harness(blocks=8)
    harness.cache.pool.allocate(7)
    with pytest.raises(PinnedPromptFailed, match="not enough memory to run this sequence"):
        harness.load(PinnedPrompt("house", HOUSE[:8]))
    harness.cache.pool.remove_segment(harness.cache.pool.add_segment(8))
    with pytest.raises(PinnedPromptFailed, match="there is not enough memory for it"):
        harness.load(PinnedPrompt("house", HOUSE[:8]))


def test_no_pinned_prompts_change_nothing() -> None:
    harness = Harness(prefix=False)
    harness.load()
    harness.pins.observe(1.0)
    assert (harness.pins.states(1.0), harness.ledger.earmarks, harness.progress) == ((), {}, [])
