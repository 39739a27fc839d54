"""What GET /metrics tells, in Prometheus's text format."""

from collections.abc import Iterable, Sequence

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxgpt_export.serve.served_model import ServedModel

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "jaxgpt_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )
        self.first_token = self._histogram("first_token", "From a request to its first token.")
        self.between_tokens = self._histogram("between_tokens", "Between a text's tokens.")

    def _histogram(self, name: str, about: str) -> prometheus_client.Histogram:
        name = f"jaxgpt_{name}_seconds"
        return prometheus_client.Histogram(name, about, buckets=SECONDS, registry=self.registry)

    def observe(self, models: Sequence[ServedModel]) -> None:
        """Tell the figures of models' schedulers too."""
        self.registry.register(_SchedulerCollector(models))

    def on_tokens(self, seconds: float, count: int, first: bool) -> None:
        """Take in that tokens arrived; see Caller."""
        if first:
            self.first_token.observe(seconds)
        else:
            self.between_tokens.observe(seconds / count)

    def text(self) -> bytes:
        """Return all figures."""
        return prometheus_client.generate_latest(self.registry)


class _SchedulerCollector(Collector):
    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        """Read the schedulers' numbers; they change meanwhile, each by itself."""
        counters = {
            "prompt_tokens": "Tokens of prompts that were computed.",
            "cached_tokens": "Tokens of prompts that past texts gave.",
            "new_tokens": "Generated tokens.",
            "steps": "Calls of the engine.",
        }
        for name, about in counters.items():
            counter = CounterMetricFamily(f"jaxgpt_{name}", about, labels=["model"])
            for model in self._models:
                counter.add_metric([model.name], getattr(model.scheduler.counts, name))
            yield counter
        gauges = {
            "running": ("Texts that are generated.", lambda m: m.worker.load[0]),
            "waiting": ("Texts that wait for a slot.", lambda m: m.worker.load[1]),
            "slots": ("Texts that may be generated side by side.", lambda m: m.scheduler.max_running),
            "cache_bytes": (
                "Memory of the slots that no text runs in, most of it past texts.",
                lambda m: m.scheduler.pool.kept_bytes,
            ),
        }
        for name, (about, read) in gauges.items():
            gauge = GaugeMetricFamily(f"jaxgpt_{name}", about, labels=["model"])
            for model in self._models:
                gauge.add_metric([model.name], read(model))
            yield gauge
