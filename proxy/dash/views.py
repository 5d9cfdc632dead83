"""The pages: the list of keys with their usage, one key's page, and what can be done with a key.

A member sees own keys; owners, admins and viewers all keys of the organization; the operator those of every
organization. A foreign key and a missing one get the same 404.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from allauth.account.views import login as sign_in
from channels.db import database_sync_to_async
from django.conf import settings
from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.core.exceptions import PermissionDenied, ValidationError
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, JsonResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.utils import timezone
from django.utils.cache import patch_vary_headers
from django.views.decorators.http import require_GET, require_http_methods, require_safe

from accounts import actions
from accounts import queries as accounts
from accounts.models import ApiKey, Limit, Membership, Metric, Mode, Organization, Role, User
from proxy import queries, snapshot
from proxy.dash.forms import FreezeForm, KeyForm, RenameForm, RotateForm
from proxy.dash.snippets import PLACEHOLDER, example_model, snippets
from proxy.dash.state import roles_in, state_of
from proxy.models import UsageEvent
from proxy.outcomes import attempts_of, known_how, outcome_of, why_no_cost
from proxy.queries import SPANS, Bucket, Cursor, Group, KeyTotals, Span, Sums
from proxy.sheets import csv_line

KEYS_ON_A_PAGE = 50
ORGANIZATIONS_IN_THE_MENU = 100
_FORMS_REMEMBERED = 20


@require_safe
def front(request: HttpRequest) -> HttpResponseBase:
    """People get the sign-in page or their keys, programs get a word."""
    if "text/html" not in request.headers.get("accept", ""):
        response: HttpResponseBase = JsonResponse({"status": "running"}, json_dumps_params={"separators": (",", ":")})
    elif request.user.is_authenticated:
        response = redirect("keys")
    else:
        response = sign_in(request)
    patch_vary_headers(response, ["Accept", "Cookie"])
    return response


# The list


@login_required
@require_http_methods(["GET", "HEAD", "POST"])
def keys(request: HttpRequest) -> HttpResponse:
    """The keys that the viewer may see with their usage; POST makes a new one."""
    place = _chosen_place(request)
    if place is None:
        return render(request, "keys/nowhere.html")
    if request.method != "POST":
        return _list(request, place, KeyForm(place, initial={"once": secrets.token_urlsafe(12)}))
    if place.role == Role.VIEWER:
        raise PermissionDenied("A viewer may look at keys, and make none. An owner or administrator of the organization can.")
    if not _may_issue(place):
        raise PermissionDenied("The organization is switched off: no keys are made in it.")
    form = KeyForm(place, request.POST)
    if form.is_valid():
        if _already_sent(request, form.cleaned_data["once"]):
            return redirect("keys")
        try:
            key, clear = actions.issue_key(actor=place.user, **form.asked())
        except ValidationError as problem:
            form.complain(problem)
        else:
            _remember_sent(request, form.cleaned_data["once"])
            return _shown_once(request, place, key, clear)
    return _list(request, place, form, status=422)


def _list(request: HttpRequest, place: Membership, form: KeyForm, status: int = 200) -> HttpResponse:
    now = timezone.now()
    organization = place.organization
    found = accounts.keys_visible_to(place)
    search = request.GET.get("q", "").strip()[:150]
    if search:
        found = accounts.named_like(found, search)
    before = request.GET.get("before", "")
    if before.isascii() and before.isdigit() and len(before) < 19:
        found = found.filter(pk__lt=int(before))
    page = list(found[: KEYS_ON_A_PAGE + 1])
    shown = page[:KEYS_ON_A_PAGE]
    used = queries.totals_by_key(organization, [key.pk for key in shown], now)
    roles = roles_in(organization, {key.user_id for key in shown})
    context = {
        "rows": [{"key": key, "state": state_of(key, roles), "used": used.get(key.pk, KeyTotals())} for key in shown],
        "older": shown[-1].pk if len(page) > KEYS_ON_A_PAGE else None,
        "month": queries.totals(organization, since=queries.since_of(SPANS["30d"], organization, now), user_id=_own_only(place)),
        "day": queries.totals(organization, since=queries.since_of(SPANS["24h"], organization, now), user_id=_own_only(place)),
        "search": search,
        "is_first_page": not before,
        "may_issue": _may_issue(place),
        "sees_all": _own_only(place) is None,
        "form": form,
    }
    return render(request, "keys/list.html", {**_frame(request, place), **context}, status=status)


# One key's page


@login_required
@require_safe
def key(request: HttpRequest, key_id: int) -> HttpResponse:
    place, key = _key(request, key_id)
    organization, now = place.organization, timezone.now()
    span = _span(request)
    since = queries.since_of(span, organization, now)
    buckets = queries.series(organization, key.pk, span, now)
    models = queries.totals_by(organization, "model", since=since, key_ids=[key.pk])
    state = state_of(key, roles_in(organization, {key.user_id}))
    page = queries.recent_requests(organization, key.pk, since=since, before=_cursor(request))
    context = {
        "key": key,
        "state": state,
        "may_act": _may_act(place, key),
        "may_thaw": actions.may_thaw(place, key),
        "frozen_by": _frozen_by(place, key),
        "limits": _limits(place, key, now),
        "span": span,
        "spans": SPANS.values(),
        "since": since,
        "zone": queries.zone_of(organization).key,
        "sums": sum((bucket.sums for bucket in buckets), Sums()),
        "buckets": buckets,
        "chart": _chart(buckets, span),
        "models": models,
        "refused": queries.refused_calls(organization, key.pk, since=since),
        "page": page,
        "log": _with_accounts(place, page.rows),
        "is_first_page": "before" not in request.GET,
        **(_snippets(key, models) if state.works else {}),
    }
    return render(request, "keys/key.html", {**_frame(request, place), **context})


def _span(request: HttpRequest) -> Span:
    return SPANS.get(request.GET.get("range", ""), SPANS["24h"])


def _with_accounts(place: Membership, events: Sequence[UsageEvent]) -> list[dict[str, Any]]:
    """Each request with what the account that served it is called for this viewer: by its label, or only by its provider."""
    labels = queries.labels_shown_to(place, events)
    return [{"event": event, "account": labels.get(event.credential_id or 0, event.provider), "labels": labels} for event in events]


@login_required
@require_safe
def one_request(request: HttpRequest, key_id: int, request_id: uuid.UUID) -> HttpResponse:
    """Everything that the log has of one request of a key."""
    place, key = _key(request, key_id)
    event = queries.request_of(place.organization, key.pk, request_id)
    if event is None:
        raise Http404("There is no such request.")
    corrections = [] if event.corrects else queries.corrections_of(place.organization, event)
    [row] = _with_accounts(place, [event])
    context = {
        "key": key,
        **row,
        "span": _span(request),
        "outcome": outcome_of(event),
        "known_how": known_how(event),
        "attempts": attempts_of(event, row["account"], row["labels"]),
        "corrections": [{"event": one, "outcome": outcome_of(one), "known_how": known_how(one)} for one in corrections],
        "columns": [("As stored", event), *(("Correction", one) for one in corrections)],
        "total": _corrected(event, corrections) if corrections else None,
        "why_no_cost": why_no_cost(event),
        "may_price": place.user.is_superuser and event.cost is None and bool(event.served_model),
    }
    return render(request, "keys/request.html", {**_frame(request, place), **context})


def _corrected(event: UsageEvent, corrections: Sequence[UsageEvent]) -> UsageEvent:
    """The figures with all corrections in them, as a row that is not stored. One that has no price leaves the sum without one."""
    rows = [event, *corrections]
    parts = {part: sum(getattr(row, part) for row in rows) for part in queries.TOKEN_PARTS}
    costs = [row.cost for row in rows if row.cost is not None]
    return UsageEvent(**parts, cost=sum(costs) if len(costs) == len(rows) else None)


@login_required
@require_GET
def requests_csv(request: HttpRequest, key_id: int) -> HttpResponseBase:
    """The key's requests in the window of its page, the oldest first: what `manage.py usage` has, as far as the viewer may know it."""
    place, key = _key(request, key_id)
    now = timezone.now()
    span = _span(request)
    lines = _lines(place, key, queries.since_of(span, place.organization, now), now)
    filename = f"sluice-key-{key.pk}-{span.name}.csv"
    return StreamingHttpResponse(
        _by_a_thread(lines), content_type="text/csv; charset=utf-8", headers={"Content-Disposition": f'attachment; filename="{filename}"'}
    )


