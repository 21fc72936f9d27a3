"""The engine as the HTTP side sees it. Runs in: trio; owns: nothing (a protocol and frozen data)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from edgekv.actors.stream import TokenStream
from edgekv.core.pressure import Decision
from edgekv.core.reading import Reading
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import SequenceSpec
from edgekv.core.step import EngineStats, MemoryStats, PoolStats
from edgekv.errors import ContextLengthExceeded

if TYPE_CHECKING:
    from edgekv.model.spec import GenerationDefaults
    from edgekv.text.chat_template import ChatTemplate
    from edgekv.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is served and how much of it fits; known once the model has loaded.

    `created` is in unix seconds; the model itself was made for `model_context_tokens`. `pool_tokens` is what the KV
    pool holds now, `most_pool_tokens` the most that it has held, and can hold again once other programs leave the
    memory to it; None where that is the same. `chat_template` is None for a model that has none.
    """

    name: str
    aliases: tuple[str, ...]
    created: int
    context_tokens: int
    model_context_tokens: int
    pool_tokens: int
    block_size: int
    tokenizer: "Tokenizer"
    chat_template: "ChatTemplate | None"
    generation: "GenerationDefaults"
    most_pool_tokens: int | None = None

    @property
    def limit_tokens(self) -> int:
        """The most tokens, prompt and output together, that one sequence can ever have."""
        return min(self.context_tokens, self.largest_pool_tokens)

    @property
    def present_tokens(self) -> int:
        """The most that one sequence can have as long as the pool stays as it is."""
        return min(self.context_tokens, self.pool_tokens)

    @property
    def largest_pool_tokens(self) -> int:
        """What the pool holds when it has all its memory."""
        return max(self.pool_tokens, self.most_pool_tokens or 0)

    def exceeded(self, prompt_tokens: int, completion_tokens: int) -> ContextLengthExceeded:
        """The refusal of a request over `limit_tokens`: the numbers, and what would make it fit."""
        asked, left = prompt_tokens + completion_tokens, self.limit_tokens - prompt_tokens
        less = f"ask for a completion of at most {left} tokens" if left > 0 else "shorten the messages"
        changes = []
        if self.context_tokens < asked <= self.model_context_tokens:
            changes.append(f"set models.{self.name}.context to {asked} or more (now {self.context_tokens})")
        if asked > self.largest_pool_tokens:
            changes.append(f"raise kv.budget until the pool holds {asked} tokens (now {self.largest_pool_tokens})")
        remedy = f"To make it fit, {' or '.join([less, ' and '.join(changes)] if changes else [less])}."
        return ContextLengthExceeded(self.limit_tokens, prompt_tokens, completion_tokens, remedy)


@dataclass(frozen=True, slots=True)
class Health:
    """How the server fares, in a word and a sentence. Requests are taken while it is "ok" or "degraded"."""

    status: Literal["ok", "degraded", "loading", "draining", "failed"]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class MemoryEvent:
    """Something that the memory guard did or saw. `at` is in unix seconds.

    `num_bytes`: given back, taken, or given back and not seen to leave; of a state, what is spilled; else 0.
    """

    at: float
    kind: Literal["shrunk", "grown", "state", "stale", "fresh", "unreturned"]
    num_bytes: int
    detail: str


@dataclass(frozen=True, slots=True)
class MemoryView:
    """The device's memory as the guard last saw it: what was read, what was decided, and who owns what.

    `age_s` is how old the reading is; `problem` says why there is none, or no newer one. `events`: latest last.
    """

    device: str
    headroom_bytes: int
    reading: Reading | None = None
    age_s: float | None = None
    problem: str | None = None
    decision: Decision | None = None
    memory: MemoryStats | None = None
    pool: PoolStats | None = None
    events: tuple[MemoryEvent, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceDraft:
    """A sequence that has not been given its id yet; the fields are those of `SequenceSpec`."""

    prompt: tuple[int, ...] = field(repr=False)
    sampling: SamplingParams
    priority: int = 0
    salt: bytes = b""

    @property
    def needed_tokens(self) -> int:
        """Tokens of KV cache it needs if it uses all that it asked for."""
        return len(self.prompt) + self.sampling.max_tokens

    def with_id(self, sequence_id: int) -> SequenceSpec:
        """The sequence to submit."""
        return SequenceSpec(
            id=sequence_id, prompt=self.prompt, sampling=self.sampling, priority=self.priority, salt=self.salt
        )


class Service(Protocol):
    """What an HTTP handler holds."""

    def card(self) -> ModelCard:
        """The served model. Raises `NotServing` until it has loaded."""

    async def open(self, drafts: Sequence[SequenceDraft]) -> list[TokenStream]:
        """Admit all drafts or none and return their streams in order; the caller closes each in a `finally`.

        Raises `ContextLengthExceeded`, `QueueFull` or `NotServing`; then nothing has been submitted.
        """

    def stats(self) -> EngineStats | None:
        """The engine's counters after its latest step; None before the first."""

    def health(self) -> Health:
        """How the server fares."""

    def memory(self) -> MemoryView | None:
        """Where the device's memory is; None where nobody watches it."""
