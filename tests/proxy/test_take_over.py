"""`manage.py import_config`: what it makes, that it makes nothing twice, and that it never shows a secret."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from django.conf import settings
from django.core.management import CommandError, call_command
from django.db import models as django_models

from accounts import actions as accounts
from accounts.models import ApiKey, AuditEntry, Membership, Organization, Role, User
from accounts.principal import digest
from project.keyring import Keyring
from providers import actions, registry, tokens
from providers.adapter import Adapter, OpenAICompatible
from providers.models import Credential, Price
from providers.oauth import SignIn, TokenSet
from proxy import snapshot
from proxy.models import Route
from tests.proxy.test_import_config import CONFIG, ENV, TOKEN

pytestmark = pytest.mark.django_db

OAUTH = {"client_id", "token_url"}
KINDS: dict[str, tuple[str, set[str]]] = {
    "codegpt": ("allowed", {"agent_id", "org_id"}),
    "kimi": ("allowed", {"user_agent"}),
    "codegeex": (
        "restricted", {"user_id", "user_role", "ide", "ide_version", "plugin_version", "machine_id", "talk_id", "locale"},
    ),
    "qwen": ("ended", {"auth", "device_code_url"} | OAUTH),
    "qwen_web": ("restricted", set()),
    "gemini_cli": ("restricted", {"project_id", "client_secret"} | OAUTH),
}  # fmt: skip


class Stub(OpenAICompatible):
    """A kind as far as an import sees it."""

    base_url = "https://vendor.example"
    policy_source = "https://vendor.example/terms"
    free = True
    signs_in: ClassVar[bool] = False

    def tokens_from(self, given: str) -> TokenSet | None:
        if not self.signs_in:
            return None
        said = json.loads(given)
        if "revoked" in said:
            raise ValueError("these tokens were revoked")
        return TokenSet(said["access_token"], said.get("refresh_token", "")) if "access_token" in said else None

    def sign_in(self, settings: Mapping[str, str]) -> SignIn | None:
        return SignIn(flow="device", token_url="https://vendor.example/token", client_id="sim") if self.signs_in else None

    def models_request(self, target: object) -> None:
        return None

    def listed(self) -> dict[str, Any]:
        return {"m": {}}


@pytest.fixture(autouse=True)
def kinds(know: Callable[[dict[str, Adapter]], None]) -> None:
    """The kinds that a file can name, each as a stub: what the real ones make of their tokens is not this test's business."""
    known: dict[str, Adapter] = {name: registry.adapter(name) for name in ("demo", "openai")}
    for name, (policy, words) in KINDS.items():
        signs_in = bool(OAUTH & words)
        known[name] = type(f"Stub{name}", (Stub,), {"name": name, "policy": policy, "settings": frozenset(words), "signs_in": signs_in})()
    know(known)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "seeds"


def run(file: Path, content: object, *arguments: str) -> list[str]:
    """The lines of the report. An exit other than 0 is its last line."""
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    out = io.StringIO()
    try:
        call_command("import_config", str(file), *arguments, stdout=out, stderr=out, no_color=True)
    except CommandError as problem:
        out.write(f"{problem}\n")
    assert TOKEN not in out.getvalue()
    return out.getvalue().splitlines()


def everything() -> dict[str, list[dict[str, Any]]]:
    """Every row of our own tables."""
    tables: tuple[type[django_models.Model], ...] = (
        Credential, ApiKey, Route, User, Organization, Membership, AuditEntry, Price, snapshot.SnapshotVersion,
    )  # fmt: skip
    return {table.__name__: list(table.objects.order_by("pk").values()) for table in tables}


# config.json


def test_a_config_becomes_credentials_with_their_secrets_settings_and_prefixes(file: Path):
    said = run(file, CONFIG, "--accept-policy")

    assert [line for line in said if line.startswith("refused")] == []
    assert sum(line.startswith("made: ") for line in said) == 6
    rows = {row.prefix: row for row in Credential.objects.all()}
    assert {prefix: row.kind for prefix, row in rows.items()} == {
        "geex": "codegeex", "codegeex": "codegeex", "web": "qwen_web", "portal": "qwen", "gemini_cli": "gemini_cli", "two": "gemini_cli",
    }  # fmt: skip
    assert rows["geex"].settings["user_role"] == "2"
    assert all(row.settings["proxy_url"] == "http://proxy.example.org:3128" for row in rows.values())
    assert rows["portal"].settings["auth"] == "oauth"
    assert actions.secret_of(rows["geex"]).reveal() == f"{TOKEN}-a"
    signed_in = tokens.access_of(rows["portal"])
    assert signed_in is not None, "a sign-in is kept as one, to be renewed"
    assert signed_in.secret.reveal() == f"{TOKEN}-d"
    assert all(row.organization is None and row.policy_accepted_at is not None for row in rows.values())
    assert not Route.objects.exists()
    assert f"made: codegeex[0]: credential {rows['geex'].pk} 'imported codegeex 1' of kind codegeex, models geex/…" in said


