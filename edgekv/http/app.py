"""The endpoint's routes. Runs in: trio; owns: the metrics and the limit on work done beside the loop.

A request passes the gate (Host, Origin, key), is routed, read within bounds, validated, tokenized, and admitted by the
service; what follows is `generation`'s. Every answer but the streams and /metrics is JSON, errors included.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgekv.actors.service import ModelCard, SequenceDraft, Service
from edgekv.core.step import EngineStats
from edgekv.core.stop import StopStrings
from edgekv.errors import ContextLengthExceeded, NotServing, QueueFull
from edgekv.http.body import read_json_body
from edgekv.http.choice import Choice
from edgekv.http.drain import Drain
from edgekv.http.errors import ApiError, JsonResponse, invalid, refusal, retry_after
from edgekv.http.gate import Gate
from edgekv.http.generation import DRAINING, Format, Generation, answer
from edgekv.http.memory import memory_json
from edgekv.http.metrics import CONTENT_TYPE, Metrics
from edgekv.http.openai_chat import ChatFormat, ChatRequest
from edgekv.http.openai_completions import DEFAULT_MAX_TOKENS, CompletionFormat, CompletionRequest
from edgekv.http.presence import Client, ClientGone, while_present
from edgekv.http.sampling import MAX_TOKENS, GenerationFields
from edgekv.http.settings import ApiKey, HttpSettings
from edgekv.http.tokenize import DetokenizeRequest, TokenizeRequest

logger = logging.getLogger("edgekv.http")

T = TypeVar("T")

# Below this a body is parsed and tokenized on the loop: it takes less time than another task would notice.
SHORT_BYTES = 32 * 1024
MAX_LONG_AT_ONCE = 2
POLLED = ("/health", "/metrics", "/api/edgekv/memory")
ANSWERED = (ApiError, ClientGone, ContextLengthExceeded, QueueFull, NotServing, HTTPException, Exception)


def build_app(service: Service, settings: HttpSettings, drain: Drain | None = None) -> ASGIApp:
    """The ASGI application over `service`; `drain` is told by the server when it is to stop."""
    endpoint = Endpoint(service, settings, drain or Drain())
    routes = [
        Route("/v1/chat/completions", endpoint.chat_completions, methods=["POST"]),
        Route("/v1/completions", endpoint.completions, methods=["POST"]),
        Route("/v1/models", endpoint.models),
        Route("/v1/models/{name:path}", endpoint.model),
        Route("/tokenize", endpoint.tokenize, methods=["POST"]),
        Route("/detokenize", endpoint.detokenize, methods=["POST"]),
        Route("/metrics", endpoint.metrics_page),
        Route("/api/edgekv/memory", endpoint.memory),
    ]
    open_routes = [Route("/health", endpoint.health)]
    app = Starlette(
        routes=[*open_routes, *routes],
        middleware=[
            Middleware(Account, endpoint=endpoint, routes=[*open_routes, *routes]),
            Middleware(Gate, settings=settings, open_routes=open_routes),
        ],
        exception_handlers=dict.fromkeys(ANSWERED, _answer_error),
    )
    app.router.redirect_slashes = False  # a redirect would repeat the client's Host
    return app


class Endpoint:
    """The handlers and what they share."""

    def __init__(self, service: Service, settings: HttpSettings, drain: Drain) -> None:
        self._service, self._settings, self._drain = service, settings, drain
        self._long_work = trio.CapacityLimiter(MAX_LONG_AT_ONCE)
        self.metrics = Metrics(self._engine_numbers, service.memory)

    async def health(self, request: Request) -> Response:
        """200 when requests are taken, if `degraded` with a reason; else 503. Never touches the engine."""
        health = self._service.health()
        status = "draining" if self._drain.has_begun else health.status
        body = {"status": status, "detail": DRAINING if self._drain.has_begun else health.detail}
        if status in ("ok", "degraded"):
            return JsonResponse(body)
        return JsonResponse(body, status=503, headers=retry_after(1.0))

    async def metrics_page(self, request: Request) -> Response:
        """Prometheus' text; never touches the engine."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def memory(self, request: Request) -> Response:
        """Who owns which byte of the device; never touches the engine or the driver."""
        return JsonResponse(memory_json(self._service.memory(), self._service.stats()))

    async def models(self, request: Request) -> Response:
        """The served model under each of its names."""
        card = self._service.card()
        return JsonResponse({"object": "list", "data": [_model_object(card, name) for name in _names(card)]})

    async def model(self, request: Request) -> Response:
        """One of the names."""
        name = request.path_params["name"]
        return JsonResponse(_model_object(self._card(name), name))

    async def tokenize(self, request: Request) -> Response:
        """Text or messages to token ids."""
        body = await self._read(request)

        async def work() -> Response:
            asked = await self._beside(len(body), partial(TokenizeRequest.from_body, body))
            card = self._card(asked.form.model)
            return JsonResponse(await self._beside(len(body), partial(asked.answer, card)))

        return await while_present(Client(request.receive), work)

    async def detokenize(self, request: Request) -> Response:
        """Token ids to text."""
        body = await self._read(request)

        async def work() -> Response:
            asked = await self._beside(len(body), partial(DetokenizeRequest.from_body, body))
            card = self._card(asked.model)
            return JsonResponse(await self._beside(len(body), partial(asked.answer, card)))

        return await while_present(Client(request.receive), work)

    async def chat_completions(self, request: Request) -> Response:
        """Continue a conversation."""
        body = await self._read(request)
        client = Client(request.receive)

        async def admit() -> tuple[Generation, Format, bool]:
            asked = await self._beside(len(body), partial(ChatRequest.from_body, body))
            card = self._card(asked.model)
            special = asked.add_special_tokens is True
            prompt = await self._beside(len(body), partial(asked.encode, card, add_special_tokens=special))
            if not prompt:
                raise invalid("messages", "'messages' must make at least one token.")
            generation = await self._generate(
                request, card, asked, [prompt], asked.token_limit, MAX_TOKENS, asked.num_logprobs
            )
            return generation, ChatFormat(asked, card), asked.stream is True

        generation, form, stream = await while_present(client, admit)
        return await answer(client, generation, form, stream=stream)

    async def completions(self, request: Request) -> Response:
        """Continue one or several prompts."""
        body = await self._read(request)
        client = Client(request.receive)

        async def admit() -> tuple[Generation, Format, bool]:
            asked = await self._beside(len(body), partial(CompletionRequest.from_body, body))
            card = self._card(asked.model)
            prompts = await self._beside(len(body), partial(asked.encode, card))
            form = CompletionFormat(asked, card, asked.echoes(card, prompts))
            generation = await self._generate(
                request, card, asked, prompts, asked.max_tokens, DEFAULT_MAX_TOKENS, asked.logprobs
            )
            return generation, form, asked.stream is True

        generation, form, stream = await while_present(client, admit)
        return await answer(client, generation, form, stream=stream)

    async def _read(self, request: Request) -> bytes:
        if self._drain.has_begun:
            raise NotServing("draining", DRAINING, retry_after_s=5.0)
        return await read_json_body(request, self._settings)

    async def _beside(self, size: int, work: Callable[[], T]) -> T:
        """Do work that grows with the body: here if it is short, else in a thread, a few at a time."""
        if size <= SHORT_BYTES:
            return work()
        return await trio.to_thread.run_sync(work, limiter=self._long_work)

    def _card(self, name: str | None) -> ModelCard:
        card = self._service.card()
        if name is not None and name not in _names(card):
            served = ", ".join(f"'{name}'" for name in _names(card))
            raise ApiError(
                404,
                f"The model '{name[:128]}' does not exist; this server has {served}.",
                code="model_not_found",
                param="model",
            )
        return card

    async def _generate(
        self,
        request: Request,
        card: ModelCard,
        asked: GenerationFields,
        prompts: Sequence[tuple[int, ...]],
        max_tokens: int | None,
        default_tokens: int,
        logprobs: int | None,
    ) -> Generation:
        caller: ApiKey | None = request.state.caller
        priority = self._priority(caller, asked.priority)
        salt = _salt(caller, asked.cache_salt)
        drafts = [
            SequenceDraft(prompt, sampling, priority, salt)
            for prompt in prompts
            for sampling in asked.sampling(
                card,
                num_prompt=len(prompt),
                max_tokens=max_tokens,
                default_tokens=default_tokens,
                logprobs=logprobs,
            )
        ]
        streams = await self._service.open(drafts)
        choices = [
            Choice(
                index,
                card.tokenizer.detokenizer(draft.prompt, skip_special_tokens=asked.skip_special_tokens is not False),
                StopStrings(asked.stops),
                keep_tokens=logprobs is not None,
                min_tokens=draft.sampling.min_tokens,
            )
            for index, draft in enumerate(drafts)
        ]
        return Generation(prompts, choices, streams, self._drain, self.metrics)

    def _priority(self, caller: ApiKey | None, wanted: int | None) -> int:
        own = self._settings.default_priority if caller is None else caller.priority
        if wanted is not None and wanted < own:
            raise invalid("priority", f"'priority' must be at least {own} (lower runs first) for this API key.")
        return own if wanted is None else wanted

    def _engine_numbers(self) -> tuple[str, EngineStats | None]:
        try:
            return self._service.card().name, self._service.stats()
        except NotServing:
            return "", None


