"""Carries out what a forerunner's file asks for: credentials, keys that go on working, and the catch-all alias.

Line by line, each in a transaction of its own, and nothing twice: what is there already is found again by a keyed
digest of what the file says of it, and stays as it is.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from urllib.parse import urlsplit

from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import transaction

from accounts import actions as accounts
from accounts.models import Organization, Role, User
from accounts.principal import STRONG_LENGTH
from providers import actions as providers
from providers import registry
from providers.adapter import Adapter
from providers.models import Credential, State
from proxy import routes
from proxy.import_config import Account, Key, Plan, Remark
from proxy.models import Route
from proxy.routes import Leads


def carry_out(plan: Plan, *, organization: str | None, email: str | None, accept_policy: bool) -> Iterator[Remark]:
    """What became of each thing in the file. Without an organization accounts and alias are everybody's, and keys those of `default`."""
    owner = accounts.ensure_organization(organization) if organization is not None else None
    yield from plan.remarks
    leads: list[str] = []
    for account in plan.accounts:
        credential, remark = _take_account(account, owner, accept_policy=accept_policy)
        yield _hidden(remark, plan)
        if credential is not None and account.catch_all:
            leads.append(f"{credential.prefix}/{account.catch_all}")
            if credential.state != State.ACTIVE:
                yield Remark("note", account.where, f"credential {credential.pk} is {credential.get_state_display().lower()}")
    for key in plan.keys:
        for remark in _take_key(key, organization or accounts.DEFAULT_ORGANIZATION, email):
            yield _hidden(remark, plan)
    if leads:
        yield _hidden(_catch_all(leads, owner), plan)


def _take_account(account: Account, owner: Organization | None, *, accept_policy: bool) -> tuple[Credential | None, Remark]:
    if account.kind not in registry.names():
        return None, Remark("refused", account.where, f"this Sluice has no kind '{account.kind}'")
    adapter = registry.adapter(account.kind)
    try:
        secret = tokens_of(adapter, account) if account.tokens else account.secret.reveal()
        marks = _marks(account, owner)
        known = providers.imported_before(account.kind, account.prefix, marks, secret, owner)
        if known is not None:
            return known, Remark("unchanged", account.where, f"credential {known.pk} is it")
        with transaction.atomic():
            made = providers.add_credential(
                account.kind,
                account.label,
                secret,
                prefix=account.prefix,
                base_url=_base_url(adapter, account),
                settings=account.settings,
                organization=owner,
                accept_policy=accept_policy and adapter.policy_for(account.settings) != "allowed",
                imported_as=marks[0],
            )
    except ValidationError as problem:
        words = " ".join(problem.messages)
        if "accept_policy" in getattr(problem, "error_dict", {}):
            words += " (--accept-policy)"
        return None, Remark("refused", account.where, words)
    except ValueError as problem:
        return None, Remark("refused", account.where, str(problem))
    return made, Remark("made", account.where, f"credential {made.pk} '{made.label}' of kind {made.kind}, models {made.prefix}/…")


def tokens_of(adapter: Adapter, account: Account) -> str:
    """A sign-in's tokens, as the credential is given them: the JSON that the file has. Raises ValueError where that holds none."""
    given = account.secret.reveal()
    if adapter.tokens_from(given) is None:
        raise ValueError(f"the kind {adapter.name} finds no tokens in it")
    return given


def _marks(account: Account, owner: Organization | None) -> list[bytes]:
    """Under every pepper, the newest first."""
    whose = owner.slug if owner is not None else ""
    text = "\0".join(("import", account.kind, whose, account.prefix, account.mark.reveal())).encode()
    return [hmac.digest(pepper, text, "sha256") for pepper in settings.KEYRING.keys("pepper").values()]


def _base_url(adapter: Adapter, account: Account) -> str:
    """As the adapter takes it: some proxies were told the vendor's path with it, and some adapters add that themselves."""
    url, own = account.base_url.rstrip("/"), account.own_path
    if own and (url.endswith(own) or not urlsplit(url).path):
        url = url.removesuffix(own) + (own if urlsplit(adapter.base_url).path.rstrip("/").endswith(own) else "")
    return "" if url == adapter.base_url.rstrip("/") else url


def _take_key(key: Key, organization: str, email: str | None) -> Iterator[Remark]:
    clear = key.secret.reveal()
    try:
        with transaction.atomic():
            place = accounts.ensure_organization(organization)
            user = _holder(email)
            accounts.ensure_membership(user, place, role=Role.OWNER if user.is_superuser else Role.MEMBER)
            made, is_new = accounts.import_key(organization=place, user=user, name=key.where, clear=clear)
    except ValidationError as problem:
        yield Remark("refused", key.where, " ".join(problem.messages))
        return
    if is_new:
        yield Remark("made", key.where, f"key {made.pk} of {user}, in {place}: it works as it is, and does not expire")
    else:
        state = "" if made.state == "active" else f", and it is {made.state}"
        yield Remark("unchanged", key.where, f"key {made.pk} is it{state}")
    if len(clear) < STRONG_LENGTH:
        words = f"THIS KEY IS WEAK: {len(clear)} characters can be guessed. Rotate it (key {made.pk}) as soon as its clients can change"
        yield Remark("WARNING", key.where, words)


def _holder(email: str | None) -> User:
    """Whose the keys are: who was named, else the operator, else whom `bootstrap` will make the operator."""
    if email is None:
        operator = User.objects.filter(is_superuser=True, is_active=True).order_by("pk").first()
        if operator is not None:
            return operator
    return accounts.ensure_user(email or accounts.DEFAULT_EMAIL)


def _catch_all(leads: list[str], owner: Organization | None) -> Remark:
    known = Route.objects.filter(name="*", organization=owner).first()
    if known is not None:
        there = [target.model for target in known.targets.all()]
        if there == leads:
            return Remark("unchanged", "alias *", f"it leads to {', '.join(leads)}")
        return Remark(
            "note", "alias *", f"it stays as it is and leads to {', '.join(there)}; this file would have it lead to {', '.join(leads)}"
        )
    targets = [Leads(model, position) for position, model in enumerate(leads)]
    try:
        routes.create_route(organization=owner, name="*", targets=targets)
    except ValidationError as problem:
        return Remark("refused", "alias *", " ".join(problem.messages))
    return Remark("made", "alias *", f"every name that nobody knows leads to {', '.join(leads)}")


def _hidden(remark: Remark, plan: Plan) -> Remark:
    """The remark without any secret of the file, whoever put it into his words."""
    why = remark.why
    for secret in sorted(plan.secrets, key=len, reverse=True):
        if len(secret) >= 4:
            why = why.replace(secret, "[redacted]")
    return Remark(remark.said, remark.where, why)
