"""Sign-ins are kept and renewed: once for all who want it, never at the cost of a token that works (promises, section 8)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.conf import settings
from django.core import mail
from django.core.exceptions import ValidationError
from django.db import OperationalError, connection, transaction
from django.utils import timezone

from accounts.models import AuditEntry, User
from providers import actions, asking, registry, sweeps, tokens
from providers.models import Credential, OAuthToken, State
from providers.oauth import GrantDead, OAuthFailed, TryAgainLater, WrongSettings
from providers.secrets import SealBroken, seal
from proxy import snapshot
from tests.upstreams.kit import PAGE, Step
from tests.upstreams.oauth_server import OAuthUpstream
from tests.upstreams.passport import file_of

pytestmark = pytest.mark.django_db

Account = Callable[..., Credential]


def row_of(credential: Credential) -> OAuthToken:
    return OAuthToken.objects.select_related("credential").get(pk=credential.pk)


def refresh_of(credential: Credential) -> str:
    row = row_of(credential)
    return tokens._opened(row, "refresh", tokens._origin(row, "refresh")).reveal()


def renewed(credential: Credential, **how: Any) -> int:
    """The generation after a renewal."""
    return tokens.renew(credential.pk, row_of(credential).generation, **how).lease.generation


def state_of(credential: Credential) -> str:
    return Credential.objects.get(pk=credential.pk).state


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SHORTEST_BACK_OFF_SECONDS", 0.0)


# What is kept


def test_a_tools_own_file_is_signed_in_with_and_its_facts_stand_below_the_settings(account: Account, vendor: OAuthUpstream):
    mine = account(ended_seconds=-3600)

    [upstream] = snapshot.load().upstreams
    assert upstream.secret.reveal().startswith("sk-sim-ok~access-")
    assert upstream.lease is not None
    assert not upstream.lease.has_ended()
    assert upstream.settings["region"] == "eu"
    assert mine.secret is None

    actions.change_credential(mine, settings={**mine.settings, "region": "us"})
    assert snapshot.load().upstreams[0].settings["region"] == "us"
    assert actions.target_of(Credential.objects.get()).settings["region"] == "us"


@pytest.mark.parametrize("given", ["{broken", "{}"])
def test_a_file_that_is_none_is_refused_in_words(vendor: OAuthUpstream, given: str):
    with pytest.raises(ValidationError, match="credential file"):
        actions.add_credential("passport", "x", given, settings=vendor.settings())
    assert not Credential.objects.exists()


def test_a_plain_secret_goes_before_a_sign_in_and_a_sign_in_takes_its_place(account: Account, vendor: OAuthUpstream):
    mine = account()
    actions.change_credential(mine, secret="plain-secret")
    assert tokens.access_of(mine) is None
    assert snapshot.load().upstreams[0].secret.reveal() == "plain-secret"
    assert sweeps.renew_due() == 0

    actions.change_credential(mine, secret=file_of(vendor.log_in()))
    assert row_of(mine).generation == 2
    assert snapshot.load().upstreams[0].secret.reveal().startswith("sk-sim-ok~")


def test_no_token_is_kept_in_the_clear_and_none_opens_elsewhere(account: Account, vendor: OAuthUpstream):
    mine, other = account("Mine"), account("Other")
    row = row_of(mine)
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM providers_oauthtoken")
        kept = repr([[bytes(value) if isinstance(value, memoryview) else value for value in line] for line in cursor.fetchall()])
    assert "sk-sim" not in kept
    assert "refresh-sim" not in kept
    for moved in (
        {"pk": other.pk, "access": row.access},  # another account's
        {"pk": mine.pk, "access": row.refresh},  # another column's
        {"pk": mine.pk, "generation": row.generation + 1},  # another generation's
    ):
        with transaction.atomic():
            OAuthToken.objects.filter(pk=moved.pop("pk")).update(**moved)
            with pytest.raises(SealBroken):
                [tokens.access_in(one) for one in tokens.in_use()]
            transaction.set_rollback(True)


def test_a_sign_in_does_not_follow_its_account_to_another_address(account: Account, vendor: OAuthUpstream):
    mine = account()
    notes = actions.change_credential(mine, base_url="http://127.0.0.1:9/v1")
    assert "sign it in again" in notes[0]
    assert state_of(mine) == State.NEEDS_REAUTH
    with pytest.raises(ValidationError, match="signed in again"):
        actions.enable(mine)

    actions.sign_in(mine, registry.adapter("passport").tokens_from(file_of(vendor.log_in())))
    assert state_of(mine) == State.ACTIVE


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("switched_off", [False, True])
def test_no_renewal_brings_a_sign_in_along_to_another_address(account: Account, vendor: OAuthUpstream, switched_off: bool, by_hand: bool):
    mine = account(ended_seconds=-3600)
    if switched_off:
        actions.disable(mine)
    actions.change_credential(mine, base_url="http://127.0.0.1:9/v1")
    if switched_off:
        actions.enable(mine)
    sweeps.renew_due()
    with pytest.raises(OAuthFailed):
        renewed(mine, by_hand=by_hand)
    assert vendor.log == []
    assert state_of(mine) == State.NEEDS_REAUTH
    with pytest.raises(SealBroken):
        tokens.access_in(row_of(mine))

    actions.sign_in(mine, registry.adapter("passport").tokens_from(file_of(vendor.log_in())))
    assert (state_of(mine), renewed(mine)) == (State.ACTIVE, 3)


def test_a_refresh_token_is_sent_to_no_other_token_server(account: Account, vendor: OAuthUpstream):
    mine = account()
    with OAuthUpstream() as evil:
        actions.change_credential(mine, settings={**mine.settings, "token_url": evil.token_url})
        with pytest.raises(WrongSettings):
            renewed(mine)
        assert evil.log == []
    assert row_of(mine).last_error == "sealed_elsewhere"
    actions.change_credential(mine, settings=vendor.settings())
    assert renewed(mine, by_hand=True) == 2


def test_a_file_may_come_before_the_settings_that_renew_it(vendor: OAuthUpstream):
    mine = actions.add_credential(
        "passport", "x", file_of(vendor.log_in()), base_url=vendor.base_url, settings={"token_url": vendor.token_url}
    )
    with pytest.raises(WrongSettings, match="client_id"):
        renewed(mine)
    assert row_of(mine).last_error == "not_configured"
    actions.change_credential(mine, settings=vendor.settings())
    assert renewed(mine, by_hand=True) == 2


def test_a_new_keyring_entry_seals_tokens_again(account: Account, vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch):
    mine = account()
    renewed(mine)
    refresh = refresh_of(mine)
    old = settings.KEYRING.keys("seal")

    class Rotated:
        def keys(self, purpose: str) -> dict[str, bytes]:
            return {"deadbeef": b"n" * 32, **old} if purpose == "seal" else old

    monkeypatch.setattr(settings, "KEYRING", Rotated())
    *_, last = actions.reseal_all()
    assert (last.left, last.broken) == (0, 0)
    row = row_of(mine)
    assert all(bytes(getattr(row, column))[1:9] == b"deadbeef" for column in tokens.SEALED)
    assert refresh_of(mine) == refresh


# Renewing


def test_a_renewal_makes_the_next_generation_and_keeps_the_token_before(account: Account, vendor: OAuthUpstream):
    mine = account()
    before, seen = refresh_of(mine), snapshot.version()

    access = tokens.renew(mine.pk, 1)

    row = row_of(mine)
    assert (row.generation, row.attempted_at, row.failures, row.last_error) == (2, None, 0, "")
    assert access.secret.reveal() == snapshot.load().upstreams[0].secret.reveal()
    assert refresh_of(mine) != before
    assert vendor.is_current(refresh_of(mine))
    assert tokens._opened(row, "previous_refresh", tokens._origin(row, "refresh")).reveal() == before
    assert timedelta(minutes=59) < row.expires_at - timezone.now() <= timedelta(hours=1)
    assert timedelta(minutes=5) < row.expires_at - row.next_refresh_at < timedelta(minutes=7)
    assert snapshot.version() > seen


@pytest.mark.parametrize(("life", "least", "most"), [(60, 29, 31), (600, 53, 67), (86400, 7700, 9600)])
def test_it_is_due_a_minute_or_a_tenth_of_its_life_before_its_end_but_never_before_half_of_it(
    account: Account, vendor: OAuthUpstream, life: float, least: float, most: float
):
    vendor.life_seconds = life
    mine = account()
    renewed(mine)
    row = row_of(mine)
    assert least < (row.expires_at - row.next_refresh_at).total_seconds() < most


def test_who_comes_with_an_old_generation_gets_the_newer_one_and_nobody_is_called(account: Account, vendor: OAuthUpstream):
    mine = account()
    tokens.renew(mine.pk, 1)
    assert tokens.renew(mine.pk, 1).lease.generation == 2
    assert vendor.counts.refreshes == 1


def test_a_vendor_that_gives_no_new_refresh_token_or_fact_keeps_the_old_ones(account: Account, vendor: OAuthUpstream):
    mine = account()
    before = refresh_of(mine)
    vendor.rotate, vendor.facts = False, {}
    renewed(mine)
    assert refresh_of(mine) == before
    assert row_of(mine).previous_refresh is None
    assert row_of(mine).facts == {"region": "eu"}
    assert renewed(mine) == 3


def test_a_vendor_that_does_not_say_how_long_is_asked_when_a_token_is_refused(account: Account, vendor: OAuthUpstream):
    vendor.life_seconds = None
    mine = account()
    lease = tokens.renew(mine.pk, 1).lease
    assert lease.expires is None
    assert not lease.has_ended()
    assert row_of(mine).next_refresh_at is None


# O05: what a token server may say


def test_the_tokens_of_a_sign_in_count_as_a_secret_where_callers_may_bring_their_own(vendor: OAuthUpstream):
    settings = vendor.settings() | {"pass_through": True}
    refresh_alone = json.dumps({"refresh_token": vendor.log_in()["refresh_token"]})
    made = {}
    for label, secret in (("tokens", refresh_alone), ("nothing", "")):
        made[label] = actions.add_credential("passport", label, secret, base_url=vendor.base_url, settings=settings)
        assert made[label].state == State.ACTIVE
    needed = {one.label: one.callers_key_only for one in snapshot.load().upstreams}
    assert needed == {"tokens": False, "nothing": True}


def said(status: int, body: bytes = b"", **headers: str) -> Step:
    return Step(status=status, body=body, headers=list(headers.items()))


KEPT = [
    (said(500, b"oops"), "http_500", True),
    (said(503, PAGE), "http_503", True),
    (said(429, b"{}"), "rate_limited", False),
    (said(400, PAGE), "http_400", False),  # something in front of the vendor speaks, not the vendor
    (said(403, b"{}"), "http_403", False),
    (said(404, b""), "http_404", False),
    (said(302, b"", location="http://127.0.0.1:9/"), "http_302", False),
    (said(200, PAGE), "unreadable", True),
    (said(200, b"[]"), "unreadable", True),
    (said(200, b"{}"), "unreadable", True),
    (said(200, b'{"access_token": "two\\nlines"}'), "unreadable", True),
    (said(200, b'{"error": "temporarily_unavailable"}'), "temporarily_unavailable", False),
    (said(200, b"x" * (2 << 20)), "broken_off", True),
    (Step(scenario="reset"), "broken_off", True),
    (Step(scenario="close"), "broken_off", True),
    (Step(scenario="garbage"), "broken_off", True),
    (Step(scenario="cl_mismatch"), "broken_off", True),
    (Step(scenario="slow_headers"), "timeout", True),
    (said(401, b'{"error": "invalid_client"}'), "invalid_client", False),
    (said(400, b'{"error": "unauthorized_client"}'), "unauthorized_client", False),
    (said(400, b'{"error": "invalid_request"}'), "invalid_request", False),
    (said(400, b'{"error": "quota_exceeded"}'), "quota_exceeded", False),
]


@pytest.mark.parametrize(("step", "code", "unsure"), KEPT, ids=[f"{one[1]}-{number}" for number, one in enumerate(KEPT)])
def test_o05_what_is_not_said_of_the_token_leaves_it_and_waits(
    account: Account, vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch, step: Step, code: str, unsure: bool
):
    monkeypatch.setattr(asking, "TOTAL_SECONDS", 0.3 if code == "timeout" else 15.0)
    mine = account()
    sealed = bytes(row_of(mine).refresh)
    vendor.token_script(step)

    with pytest.raises(OAuthFailed) as failure:
        renewed(mine)

    row = row_of(mine)
    assert not isinstance(failure.value, GrantDead)
    assert (failure.value.code, row.last_error, row.generation, row.failures) == (code, code, 1, 1)
    assert bytes(row.refresh) == sealed
    assert (row.attempted_at is not None) == unsure
    assert state_of(mine) == State.ACTIVE
    assert 0 < (row.next_refresh_at - timezone.now()).total_seconds() <= 66
    asked = len(vendor.log)
    with pytest.raises(OAuthFailed):
        renewed(mine)
    assert len(vendor.log) == asked, "the pause is kept"


DEAD = [
    (said(400, b'{"error": "invalid_grant"}'), "invalid_grant"),
    (said(401, b'{"error": "invalid_grant"}'), "invalid_grant"),
    (said(200, b'{"error": "invalid_grant"}'), "invalid_grant"),
    (said(400, b'{"error": "refresh_token_reused"}'), "refresh_token_reused"),
    (said(400, b'{"error": "refresh_token_expired"}'), "refresh_token_expired"),
    (said(401, b'{"error": "unauthorized"}'), "unauthorized"),
    (said(400, b"{}"), "http_400"),
    (said(401, b""), "http_401"),
]


@pytest.mark.parametrize(("step", "code"), DEAD, ids=[f"{one[1]}-{number}" for number, one in enumerate(DEAD)])
def test_o05_a_grant_that_is_dead_takes_the_account_out_and_deletes_nothing(
    account: Account,
    vendor: OAuthUpstream,
    caplog: pytest.LogCaptureFixture,
    step: Step,
    code: str,
    django_capture_on_commit_callbacks: Any,
):
    User.objects.create_superuser("olga@example.org", "x")
    mine = account()
    sealed = bytes(row_of(mine).refresh)
    vendor.token_script(step)

    with pytest.raises(GrantDead), django_capture_on_commit_callbacks(execute=True):
        renewed(mine)

    row = row_of(mine)
    assert (row.last_error, row.generation, row.next_refresh_at) == (code, 1, None)
    assert bytes(row.refresh) == sealed
    assert state_of(mine) == State.NEEDS_REAUTH
    assert snapshot.load().upstreams == ()
    assert [one.label for one in snapshot.load().signed_out] == ["Mine"]
    [told] = [record for record in caplog.records if "signed in again" in record.message]
    link = f"{settings.PUBLIC_URL}/admin/providers/credential/{mine.pk}/sign-in"
    assert link in told.message
    for thread in threading.enumerate():
        if thread.name == "sluice-mail":
            thread.join(5)
    assert [one.to for one in mail.outbox] == [["olga@example.org"]]
    assert link in mail.outbox[0].body
    assert AuditEntry.objects.get(action="credential.signed_out").detail == {"reason": code}
    asked = len(vendor.log)
    with pytest.raises(GrantDead):
        renewed(mine)
    assert len(vendor.log) == asked, "a dead grant is not asked about again"


def test_o05_pauses_double_up_to_a_minute_and_a_success_forgets_them(account: Account, vendor: OAuthUpstream):
    mine = account()
    pauses = []
    for _ in range(8):
        vendor.token_script(said(503))
        with pytest.raises(TryAgainLater):
            renewed(mine, by_hand=True)
        pauses.append((row_of(mine).next_refresh_at - timezone.now()).total_seconds())
    for expected, pause in zip([1, 2, 4, 8, 16, 32, 60, 60], pauses, strict=True):
        assert 0.8 * expected < pause < 1.1 * expected + 0.1
    renewed(mine, by_hand=True)
    assert (row_of(mine).failures, row_of(mine).last_error) == (0, "")


def test_o05_a_vendor_may_ask_for_a_longer_pause_of_at_most_a_minute(account: Account, vendor: OAuthUpstream):
    mine = account()
    for asked, least, most in (("20", 17, 23), ("86400", 53, 66)):
        vendor.token_script(said(429, b"{}", **{"retry-after": asked}))
        with pytest.raises(TryAgainLater):
            renewed(mine, by_hand=True)
        assert least < (row_of(mine).next_refresh_at - timezone.now()).total_seconds() < most


def test_a_refusal_after_a_lost_answer_is_told_as_that(account: Account, vendor: OAuthUpstream, no_pause: None):
    mine = account()
    vendor.token_script(Step(scenario="close"))  # it has rotated, and the answer is lost
    with pytest.raises(TryAgainLater):
        renewed(mine)
    assert vendor.counts.refreshes == 1
    with pytest.raises(GrantDead):
        renewed(mine)
    assert row_of(mine).last_error == "lost_reply"
    assert state_of(mine) == State.NEEDS_REAUTH


def test_a_vendor_that_forgot_its_last_answer_is_asked_once_with_the_token_before(account: Account, vendor: OAuthUpstream):
    mine = account()
    renewed(mine)
    vendor.lost_last_rotation = True
    assert renewed(mine) == 3
    assert vendor.counts.reused == 0
    vendor.lost_last_rotation = False
    assert renewed(mine) == 4


def test_a_sign_in_without_a_refresh_token_is_noticed_when_it_ends(vendor: OAuthUpstream):
    given = vendor.log_in()
    del given["refresh_token"]
    mine = actions.add_credential("passport", "x", file_of(given, 1), base_url=vendor.base_url, settings=vendor.settings())
    assert sweeps.renew_due() == 1
    assert row_of(mine).last_error == "no_refresh_token"
    assert state_of(mine) == State.NEEDS_REAUTH
    assert vendor.log == []


def test_an_account_that_waits_for_a_person_comes_back_by_a_renewal_by_hand(account: Account, vendor: OAuthUpstream):
    mine = account()
    vendor.token_script(said(401, b"{}"))
    with pytest.raises(GrantDead):
        renewed(mine)
    assert renewed(mine, by_hand=True) == 2
    assert state_of(mine) == State.ACTIVE


# O03: losers


def interloper(mine: Credential, vendor: OAuthUpstream, answer: str) -> Callable[..., Any]:
    """Instead of the vendor's answer: somebody past all locks signs the account in, and then this is answered."""
    asked = asking.ask

    def ask(*given: Any) -> Any:
        asking.ask = asked
        row = row_of(mine)
        after = OAuthToken(credential=row.credential, generation=row.generation + 1)
        parts = {"access": tokens._sealed(after, "access", "winner"), "refresh": tokens._sealed(after, "refresh", "winner-refresh")}
        OAuthToken.objects.filter(pk=mine.pk).update(generation=after.generation, last_error="", **parts)
        if answer == "dead":
            raise GrantDead("invalid_grant", "no")
        if answer == "later":
            raise TryAgainLater("timeout", "late")
        return asked(*given)

    return ask