def _lines(place: Membership, key: ApiKey, since: datetime, until: datetime) -> Iterator[str]:
    """The table's head, and then a chunk of its rows at a time."""
    columns = queries.columns_shown_to(place)
    yield f"{csv_line(columns)}\n"
    for rows in queries.key_rows(place, key.pk, since=since, until=until):
        yield "".join(f"{csv_line(row[name] for name in columns)}\n" for row in rows)


async def _by_a_thread(pieces: Iterator[str]) -> AsyncIterator[str]:
    """Each piece is read when the client has taken the one before. Meanwhile no connection to the database is held."""
    read = database_sync_to_async(next)
    while (piece := await read(pieces, None)) is not None:
        yield piece


def _limits(place: Membership, key: ApiKey, now: datetime) -> list[dict[str, Any]]:
    """What a call with this key meets. How much of it is spent is shown where the viewer may see the spender's usage."""
    limits = queries.limits_on(place.organization, key)
    whole = _own_only(place) is None
    visible = [limit for limit in limits if whole or limit.key_id or limit.user_id]
    budgets = {budget.limit.pk: budget for budget in queries.budgets(place.organization, visible, now)}
    return [
        {
            "limit": limit,
            "whose": _whose(limit, place),
            "budget": (budget := budgets.get(limit.pk)),
            "is_money": limit.metric == Metric.MONEY,
            "is_used_up": budget is not None and budget.share >= 1 and limit.mode == Mode.ENFORCE,
        }
        for limit in limits
    ]


