"""A sequence: what the engine was asked to continue, and how far it has come.

Runs in: engine thread; owns: one sequence.
"""

from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto

from edgekv.core.sampling import SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended; STOP and LENGTH are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    OUT_OF_MEMORY = "insufficient_memory"
    ERROR = "error"


class Stage(Enum):
    """Where a sequence is in its life."""

    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()
    FINISHED = auto()


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """What is submitted: the prompt's token ids and how to continue it.

    `priority`: lower runs first. `salt` separates prefix caches (a tenant never hits another's blocks).
    `stop_token_ids` of `sampling` include the model's end-of-sequence ids unless the caller ignores them.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    salt: bytes = b""


@dataclass(slots=True, eq=False)
class Sequence:
    """The mutable state of one sequence.

    Invariants: `num_computed` tokens of `tokens` have their keys and values in the blocks of `block_table`;
    `len(block_table) * block_size >= num_computed`; a FINISHED, WAITING or PREEMPTED sequence holds no block.
    `block_keys` are the prefix-cache keys of the leading full blocks of `tokens`, worked out so far.
    """

    spec: SequenceSpec
    arrival: int
    tokens: list[int]
    stage: Stage = Stage.WAITING
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    cached_tokens: int | None = None
    num_preemptions: int = 0
    block_keys: list[bytes] = field(default_factory=list)

    @classmethod
    def from_spec(cls, spec: SequenceSpec, arrival: int) -> "Sequence":
        """A waiting sequence; `arrival` is its place among equals."""
        return cls(spec=spec, arrival=arrival, tokens=list(spec.prompt))

    @property
    def id(self) -> int:
        """The spec's id."""
        return self.spec.id

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.spec.prompt)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.spec.prompt)

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose keys and values are still to be computed (1 while decoding)."""
        return len(self.tokens) - self.num_computed