@pytest.mark.parametrize("answer", ["dead", "later", "tokens"])
def test_o03_a_loser_never_clears_whatever_it_was_told(
    account: Account, vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch, answer: str
):
    mine = account()
    for race in range(10):
        generation = row_of(mine).generation
        monkeypatch.setattr(asking, "ask", interloper(mine, vendor, answer))
        OAuthToken.objects.filter(pk=mine.pk).update(failures=0)
        if answer == "tokens":
            given = vendor.log_in()["refresh_token"]
            row = row_of(mine)
            OAuthToken.objects.filter(pk=mine.pk).update(refresh=tokens._sealed(row, "refresh", given))
        assert tokens.renew(mine.pk, generation).secret.reveal() == "winner", race
        row = row_of(mine)
        assert (row.generation, row.last_error, state_of(mine)) == (generation + 1, "", State.ACTIVE)
        assert refresh_of(mine) == "winner-refresh"


def test_o03_a_refusal_of_an_older_token_changes_nothing(account: Account, vendor: OAuthUpstream):
    mine = account()
    renewed(mine)
    tokens.refuse(mine.pk, 1)
    assert (state_of(mine), row_of(mine).last_error) == (State.ACTIVE, "")
    tokens.refuse(mine.pk, 2)
    assert (state_of(mine), row_of(mine).last_error) == (State.NEEDS_REAUTH, "refused_upstream")


