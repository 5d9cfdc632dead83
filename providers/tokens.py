"""The one writer of OAuthToken rows: keeps what a sign-in gave, and renews it, one process at a time (promises, section 8).

A renewal: look whether somebody was faster; take the account for oneself; look again; note that a call is about to be made; call;
store under the next generation and commit; only then is the new token used. Every write names the generation that it
replaces, so that a loser, whatever it believes, changes nothing.

To have an account for oneself is a row lock on Postgres, and on SQLite a lock on a file, because a transaction there would
keep out every other writer while the vendor is asked.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from django.conf import settings as django_settings
from django.db import DatabaseError, InterfaceError, OperationalError, connection, models, transaction
from django.utils import timezone

from providers import alerts, asking, oauth, registry
from providers.adapter import Adapter, Heard
from providers.egress import Egress
from providers.exchange import Outgoing
from providers.failures import UpstreamFailure, UpstreamTimeout, UpstreamUnreachable
from providers.models import Credential, OAuthToken, State, audited, changed
from providers.oauth import Access, GrantDead, Lease, OAuthFailed, SignIn, TokenSet, TryAgainLater, Via, WrongSettings
from providers.secrets import SealBroken, SecretText, open_sealed, redact, seal, sealed_with

log = logging.getLogger(__name__)

LOCK_SECONDS = 10.0
EARLY_SECONDS, EARLY_SHARE = 60.0, 0.1  # renewed when so much of its life is left, whichever is longer
JITTER = 0.1
SHORTEST_BACK_OFF_SECONDS, LONGEST_BACK_OFF_SECONDS = 1.0, 60.0
RESCUE_SECONDS = 30.0
SEALED = ("access", "refresh", "previous_refresh")


@dataclass(frozen=True, slots=True, repr=False)
class _Given:
    """What the vendor gave for the refresh token `used`."""

    tokens: TokenSet
    used: str


def access_of(credential: Credential) -> Access | None:
    """The access token that this account's calls carry; None where it has a plain secret, or none yet. Raises SealBroken."""
    if credential.secret:
        return None
    row = OAuthToken.objects.select_related("credential").filter(pk=credential.pk).first()
    return None if row is None else access_in(row)


def access_in(row: OAuthToken) -> Access:
    """The same, of a row that has been read together with its credential."""
    credential = row.credential
    settings = {**row.facts, **credential.settings}
    return Access(_opened(row, "access", credential.origin), _lease_of(row), settings, credential.origin)


def _lease_of(row: OAuthToken) -> Lease:
    return Lease(row.generation, _on_our_clock(row.expires_at), row.sign_in, _on_our_clock(row.refreshed_at) or 0.0)


def renew(credential_id: int, seen: int, *, wait: bool = True, by_hand: bool = False) -> Access:
    """A token of a later generation than `seen`: somebody else's, or one that is asked for now.

    Without `wait` another's renewal is not waited for. `by_hand` asks although the last attempt failed a moment ago, or for
    good. Raises OAuthFailed, SealBroken, DatabaseError. Call it where no event loop runs; it may take half a minute."""
    row = _read(credential_id)
    if row.generation == seen:
        failure = _renewed(credential_id, seen, wait=wait, by_hand=by_hand)
        if failure is not None:
            raise failure
        row = _read(credential_id)
    return access_in(row)


def refuse(credential_id: int, generation: int) -> None:
    """The upstream did not take this token although it had just been renewed: the account has to be signed in again.

    Nothing happens when the token is no longer the current one."""
    with alone(credential_id):
        row = _read(credential_id)
        if row.generation == generation and row.credential.state == State.ACTIVE:
            _note_dead(row, GrantDead("refused_upstream", "The upstream refuses the token."))


