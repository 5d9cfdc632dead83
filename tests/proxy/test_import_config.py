"""What the forerunners' files say, as a plan: every field has its place or its line, and no secret is ever shown."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.import_config import VARIABLES, Account, Plan, read

TOKEN = "tok-0123456789-secret"
CONFIG: dict[str, Any] = {
    "host": "0.0.0.0",
    "port": 8080,
    "proxy": "http://proxy.example.org:3128",
    "codegeex": [
        {
            "token": f"{TOKEN}-a", "prefix": "geex", "user_id": "u1", "user_role": 2, "ide": "VSCode", "ide_version": "1.90",
            "plugin_version": "2.1", "machine_id": "m1", "talk_id": "t1", "locale": "en",
        },
        {"token": f"{TOKEN}-b"},
    ],
    "qwen": [{"token": f"{TOKEN}-c", "prefix": "web"}],
    "qwen_code": [
        {
            "prefix": "portal",
            "token": {
                "access_token": f"{TOKEN}-d", "refresh_token": f"{TOKEN}-e", "token_type": "Bearer", "expires_in": 21600,
                "resource_url": "portal.qwen.ai", "expiry": "2026-01-01T00:00:00Z",
            },
        }
    ],
    "gemini_cli": [
        {"project_id": "p-1", "token": {"access_token": f"{TOKEN}-f", "refresh_token": f"{TOKEN}-g", "token_type": "Bearer",
                                        "expiry": "2026-01-01T00:00:00Z"}},
        {"prefix": "two", "project_id": "", "token": {"access_token": f"{TOKEN}-h", "refresh_token": f"{TOKEN}-i"}},
    ],
    "dangbei": [{"token": f"{TOKEN}-j"}],
}  # fmt: skip


def planned(config: object, **options: Any) -> Plan:
    return read(json.dumps(config), **options)


def account(plan: Plan, where: str) -> Account:
    return next(one for one in plan.accounts if one.where == where)


def lines(plan: Plan) -> list[str]:
    return [str(remark) for remark in plan.remarks]


# config.json


def test_every_account_of_a_config_has_its_kind_prefix_and_settings():
    plan = planned(CONFIG)

    proxied = {"proxy_url": "http://proxy.example.org:3128"}
    assert [(one.where, one.kind, one.prefix) for one in plan.accounts] == [
        ("codegeex[0]", "codegeex", "geex"),
        ("codegeex[1]", "codegeex", "codegeex"),
        ("qwen[0]", "qwen_web", "web"),
        ("qwen_code[0]", "qwen", "portal"),
        ("gemini_cli[0]", "gemini_cli", "gemini_cli"),
        ("gemini_cli[1]", "gemini_cli", "two"),
    ]
    assert account(plan, "codegeex[0]").settings == proxied | {
        "user_id": "u1", "user_role": "2", "ide": "VSCode", "ide_version": "1.90", "plugin_version": "2.1", "machine_id": "m1",
        "talk_id": "t1", "locale": "en",
    }  # fmt: skip
    assert account(plan, "codegeex[0]").secret.reveal() == f"{TOKEN}-a"
    assert account(plan, "qwen[0]").settings == proxied
    assert account(plan, "qwen_code[0]").settings == proxied | {"auth": "oauth"}
    assert account(plan, "gemini_cli[0]").settings == proxied | {"project_id": "p-1"}
    assert account(plan, "gemini_cli[1]").settings == proxied
    assert len({one.label for one in plan.accounts}) == 6


def test_without_a_prefix_models_keep_the_names_that_clients_know():
    """That proxy's ids are `<list>/<model>`, and its list `qwen_code` is our kind `qwen`."""
    plan = planned({"qwen_code": [{"token": {"access_token": "a", "refresh_token": "r"}}], "qwen": [{"token": TOKEN, "prefix": ""}]})

    assert [(one.kind, one.prefix) for one in plan.accounts] == [("qwen", "qwen_code"), ("qwen_web", "qwen")]


def test_tokens_are_handed_over_whole():
    plan = planned(CONFIG)

    assert json.loads(account(plan, "qwen_code[0]").secret.reveal()) == CONFIG["qwen_code"][0]["token"]
    assert account(plan, "qwen_code[0]").tokens
    assert account(plan, "qwen_code[0]").mark.reveal() == f"{TOKEN}-e"
    assert not account(plan, "codegeex[0]").tokens


