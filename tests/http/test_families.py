"""What a family of metrics looks like to whoever scrapes it."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edgekv.http.families import of_model


class Made(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self.families


def text_of(families: Iterable[Metric]) -> str:
    registry = CollectorRegistry()
    registry.register(Made(families))
    return generate_latest(registry).decode()


def test_each_number_is_a_family_of_the_model_in_the_order_told() -> None:
    told = [("edgekv_b", "The first.", 3), ("edgekv_a", "The second.", 0.5)]
    assert text_of(of_model(GaugeMetricFamily, "llama", told)) == (
        "# HELP edgekv_b The first.\n"
        "# TYPE edgekv_b gauge\n"
        'edgekv_b{model_name="llama"} 3.0\n'
        "# HELP edgekv_a The second.\n"
        "# TYPE edgekv_a gauge\n"
        'edgekv_a{model_name="llama"} 0.5\n'
    )


def test_a_counters_name_gets_its_ending() -> None:
    assert text_of(of_model(CounterMetricFamily, "llama", [("vllm:prompt_tokens", "Prompt tokens.", 7)])) == (
        "# HELP vllm:prompt_tokens_total Prompt tokens.\n"
        "# TYPE vllm:prompt_tokens_total counter\n"
        'vllm:prompt_tokens_total{model_name="llama"} 7.0\n'
    )
