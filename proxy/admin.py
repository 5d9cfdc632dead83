"""The operators' admin of aliases, and a window onto what was used.

The log grows without end, so nothing here counts it, sorts it, or looks at all of it: a list shows the newest rows of a
window of time, a page at a time, and a search is for one request's id.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db.models import CharField, Model, OuterRef, QuerySet, Subquery, Value
from django.db.models.functions import Coalesce
from django.forms.models import BaseInlineFormSet
from django.http import HttpRequest
from django.utils import timezone
from unfold.admin import ModelAdmin, TabularInline
from unfold.decorators import display
from unfold.paginator import InfinitePaginator
from unfold.views import ChangeList

from accounts.admin import Audited
from accounts.models import ApiKey, Organization, User
from providers.models import Credential
from proxy.models import RefusedCalls, Route, RouteTarget, UsageEvent, UsageTotal
from proxy.queries import SHADOW
from proxy.templatetags.show import milliseconds, usd

MOST_PAGES = 20
_WINDOWS = {"1h": (timedelta(hours=1), "Last hour"), "24h": (timedelta(hours=24), "Last 24 hours")}
_WINDOWS |= {f"{days}d": (timedelta(days=days), f"Last {days} days") for days in (7, 30, 90)}
_DEFAULT_WINDOW = "24h"


# Aliases


class RouteForm(forms.ModelForm):
    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or self.cleaned_data
        same = Route.objects.filter(name=cleaned.get("name"), organization=cleaned.get("organization")).exclude(pk=self.instance.pk)
        if same.exists():
            self.add_error("name", "There is already an alias of this name.")
        return cleaned


class Targets(BaseInlineFormSet):
    def clean(self) -> None:
        super().clean()
        names = [
            form.cleaned_data["model"] for form in self.forms if form.cleaned_data.get("model") and not form.cleaned_data.get("DELETE")
        ]
        if not names:
            raise ValidationError("An alias leads to at least one model.")
        if self.instance.name in names:
            raise ValidationError("An alias cannot lead to itself.")


class RouteTargetInline(TabularInline):
    model = RouteTarget
    formset = Targets
    fields = ("position", "model")
    extra = 1
    min_num = 1


@admin.register(Route)
class RouteAdmin(Audited):
    audit_name = "alias"
    form = RouteForm
    fields = ("name", "organization")
    inlines = (RouteTargetInline,)
    list_display = ("name", "leads_to", "for_whom")
    list_filter = ("organization",)
    search_fields = ("name",)
    ordering = ("name", "pk")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Route]:
        return super().get_queryset(request).select_related("organization").prefetch_related("targets")

    @display(description="leads to")
    def leads_to(self, route: Route) -> str:
        return " → ".join(target.model for target in route.targets.all()) or "nothing"

    @display(description="for")
    def for_whom(self, route: Route) -> str:
        return str(route.organization) if route.organization else "everybody"


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


class NewestFirst(ChangeList):
    """Rows in the order of an index, whatever the address asks for; a limited number of pages."""

    def get_ordering(self, request: HttpRequest, queryset: QuerySet[Any]) -> list[str]:
        return list(self.model_admin.ordering)

    def get_results(self, request: HttpRequest) -> None:
        asked: int = self.page_num  # type: ignore[has-type]
        self.page_num = min(asked, MOST_PAGES)
        if asked > MOST_PAGES:
            messages.info(request, f"Lists end at page {MOST_PAGES}: choose a shorter time or another filter to see other rows.")
        super().get_results(request)


class ReadOnly(ModelAdmin):
    """A table that only the gateway writes."""

    paginator = InfinitePaginator
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
        (None, {"fields": ("request_id", "at", "endpoint", "model", "served_model", "provider", "stream", "attempts", "corrects")}),
        ("Whose", {"fields": ("its_organization", "its_user", "its_key", "its_credential")}),
        ("What came of it", {"fields": ("status", "error", "first_byte", "took")}),
        (
            "What it used",
            {"fields": ("usage_source", "fresh_input", "cache_read", "cache_write", "output", "reasoning", "shown_cost", "price_id")},
        ),
    )
    readonly_fields = ("its_organization", "its_user", "its_key", "its_credential", "shown_cost", "first_byte", "took")

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

    def get_search_results(self, request: HttpRequest, queryset: QuerySet[Any], search_term: str) -> tuple[QuerySet[Any], bool]:
        if not search_term:
            return queryset, False
        try:
            return queryset.filter(request_id=uuid.UUID(search_term.strip())), False
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

    @display(description="status", label={"good": "success", "left": "warning", "failed": "danger"})
    def shown_status(self, event: UsageEvent) -> tuple[str, str]:
        kind = "good" if event.status < 400 else "left" if event.status == 499 else "failed"
        return kind, f"{event.status} {event.error}".strip()

    @display(description="tokens in / out")
    def tokens(self, event: UsageEvent) -> str:
        return f"{event.input_tokens:,} / {event.output_tokens:,}"

    @display(description="cost")
    def shown_cost(self, event: UsageEvent) -> str:
        return usd(event.cost)

    @display(description="first byte after")
    def first_byte(self, event: UsageEvent) -> str:
        return milliseconds(event.first_byte_ms)

    @display(description="time taken")
    def took(self, event: UsageEvent) -> str:
        return milliseconds(event.duration_ms)


@admin.register(UsageTotal)
class UsageTotalAdmin(ReadOnly):
    window = SlotFilter
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
