"""One credential alone in its pool keeps serving its good models, whatever its others answer."""

import httpx
import pytest

BAD = [401, 402, 403, 404, 429, 500]


def ask(sluice, key: str, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}]}
    return httpx.post(f"{sluice.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}, timeout=10)


@pytest.mark.parametrize("bad", BAD)
def test_good_models_are_served_while_another_fails(sluice, upstream_server, upstream, bad):
    prefix = f"alone{bad}"
    sluice.add_openai(upstream_server, prefix=prefix, secret="sk-sim-ok")
    sluice.wait_for(prefix)
    key = sluice.issue_key()
    for _ in range(7):
        failed = ask(sluice, key, f"{prefix}/sim-{bad}")
        assert failed.status_code >= 400
        good = ask(sluice, key, f"{prefix}/gpt-4o-mini")
        assert good.status_code == 200, good.text


def test_good_models_are_served_while_all_the_bad_ones_fail_in_turn(sluice, upstream_server, upstream):
    sluice.add_openai(upstream_server, prefix="alone", secret="sk-sim-ok")
    sluice.wait_for("alone")
    key = sluice.issue_key()
    for _ in range(3):
        for bad in BAD:
            assert ask(sluice, key, f"alone/sim-{bad}").status_code >= 400
            assert ask(sluice, key, "alone/gpt-4o-mini").status_code == 200
