"""Metrics of the server in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class ServingMetrics:
    """Metrics with the prefix `softprompt_`. Only names of loaded prompts are labels, so clients cannot add series.

    Args:
        waiting: Returns the number of rows in the queue.
        running: Returns the number of rows of the current batch that are not done.
        prompts: Returns the number of prompts.
        prompt_bytes: Returns their size.
    """

    def __init__(
        self,
        waiting: Callable[[], int],
        running: Callable[[], int],
        prompts: Callable[[], int],
        prompt_bytes: Callable[[], int],
    ) -> None:
        self.registry = CollectorRegistry()
        gauges = {
            "softprompt_queue_length": ("Rows that wait", waiting),
            "softprompt_running_rows": ("Rows of the current batch that are not done", running),
            "softprompt_prompts": ("Loaded prompts", prompts),
            "softprompt_prompt_bytes": ("Size of the loaded prompts", prompt_bytes),
        }
        for name, (text, read) in gauges.items():
            Gauge(name, text, registry=self.registry).set_function(read)
        labels = ("prompt", "endpoint", "code")
        self.requests = Counter("softprompt_requests", "Requests by status", labels, registry=self.registry)
        self.tokens = Counter("softprompt_tokens", "Tokens", ("prompt", "kind"), registry=self.registry)
        self.swaps = Counter("softprompt_swaps", "Prompts that were replaced or removed", registry=self.registry)
        self.batch_rows = self._histogram("batch_rows", "Rows of a batch", ROWS)
        self.request_seconds = self._histogram("request_seconds", "Seconds of a request", SECONDS, "endpoint")
        self.first_token_seconds = self._histogram("time_to_first_token_seconds", "Seconds to the first text", SECONDS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"softprompt_{name}", text, labels, buckets=buckets, registry=self.registry)

    def render(self) -> bytes:
        """Returns all metrics as text."""
        return generate_latest(self.registry)
