"""The figures at `/metrics`: every counter, and how full everything is that has a bound."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from carserver.core.counters import Counters

Gauges = Mapping[str, tuple[float, str]]
"""By name: a figure of now, and its help."""


class Metrics(Collector):
    """Reads what is counted when it is asked, so counting costs an addition and no more."""

    def __init__(self, counters: Counters, gauges: Callable[[], Gauges]) -> None:
        self._counters = counters
        self._gauges = gauges
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def collect(self) -> Iterable[Metric]:
        """The families; called by the registry."""
        help_ = self._counters.help()
        for name, value in asdict(self._counters).items():
            yield CounterMetricFamily(f"carserver_{name}", help_[name], value=value)
        for name, (figure, words) in self._gauges().items():
            yield GaugeMetricFamily(f"carserver_{name}", words, value=figure)

    def text(self) -> tuple[bytes, str]:
        """What `/metrics` answers, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
