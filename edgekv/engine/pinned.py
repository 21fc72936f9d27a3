"""Prompts that are computed when the model loads and stay in the prefix cache: which, until when, and what they hold.

Runs in: engine thread; owns: the names that pin prefixes, and their deadlines.

They are published under OPEN_SALT, so that every key holder's requests may begin with their blocks. The text is the
operator's, and no tenant's secret; what a tenant puts behind it stays under the tenant's own salt (see
`edgekv.core.prefix_tree`). What anybody can learn by guessing is which whole blocks are pinned: a pinned text is not
to hold what a key holder may not know.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edgekv.core.kv_cache import KVCache
from edgekv.core.ledger import Ledger
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.prefix_tree import OPEN_SALT, Node
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import EngineStats, StepReport
from edgekv.engine.settings import KV_LEASE
from edgekv.errors import EdgeKVError

EARMARK = "prefix.pinned"


@dataclass(frozen=True, slots=True)
class PinnedPrompt:
    """The beginning of many prompts. Only its full blocks are pinned.

    `ttl_s`: how long it stays pinned after its last use, None for ever. `priority`: afterwards, as an ordinary cached
    prefix, a higher one is evicted later.
    """

    name: str
    token_ids: tuple[int, ...] = field(repr=False)
    ttl_s: float | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class PinnedState:
    """How a pinned prompt fares. `left_s` is until its pin is given up; None: for ever, or it has been given up."""

    name: str
    num_blocks: int
    is_pinned: bool
    left_s: float | None = None


class Steps(Protocol):
    """The engine, as far as a prompt's computation needs it."""

    def submit(self, spec: SequenceSpec) -> None:
        """Queue a sequence."""

    def step(self) -> StepReport:
        """Run one step."""

    def stats(self) -> EngineStats:
        """Counts as of now."""


@dataclass(slots=True)
class _Pin:
    """A prompt whose blocks are published, and when its pin ends unless it is used again."""

    prompt: PinnedPrompt
    chain: tuple[Node, ...]
    last_used: int
    deadline_s: float | None
    is_held: bool = True


class PinnedPrefixes:
    """The pinned prompts of one engine.

    Invariant: the earmark on the ledger is the bytes of all blocks that are pinned now.

    Args:
        cache: the engine's block tables.
        ledger: the one that its pool is leased on.
        block_bytes: of one block.
    """

    def __init__(self, cache: KVCache, ledger: Ledger, *, block_bytes: int) -> None:
        self._cache = cache
        self._ledger = ledger
        self._block_bytes = block_bytes
        self._pins: dict[str, _Pin] = {}

    def load(
        self,
        core: Steps,
        prompts: Sequence[PinnedPrompt],
        *,
        context_tokens: int | None,
        model_tokens: int,
        now_s: float,
        progress: Callable[[int, int, str], None],
    ) -> None:
        """Compute prompts and pin them; before the engine has other work.

        Args:
            core: the engine, idle.
            prompts: what to pin.
            context_tokens: the most tokens of one request as configured, None where that was left open.
            model_tokens: the most tokens that the model was made for.
            now_s: the present, on the clock of `observe`.
            progress: is told the bytes of keys and values that are there, those that will be, and what is being done.

        Raises:
            PinnedPromptRefused: one that does not fit, checked before anything is computed.
            PinnedPromptFailed: one whose computation did not end well.
        """
        cache = self._cache
        check_pinned(
            prompts,
            prefix=cache.prefix,
            block_size=cache.block_size,
            pool_blocks=cache.pool.total_blocks,
            context_tokens=context_tokens,
            model_tokens=model_tokens,
        )
        token_bytes = self._block_bytes // self._cache.block_size
        total_bytes = sum(len(prompt.token_ids) for prompt in prompts) * token_bytes
        done_bytes = 0
        for prompt in prompts:
            stage = f"pinned prompt {prompt.name!r}"
            progress(done_bytes, total_bytes, stage)
            for done_tokens in _compute(core, prompt):
                progress(done_bytes + done_tokens * token_bytes, total_bytes, stage)
            done_bytes += len(prompt.token_ids) * token_bytes
            self._pin(prompt, now_s)
        if prompts:
            self._earmark()

    def observe(self, now_s: float, spare_blocks: Callable[[], int] | None = None) -> None:
        """Renew the pins that were used since the last call, and give up those that nobody used for their TTL.

        A prefix that is used again after its pin was given up, and is still cached as a whole, is pinned again; not
        before `spare_blocks` says that so many more can be, for what was let in meanwhile counts on them (None: all).
        """
        changed = False
        for name, pin in self._pins.items():
            if pin.prompt.ttl_s is None:
                continue
            tip = pin.chain[-1]
            if tip.live and tip.last_used != pin.last_used:
                if not pin.is_held and spare_blocks is not None:
                    new_blocks = sum(not node.pins for node in pin.chain)
                    if new_blocks > spare_blocks():
                        continue
                pin.last_used, pin.deadline_s = tip.last_used, now_s + pin.prompt.ttl_s
                if not pin.is_held:
                    self._cache.pin_prefix(name, pin.chain, priority=pin.prompt.priority)
                    pin.is_held = changed = True
            elif pin.is_held and pin.deadline_s is not None and now_s >= pin.deadline_s:
                self._cache.unpin_prefix(name)
                pin.is_held, changed = False, True
        if changed:
            self._earmark()

    def states(self, now_s: float) -> tuple[PinnedState, ...]:
        """Every pinned prompt as of now."""
        return tuple(
            PinnedState(
                name=name,
                num_blocks=len(pin.chain),
                is_pinned=pin.is_held,
                left_s=None if pin.deadline_s is None or not pin.is_held else max(0.0, pin.deadline_s - now_s),
            )
            for name, pin in self._pins.items()
        )

    def _pin(self, prompt: PinnedPrompt, now_s: float) -> None:
        chain = self._cache.chain(prompt.token_ids, OPEN_SALT)
        if len(chain) < len(prompt.token_ids) // self._cache.block_size:
            raise PinnedPromptFailed(prompt.name, "its blocks did not stay in the cache")
        self._cache.pin_prefix(prompt.name, chain, priority=prompt.priority)
        deadline_s = None if prompt.ttl_s is None else now_s + prompt.ttl_s
        self._pins[prompt.name] = _Pin(prompt, chain, chain[-1].last_used, deadline_s)

    def _earmark(self) -> None:
        self._ledger.earmark(EARMARK, KV_LEASE, self._cache.pinned_blocks * self._block_bytes)


