"""F10 and F11 at a gateway that runs: how much is tried again, who is left out, also after a restart, and who comes back."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from proxy.stores.health import EJECT_AFTER, EXTRA_AT_LEAST
from tests.loops.pressure import Caller, press
from tests.project.raw_http import request
from tests.serving import Sluice, eventually
from tests.upstreams.kit import Step
from tests.upstreams.openai import OpenAIUpstream

EJECTION_SECONDS = 1.5
ACCOUNTS = 3


@pytest.fixture(scope="module")
def gateway(serve: Callable[..., Sluice]) -> Sluice:
    return serve(EJECTION_SECONDS=str(EJECTION_SECONDS))


@pytest.fixture
def ailing(gateway: Sluice) -> Iterator[OpenAIUpstream]:
    """An upstream with three accounts, in a pool of its own with the prefix `ailing`; all of them answer 503."""
    with OpenAIUpstream() as one:
        for number in range(ACCOUNTS):
            gateway.add_openai(one, label=f"ailing-{one.port}-{number}", prefix=f"ailing{one.port}", secret=f"sk-sim-503~{number}")
        gateway.wait_for(f"ailing{one.port}")
        one.reset()
        yield one
    gateway.python(
        "from providers import actions, models; [actions.disable(one) for one in models.Credential.objects.filter(state='active')]"
    )


def asking(prefix: str) -> dict[str, object]:
    return {"model": f"{prefix}/gpt-4o", "messages": [{"role": "user", "content": "hello"}]}


def left_out(gateway: Sluice) -> int:
    """How many accounts rest whole."""
    page = httpx.get(f"{gateway.url}/metrics", timeout=10).text
    return sum(int(count) for count in re.findall(r"^sluice_credentials_resting\{.*\} (\d+)$", page, re.MULTILINE))


def test_f10_of_two_hundred_calls_a_second_to_an_upstream_that_is_down_few_are_tried_again(gateway: Sluice, ailing: OpenAIUpstream) -> None:
    text = request(key=gateway.issue_key(), body=asking(f"ailing{ailing.port}")).decode()
    seen = press([Caller("all", gateway.port, text, rate=200)], 2)["all"]
    assert left_out(gateway) == ACCOUNTS // 2  # never more than half of a pool
    assert set(seen.statuses) == {503}
    calls = len({one.headers["x-request-id"] for one in ailing.posts})
    assert calls > 100
    extra = len(ailing.posts) - calls
    # A fifth of what came in a second, or three: for each account, also for the one that is left out. The second that was begun is in it.
    assert 0 < extra <= 0.2 * (calls + 200) + EXTRA_AT_LEAST * 3


def test_f11_who_fails_five_times_is_left_out_and_comes_back_when_it_is_well(
    gateway: Sluice, ailing: OpenAIUpstream, upstream: OpenAIUpstream
) -> None:
    prefix = f"mixed{ailing.port}"
    for one, secret in ((ailing, "sk-sim-503~bad"), (upstream, "sk-sim-ok")):
        gateway.add_openai(one, label=f"{prefix}-{secret}", prefix=prefix, secret=secret)
    gateway.wait_for(prefix)
    ailing.reset()
    statuses: list[int] = []
    with httpx.Client(base_url=gateway.url, headers={"authorization": f"Bearer {gateway.issue_key()}"}, timeout=20) as client:

        def call() -> int:
            """How often the ailing account has been called by now."""
            statuses.append(client.post("/v1/chat/completions", json=asking(prefix)).status_code)
            return len(ailing.posts)

        eventually(lambda: call() >= EJECT_AFTER, "it is not tried")
        assert set(statuses) <= {200, 503}  # in one second no more than three are tried again
        statuses.clear()
        for _ in range(6):
            call()
        assert len(ailing.posts) == EJECT_AFTER
        assert left_out(gateway) == 1
        ailing.script(*[Step()] * 1000)
        healed = time.monotonic()
        eventually(lambda: call() > EJECT_AFTER, "it does not come back")
        back = ailing.posts[EJECT_AFTER].at
        assert back - ailing.posts[EJECT_AFTER - 1].at >= EJECTION_SECONDS * 0.9
        assert back - healed <= EJECTION_SECONDS * 35 / 30 + 1  # a busy machine
        before = len(ailing.posts)
        for _ in range(4):
            call()
        assert len(ailing.posts) - before == 2
        assert set(statuses) == {200}
        assert left_out(gateway) == 0


REST = "from proxy.models import Rest; print(*Rest.objects.values_list('credential__label', 'reason', 'times'))"


def test_who_is_left_out_stays_out_after_a_restart_until_its_row_is_deleted(serve: Callable[..., Sluice], upstream: OpenAIUpstream) -> None:
    gateway = serve(EJECTION_SECONDS="300")
    with OpenAIUpstream() as ailing:
        for one, label, priority in ((ailing, "bad", 10), (upstream, "good", 0)):
            gateway.add_openai(one, label=label, prefix="kept", secret="sk-sim-503" if label == "bad" else "sk-sim-ok", priority=priority)
        gateway.wait_for("kept")
        ailing.reset()
        headers = {"authorization": f"Bearer {gateway.issue_key()}"}

        def call() -> int:
            """How often the ailing account has been called by now."""
            assert httpx.post(f"{gateway.url}/v1/chat/completions", headers=headers, json=asking("kept"), timeout=20).status_code in (
                200,
                503,
            )
            return len(ailing.posts)

        eventually(lambda: call() >= EJECT_AFTER, "it is not tried")
        gateway.stop()  # at once: nothing is lost of the last two seconds
        assert gateway.python(REST).strip() == "('bad', 'ejected', 1)"
        gateway.start_again()
        for _ in range(6):
            call()
        assert len(ailing.posts) == EJECT_AFTER
        assert left_out(gateway) == 1
        gateway.kill9()
        gateway.start_again()
        call()
        assert len(ailing.posts) == EJECT_AFTER

        gateway.python("from proxy.models import Rest; Rest.objects.all().delete()")
        eventually(lambda: call() > EJECT_AFTER, "it is not tried again")
        # And with it what was counted: one more failure puts nobody out.
        eventually(lambda: call() >= 2 * EJECT_AFTER, "it is out again before it has failed five times")
        eventually(lambda: gateway.python(REST).strip() == "('bad', 'ejected', 1)", "it is not out")
