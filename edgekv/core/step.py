"""What one engine step is told to do, and what it says it did. Runs in: anywhere; owns: nothing (frozen data)."""

from dataclasses import dataclass, field
from enum import StrEnum

from edgekv.core.pressure import PoolFacts
from edgekv.core.sequence import FinishReason, Sequence

# In a step that was planned before the step before it has been read: the token that this one samples for the sequence.
UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy the first `num_tokens` slots of every layer of block `source` to block `target`, before the forward pass."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence to run through the model in this step.

    Positions `start .. start + len(token_ids) - 1`. `block_table` covers them all: token position p lives in block
    `block_table[p // block_size]`, slot `p % block_size`. `sampled` says of how many of its last rows the logits choose
    a token: none while known tokens come after it, else that of the last known token and of each proposal after it.

        token_ids   t7 t8 t9 | p10 p11 p12     t9 is the last known token, three more are proposed: sampled is 4
        chosen            c10  c11 c12 c13     c10 is the next token; if it is p10, so is c11, and so on

    `token_ids` of a step that was planned ahead are (UNKNOWN,): the device takes the token from what the step before
    sampled for the same sequence.
    """

    sequence: Sequence
    start: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    sampled: int

    @property
    def samples(self) -> bool:
        """Whether it reaches the sequence's last known token, so that the next is chosen."""
        return self.sampled > 0

    @property
    def proposed(self) -> tuple[int, ...]:
        """The tokens after the last known one that somebody proposes; the step verifies them."""
        return self.token_ids[len(self.token_ids) - self.sampled + 1 :] if self.sampled else ()

    def with_proposals(self, proposals: tuple[int, ...], block_table: tuple[int, ...]) -> "Chunk":
        """A chunk that samples and proposes nothing, with proposals to verify; the table covers them too."""
        token_ids = self.token_ids + proposals
        return Chunk(self.sequence, self.start, token_ids, block_table, sampled=self.sampled + len(proposals))

    def with_sampled(self, sampled: int) -> "Chunk":
        """The chunk without the proposals that only its sampled rows after the first `sampled` verify."""
        end = len(self.token_ids) - self.sampled + sampled
        return Chunk(self.sequence, self.start, self.token_ids[:end], self.block_table, sampled)

    @property
    def end(self) -> int:
        """Context length once this chunk is computed."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: copies first, then all chunks as one ragged batch (decodes are chunks of one token)."""

    copies: tuple[BlockCopy, ...]
    chunks: tuple[Chunk, ...]
    preempted: tuple[int, ...] = ()

    @property
    def sampling(self) -> tuple[Chunk, ...]:
        """The chunks that sample, in order: the logits are of the `sampled` rows of each, one after another."""
        return tuple(chunk for chunk in self.chunks if chunk.samples)

    @property
    def num_sampled(self) -> int:
        """Rows of the logits."""
        return sum(chunk.sampled for chunk in self.chunks)

    @property
    def num_tokens(self) -> int:
        """Rows of the batch."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token chosen for one row; log-probabilities are of the raw model distribution (natural log)."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """A sequence was scheduled for the first time. `miss` says why the prefix cache gave no more than it did."""

    sequence_id: int
    cached_tokens: int
    miss: str | None = None


@dataclass(frozen=True, slots=True)
class TokenOut:
    """One generated token of one sequence. `is_stop`: it ended the sequence and is not part of its text."""

    sequence_id: int
    sampled: Sampled
    is_stop: bool = False


@dataclass(frozen=True, slots=True)
class Verified:
    """What became of the proposals for a sequence in one step: the first `accepted` of `proposed` were its own words.

    Where the sequence ended within them, those after its end do not count as proposed.
    """

    sequence_id: int
    proposed: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A sequence ended; its blocks are already released."""

    sequence_id: int
    reason: FinishReason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Where the blocks are: free + cached + active = total."""

    total_blocks: int
    free_blocks: int
    cached_blocks: int
    active_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Resize:
    """What the engine is to do with its memory before its next step; `budget_bytes` is the ledger's from now on.

    The KV pool gives back at least `shrink_bytes` or takes at most `grow_bytes`, in whole segments. While `hold`, no
    step runs. An order that neither shrinks nor grows only changes budget and hold, and does not count as a resize.
    """

    budget_bytes: int
    shrink_bytes: int = 0
    grow_bytes: int = 0
    hold: bool = False


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Where the device's memory went: bytes by lease, and of what they hold (`earmarks`: name to (lease, bytes)).

    `budget_bytes` is the ledger's; `wanted_budget_bytes` the one last ordered, lower while the leases are above it.
    `shortfall` says why the latest growth was less than ordered, None where it was not.
    """

    leases: dict[str, int]
    budget_bytes: int
    wanted_budget_bytes: int
    facts: PoolFacts
    earmarks: dict[str, tuple[str, int]] = field(default_factory=dict)
    held: bool = False
    shortfall: str | None = None


class SpeculationState(StrEnum):
    """Whether tokens are proposed: they are; it does not pay at present; its memory is with others until they leave.

    OFF: they will not be any more.
    """

    ON = "on"
    PAUSED = "paused"
    YIELDED = "yielded"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """How speculation goes. Counters only grow; what is "recent" fades from step to step.

    `method`: "model" or "ngram". `detail`: why it is in its state, in a few words for people. `tokens`: proposed for a
    sequence in recent steps, on average. `acceptance`: the share of recent proposals that were accepted; `speedup`:
    tokens a second against none proposed, as measured in recent steps. Both None before anything was. `verifications`:
    how often proposals for a sequence were verified; `pauses`, `yields` and `returns`: how often it stopped because it
    did not pay, gave its memory back, and had it again. `read_tokens`: computed by the draft model of what it had not
    seen. `pool`: of the draft model's blocks, None for n-grams, and so `drafter`, what that model is called.
    `most_tokens`: the most proposed for a sequence; None where there is no such limit. `tokens_a_step`: that a sequence
    had of a recent step that verified proposals for it, on average; None before any.
    """

    method: str
    state: SpeculationState
    detail: str = ""
    tokens: float = 0.0
    acceptance: float | None = None
    speedup: float | None = None
    verifications: int = 0
    pauses: int = 0
    yields: int = 0
    returns: int = 0
    read_tokens: int = 0
    pool: PoolStats | None = None
    drafter: str | None = None
    most_tokens: int | None = None
    tokens_a_step: float | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot after a step; counters only grow.

    `most_blocks`: what the pool has had and may have again, `pinned_blocks` what of it is always taken. `forward_s`:
    seconds in the model's forward pass; of a card, those in which it was given its work. `ahead_steps`: steps that a
    card was given while it was still busy with the one before. `proposed_tokens` were verified, and of these
    `accepted_tokens` are in outputs; `speculation` is None where nothing is ever proposed.
    """

    pool: PoolStats
    running: int
    waiting: int
    steps: int = 0
    forward_s: float = 0.0
    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    evictions: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    memory: MemoryStats | None = None
    most_blocks: int = 0
    pinned_blocks: int = 0
    ahead_steps: int = 0
    speculation: SpeculationStats | None = None


@dataclass(frozen=True, slots=True)
class StepReport:
    """Everything that one step has to tell the streams."""

    stats: EngineStats
    started: tuple[Started, ...] = ()
    tokens: tuple[TokenOut, ...] = ()
    finished: tuple[Finished, ...] = ()