# O04: others who write


def test_o04_who_edits_the_account_or_lists_its_models_never_takes_a_token_back(
    account: Account, vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch
):
    mine = account()
    stale = Credential.objects.get(pk=mine.pk)
    asked = asking.ask

    def meanwhile(*given: Any) -> Any:
        """While the vendor is asked, an operator saves a form that was opened before, and a list of models comes in."""
        answer = asked(*given)
        if connection.vendor != "postgresql" or not connection.in_atomic_block:
            stale.save()
        actions.change_credential(stale, label=f"Renamed {row_of(mine).generation}", weight=3)
        actions._note_models(stale, {"a": {}})
        return answer

    monkeypatch.setattr(asking, "ask", meanwhile)
    for generation in range(2, 8):
        assert renewed(mine) == generation
        assert vendor.is_current(refresh_of(mine))
        actions.change_credential(stale, priority=generation)
        stale.save()
        assert row_of(mine).generation == generation
        assert vendor.is_current(refresh_of(mine))
    assert Credential.objects.get().label == "Renamed 6"


def test_a_new_sign_in_during_a_renewal_waits_and_wins(account: Account, vendor: OAuthUpstream):
    mine = account()
    renewed(mine)
    actions.sign_in(mine, registry.adapter("passport").tokens_from(file_of(vendor.log_in())))
    row = row_of(mine)
    assert row.generation == 3
    assert row.previous_refresh is None


