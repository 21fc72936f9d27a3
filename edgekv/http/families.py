"""Families of metrics, made at the moment somebody asks. Runs in: anywhere; owns: nothing."""

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


def of_model(
    kind: type[CounterMetricFamily | GaugeMetricFamily], model: str, told: Iterable[tuple[str, str, float]]
) -> Iterator[Metric]:
    """A family of one value for each name, documentation and value that is told, labelled with the `model`'s name."""
    for name, documentation, value in told:
        family = kind(name, documentation, labels=["model_name"])
        family.add_metric([model], value)
        yield family