def _whose(limit: Limit, place: Membership) -> str:
    if limit.key_id:
        return "This key"
    if limit.user:
        return f"All keys of {limit.user.email}"
    return f"Team {limit.team.name}" if limit.team else f"All of {place.organization.name}"


def _chart(buckets: list[Bucket], span: Span) -> dict[str, Any]:
    """What the script draws: one list for each row of figures, costs in US dollars."""
    names = ("requests", "errors", "unpriced", "estimated", "fresh_input", "cache_read", "cache_write", "output", "reasoning")
    written = {"24h": "%H:%M", "7d": "%a %H:%M", "30d": "%-d %b"}[span.name]
    return {
        "labels": [bucket.starts_at.strftime(written) for bucket in buckets],
        "titles": [_step(bucket, span) for bucket in buckets],
        "cost": [bucket.sums.cost / 1_000_000 for bucket in buckets],
        **{name: [getattr(bucket.sums, name) for bucket in buckets] for name in names},
    }


def _step(bucket: Bucket, span: Span) -> str:
    if span.step_hours == 24:
        return bucket.starts_at.strftime("%a %-d %b %Y")
    return f"{bucket.starts_at:%a %-d %b, %H:%M} – {bucket.ends_at:%H:%M}"


def _snippets(key: ApiKey, models: list[Group], clear: str | None = None) -> dict[str, Any]:
    """Lines to copy for a key that works."""
    catalog = snapshot.in_force()
    principal = catalog.principals.get(bytes(key.digest)) or snapshot.load_principal(key.pk)
    model = PLACEHOLDER if principal is None else example_model(principal, catalog, [group.name for group in models])
    return {"snippets": snippets(settings.PUBLIC_URL, model, clear), "placeholder": PLACEHOLDER if model == PLACEHOLDER else ""}


def _cursor(request: HttpRequest) -> Cursor | None:
    text = request.GET.get("before")
    if text is None:
        return None
    try:
        return Cursor.parse(text)
    except ValueError:
        raise Http404("There is no such page of the log.") from None


# What can be done with a key


@login_required
@require_http_methods(["GET", "HEAD", "POST"])
def rotate(request: HttpRequest, key_id: int) -> HttpResponse:
    place, key = _key_to_change(request, key_id)
    form = RotateForm(request.POST or None, initial={"once": secrets.token_urlsafe(12)})
    if request.method == "POST" and form.is_valid():
        if _already_sent(request, form.cleaned_data["once"]):
            return redirect("key", key.pk)
        try:
            sibling, clear = actions.rotate_key(key, overlap=timedelta(hours=form.cleaned_data["hours"]), actor=place.user)
        except (ValidationError, actions.Conflict) as problem:
            form.add_error(None, problem.messages if isinstance(problem, ValidationError) else str(problem))
        else:
            _remember_sent(request, form.cleaned_data["once"])
            return _shown_once(request, place, sibling, clear, replaced=key)
    return _asking(request, place, key, "keys/rotate.html", form)


@login_required
@require_http_methods(["GET", "HEAD", "POST"])
def freeze(request: HttpRequest, key_id: int) -> HttpResponse:
    place, key = _key_to_change(request, key_id)
    form = FreezeForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        said = form.cleaned_data
        try:
            actions.freeze_key(place, key, length=timedelta(minutes=said["minutes"]), reason=said["reason"])
        except ValidationError as problem:
            form.add_error(None, problem)
        except actions.Conflict as problem:
            form.add_error(None, str(problem))
        else:
            messages.success(request, f"“{key.name}” is frozen: whatever uses it is refused within five seconds.")
            return redirect("key", key.pk)
    return _asking(request, place, key, "keys/freeze.html", form, cuts=settings.ENV.cut_revoked_calls)


@login_required
@require_http_methods(["GET", "HEAD", "POST"])
def thaw(request: HttpRequest, key_id: int) -> HttpResponse:
    place, key = _key_to_change(request, key_id)
    if request.method == "POST":
        try:
            if actions.thaw_key(place, key):
                messages.success(request, f"“{key.name}” may call models again, within five seconds.")
        except actions.Conflict as problem:
            messages.error(request, str(problem))
        return redirect("key", key.pk)
    if not key.is_frozen:
        return redirect("key", key.pk)
    return _asking(request, place, key, "keys/thaw.html", None)