def put(credential: Credential, tokens: TokenSet) -> None:
    """Keep what a sign-in or a tool's own file gave, as the next generation. Only inside `alone`, and a transaction."""
    before = OAuthToken.objects.filter(pk=credential.pk).values_list("generation", flat=True).first() or 0
    row = OAuthToken(credential=credential, generation=before + 1)
    redact.learn_more([tokens.access, tokens.refresh])
    fields = {"generation": before + 1, "sign_in": before + 1, **_fields(row, tokens, tokens.refresh)}
    OAuthToken.objects.update_or_create(pk=credential.pk, defaults=fields)
    changed.send(sender=OAuthToken)


def due() -> list[tuple[int, int]]:
    """(credential, generation) of those whose renewal is due, the longest due first."""
    return list(in_use().filter(credential__state=State.ACTIVE, next_refresh_at__lte=_now()).values_list("pk", "generation"))


def in_use() -> models.QuerySet[OAuthToken]:
    """The rows whose tokens are called with: an account that was given a plain secret has that instead."""
    return OAuthToken.objects.filter(credential__secret=None).select_related("credential").order_by("next_refresh_at", "pk")


def is_signed_in(credential: Credential) -> bool:
    return not credential.secret and OAuthToken.objects.filter(pk=credential.pk).exists()


def reseal(row: OAuthToken, newest: str) -> bool:
    """Seal this row's tokens with the newest key. False where that is done already. Raises SealBroken."""
    with alone(row.pk), transaction.atomic():
        row = _read(row.pk)
        sealed = {column: bytes(value) for column in SEALED if (value := getattr(row, column))}
        if all(sealed_with(value) == newest for value in sealed.values()):
            return False
        again = {column: _sealed(row, column, _opened(row, column, _origin(row, column)).reveal()) for column in sealed}
        OAuthToken.objects.filter(pk=row.pk, generation=row.generation).update(**again)
        return True


def is_sealed_with(row: OAuthToken, key_id: str) -> bool:
    return all(sealed_with(bytes(value)) == key_id for column in SEALED if (value := getattr(row, column)))


@contextmanager
def alone(credential_id: int, *, wait: bool = True) -> Iterator[None]:
    """Nobody else renews this account or signs it in meanwhile. On Postgres this is a transaction.

    Raises TryAgainLater when it could not be had in 10 s, or at once without `wait`."""
    with _file_lock(credential_id, wait=wait), _row_lock(credential_id, wait=wait):
        yield


# One renewal


def _renewed(credential_id: int, seen: int, *, wait: bool, by_hand: bool) -> OAuthFailed | None:
    """None when there is a later generation now, whoever made it; else why there is none."""
    given = None
    with _file_lock(credential_id, wait=wait):
        with _row_lock(credential_id, wait=wait):
            row = _read(credential_id)
            if row.generation != seen or (failure := _no_use(row, by_hand=by_hand)):
                return None if row.generation != seen else failure
            was_cut_off = row.attempted_at is not None
            # Committed before the call: whoever comes after a crash knows that the token may have been used up.
            OAuthToken.objects.filter(pk=row.pk, generation=seen).update(attempted_at=_now())
        try:
            with _row_lock(credential_id, wait=True):
                row = _read(credential_id)
                if row.generation != seen or (failure := _no_use(row, by_hand=by_hand)):
                    return None if row.generation != seen else failure
                try:
                    given = _ask(row)
                except GrantDead as problem:
                    return _note_dead(row, _as_lost(problem) if was_cut_off else problem)
                except OAuthFailed as problem:
                    return _note_failure(row, problem)
                _store(row, given)
        except (DatabaseError, InterfaceError):
            if given is None:
                raise
            _rescue(row, given)
    return None


def _no_use(row: OAuthToken, *, by_hand: bool) -> OAuthFailed | None:
    """Why asking now would be of no use: the last answer still stands."""
    if by_hand:
        return None
    if row.credential.state == State.NEEDS_REAUTH:
        return GrantDead(row.last_error or "needs_reauth", "The account has to be signed in again.")
    left = (row.next_refresh_at - _now()).total_seconds() if row.failures and row.next_refresh_at else 0.0
    # A longer one than there is means that the clock was set back since.
    if 0 < left <= LONGEST_BACK_OFF_SECONDS * (1 + JITTER):
        return TryAgainLater(row.last_error, problem_of(row.last_error), retry_after_seconds=left)
    return None