def test_without_an_acknowledgment_nothing_restricted_is_made(file: Path):
    said = run(file, CONFIG)

    assert not Credential.objects.exists()
    assert sum(line.startswith("refused: ") and "(--accept-policy)" in line for line in said) == 6
    assert "https://vendor.example/terms" in said[-2]
    assert said[-1].startswith("6 were refused")


def test_a_second_run_changes_nothing(file: Path):
    run(file, CONFIG, "--accept-policy")
    before = everything()

    said = run(file, CONFIG, "--accept-policy")

    assert everything() == before
    assert sum(line.startswith("unchanged: ") for line in said) == 6
    assert not any(line.startswith("made") for line in said)
    assert run(file, CONFIG)[-1] == said[-1]  # what was accepted once is not asked for again


def test_an_account_is_known_again_after_its_tokens_were_renewed_and_its_prefix_and_name_changed(file: Path):
    run(file, CONFIG, "--accept-policy")
    for prefix, secret in (("portal", '{"access_token": "another one"}'), ("geex", "another one")):
        row = Credential.objects.get(prefix=prefix)
        actions.change_credential(row, secret=secret, prefix="moved", label="Renamed")

    run(file, CONFIG, "--accept-policy")

    assert Credential.objects.count() == 6


def test_an_account_that_was_added_by_hand_is_known_by_its_secret(file: Path):
    by_hand = actions.add_credential("codegeex", "Mine", f"{TOKEN}-b", accept_policy=True)

    assert f"unchanged: codegeex[1]: credential {by_hand.pk} is it" in run(file, CONFIG, "--accept-policy")
    assert Credential.objects.filter(kind="codegeex").count() == 2


def test_an_account_is_known_again_after_the_pepper_was_changed(file: Path, monkeypatch: pytest.MonkeyPatch):
    entries = ["pepper:" + "a" * 32, "seal:" + "s" * 32]
    monkeypatch.setattr(settings, "KEYRING", Keyring("\n".join(entries), None))
    run(file, CONFIG, "--accept-policy")
    monkeypatch.setattr(settings, "KEYRING", Keyring("\n".join(["pepper:" + "b" * 32, *entries]), None))

    assert not any(line.startswith("made") for line in run(file, CONFIG, "--accept-policy"))


def test_one_that_cannot_be_made_does_not_keep_the_others_back(file: Path):
    config = {
        "codegeex": [{"token": TOKEN, "prefix": "a/b"}, {"token": f"{TOKEN}-b"}],
        "gemini_cli": [{"token": {"access_token": "x", "revoked": True}}],
    }
    said = run(file, config, "--accept-policy")

    assert Credential.objects.get().settings == {}
    assert any(line.startswith("refused: codegeex[0]: 'a/b' cannot be a prefix") for line in said)
    assert "refused: gemini_cli[0]: these tokens were revoked" in said
    assert said[-1].startswith("2 were refused")


@pytest.mark.parametrize("proxy", ["socks5://proxy.example.org", f"http://me:{TOKEN}@proxy.example.org", f"http://{TOKEN}@[x", "nonsense"])
def test_a_proxy_that_we_cannot_use_keeps_accounts_from_calling_without_it(file: Path, proxy: str):
    said = run(file, {"codegeex": [{"token": "abcdefghijkl"}], "proxy": proxy}, "--accept-policy")

    assert not Credential.objects.exists()
    assert any(line.startswith("refused: codegeex[0]: ") for line in said)


def test_a_kind_that_is_not_installed_is_said(file: Path, know: Callable[[dict[str, Adapter]], None]):
    know({})
    assert "refused: codegeex[0]: this Sluice has no kind 'codegeex'" in run(file, {"codegeex": [{"token": TOKEN}]})


def test_an_organization_of_ones_own(file: Path):
    said = run(file, {**CONFIG, "host": None}, "--accept-policy", "--organization", "acme")
    assert {row.organization.slug for row in Credential.objects.all()} == {"acme"}
    assert sum(line.startswith("made") for line in run(file, CONFIG, "--accept-policy")) == 6  # shared: another owner's
    assert sum(line.startswith("made") for line in said) == 6


# Env files


def test_an_env_file_becomes_credentials_a_key_and_the_catch_all(file: Path):
    said = run(file, ENV)

    rows = {row.kind: row for row in Credential.objects.all()}
    assert {kind: dict(row.settings) for kind, row in rows.items()} == {
        "codegpt": {"agent_id": "agent-1", "org_id": "org-1"},
        "openai": {"pass_through": True},
        "kimi": {"user_agent": "MyTool/1.0 (x)", "pass_through": True},
    }
    assert rows["kimi"].secret is None
    route = Route.objects.get()
    assert (route.name, route.organization) == ("*", None)
    assert [target.model for target in route.targets.all()] == ["codegpt/default", "openai/*"]
    key = ApiKey.objects.get()
    assert (key.is_imported, key.handle, key.name, key.expires_at) == (True, None, "VALID_API_KEY", None)
    assert (key.user.email, key.organization.slug) == ("admin@example.com", "default")
    assert said[-1] == "made: alias *: every name that nobody knows leads to codegpt/default, openai/*"
    assert AuditEntry.objects.filter(action="key.imported", organization=key.organization).count() == 1
    assert TOKEN not in str(everything())