class Account:
    """Pure ASGI middleware: counts and logs each response by its route, never by the client's words."""

    def __init__(self, app: ASGIApp, *, endpoint: Endpoint, routes: Sequence[Route]) -> None:
        self._app, self._endpoint, self._routes = app, endpoint, tuple(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and note what is answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        route = next((route.path for route in self._routes if route.path_regex.match(scope["path"])), "unknown")

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._endpoint.metrics.responded(route, message["status"])
                level = logging.DEBUG if route in POLLED else logging.INFO
                milliseconds = (time.perf_counter() - began) * 1000
                logger.log(level, "%s %s %d (%.1f ms)", scope["method"], route, message["status"], milliseconds)
            await send(message)

        await self._app(scope, receive, send_and_note)


def _names(card: ModelCard) -> tuple[str, ...]:
    return (card.name, *card.aliases)


def _model_object(card: ModelCard, name: str) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "edgekv",
        "root": card.name,
        "parent": None,
        "max_model_len": card.context_tokens,
    }


def _salt(caller: ApiKey | None, wanted: str | None) -> bytes:
    """Separates prefix caches by key holder and by the request's own salt; empty when there is neither."""
    if caller is None and wanted is None:
        return b""
    holder = b"" if caller is None else b"key:" + caller.name.encode()
    own = b"" if wanted is None else b"salt:" + wanted.encode()
    # The holder's length goes in front: no two pairs may run together into the same bytes.
    return hashlib.sha256(len(holder).to_bytes(8, "big") + holder + own).digest()


async def _answer_error(request: Request, error: Exception) -> Response:
    await trio.lowlevel.checkpoint()
    match error:
        case ApiError():
            return error.response()
        case ContextLengthExceeded() | QueueFull() | NotServing():
            return refusal(error).response()
        case ClientGone():
            return Response(status_code=499)  # nobody reads it; the account does
        case HTTPException():
            known = {404: "There is nothing at this path.", 405: "This path does not take this method."}
            message = known.get(error.status_code, error.detail)
            return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()
        case _:
            # Starlette raises it again once this is sent, and the server logs it.
            message = "The server failed on this request; its log says more."
            return ApiError(500, message, code="internal_error").response()