def _ask(row: OAuthToken) -> _Given:
    """Raises OAuthFailed."""
    adapter, sign_in = sign_in_of(row.credential)
    if not row.refresh:
        raise GrantDead("no_refresh_token", "The sign-in gave no refresh token.")
    try:
        refresh = _opened(row, "refresh", oauth.origin_of(sign_in.token_url)).reveal()
        previous = _opened(row, "previous_refresh", oauth.origin_of(sign_in.token_url)).reveal() if row.previous_refresh else ""
    except SealBroken:
        raise WrongSettings("sealed_elsewhere", problem_of("sealed_elsewhere")) from None
    except UpstreamUnreachable as problem:
        raise WrongSettings("not_configured", problem.message) from None
    _check_address(row)
    try:
        return _Given(_call(row, adapter, sign_in, refresh), refresh)
    except GrantDead as problem:
        if not previous:
            raise
        # The vendor may have lost what it gave last (it fell over, too): the one before is tried once, and for nothing else.
        try:
            return _Given(_call(row, adapter, sign_in, previous), previous)
        except OAuthFailed:
            raise problem from None


def _check_address(row: OAuthToken) -> None:
    """A new access token would be sealed for wherever its account lies now, and so would follow it to another address.

    Raises GrantDead where that is not the one that the sign-in was for."""
    try:
        _opened(row, "access", row.credential.origin)
    except SealBroken:
        raise GrantDead("moved", problem_of("moved")) from None


def _call(row: OAuthToken, adapter: Adapter, sign_in: SignIn, refresh: str) -> TokenSet:
    request = oauth.refresh_request(sign_in, refresh, Via.of(row.credential.settings, row.pk))
    return oauth.tokens_in(ask(request), _now().timestamp(), adapter.facts_from, sign_in.refresh_statuses_dead)


def ask(request: Outgoing) -> Heard:
    """The vendor's whole answer, whatever its status. Raises TryAgainLater."""
    try:
        return asking.ask(request, Egress(tuple(django_settings.ENV.egress_allow)))
    except UpstreamUnreachable as problem:  # it never had the request
        raise TryAgainLater("unreachable", f"{problem.message} {problem.detail}".strip()) from None
    except UpstreamFailure as problem:
        code = "timeout" if isinstance(problem, UpstreamTimeout) else "broken_off"
        raise TryAgainLater(code, problem.message, unsure=True) from None


def _store(row: OAuthToken, given: _Given) -> bool:
    """False when another generation has taken the place of the one that was renewed: then that one is used."""
    tokens = given.tokens
    refresh = tokens.refresh or given.used
    redact.learn_more([tokens.access, refresh])
    after = OAuthToken(credential=row.credential, generation=row.generation + 1, facts=row.facts)
    fields = _fields(after, tokens, refresh, previous=given.used if refresh != given.used else "")
    with transaction.atomic():
        stored = OAuthToken.objects.filter(pk=row.pk, generation=row.generation).update(generation=after.generation, **fields)
        if stored:
            Credential.objects.filter(pk=row.pk, state=State.NEEDS_REAUTH).update(state=State.ACTIVE, models_due_at=None)
            changed.send(sender=OAuthToken)
    return bool(stored)


def _rescue(row: OAuthToken, given: _Given) -> None:
    """The database went away between the vendor's answer and the commit: this token exists nowhere else, so insist."""
    until = time.monotonic() + RESCUE_SECONDS
    while True:
        if not connection.in_atomic_block:
            connection.close()
        try:
            _store(row, given)
            return
        except (DatabaseError, InterfaceError):
            if time.monotonic() > until or connection.in_atomic_block:
                raise
            time.sleep(0.2)