def test_a_second_run_of_an_env_file_changes_nothing(file: Path):
    run(file, ENV)
    before = everything()

    said = run(file, ENV)

    assert everything() == before
    assert sum(line.startswith("unchanged: ") for line in said) == 5


def test_the_key_that_was_given_opens_the_gateway_and_no_other_does(file: Path):
    run(file, ENV)
    catalog = snapshot.load()
    pepper = catalog.peppers[0]

    assert catalog.principals[digest(pepper, f"{TOKEN}-valid")].models == ()
    assert digest(pepper, f"{TOKEN}-vali") not in catalog.principals
    assert snapshot.load_key([digest(pepper, f"{TOKEN}-valid")]) is not None


@pytest.mark.parametrize(("key", "weak"), [("1", True), ("secret", True), ("a" * 15, True), ("a" * 16, False)])
def test_a_weak_key_is_imported_with_a_loud_warning(file: Path, key: str, weak: bool):
    said = run(file, f"VALID_API_KEY={key}\n")

    row = ApiKey.objects.get()
    assert row.last_four == ("" if weak else "aaaa")
    assert row.hint == ("imported" if weak else "imported …aaaa")
    assert any(line.startswith(f"WARNING: VALID_API_KEY: THIS KEY IS WEAK: {len(key)} characters") for line in said) == weak
    assert AuditEntry.objects.get(action="key.imported").detail["weak"] == weak


@pytest.mark.parametrize("key", ["schlüssel-lang-genug", "x" * 513, '"a\tb"'])
def test_a_key_that_no_header_carries_is_refused(file: Path, key: str):
    said = run(file, f"VALID_API_KEY={key}\n")

    assert not ApiKey.objects.exists()
    assert any(line.startswith("refused: VALID_API_KEY: A key is one line") for line in said)


def test_a_revoked_key_stays_revoked(file: Path):
    run(file, ENV)
    accounts.revoke_key(ApiKey.objects.get())

    assert any(line.startswith("unchanged: VALID_API_KEY") and line.endswith("and it is revoked") for line in run(file, ENV))
    assert ApiKey.objects.get().revoked_at is not None


def test_whose_the_key_is(file: Path):
    olga = User.objects.create_superuser("olga@example.org", "x")
    run(file, ENV)
    assert ApiKey.objects.get().user == olga
    assert Membership.objects.get().role == Role.OWNER

    run(file, ENV.replace("-valid", "-other"), "--email", "Ada@Example.org", "--organization", "acme")
    other = ApiKey.objects.order_by("pk").last()
    assert other is not None
    assert (other.user.email, other.organization.slug) == ("ada@example.org", "acme")
    assert Route.objects.filter(organization=other.organization, name="*").count() == 1


def test_a_catch_all_that_is_there_is_never_changed(file: Path):
    from proxy.routes import Leads, create_route

    create_route(organization=None, name="*", targets=[Leads("demo/echo", 0)])
    said = run(file, ENV)

    assert [target.model for target in Route.objects.get().targets.all()] == ["demo/echo"]
    assert said[-1].startswith("note: alias *: it stays as it is and leads to demo/echo; this file would have it lead to codegpt/default")


@pytest.mark.parametrize(
    ("own", "given", "kept"),
    [
        ("https://vendor.example/coding/v1", "https://vendor.example/coding/v1/", ""),
        ("https://vendor.example", "https://vendor.example/coding/v1", ""),
        ("https://vendor.example", "http://10.0.0.1:9/coding/v1", "http://10.0.0.1:9"),
        ("https://vendor.example/coding/v1", "http://10.0.0.1:9/coding/v1", "http://10.0.0.1:9/coding/v1"),
        ("https://vendor.example/coding/v1", "http://10.0.0.1:9", "http://10.0.0.1:9/coding/v1"),
        ("https://vendor.example/coding/v1", "https://other.example/v1", "https://other.example/v1"),
    ],
)
def test_an_address_is_given_as_the_kind_takes_it(file: Path, monkeypatch: pytest.MonkeyPatch, own: str, given: str, kept: str):
    monkeypatch.setattr(type(registry.adapter("kimi")), "base_url", own)
    run(file, f"KIMI_API_BASE_URL={given}\n")
    assert Credential.objects.get().base_url == kept


@pytest.mark.parametrize(("content", "words"), [("x", "neither JSON nor an env file"), ("{", "not valid JSON"), ("FOO=1", "neither")])
def test_a_file_that_is_neither_fails_in_one_line(file: Path, content: str, words: str):
    [line] = run(file, content)
    assert words in line
    assert not Credential.objects.exists()


def test_a_file_that_cannot_be_read_fails_in_one_line(file: Path, tmp_path: Path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(CommandError, match=str(tmp_path)):
            call_command("import_config", str(path))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CommandError, match="UTF-8"):
        call_command("import_config", str(file))
    file.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(CommandError, match="larger"):
        call_command("import_config", str(file))
