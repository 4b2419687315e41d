"""Figures for Prometheus, in a registry of their own; no label holds what a client has written."""

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from halfbyte.serving.engine import Ask, Engine
from halfbyte.serving.http.refusal import Refusal

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Gauges:
    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self._answers = Counter("halfbyte_answers", "Requests answered whole", ["model"], registry=registry)
        self._refused = Counter("halfbyte_refused", "Requests refused or failed", ["status"], registry=registry)
        self._first = Histogram(
            "halfbyte_first_token_seconds", "From asking to the first token", registry=registry, buckets=_SECONDS
        )
        self._whole = Histogram(
            "halfbyte_answer_seconds", "From asking to the end", registry=registry, buckets=_SECONDS
        )
        for name, what, read in (
            ("running", "Texts being written", lambda: engine.running),
            ("waiting", "Texts that wait for a place", lambda: engine.waiting),
            ("places", "Most texts at once", lambda: engine.models.places),
            ("prompt_tokens_total", "Tokens of prompts read", lambda: engine.prompt_tokens),
            ("written_tokens_total", "Tokens written", lambda: engine.written_tokens),
            ("steps_total", "Steps of all texts together", lambda: engine.steps),
        ):
            Gauge(f"halfbyte_{name}", what, registry=registry).set_function(read)

    def first(self, ask: Ask) -> None:
        self._first.observe(time.monotonic() - ask.came)

    def whole(self, asks: Sequence[Ask]) -> None:
        self._answers.labels(asks[0].model.name).inc()
        self._whole.observe(time.monotonic() - asks[0].came)

    def refused(self, error: Refusal) -> None:
        self._refused.labels(str(error.status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