def _note_failure(row: OAuthToken, problem: OAuthFailed) -> OAuthFailed | None:
    """What we hold stays; the next attempt comes after a pause. None when another was faster."""
    failures = min(row.failures + 1, 1000)
    pause, unsure = LONGEST_BACK_OFF_SECONDS, False
    if isinstance(problem, TryAgainLater):
        pause = min(max(SHORTEST_BACK_OFF_SECONDS * 2 ** min(failures - 1, 10), problem.retry_after_seconds or 0.0), pause)
        problem.retry_after_seconds, unsure = pause, problem.unsure
    noted = OAuthToken.objects.filter(pk=row.pk, generation=row.generation).update(
        failures=failures,
        last_error=problem.code,
        next_refresh_at=_now() + timedelta(seconds=_about(pause)),
        **({} if unsure else {"attempted_at": None}),
    )
    log.warning("The sign-in of credential %s (%s) could not be renewed: %s", row.pk, row.credential.label, problem)
    return problem if noted else None


def _note_dead(row: OAuthToken, problem: GrantDead) -> OAuthFailed | None:
    """Nothing is deleted: the account is taken out of its pool, and waits for a person. None when another was faster."""
    credential = row.credential
    with transaction.atomic():
        current = OAuthToken.objects.filter(pk=row.pk, generation=row.generation)
        if not current.update(failures=row.failures + 1, last_error=problem.code, next_refresh_at=None, attempted_at=None):
            return None
        if Credential.objects.filter(pk=row.pk, state=State.ACTIVE).update(state=State.NEEDS_REAUTH):
            subject = f"credential {credential.pk} ({credential.label})"
            audited.send(
                sender=Credential,
                actor=None,
                organization_id=credential.organization_id,
                action="credential.signed_out",
                subject=subject,
                detail={"reason": problem.code},
            )
            transaction.on_commit(lambda: alerts.needs_sign_in(credential, problem_of(problem.code)), robust=True)
        changed.send(sender=Credential)
    return problem


def _as_lost(problem: GrantDead) -> GrantDead:
    return GrantDead("lost_reply", problem_of("lost_reply")) if problem.code not in ("no_refresh_token", "moved") else problem


# Words


_PROBLEMS = {
    "timeout": "The vendor did not answer in time.",
    "unreachable": "The vendor could not be reached.",
    "broken_off": "The vendor's answer broke off.",
    "unreadable": "The vendor's answer could not be read.",
    "rate_limited": "The vendor asked to wait.",
    "invalid_grant": "The vendor has ended this sign-in.",
    "lost_reply": "An earlier renewal was cut off before its answer was kept, and the vendor has replaced the token since.",
    "no_refresh_token": "The sign-in gave no refresh token, and its access token has ended.",
    "refused_upstream": "The upstream refuses a token that has just been renewed.",
    "moved": "The account was signed in for another address: sign it in again for this one.",
    "sealed_elsewhere": "The token was given for another address, or the keyring does not open it.",
    "not_configured": "A setting that signing in needs is missing.",
    "invalid_request": "The vendor does not take the request as these settings make it: see the client id and the addresses.",
    "invalid_client": "The vendor does not accept the client id or its secret: see the settings.",
    "busy": "Another renewal of this account is under way.",
}


def problem_of(code: str) -> str:
    """The sentence for what is kept in `last_error`; empty for none."""
    if not code:
        return ""
    if code.startswith("http_"):
        return f"The vendor answered {code.removeprefix('http_')}."
    return _PROBLEMS.get(code, f"The vendor refused it ({code}).")


# Rows, seals and locks


def sign_in_of(credential: Credential) -> tuple[Adapter, SignIn]:
    """Raises WrongSettings."""
    if credential.kind not in registry.names():
        raise WrongSettings("not_configured", f"No adapter speaks '{credential.kind}'.")
    adapter = registry.adapter(credential.kind)
    try:
        sign_in = adapter.sign_in(credential.settings)
    except ValueError as problem:
        raise WrongSettings("not_configured", str(problem)) from None
    if sign_in is None:
        raise WrongSettings("not_configured", "With these settings its kind does not sign in.")
    redact.learn_more([sign_in.client_secret])
    return adapter, sign_in


