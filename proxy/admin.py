"""The operators' admin of aliases, and a window onto what was used.

The log grows without end, so nothing here counts it, sorts it, or looks at all of it: a list shows the newest rows of a
window of time, a page at a time, and a search is for one request's id.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any, ClassVar, cast

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db.models import CharField, Model, OuterRef, Q, QuerySet, Subquery, Value
from django.db.models.functions import Coalesce
from django.forms.models import BaseInlineFormSet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html_join
from django.utils.safestring import mark_safe
from unfold.admin import ModelAdmin, TabularInline
from unfold.decorators import display
from unfold.views import ChangeList

from accounts.actions import record
from accounts.admin import Audited
from accounts.models import ApiKey, Organization, User
from providers.models import Credential
from proxy import routes, totals
from proxy.models import FrozenModel, OnAbort, RefusedCalls, Rest, Route, RouteTarget, UsageEvent, UsageTotal, moment_of
from proxy.outcomes import came_to
from proxy.queries import SHADOW, why_it_rests
from proxy.routes import Leads
from proxy.templatetags.show import exact_usd, milliseconds, usd

BEFORE = "before"  # in the address of a list
_WINDOWS = {"1h": (timedelta(hours=1), "Last hour"), "24h": (timedelta(hours=24), "Last 24 hours")}
_WINDOWS |= {f"{days}d": (timedelta(days=days), f"Last {days} days") for days in (7, 30, 90)}
_DEFAULT_WINDOW = "24h"


# Aliases


class RouteForm(forms.ModelForm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["on_abort"].required = False  # nothing said = cancel

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or self.cleaned_data
        self._ask(lambda: {"name": routes.clean_name(cleaned.get("name") or "")}, after="name")
        self._ask(lambda: routes.check_free(cleaned["name"], cleaned.get("organization"), self.instance), after="name")
        for field in ("defaults", "overrides"):
            self._ask(lambda field=field: {field: routes.clean_values(field, cleaned.get(field) or {})}, after=field)  # type: ignore[misc]
        self._ask(lambda: {"drops": routes.clean_drops(cleaned.get("drops") or [])}, after="drops")
        self._ask(self._abort, after="on_abort")
        return cleaned

    def _abort(self) -> dict[str, Any]:
        said = routes.clean_abort(self.cleaned_data.get("on_abort") or OnAbort.CANCEL, self.cleaned_data.get("drain_seconds"))
        return dict(zip(("on_abort", "drain_seconds"), said, strict=True))

    def _ask(self, rule: Callable[[], dict[str, Any] | None], *, after: str) -> None:
        """What the rule makes of a field, unless that has been complained of already."""
        if after in self.errors:
            return
        try:
            self.cleaned_data |= rule() or {}
        except ValidationError as problem:
            for field, words in problem.message_dict.items():
                self.add_error(field if field in self.fields else None, words)


class RouteTargetForm(forms.ModelForm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("position", "weight"):
            self.fields[name].required = False
        if not self.instance.pk:
            self.initial["position"] = None  # behind those above it

    def clean_weight(self) -> int:
        weight = self.cleaned_data.get("weight")
        return 1 if weight is None else int(weight)


class Targets(BaseInlineFormSet):
    def clean(self) -> None:
        super().clean()
        if any(self.errors):
            return
        leads: list[Leads] = []
        for form in self.forms:
            said = form.cleaned_data
            if not said.get("model") or said.get("DELETE"):
                continue
            if said.get("position") is None:
                said["position"] = form.instance.position = max((lead.position for lead in leads), default=-1) + 1
            leads.append(Leads(said["model"], said["position"], said["weight"]))
        try:
            routes.clean_targets(self.instance.name, leads)
        except ValidationError as problem:
            raise ValidationError(problem.messages) from None


class RouteTargetInline(TabularInline):
    model = RouteTarget
    form = RouteTargetForm
    formset = Targets
    fields = ("position", "model", "weight")
    extra = 1
    min_num = 1


@admin.register(Route)
class RouteAdmin(Audited):
    audit_name = "alias"
    form = RouteForm
    fieldsets = (
        (None, {"fields": ("name", "organization")}),
        (
            "Parameters",
            {"fields": ("defaults", "overrides", "drops"), "description": "What it does to a request: first the drops, then the others."},
        ),
        ("When the client leaves", {"fields": ("on_abort", "drain_seconds")}),
    )
    inlines = (RouteTargetInline,)
    list_display = ("name", "leads_to", "for_whom", "parameters")
    list_filter = ("organization",)
    search_fields = ("name",)
    ordering = ("name", "pk")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Route]:
        return super().get_queryset(request).select_related("organization").prefetch_related("targets")

    @display(description="leads to")
    def leads_to(self, route: Route) -> str:
        ranks = [list(tied) for _, tied in groupby(route.targets.all(), key=lambda target: target.position)]
        return " → ".join(_in_turns(tied) for tied in ranks) or "nothing"

    @display(description="for")
    def for_whom(self, route: Route) -> str:
        return str(route.organization) if route.organization else "everybody"

    @display(description="parameters")
    def parameters(self, route: Route) -> str:
        return ", ".join([*route.defaults, *(f"{name}!" for name in route.overrides), *(f"no {name}" for name in route.drops)]) or "as sent"


def _in_turns(tied: list[RouteTarget]) -> str:
    return tied[0].model if len(tied) == 1 else " | ".join(f"{target.model} × {target.weight}" for target in tied)


@admin.register(FrozenModel)
class FrozenModelAdmin(Audited):
    """Nobody calls these until they thaw, which they do by themselves."""

    audit_name = "frozen model"
    fields = ("pattern", "organization", "until", "reason")
    list_display = ("pattern", "organization", "until", "reason")
    list_select_related = ("organization",)
    search_fields = ("pattern",)
    ordering = ("-until",)

    def get_form(self, request: HttpRequest, obj: FrozenModel | None = None, change: bool = False, **kwargs: Any) -> Any:
        return super().get_form(request, obj, change=change, **{**kwargs, "help_texts": {"until": "In UTC."}})


@admin.register(Rest)
class RestAdmin(ModelAdmin):
    """What upstreams asked for, what we chose, and who was ejected. Taking one away lets the account be tried again within seconds."""

    list_display = ("credential", "shown_model", "why", "until")
    list_select_related = ("credential",)
    ordering = ("-until",)
    fields = readonly_fields = ("credential", "shown_model", "why", "until")

    @display(description="model")
    def shown_model(self, rest: Rest) -> str:
        return rest.model or "all of them"

    @display(description="why")
    def why(self, rest: Rest) -> str:
        return why_it_rests(rest)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def delete_model(self, request: HttpRequest, obj: Rest) -> None:
        self._note(request, obj)
        super().delete_model(request, obj)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Rest]) -> None:
        for rest in queryset:
            self._note(request, rest)
        super().delete_queryset(request, queryset)

    def _note(self, request: HttpRequest, rest: Rest) -> None:
        record(cast(User, request.user), rest.credential.organization, "rest.cleared", f"{rest.credential}: {rest}")


# The log and its sums


class WindowFilter(admin.SimpleListFilter):
    """Always in force: without a choice it is the last 24 hours. One request's id is looked up whenever it was."""

    title = "time"
    parameter_name = "window"
    column: ClassVar[str] = "at"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(name, title) for name, (_, title) in _WINDOWS.items()]

    def value(self) -> str:
        said = super().value()
        return said if said in _WINDOWS else _DEFAULT_WINDOW

    def choices(self, changelist: Any) -> Iterator[Any]:
        for name, title in self.lookup_choices:
            yield {
                "selected": self.value() == name,
                "query_string": changelist.get_query_string({self.parameter_name: name}),
                "display": title,
            }

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if request.GET.get("q") and self.column == "at":
            return queryset
        length, _ = _WINDOWS[self.value()]
        return queryset.filter(**{f"{self.column}__gte": timezone.now() - length})