@pytest.mark.parametrize(
    ("token", "expiry"),
    [
        ({"expires_in": 3600}, "2026-01-01T01:00:00Z"),
        ({"expires_in": 3600, "expiry": "0001-01-01T00:00:00Z"}, "2026-01-01T01:00:00Z"),
        ({"expires_in": 3600, "expiry": "2026-05-05T00:00:00Z"}, "2026-05-05T00:00:00Z"),
        ({"expiry": "0001-01-01T00:00:00Z"}, None),
        ({"expires_in": "soon"}, None),
        ({"expires_in": -1}, None),
        ({}, None),
    ],
)
def test_a_token_without_a_date_counts_from_the_files_own_time(token: dict[str, Any], expiry: str | None):
    entry = {"token": {"access_token": "a", "refresh_token": "r", **token}}
    plan = planned({"gemini_cli": [entry]}, written_at=1_767_225_600.0)

    assert json.loads(plan.accounts[0].secret.reveal()).get("expiry") == expiry


def test_what_has_no_counterpart_is_said_line_by_line():
    config = {**CONFIG, "debug": True, f"{TOKEN}-z": 1}
    config["codegeex"] = [{"token": TOKEN, "colour": "red", "ide": ["a"]}, "x", {}, {"token": ["x"]}]
    config["qwen_code"] = [{"token": TOKEN}, {"token": {"token_type": "Bearer"}}]
    config["qwen"] = []

    said = lines(planned(config))

    for line in (
        "ignored: host: Sluice listens where HOST and PORT say, or `serve --host --port`",
        "note: proxy: set on every account of this file",
        "ignored: dangbei: Sluice has no such kind",
        "ignored: debug: Sluice knows nothing of this name",
        "ignored: (a name that is not shown): Sluice knows nothing of this name",
        "ignored: codegeex[0].colour: the kind codegeex has no setting of this name",
        "ignored: codegeex[0].ide: a setting is one value, and this is not",
        "refused: codegeex[1]: it is not an object with a token",
        "refused: codegeex[2].token: there is none",
        "refused: codegeex[3].token: it is not a line of text",
        "refused: qwen_code[0].token: it is not an object with access_token and refresh_token",
        "refused: qwen_code[1].token: it has neither access_token nor refresh_token",
        "ignored: qwen: it is empty",
    ):
        assert line in said
    assert [one.where for one in planned(config).accounts] == ["codegeex[0]", "gemini_cli[0]", "gemini_cli[1]"]


