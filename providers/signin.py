"""Signing an account in, step by step, as a command or a page drives it. Asks the vendor; keeps nothing.

begin -> (a person opens the link) -> with_code           code flow
                                   -> poll -> poll -> …   device flow
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Mapping
from dataclasses import asdict

import msgspec
from django.conf import settings as django_settings

from providers import given, oauth
from providers.adapter import Adapter
from providers.failures import UpstreamUnreachable
from providers.models import Credential
from providers.oauth import CodePending, DevicePending, SignInEnded, TokenSet, TryAgainLater, Via, WrongSettings
from providers.secrets import Place, SealBroken, open_sealed, seal
from providers.tokens import ask

Settings = Mapping[str, str]
Pending = CodePending | DevicePending


def begin(adapter: Adapter, settings: Settings, *, credential_id: int = 0, redirect_uri: str = "") -> Pending:
    """What a person has to do. `redirect_uri`: where the kind's own leaves the port open. Raises ValidationError, OAuthFailed."""
    sign_in = given.sign_in(adapter, settings)
    try:
        if sign_in.flow == "code":
            oauth.origin_of(sign_in.authorize_url.partition("?")[0])  # it is shown as a link
            return oauth.begin_code(sign_in, redirect_uri)
        verifier = oauth.new_verifier()
        return oauth.device_in(ask(oauth.device_request(sign_in, verifier, Via.of(settings, credential_id))), verifier, time.time())
    except UpstreamUnreachable as problem:
        raise WrongSettings("not_configured", problem.message) from None


def with_code(adapter: Adapter, settings: Settings, pending: CodePending, pasted: str, *, credential_id: int = 0) -> TokenSet:
    """Raises ValidationError, OAuthFailed."""
    sign_in = given.sign_in(adapter, settings)
    code = oauth.code_in(pasted, pending)
    try:
        heard = ask(oauth.code_request(sign_in, pending, code, Via.of(settings, credential_id)))
        return oauth.tokens_in(heard, time.time(), adapter.facts_from)
    except oauth.GrantDead:
        raise SignInEnded("code_refused", "The vendor does not take this code: it may have been used or be too old. Begin again.") from None
    except UpstreamUnreachable as problem:
        raise WrongSettings("not_configured", problem.message) from None


def poll(adapter: Adapter, settings: Settings, pending: DevicePending, *, credential_id: int = 0) -> TokenSet | DevicePending:
    """The tokens, or what to go on waiting with. Raises ValidationError, SignInEnded, WrongSettings."""
    sign_in = given.sign_in(adapter, settings)
    if time.time() > pending.expires_at:
        raise SignInEnded("expired_token", "The code has expired: begin again.")
    try:
        heard = ask(oauth.poll_request(sign_in, pending, Via.of(settings, credential_id)))
    except TryAgainLater:
        return oauth.slower(pending)
    except UpstreamUnreachable as problem:
        raise WrongSettings("not_configured", problem.message) from None
    return oauth.polled(pending, heard, time.time(), adapter.facts_from)


# Between two requests of a page it lies in the session, which is no place for secrets


def sealed(pending: Pending, credential: Credential) -> str:
    text = msgspec.json.encode({"kind": type(pending).__name__, **asdict(pending)}).decode()
    return base64.b64encode(seal(text, _place(credential), django_settings.KEYRING.keys("seal"))).decode()


def opened(text: str, credential: Credential) -> Pending | None:
    """None for what cannot be gone on with: another account's, another address's, too old."""
    try:
        kept = open_sealed(base64.b64decode(text, validate=True), _place(credential), django_settings.KEYRING.keys("seal"))
    except (binascii.Error, SealBroken):
        return None
    said = msgspec.json.decode(kept.reveal())
    return (CodePending if said.pop("kind") == "CodePending" else DevicePending)(**said)


def _place(credential: Credential) -> Place:
    return Place(table="django_session", row=str(credential.pk), column="session_data", purpose="sign-in", origin=credential.origin)