class SlotFilter(WindowFilter):
    column = "slot"


class HourFilter(WindowFilter):
    column = "hour"


class OutcomeFilter(admin.SimpleListFilter):
    title = "outcome"
    parameter_name = "outcome"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("good", "Answered"), ("failed", "Failed"), ("unpriced", "Unpriced")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if self.value() == "unpriced":
            return queryset.filter(cost=None)
        bounds = {"good": {"status__lt": 400}, "failed": {"status__gte": 400}}
        return queryset.filter(**bounds.get(self.value() or "", {}))


class Older:
    """In the place of a paginator: a list goes on at a row, not at a number of rows that would have to be passed by."""

    template_name = "admin/older.html"

    def __init__(self, per_page: int, url: str) -> None:
        self.per_page, self.url = per_page, url


class NewestFirst(ChangeList):
    """Rows in the order of an index, whatever the address asks for. `before` in the address says where it goes on."""

    def __init__(self, request: HttpRequest, *args: Any, **kwargs: Any) -> None:
        # Taken out, so that a filter that is chosen begins with the newest rows again.
        asked = request.GET.copy()
        self.before = (asked.pop(BEFORE, None) or [""])[-1]
        request.GET = asked  # type: ignore[assignment]
        super().__init__(request, *args, **kwargs)

    def get_ordering(self, request: HttpRequest, queryset: QuerySet[Any]) -> list[str]:
        return list(self.model_admin.ordering)

    def get_results(self, request: HttpRequest) -> None:
        column = self.model_admin.ordering[0].removeprefix("-")
        rows = list(self._older(request, column)[: self.list_per_page + 1])
        page = rows[: self.list_per_page]
        place = f"{getattr(page[-1], column).isoformat()}~{page[-1].pk}" if len(rows) > len(page) else ""
        self.newest_url = self.get_query_string()
        # The same figure twice: else the head of the page offers as all of them the rows of this page.
        self.result_list, self.result_count, self.full_result_count = page, len(page), len(page)
        self.show_full_result_count = self.show_admin_actions = self.can_show_all = False
        self.multi_page, self.page_num = False, 1  # there are no numbers of pages
        self.paginator = Older(self.list_per_page, self.get_query_string({BEFORE: place}) if place else "")

    def _older(self, request: HttpRequest, column: str) -> QuerySet[Any]:
        if not self.before:
            return self.queryset
        moment, _, number = self.before.partition("~")
        try:
            at, pk = datetime.fromisoformat(moment), self.model._meta.pk.to_python(number)
            at = at.replace(tzinfo=at.tzinfo or UTC).astimezone(UTC)
        except (ValueError, OverflowError, ValidationError):
            messages.warning(request, "There is no such page: these are the newest rows.")
            self.before = ""
            return self.queryset
        return self.queryset.filter(Q(**{f"{column}__lt": at}) | Q(**{column: at, "pk__lt": pk}), **{f"{column}__lte": at})


