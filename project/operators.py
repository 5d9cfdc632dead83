"""The operators' admin site: for superusers alone, who sign in on the same page as everybody."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from django.contrib import admin
from django.contrib.auth.views import redirect_to_login
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils.http import url_has_allowed_host_and_scheme
from unfold.sites import UnfoldAdminSite

# Each word of a search is one more condition on each field that is searched: a few hundred are more than a database takes.
MOST_SEARCHED, MOST_WORDS = 64, 8
_SEARCHES = ("q", "s", "term")  # of lists, of the box in the corner, of fields that complete what is typed


class OperatorSite(UnfoldAdminSite):
    def admin_view(self, view: Callable[..., HttpResponse], cacheable: bool = False) -> Callable[..., HttpResponse]:
        @wraps(view)
        def searching_little(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
            searched = [request.GET.get(name, "") for name in _SEARCHES]
            if any(len(words) > MOST_SEARCHED or len(words.split()) > MOST_WORDS for words in searched):
                said = f"A search has at most {MOST_SEARCHED} letters and {MOST_WORDS} words."
                return HttpResponse(said, status=400, content_type="text/plain")
            return view(request, *args, **kwargs)

        checked: Callable[..., HttpResponse] = super().admin_view(searching_little, cacheable)
        return checked

    def has_permission(self, request: HttpRequest) -> bool:
        user = request.user
        return user.is_active and user.is_staff and user.is_superuser

    def login(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> HttpResponse:
        # The admin's own form would take passwords without the limits on attempts that the sign-in page has.
        if self.has_permission(request):
            return super().login(request, extra_context)
        if request.user.is_authenticated:
            raise PermissionDenied("The admin is for the operators of this server. An organization’s keys are on its own pages.")
        wanted = request.GET.get("next", "")
        safe = url_has_allowed_host_and_scheme(wanted, allowed_hosts={request.get_host()}, require_https=request.is_secure())
        return redirect_to_login(wanted if safe else reverse("admin:index"))


# What the side of the admin shows: model, title, icon.
_NAVIGATION: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "Usage",
        (
            ("proxy_usageevent", "Requests", "receipt_long"),
            ("proxy_usagetotal", "Sums", "stacked_bar_chart"),
            ("proxy_refusedcalls", "Refused calls", "block"),
        ),
    ),
    ("Keys", (("accounts_apikey", "Keys", "key"), ("accounts_limit", "Limits", "speed"))),
    (
        "Models",
        (
            ("providers_credential", "Credentials", "vpn_key"),
            ("providers_upstreammodel", "Models", "deployed_code"),
            ("providers_price", "Prices", "sell"),
            ("proxy_route", "Aliases", "alt_route"),
            ("proxy_frozenmodel", "Frozen models", "ac_unit"),
            ("proxy_rest", "Rests", "hourglass_top"),
        ),
    ),
    (
        "People",
        (
            ("accounts_organization", "Organizations", "apartment"),
            ("accounts_membership", "Members", "badge"),
            ("accounts_team", "Teams", "groups"),
            ("accounts_user", "People", "person"),
        ),
    ),
    ("Record", (("accounts_auditentry", "Audit", "history"),)),
)


def navigation(request: HttpRequest) -> list[dict[str, Any]]:
    """The side of the admin, in the order in which operators look for things."""
    known = {f"{model._meta.app_label}_{model._meta.model_name}" for model in admin.site._registry}
    return [
        {
            "title": title,
            "separator": number > 0,
            "items": [
                {"title": name, "icon": icon, "link": reverse(f"admin:{model}_changelist")} for model, name, icon in items if model in known
            ],
        }
        for number, (title, items) in enumerate(_NAVIGATION)
    ]
