"""What /metrics says, under vLLM's names where vLLM has one. Runs in: trio; owns: one registry.

The engine's numbers are read from its latest report when somebody asks; what only the HTTP side can see (latencies as
a client feels them, refusals) is counted as it happens.
"""

from collections.abc import Callable, Iterable, Mapping

import trio
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edgekv.actors.service import MemoryView
from edgekv.core.draft_plan import DRAFT_LEASES
from edgekv.core.spill import State
from edgekv.core.step import EngineStats
from edgekv.http.families import of_model
from edgekv.http.memory import owners
from edgekv.http.speculation import speculation_metrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# vLLM's bucket edges, in seconds.
_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_BETWEEN_TOKENS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip

Source = Callable[[], tuple[str, EngineStats | None]]
Memory = Callable[[], MemoryView | None]


class Metrics:
    """Counters and histograms of one server.

    `source` gives the model's name and the engine's latest numbers, `memory` what the guard last saw of the device.
    """

    def __init__(self, source: Source, memory: Memory) -> None:
        self._source = source
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(source))
        self._registry.register(_MemoryCollector(source, memory))
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From an admitted request to its first token.", _FIRST_TOKEN_S
        )
        self._between_tokens = self._histogram(
            "vllm:inter_token_latency_seconds", "Between one token and the next.", _BETWEEN_TOKENS_S
        )
        self._request = self._histogram(
            "vllm:e2e_request_latency_seconds", "From an admitted request to its end.", _REQUEST_S
        )
        self._ended = Counter(
            "vllm:request_success",
            "Sequences that ended, by why.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._responses = Counter(
            "edgekv_http_responses", "Responses, by route and status.", ["route", "status"], registry=self._registry
        )

    def timer(self, opened_at: float) -> "SequenceTimer":
        """Times the tokens of one sequence of a request that was admitted at `opened_at` (trio's clock)."""
        model = self._model()
        return SequenceTimer(opened_at, self._first_token.labels(model), self._between_tokens.labels(model))

    def ended(self, reason: str, seconds: float) -> None:
        """A sequence ended `seconds` after it was admitted."""
        self._ended.labels(self._model(), reason).inc()
        self._request.labels(self._model()).observe(seconds)

    def responded(self, route: str, status: int) -> None:
        """A response was begun; `route` is the route's pattern, never the client's path."""
        self._responses.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def _model(self) -> str:
        return self._source()[0]

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, documentation, ["model_name"], buckets=buckets, registry=self._registry)


class SequenceTimer:
    """Observes when the tokens of one sequence arrive."""

    def __init__(self, opened_at: float, first_token: Histogram, between_tokens: Histogram) -> None:
        self._last = opened_at
        self._is_first = True
        self._first_token, self._between_tokens = first_token, between_tokens

    def generated(self, num_tokens: int) -> None:
        """`num_tokens` more have arrived; several at once share the time since the last."""
        if num_tokens == 0:
            return
        now = trio.current_time()
        if self._is_first:
            self._is_first = False
            self._first_token.observe(now - self._last)
        else:
            for _ in range(num_tokens):
                self._between_tokens.observe((now - self._last) / num_tokens)
        self._last = now


class _EngineCollector(Collector):
    """Turns the engine's latest numbers into metrics at the moment they are asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        model, stats = self._source()
        if stats is None:
            return
        pool = stats.pool
        gauges = [
            ("vllm:num_requests_running", "Sequences in the running batch.", stats.running),
            ("vllm:num_requests_waiting", "Sequences waiting for memory.", stats.waiting),
            (
                "vllm:kv_cache_usage_perc",
                "Share of the KV blocks that sequences hold; 1 is all.",
                pool.active_blocks / pool.total_blocks if pool.total_blocks else 0.0,
            ),
            ("edgekv_kv_blocks", "KV blocks of the pool.", pool.total_blocks),
            ("edgekv_kv_blocks_free", "KV blocks that hold nothing.", pool.free_blocks),
            ("edgekv_kv_blocks_cached", "KV blocks that only the prefix cache holds.", pool.cached_blocks),
            ("edgekv_kv_blocks_active", "KV blocks that sequences hold.", pool.active_blocks),
        ]
        counters = [
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prompt_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.cached_prompt_tokens),
            ("vllm:prompt_tokens", "Prompt tokens of all sequences.", stats.prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated.", stats.generated_tokens),
            ("vllm:num_preemptions", "Sequences preempted.", stats.preemptions),
            ("edgekv_computed_prompt_tokens", "Prompt tokens run through the model.", stats.computed_prompt_tokens),
            ("edgekv_engine_steps", "Engine steps.", stats.steps),
            ("edgekv_forward_seconds", "Seconds in the model's forward pass.", stats.forward_s),
            ("edgekv_evictions", "Cached blocks evicted.", stats.evictions),
        ]
        yield from of_model(GaugeMetricFamily, model, gauges)
        yield from of_model(CounterMetricFamily, model, counters)
        misses = CounterMetricFamily(
            "edgekv_prefix_misses", "Why the prefix cache gave no more than it did.", labels=["model_name", "reason"]
        )
        for reason, count in stats.misses.items():
            misses.add_metric([model, reason], count)
        yield misses
        yield from speculation_metrics(model, stats)


class _MemoryCollector(Collector):
    """Where the device's memory is, as the guard last saw it."""

    def __init__(self, source: Source, memory: Memory) -> None:
        self._source, self._memory = source, memory

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        view = self._memory()
        if view is None:
            return
        reading, decision, memory = view.reading, view.decision, view.memory
        yield _gauge("edgekv_device_headroom_bytes", "Memory left to other programs.", view.headroom_bytes)
        if view.age_s is not None:
            yield _gauge("edgekv_reading_age_seconds", "How old the latest reading of the device is.", view.age_s)
        if reading is not None:
            by_owner = self._drafts() | owners(reading, memory)
            yield _gauges("edgekv_device_memory_bytes", "The device's memory, by owner.", "owner", by_owner)
            spilled = reading.spilled_own_bytes
            yield _gauge("edgekv_device_spilled_bytes", "Memory of ours that is not on the device.", spilled)
        if decision is not None:
            now = decision.condition.state
            states = {state.value: int(state is now) for state in State}
            yield _gauges("edgekv_device_state", "1 for the device's present state.", "state", states)
        if memory is not None:
            yield _gauge("edgekv_ledger_budget_bytes", "The most that may be leased.", memory.budget_bytes)
            yield _gauge(
                "edgekv_kv_ceiling_bytes", "The most that KV pool and draft may have.", memory.facts.ceiling_bytes
            )
            given_back, taken = memory.facts.given_back_bytes, memory.facts.taken_bytes
            yield CounterMetricFamily(
                "edgekv_pool_given_back_bytes", "Memory that KV pool and draft have given back.", value=given_back
            )
            yield CounterMetricFamily("edgekv_pool_taken_bytes", "Memory that they have taken again.", value=taken)

    def _drafts(self) -> dict[str, int]:
        """No bytes for what a draft model has at other times: a graph shows that it was given back."""
        _, stats = self._source()
        is_drafted = stats is not None and stats.speculation is not None and stats.speculation.method == "model"
        return dict.fromkeys(DRAFT_LEASES, 0) if is_drafted else {}


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(name, documentation, value=value)


def _gauges(name: str, documentation: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