class ReadOnly(ModelAdmin):
    """A table that only the gateway writes."""

    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    list_per_page = 50
    list_max_show_all = 0
    list_fullwidth = True
    actions = None
    sortable_by = ()
    window: ClassVar[type[WindowFilter]]
    # What may be asked of it in the address, besides its own filters.
    lookups: ClassVar[frozenset[str]] = frozenset()

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return NewestFirst

    def get_list_filter(self, request: HttpRequest) -> list[Any]:
        # Appended here, so that no subclass can be without it.
        return [self.window, *self.list_filter]

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest | None = None) -> bool:
        return lookup in self.lookups or lookup in {WindowFilter.parameter_name, OutcomeFilter.parameter_name}

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


def _name(model: type[Model], column: str, reference: str) -> Coalesce:
    """What a reference without a constraint is called, without a join: a join could change the order in which rows are read."""
    return Coalesce(Subquery(model._default_manager.filter(pk=OuterRef(reference)).values(column)[:1]), Value(""), output_field=CharField())


def _of_request(events: QuerySet[UsageEvent], request_id: uuid.UUID) -> QuerySet[UsageEvent]:
    """By the moment inside the id, too: without it every month of the log would be searched."""
    return events.filter(at=moment_of(request_id), pk=request_id)


def _in_one_line(at: datetime, written: str) -> str:
    """Signs at which a narrow column would break the line are replaced by their unbreakable twins."""
    return at.astimezone(UTC).strftime(written).replace(" ", "\N{NO-BREAK SPACE}").replace("-", "\N{NON-BREAKING HYPHEN}")