def test_no_secret_stands_in_a_plan_that_is_printed():
    plan = planned({**CONFIG, "proxy": f"http://me:{TOKEN}@proxy.example.org"})

    assert TOKEN not in repr(plan)
    assert TOKEN not in str(lines(plan))
    assert {f"{TOKEN}-{letter}" for letter in "abcdefghi"} < plan.secrets
    assert TOKEN not in repr(read(f"VALID_API_KEY={TOKEN}\nCODEGPT_API_KEY={TOKEN}\nCODEGPT_AGENT_ID=a"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"codegeex": [}', "line 1, column 15"),
        ("{" * 100_000, "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "none of the lists"),
        ('{"host": "x"}', "none of the lists"),
        ('{"qwen": [], "proxy": ["x"]}', "'proxy' is no address"),
        ("", "neither JSON nor an env file"),
        ("FOO=bar", "neither JSON nor an env file"),
        ("OPENAI_API_KEY=\n", "neither JSON nor an env file"),
        ("\0", "no text file"),
    ],
)
def test_a_file_that_is_neither_is_refused_in_words(text: str, words: str):
    with pytest.raises(ValueError, match=words):
        read(text)


def test_bad_json_is_not_quoted():
    with pytest.raises(ValueError) as refused:
        read(f'{{"codegeex": [{{"token": "{TOKEN}\n')
    assert TOKEN not in str(refused.value)


NAMES = st.sampled_from(["token", "prefix", "ide", "access_token", "refresh_token", "expires_in", "expiry", "x"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=15,
)


@given(ANYTHING)
def test_whatever_stands_in_a_list_is_planned_or_said(value: object):
    plan = planned({"codegeex": value, "gemini_cli": value}, written_at=1.0)

    assert len(plan.accounts) + len(plan.remarks) > 0
    assert all(one.secret for one in plan.accounts)


# Env files

ENV = f"""\
# of the proxies
export CODEGPT_API_KEY="{TOKEN}-cg"   # the key
CODEGPT_AGENT_ID='agent-1'
CODEGPT_ORG_ID=org-1
VALID_API_KEY={TOKEN}-valid
KIMI_API_BASE_URL = https://api.kimi.com/coding/v1
USER_AGENT=MyTool/1.0 (x) # ours
OPENAI_API_KEY={TOKEN}-oa
PORT=8000
"""


def test_an_env_file_with_all_variables():
    plan = read("\N{ZERO WIDTH NO-BREAK SPACE}" + ENV.replace("\n", "\r\n"))

    codegpt, openai, kimi = plan.accounts
    assert (codegpt.kind, codegpt.settings, codegpt.secret.reveal()) == (
        "codegpt", {"agent_id": "agent-1", "org_id": "org-1"}, f"{TOKEN}-cg",
    )  # fmt: skip
    assert (openai.kind, openai.settings, openai.secret.reveal()) == ("openai", {"pass_through": "true"}, f"{TOKEN}-oa")
    assert (kimi.kind, kimi.base_url, kimi.secret.reveal()) == ("kimi", "https://api.kimi.com/coding/v1", "")
    assert kimi.settings == {"user_agent": "MyTool/1.0 (x)", "pass_through": "true"}
    assert [key.secret.reveal() for key in plan.keys] == [f"{TOKEN}-valid"]
    assert [one.catch_all for one in plan.accounts] == ["default", "*", ""]
    said = lines(plan)
    assert "ignored: PORT: none of the proxies that we know reads it" in said
    assert any(line.startswith("note: KIMI_API_BASE_URL: that proxy passed on its clients' own keys") for line in said)


def test_a_callers_own_key_never_comes_to_kimi_because_of_the_catch_all():
    assert [one.catch_all for one in read("KIMI_API_BASE_URL=https://k.example\n").accounts] == ["kimi-for-coding"]
    both = read("KIMI_API_BASE_URL=https://k.example\nOPENAI_API_KEY=x\n")
    assert {one.kind: one.catch_all for one in both.accounts} == {"openai": "*", "kimi": ""}
    own = read("KIMI_API_KEY=sk-kimi\nOPENAI_API_KEY=x\n")
    assert {one.kind: (one.catch_all, dict(one.settings)) for one in own.accounts}["kimi"] == ("kimi-for-coding", {})


def test_an_address_with_the_whole_path_of_the_call():
    [codegpt] = read("CODEGPT_API_KEY=k\nCODEGPT_AGENT_ID=a\nCODEGPT_API_URL=https://cg.example/api/v1/chat/completions\n").accounts
    assert (codegpt.base_url, codegpt.own_path) == ("https://cg.example/api/v1", "/api/v1")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("CODEGPT_API_KEY=k", "refused: CODEGPT_API_KEY: a CodeGPT account also needs CODEGPT_AGENT_ID"),
        ("CODEGPT_AGENT_ID=k\nCODEGPT_ORG_ID=o", "refused: CODEGPT_AGENT_ID, CODEGPT_ORG_ID: a CodeGPT account also needs CODEGPT_API_KEY"),
        ("USER_AGENT=x", "ignored: USER_AGENT: it is Kimi's, and there is no KIMI_API_BASE_URL beside it"),
        ("OPENAI_BASE_URL=http://x", "ignored: OPENAI_BASE_URL: there is no OPENAI_API_KEY beside it"),
        ("OPENAI_API_KEY=x\nVALID_API_KEY=", "ignored: VALID_API_KEY: it is empty"),
        ("OPENAI_API_KEY=x\nOPENAI_API_KEY=y", "note: OPENAI_API_KEY: it stands there twice: line 2 counts"),
        (f"OPENAI_API_KEY=x\n{TOKEN}", "ignored: line 2: it does not read NAME=value"),
        ("OPENAI_API_KEY=x\nc2VjcmV0==", "ignored: line 2: none of the proxies that we know reads it"),
        ("KIMI_API_BASE_URL=https://k.example\nUSER_AGENT=KimiCLI/0.2.0", "note: USER_AGENT: it names a client of the vendor's own"),
    ],
)
def test_what_an_env_file_lacks_is_said(text: str, line: str):
    said = lines(read(text))
    assert any(one.startswith(line) for one in said), said
    assert TOKEN not in str(said)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("plain", "plain"),
        ("'single # kept'", "single # kept"),
        ('"double"', "double"),
        ('"with \\" in it"', 'with " in it'),
        ("a#b", "a#b"),
        ("a #b", "a"),
        ("a=b==", "a=b=="),
        ('"half', '"half'),
    ],
)
def test_values_read_as_a_shell_would(written: str, value: str):
    [key] = read(f"VALID_API_KEY={written}\n").keys
    assert key.secret.reveal() == value


def test_every_variable_of_the_seeds_is_known():
    seeds = {"CODEGPT_API_KEY", "CODEGPT_AGENT_ID", "CODEGPT_ORG_ID", "VALID_API_KEY", "KIMI_API_BASE_URL", "USER_AGENT", "OPENAI_API_KEY"}
    assert seeds < VARIABLES