def _read(credential_id: int) -> OAuthToken:
    """Raises GrantDead where there is none: the account was deleted meanwhile."""
    row = OAuthToken.objects.select_related("credential").filter(pk=credential_id).first()
    if row is None:
        raise GrantDead("no_token", "The account is not signed in.")
    return row


def _fields(row: OAuthToken, tokens: TokenSet, refresh: str, previous: str = "") -> dict[str, object]:
    """What a new generation writes besides its number. `row` is that generation, with the facts known so far."""
    now = _now()
    expires_at = now if not tokens.access else _moment(tokens.expires_at)
    return {
        "access": _sealed(row, "access", tokens.access),
        "refresh": _sealed(row, "refresh", refresh) if refresh else None,
        "previous_refresh": _sealed(row, "previous_refresh", previous) if previous else None,
        "expires_at": expires_at,
        "refreshed_at": now,
        "next_refresh_at": _early(now, expires_at) if refresh else expires_at,  # then it is noticed that it has ended
        "attempted_at": None,
        "failures": 0,
        "last_error": "",
        "facts": {**row.facts, **tokens.facts},
    }


def _early(now: datetime, expires_at: datetime | None) -> datetime | None:
    """When to renew: before the end, and not at the same moment in every process. Never sooner than at half of its life."""
    if expires_at is None:
        return None
    life = max((expires_at - now).total_seconds(), 0.0)
    return expires_at - timedelta(seconds=min(_about(max(EARLY_SECONDS, EARLY_SHARE * life)), life / 2))


def _about(seconds: float) -> float:
    return seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311  nothing secret hangs on it


def _moment(seconds: float | None) -> datetime | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(min(max(seconds, 0.0), _now().timestamp() + oauth.LONGEST_LIFE_SECONDS), UTC)


def _on_our_clock(moment: datetime | None) -> float | None:
    return None if moment is None else time.monotonic() + (moment - _now()).total_seconds()


def _now() -> datetime:
    """The one wall clock of this module."""
    return timezone.now()


def _origin(row: OAuthToken, column: str) -> str:
    """Where a token of this column may be sent. Empty while the kind's settings do not say where it is renewed."""
    if column == "access":
        return row.credential.origin
    try:
        return oauth.origin_of(sign_in_of(row.credential)[1].token_url)
    except (WrongSettings, UpstreamUnreachable):
        return ""


def _sealed(row: OAuthToken, column: str, text: str) -> bytes:
    return seal(text, row.place(column, _origin(row, column)), django_settings.KEYRING.keys("seal"))


def _opened(row: OAuthToken, column: str, origin: str) -> SecretText:
    keys, blob = django_settings.KEYRING.keys("seal"), bytes(getattr(row, column))
    try:
        secret = open_sealed(blob, row.place(column, origin), keys)
    except SealBroken:
        if column == "access":
            raise
        secret = open_sealed(blob, row.place(column, ""), keys)  # kept before the settings said where it is renewed
    redact.learn_more([secret.reveal()])
    return secret


@contextmanager
def _row_lock(credential_id: int, *, wait: bool) -> Iterator[None]:
    if connection.vendor != "postgresql":
        yield
        return
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS:.0f}s'")
        rows = OAuthToken.objects.select_for_update(skip_locked=not wait, of=("self",)).filter(pk=credential_id)
        try:
            locked = rows.values_list("pk", flat=True).first()
        except OperationalError as problem:
            if getattr(problem.__cause__, "sqlstate", "") != "55P03":  # lock_not_available
                raise
            raise TryAgainLater("busy", problem_of("busy")) from None
        if locked is None and not wait and OAuthToken.objects.filter(pk=credential_id).exists():
            raise TryAgainLater("busy", problem_of("busy"))
        yield


@contextmanager
def _file_lock(credential_id: int, *, wait: bool) -> Iterator[None]:
    if connection.vendor == "postgresql":
        yield
        return
    folder = django_settings.DATA_DIR / "locks"
    folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(folder / f"oauth-{credential_id}", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        until = time.monotonic() + (LOCK_SECONDS if wait else 0.0)
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise TryAgainLater("busy", problem_of("busy")) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)