@admin.register(UsageEvent)
class UsageEventAdmin(ReadOnly):
    window = WindowFilter
    list_display = ("when", "whose", "models", "shown_status", "tokens", "shown_cost", "usage_source", "took")
    list_filter = (OutcomeFilter, "usage_source")
    lookups = frozenset({"key__id__exact", "organization__id__exact", "usage_source__exact"})
    ordering = ("-at", "-request_id")
    search_fields = ("request_id",)
    search_help_text = "The x-request-id of one request, whole."
    fieldsets = (
        (
            None,
            {"fields": ("request_id", "at", "endpoint", "model", "served_model", "provider", "stream", "attempts", "earlier", "corrects")},
        ),
        ("Whose", {"fields": ("its_organization", "its_user", "its_key", "its_credential")}),
        ("What came of it", {"fields": ("status", "error", "first_byte", "took")}),
        (
            "What it used",
            {
                "fields": (
                    "usage_source",
                    "fresh_input",
                    "cache_read",
                    "cache_write",
                    "output",
                    "reasoning",
                    "shown_cost",
                    "price_id",
                    "told_cost",
                )
            },
        ),
    )
    readonly_fields = (
        "its_organization",
        "its_user",
        "its_key",
        "its_credential",
        "shown_cost",
        "told_cost",
        "first_byte",
        "took",
        "earlier",
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[UsageEvent]:
        return (
            super()
            .get_queryset(request)
            .annotate(
                organization_name=_name(Organization, "slug", "organization_id"),
                user_email=_name(User, "email", "user_id"),
                key_name=_name(ApiKey, "name", "key_id"),
                credential_label=_name(Credential, "label", "credential_id"),
            )
        )

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> UsageEvent | None:
        try:
            return _of_request(self.get_queryset(request), uuid.UUID(object_id)).first()
        except ValueError:
            return None

    def get_search_results(self, request: HttpRequest, queryset: QuerySet[Any], search_term: str) -> tuple[QuerySet[Any], bool]:
        if not search_term:
            return queryset, False
        try:
            return _of_request(queryset, uuid.UUID(search_term.strip())), False
        except ValueError:
            messages.warning(request, "Search for the whole id of a request, as its x-request-id header gave it.")
            return queryset.none(), False

    @display(description="at (UTC)")
    def when(self, event: UsageEvent) -> str:
        return _in_one_line(event.at, "%Y-%m-%d %H:%M:%S")

    @display(description="model")
    def models(self, event: UsageEvent) -> str:
        other = event.served_model and event.served_model != event.model
        return f"{event.model} → {event.served_model}" if other else event.model

    @display(description="organization · key")
    def whose(self, event: Any) -> str:
        return f"{event.organization_name or event.organization_id} · {event.key_name or event.key_id}"

    @display(description="organization")
    def its_organization(self, event: Any) -> str:
        return event.organization_name or str(event.organization_id)

    @display(description="user")
    def its_user(self, event: Any) -> str:
        return event.user_email or str(event.user_id)

    @display(description="key")
    def its_key(self, event: Any) -> str:
        return f"{event.key_name or '(gone)'} (number {event.key_id})"

    @display(description="credential")
    def its_credential(self, event: Any) -> str:
        return event.credential_label or str(event.credential_id or "none")

    @display(description="attempts before the last")
    def earlier(self, event: UsageEvent) -> str:
        tried = event.tried or []
        labels = dict(Credential.objects.filter(pk__in=[one["credential"] for one in tried]).values_list("pk", "label"))
        lines = [(labels.get(one["credential"], one["provider"]), came_to(one)) for one in tried]
        return format_html_join(mark_safe("<br>"), "{}: {}", lines) or "none"

    @display(description="status", label={"good": "success", "left": "warning", "failed": "danger"})
    def shown_status(self, event: UsageEvent) -> tuple[str, str]:
        kind = "good" if event.status < 400 else "left" if event.status == 499 else "failed"
        return kind, f"{event.status} {event.error}".strip()

    @display(description="tokens in / out")
    def tokens(self, event: UsageEvent) -> str:
        return f"{event.input_tokens:,} / {event.output_tokens:,}"

    @display(description="cost")
    def shown_cost(self, event: UsageEvent) -> str:
        return exact_usd(event.cost)

    @display(description="the upstream says")
    def told_cost(self, event: UsageEvent) -> str:
        return "-" if event.upstream_cost is None else exact_usd(event.upstream_cost)

    @display(description="first byte after")
    def first_byte(self, event: UsageEvent) -> str:
        return milliseconds(event.first_byte_ms)

    @display(description="time taken")
    def took(self, event: UsageEvent) -> str:
        return milliseconds(event.duration_ms)


@admin.register(UsageTotal)
class UsageTotalAdmin(ReadOnly):
    window = SlotFilter
    fields = (*totals.TABLES[0].dimensions, *totals.SUMS)
    list_display = ("when", "whose", "provider", "model", "requests", "errors", "tokens", "shown_cost", "unpriced", "estimated")
    lookups = frozenset({"key_id", "organization_id"})
    ordering = ("-slot", "-pk")

    def get_queryset(self, request: HttpRequest) -> QuerySet[UsageTotal]:
        return (
            super()
            .get_queryset(request)
            .annotate(
                organization_name=_name(Organization, "slug", "organization_id"),
                key_name=_name(ApiKey, "name", "key_id"),
            )
        )

    @display(description="quarter from (UTC)")
    def when(self, total: UsageTotal) -> str:
        return _in_one_line(total.slot, "%Y-%m-%d %H:%M")

    @display(description="organization · key")
    def whose(self, total: Any) -> str:
        return f"{total.organization_name or total.organization_id} · {total.key_name or total.key_id}"

    @display(description="tokens in / out")
    def tokens(self, total: UsageTotal) -> str:
        return f"{total.fresh_input + total.cache_read + total.cache_write:,} / {total.output + total.reasoning:,}"

    @display(description="cost")
    def shown_cost(self, total: UsageTotal) -> str:
        return usd(None if total.unpriced > 0 and total.cost == 0 else total.cost)


@admin.register(RefusedCalls)
class RefusedCallsAdmin(ReadOnly):
    window = HourFilter
    list_display = ("when", "whose", "status", "reason", "count")
    lookups = frozenset({"key_id"})
    ordering = ("-hour", "-pk")

    def get_queryset(self, request: HttpRequest) -> QuerySet[RefusedCalls]:
        return super().get_queryset(request).annotate(key_name=_name(ApiKey, "name", "key_id"))

    @display(description="hour from (UTC)")
    def when(self, refused: RefusedCalls) -> str:
        return _in_one_line(refused.hour, "%Y-%m-%d %H:%M")

    @display(description="key")
    def whose(self, refused: Any) -> str:
        return (refused.key_name or str(refused.key_id)) if refused.key_id else "nobody’s"

    @display(description="code")
    def reason(self, refused: RefusedCalls) -> str:
        if refused.code.startswith(SHADOW):
            return f"{refused.code.removeprefix(SHADOW)} (shadow: let through)"
        return refused.code