def check_pinned(
    prompts: Sequence[PinnedPrompt],
    *,
    prefix: PrefixCache | None,
    block_size: int,
    pool_blocks: int,
    context_tokens: int | None,
    model_tokens: int,
) -> int:
    """How many blocks the prompts pin; beginnings that they share count once. Raises PinnedPromptRefused.

    `prefix` names the blocks, None where it is off; `pool_blocks` are all that there are. The rest: see `load`.
    """
    pool_tokens = pool_blocks * block_size
    # A context that nobody asked for may turn out smaller than the model's, but not by more than half of the pool.
    kept_tokens = min(model_tokens, pool_tokens // 2) if context_tokens is None else context_tokens
    kept_blocks = -(-kept_tokens // block_size)
    blocks: set[bytes] = set()
    for prompt in prompts:
        num_tokens = len(prompt.token_ids)
        if prefix is None:
            raise PinnedPromptRefused(prompt.name, "pinned prompts live in the prefix cache, and it is off.")
        if num_tokens < block_size:
            raise PinnedPromptRefused(
                prompt.name,
                f"all prompts that begin with it share {num_tokens:,} tokens, and only whole blocks of {block_size} "
                "are pinned. Leave it out: so few are computed in no time.",
            )
        most_tokens = model_tokens if context_tokens is None else context_tokens
        if num_tokens >= most_tokens:
            raise PinnedPromptRefused(
                prompt.name, f"it has {num_tokens:,} tokens, and a request may have {most_tokens:,} in all."
            )
        keys: list[bytes] = []
        prefix.extend_keys(keys, prompt.token_ids, OPEN_SALT)
        blocks.update(keys)
        if len(blocks) + kept_blocks > pool_blocks:
            left_tokens = max(0, pool_blocks - kept_blocks) * block_size
            others = f" ({len(blocks) * block_size:,} with those before it)" if prompt is not prompts[0] else ""
            raise PinnedPromptRefused(
                prompt.name,
                f"it has {num_tokens:,} tokens{others}. The KV pool holds {pool_tokens:,}, of which "
                f"{kept_blocks * block_size:,} are kept for one context: that leaves {left_tokens:,} to be pinned. "
                "Shorten it, ask for a smaller context, or raise kv.budget.",
            )
    return len(blocks)


def _compute(core: Steps, prompt: PinnedPrompt) -> Iterator[int]:
    """Run a prompt through the engine; yields after each step how many of its tokens are done."""
    before = core.stats()
    steps = before.steps
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    core.submit(SequenceSpec(id=0, prompt=prompt.token_ids, sampling=sampling, salt=OPEN_SALT))
    while True:
        report = core.step()
        stats = report.stats
        cached_tokens = stats.cached_prompt_tokens - before.cached_prompt_tokens
        yield cached_tokens + stats.computed_prompt_tokens - before.computed_prompt_tokens
        for finished in report.finished:
            if finished.reason not in (FinishReason.STOP, FinishReason.LENGTH):
                raise PinnedPromptFailed(prompt.name, finished.detail or finished.reason.value)
            return
        if stats.steps == steps:
            raise PinnedPromptFailed(prompt.name, "there is not enough memory for it")
        steps = stats.steps


class PinnedPromptRefused(EdgeKVError):
    """A pinned prompt that makes no sense or does not fit."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"The pinned prompt {name!r} cannot be had: {why}")
        self.name = name


class PinnedPromptFailed(EdgeKVError):
    """The computation of a pinned prompt went wrong."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"The pinned prompt {name!r} could not be computed: {why}.")
        self.name = name
