"""Running a request's sequences to their ends and answering with what they say. Runs in: trio; owns: their streams."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import trio
from starlette.responses import Response

from edgekv.actors.stream import StreamEvent, TokenStream
from edgekv.http.choice import Choice, Delta, joined
from edgekv.http.drain import Drain
from edgekv.http.errors import ApiError, JsonResponse, retry_after
from edgekv.http.metrics import Metrics
from edgekv.http.presence import Client, while_present
from edgekv.http.sse import Emit, EventStream

# A client that paused has many events waiting: they go out in pieces, each short work for the loop.
MAX_EVENTS_AT_ONCE = 128
DRAINING = "The server is stopping."

Show = Callable[[Choice, Delta], Awaitable[None]]


class Format(Protocol):
    """How one kind of request words its answer. Every method returns one JSON object."""

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The chunk that a choice begins with, if any."""

    def delta(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """A chunk of a choice."""

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The chunk that carries a choice's finish reason."""

    def usage(self, generation: "Generation") -> dict[str, Any]:
        """The chunk without choices that ends a stream."""

    def whole(self, generation: "Generation", texts: Sequence[Delta]) -> dict[str, Any]:
        """The answer in one piece; `texts` has all of each choice."""


class Generation:
    """The open streams of one request, a `Choice` for each.

    `prompts` are the token ids of each prompt; the choices are in the order of their prompts, equally many for each.
    """

    def __init__(
        self,
        prompts: Sequence[tuple[int, ...]],
        choices: Sequence[Choice],
        streams: Sequence[TokenStream],
        drain: Drain,
        metrics: Metrics,
    ) -> None:
        self.prompts, self.choices = tuple(prompts), tuple(choices)
        self._streams = tuple(streams)
        self._drain, self._metrics = drain, metrics
        self._failure: ApiError | None = None
        self._waiting: set[trio.CancelScope] = set()
        self._opened_at = trio.current_time()

    def usage(self) -> dict[str, Any]:
        """OpenAI's account: every prompt counts once, with what its first choice found in the prefix cache."""
        prompt_tokens = sum(len(prompt) for prompt in self.prompts)
        completion_tokens = sum(choice.num_generated for choice in self.choices)
        per_prompt = len(self.choices) // len(self.prompts)
        cached_tokens = sum(choice.cached_tokens for choice in self.choices[::per_prompt])
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }

    def account(self) -> dict[str, Any]:
        """`usage`, and in a field that OpenAI's API does not have why the prefix cache gave each prompt no more."""
        lookups = [choice.debug() for choice in self.choices[:: len(self.choices) // len(self.prompts)]]
        return {"usage": self.usage(), "edgekv": lookups[0] if len(lookups) == 1 else {"prompts": lookups}}

    async def run(self, show: Show) -> None:
        """Call `show` with every piece of every choice, then once more with an empty one when the choice has ended.

        Raises `ApiError` when the engine lost a sequence or the server stops before all have ended; `show` is never
        cancelled for that, so that what it was sending is whole.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_up_when_stopping)
            async with trio.open_nursery() as pumps:
                for choice, stream in zip(self.choices, self._streams, strict=True):
                    pumps.start_soon(self._pump, choice, stream, show)
            nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Nobody listens any more: sequences still running are aborted. Idempotent."""
        for choice, stream in zip(self.choices, self._streams, strict=True):
            if not choice.has_ended:
                choice.finish_reason = "abort"
                self._metrics.ended("abort", trio.current_time() - self._opened_at)
            stream.close()

    async def _pump(self, choice: Choice, stream: TokenStream, show: Show) -> None:
        timer = self._metrics.timer(self._opened_at)
        while not choice.has_ended:
            events = await self._take(stream)
            if self._failure is not None:
                return
            if not events:
                choice.failure = ApiError(500, "The engine dropped this request.", code="engine_error")
            for start in range(0, len(events), MAX_EVENTS_AT_ONCE):
                delta = choice.feed(events[start : start + MAX_EVENTS_AT_ONCE])
                timer.generated(delta.num_generated)
                if not delta.is_empty:
                    await show(choice, delta)
        stream.close()
        self._metrics.ended(choice.finish_reason or "error", trio.current_time() - self._opened_at)
        if choice.failure is not None:
            self._fail(choice.failure)
        else:
            await show(choice, Delta())

    async def _take(self, stream: TokenStream) -> list[StreamEvent]:
        with trio.CancelScope() as waiting:
            self._waiting.add(waiting)
            try:
                return await stream.take()
            finally:
                self._waiting.discard(waiting)
        return []

    def _fail(self, failure: ApiError) -> None:
        self._failure = self._failure or failure
        for waiting in self._waiting:
            waiting.cancel()

    async def _give_up_when_stopping(self) -> None:
        await self._drain.ending.wait()
        self._fail(ApiError(503, DRAINING, code="draining", headers=retry_after(5.0)))


async def answer(client: Client, generation: Generation, form: Format, *, stream: bool) -> Response:
    """The response to a request whose sequences are open; takes over closing them."""
    if stream:
        return EventStream(client, lambda emit: _stream(generation, form, emit), generation.close)

    pieces: dict[Choice, list[Delta]] = {choice: [] for choice in generation.choices}

    async def keep(choice: Choice, delta: Delta) -> None:
        pieces[choice].append(delta)
        await trio.lowlevel.checkpoint()

    try:
        await while_present(client, lambda: generation.run(keep))
    finally:
        generation.close()
    return JsonResponse(form.whole(generation, [joined(deltas) for deltas in pieces.values()]))


async def _stream(generation: Generation, form: Format, emit: Emit) -> None:
    async def show(choice: Choice, delta: Delta) -> None:
        await emit(form.closing(choice) if delta.is_empty else form.delta(choice, delta))

    try:
        for choice in generation.choices:
            opening = form.opening(choice)
            if opening is not None:
                await emit(opening)
        await generation.run(show)
    except ApiError as error:
        await emit(error.body())
        return
    if form.wants_usage:
        await emit(form.usage(generation))
