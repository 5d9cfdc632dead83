"""What it costs to count: `begin` and `settle` of one call's metrics, and one scrape of the page. In this process, nothing else runs."""

from __future__ import annotations

import time

from accounts.principal import Principal
from providers.adapter import Target
from providers.price import Tokens
from providers.secrets import SecretText
from proxy.call import Admission, Outcome
from proxy.metrics import Metrics

TIMES = 100_000
ROUNDS = 5


def counting() -> dict[str, float]:
    """Microseconds of a call; the best of the rounds, since whatever else runs can only add."""
    metrics = Metrics()
    target = Target("openai", 1, "bench", "https://bench/v1", SecretText("x"), "m", "bench/m")
    principal = Principal(key_id=1, organization_id=1, user_id=1)
    admission = Admission("id", 0, principal, "chat/completions", "bench/m", False, 10, time.monotonic())
    outcome = Outcome(target=target, status=200, attempts=1, read_at=time.monotonic(), sent=time.monotonic())
    outcome.first_byte = outcome.heard = time.monotonic()
    tokens = Tokens(fresh_input=100, output=64)
    best = min(_round(metrics, admission, outcome, tokens) for _ in range(ROUNDS))
    return {"count_us": best * 1e6}


def _round(metrics: Metrics, admission: Admission, outcome: Outcome, tokens: Tokens) -> float:
    began = time.process_time()
    for _ in range(TIMES):
        metrics.begin(stream=False)
        outcome.sent = time.monotonic()  # the two stamps of the trip that are there for this alone
        outcome.heard = time.monotonic()
        metrics.settle(admission, outcome, tokens, 1000, "reported")
    return (time.process_time() - began) / TIMES
