"""What one engine step is told to do, and what it says it did. Runs in: anywhere; owns: nothing (frozen data)."""

from dataclasses import dataclass, field

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
    `block_table[p // block_size]`, slot `p % block_size`. `samples` says whether the chunk ends at the sequence's
    last known token, so that its last row's logits choose the next one.

    `token_ids` of a step that was planned ahead are (UNKNOWN,): the device takes the token from what the step before
    sampled for the same sequence.
    """

    sequence: Sequence
    start: int
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    samples: bool

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
        """The chunks that sample, in order: row i of the logits is that of chunk i of these."""
        return tuple(chunk for chunk in self.chunks if chunk.samples)

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


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot after a step; counters only grow.

    `most_blocks`: what the pool has had and may have again, `pinned_blocks` what of it is always taken. `forward_s`:
    seconds in the model's forward pass; of a card, those in which it was given its work. `ahead_steps`: steps that a
    card was given while it was still busy with the one before.
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
    preemptions: int = 0
    evictions: int = 0
    misses: dict[str, int] = field(default_factory=dict)
    memory: MemoryStats | None = None
    most_blocks: int = 0
    pinned_blocks: int = 0
    ahead_steps: int = 0


@dataclass(frozen=True, slots=True)
class StepReport:
    """Everything that one step has to tell the streams."""

    stats: EngineStats
    started: tuple[Started, ...] = ()
    tokens: tuple[TokenOut, ...] = ()
    finished: tuple[Finished, ...] = ()