# The database goes away at the worst moment


def test_a_token_that_could_not_be_stored_is_stored_as_soon_as_it_can(
    account: Account, vendor: OAuthUpstream, monkeypatch: pytest.MonkeyPatch
):
    mine = account()
    store, troubles = tokens._store, [OperationalError("database is locked")]

    def away(*given: Any) -> bool:
        if troubles:
            raise troubles.pop()
        return store(*given)

    monkeypatch.setattr(tokens, "_store", away)
    assert renewed(mine) == 2
    assert vendor.is_current(refresh_of(mine))
    assert vendor.counts.refreshes == 1


# O06: clocks


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Our wall clock is so many seconds off."""
    off = [0.0]
    monkeypatch.setattr(tokens, "_now", lambda: timezone.now() + timedelta(seconds=off[0]))
    return off


@pytest.mark.parametrize("jump", [-600, 600])
def test_o06_a_clock_that_jumps_ten_minutes_causes_one_renewal_at_most(
    account: Account, vendor: OAuthUpstream, clock: list[float], jump: float
):
    vendor.life_seconds = 1200
    mine = account(ended_seconds=0)
    for step in (0.0, jump, jump, 0.0):
        clock[0] = step
        before = vendor.counts.refreshes
        for _ in range(5):
            sweeps.renew_due()
            lease = tokens.access_in(row_of(mine)).lease
            if lease.has_ended():
                tokens.renew(mine.pk, lease.generation)
        assert vendor.counts.refreshes - before <= 1
    assert vendor.counts.reused == 0
    assert state_of(mine) == State.ACTIVE


def test_o06_a_clock_that_is_off_from_the_start_does_not_matter(account: Account, vendor: OAuthUpstream, clock: list[float]):
    for off in (-600.0, 600.0):
        clock[0] = off
        mine = account()
        renewed(mine)
        lease = tokens.access_in(row_of(mine)).lease
        assert not lease.has_ended()
        assert sweeps.renew_due() == 0


def test_o06_a_life_that_makes_no_sense_is_no_reason_to_ask_again_and_again(account: Account, vendor: OAuthUpstream):
    mine = account()
    for life in (0, -5, float("1e300"), 1):
        vendor.life_seconds = life
        renewed(mine)
        before = vendor.counts.refreshes
        sweeps.renew_due()
        assert vendor.counts.refreshes == before, life


def test_o06_a_pause_does_not_become_hours_when_the_clock_is_set_back(account: Account, vendor: OAuthUpstream, clock: list[float]):
    mine = account()
    clock[0] = 36_000
    vendor.token_script(said(503))
    with pytest.raises(TryAgainLater):
        renewed(mine)
    clock[0] = 0
    assert renewed(mine) == 2


# The sweep


def test_the_sweep_renews_what_is_due_and_leaves_the_rest(account: Account, vendor: OAuthUpstream):
    fresh, off, ended = account("Fresh", ended_seconds=-3600), account("Off"), account("Ended")
    actions.disable(off)

    assert sweeps.renew_due() == 1
    assert [row_of(one).generation for one in (fresh, off, ended)] == [1, 1, 2]
    assert sweeps.renew_due() == 0


def test_lists_of_models_are_asked_for_with_a_renewed_token(account: Account, vendor: OAuthUpstream):
    mine = account()
    vendor.expire_access()
    assert actions.refresh_models(mine) == ""
    assert mine.models.exists()
    assert row_of(mine).generation == 2


def test_a_token_sealed_wrongly_is_said_and_the_sweep_goes_on(account: Account, vendor: OAuthUpstream, caplog: pytest.LogCaptureFixture):
    mine = account()
    elsewhere = row_of(mine).place("refresh", "http://elsewhere:1")
    OAuthToken.objects.update(refresh=seal("x", elsewhere, settings.KEYRING.keys("seal")))
    assert sweeps.renew_due() == 1
    assert row_of(mine).last_error == "sealed_elsewhere"