@login_required
@require_http_methods(["GET", "HEAD", "POST"])
def revoke(request: HttpRequest, key_id: int) -> HttpResponse:
    place, key = _key_to_change(request, key_id)
    if request.method == "POST":
        if actions.revoke_key(key, actor=place.user):
            messages.success(request, f"“{key.name}” is revoked: it stops within five seconds.")
        return redirect("key", key.pk)
    return _asking(request, place, key, "keys/revoke.html", None)


@login_required
@require_http_methods(["GET", "HEAD", "POST"])
def rename(request: HttpRequest, key_id: int) -> HttpResponse:
    place, key = _key_to_change(request, key_id)
    form = RenameForm(request.POST or None, initial={"name": key.name})
    if request.method == "POST" and form.is_valid():
        try:
            actions.change_key(key, name=form.cleaned_data["name"], actor=place.user)
        except ValidationError as problem:
            form.add_error("name", problem.messages)
        except actions.Conflict as problem:
            form.add_error(None, str(problem))
        else:
            return redirect("key", key.pk)
    return _asking(request, place, key, "keys/rename.html", form)


def _asking(request: HttpRequest, place: Membership, key: ApiKey, template: str, form: Any, **more: Any) -> HttpResponse:
    status = 422 if form is not None and form.errors else 200
    return render(request, template, {**_frame(request, place), "key": key, "form": form, **more}, status=status)


def _shown_once(request: HttpRequest, place: Membership, key: ApiKey, clear: str, replaced: ApiKey | None = None) -> HttpResponse:
    """The one page that ever holds a key's clear text: kept by nobody, the answer to a POST that cannot be sent again."""
    context = {"key": key, "clear": clear, "replaced": replaced, **_snippets(key, [], clear)}
    response = render(request, "keys/issued.html", {**_frame(request, place), **context})
    response["Cache-Control"] = "no-store"
    return response


# Who looks, and at what


def _viewer(request: HttpRequest) -> User:
    assert isinstance(request.user, User), "only signed-in people get here"
    return request.user


def _chosen_place(request: HttpRequest) -> Membership | None:
    """The viewer's place in the organization chosen last, or in the first; None for who is in no organization."""
    viewer = _viewer(request)
    if "organization" in request.GET:
        place = accounts.standing(viewer, request.GET["organization"])
        if request.session.get("organization") != place.organization.slug:
            request.session["organization"] = place.organization.slug
        return place
    mine = accounts.organizations_of(viewer)
    chosen = mine.filter(slug=request.session.get("organization", "")).first() or mine.first()
    return accounts.membership(viewer, chosen) if chosen else None


def _key(request: HttpRequest, key_id: int) -> tuple[Membership, ApiKey]:
    """A key by its number, in whichever of the viewer's organizations it is. Raises Http404."""
    viewer = _viewer(request)
    organization: Organization = get_object_or_404(accounts.organizations_of(viewer).filter(keys__pk=key_id))
    place = accounts.membership(viewer, organization)
    if place is None:
        raise Http404("There is no such key.")
    return place, accounts.key_of(place, key_id)


def _key_to_change(request: HttpRequest, key_id: int) -> tuple[Membership, ApiKey]:
    place, key = _key(request, key_id)
    if place.role == Role.VIEWER:
        raise PermissionDenied("A viewer may look at keys, and change none. An owner or administrator of the organization can.")
    return place, key


def _own_only(place: Membership) -> int | None:
    """The one person whose usage may be seen; None = everybody's."""
    return place.user.pk if place.role == Role.MEMBER else None


def _may_issue(place: Membership) -> bool:
    return place.role != Role.VIEWER and place.organization.is_active


def _may_act(place: Membership, key: ApiKey) -> bool:
    return place.role != Role.VIEWER and key.revoked_at is None


def _frozen_by(place: Membership, key: ApiKey) -> str:
    """Who froze the key itself; empty where it is not frozen, or where that is not known. Operators are not named."""
    if not key.is_frozen or key.frozen_by is None:
        return ""
    is_member = Membership.objects.filter(user=key.frozen_by, organization=place.organization).exists()
    return key.frozen_by.email if is_member else "an operator"


def _frame(request: HttpRequest, place: Membership) -> dict[str, Any]:
    """What the head of every page shows."""
    return {"place": place, "organizations": accounts.organizations_of(place.user)[:ORGANIZATIONS_IN_THE_MENU]}


# A key is shown once: the same form sent again (a reload, the back button) must not make another key unseen.


def _already_sent(request: HttpRequest, once: str) -> bool:
    if once not in request.session.get("sent", []):
        return False
    messages.warning(request, "This form had been sent before. The key it made was shown then, and is not shown again.")
    return True


def _remember_sent(request: HttpRequest, once: str) -> None:
    request.session["sent"] = [*request.session.get("sent", []), once][-_FORMS_REMEMBERED:]
