"""One continuation as its reader sees it: text, log-probabilities and an end, from the engine's events.

Runs in: trio; owns: one sequence's detokenizer and held-back text.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from edgekv.actors.stream import Failed, StreamEvent
from edgekv.core.sequence import FinishReason
from edgekv.core.step import Finished, Sampled, Started, TokenOut
from edgekv.core.stop import StopStrings
from edgekv.http.errors import ApiError, lost, retry_after
from edgekv.text.detokenizer import Detokenizer


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token whose text is shown, wholly or in part. `offset`: characters of the continuation before it."""

    sampled: Sampled
    offset: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What a batch of events adds to the continuation."""

    text: str = ""
    tokens: tuple[ShownToken, ...] = ()
    num_generated: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not self.text and not self.tokens


def joined(deltas: Iterable[Delta]) -> Delta:
    """Several deltas as one."""
    parts = list(deltas)
    return Delta(
        text="".join(part.text for part in parts),
        tokens=tuple(token for part in parts for token in part.tokens),
        num_generated=sum(part.num_generated for part in parts),
    )


class Choice:
    """A continuation in the making.

    Invariants: the text shown is a prefix of the detokenized text and holds no stop string past the first `min_tokens`
    tokens; a token is shown no later than any of its characters, and never if a stop string swallowed them all.
    """

    def __init__(
        self, index: int, detokenizer: Detokenizer, stops: StopStrings, *, keep_tokens: bool, min_tokens: int = 0
    ) -> None:
        self.index = index
        self.cached_tokens = 0
        self.prefix_miss: str | None = None
        self.num_generated = 0
        self.finish_reason: str | None = None
        self.failure: ApiError | None = None
        self._detokenizer = detokenizer
        self._stops = stops
        self._keep_tokens = keep_tokens
        self._min_tokens = min_tokens
        self._held_tokens: deque[ShownToken] = deque()
        self._num_decoded = 0
        self._num_shown = 0

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None or self.failure is not None

    def debug(self) -> dict[str, Any]:
        """What the prefix cache gave, and why it gave no more; null where it gave all that it could."""
        return {"prefix_miss": self.prefix_miss, "cached_tokens": self.cached_tokens}

    def feed(self, events: Iterable[StreamEvent]) -> Delta:
        """Take the engine's next events; what follows the end is ignored."""
        shown: list[str] = []
        before = self.num_generated
        for event in events:
            if self.has_ended:
                break
            match event:
                case Started():
                    self.cached_tokens, self.prefix_miss = event.cached_tokens, event.miss
                case TokenOut():
                    self.num_generated += 1
                    if not event.is_stop:
                        shown.append(self._take(event.sampled))
                case Finished():
                    shown.append(self._finish(event))
                case Failed():
                    self.failure = lost(event)
        text = "".join(shown)
        self._num_shown += len(text)
        return Delta(text, self._tokens_shown(), self.num_generated - before)

    def _take(self, sampled: Sampled) -> str:
        if self._keep_tokens:
            self._held_tokens.append(ShownToken(sampled, self._num_decoded))
        return self._show(self._detokenizer.push(sampled.token_id))

    def _show(self, piece: str) -> str:
        self._num_decoded += len(piece)
        if self.num_generated <= self._min_tokens:
            return piece  # stop strings are looked for in what comes after the minimum, as in vLLM
        text, stopped = self._stops.feed(piece)
        if stopped:
            self.finish_reason = "stop"
        return text

    def _finish(self, event: Finished) -> str:
        match event.reason:
            case FinishReason.STOP | FinishReason.LENGTH:
                text = self._show(self._detokenizer.finish())
                if self.finish_reason is None:
                    text += self._stops.flush()
                    self.finish_reason = event.reason.value
                return text
            case FinishReason.OUT_OF_MEMORY:
                message = "The request ran out of memory and was ended."
                self.failure = ApiError(503, message, code=event.reason.value, headers=retry_after(1.0))
            case FinishReason.ABORT:
                self.failure = ApiError(503, "The request was aborted.", code="aborted", headers=retry_after(1.0))
            case FinishReason.ERROR:
                self.failure = ApiError(500, "The engine could not continue this request.", code="engine_error")
        return ""

    def _tokens_shown(self) -> tuple[ShownToken, ...]:
        held, tokens = self._held_tokens, []
        ended_by_engine = self.finish_reason is not None and self._stops.matched is None
        while held and (held[0].offset < self._num_shown or ended_by_engine):
            tokens.append(held.popleft())
        return tuple(tokens)
