"""The operators' admin of upstream accounts, the models they list, and prices.

A secret goes in and never comes out: its field is always empty, and empty means that the one in place is kept. All
writing is done by `actions`; a form only asks them first whether they would refuse. Who may open it is said once, by
the site itself: operators alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db.models import Count, Model, QuerySet
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from unfold.admin import ModelAdmin
from unfold.decorators import action, display
from unfold.views import ChangeList
from unfold.widgets import UnfoldAdminDecimalFieldWidget, UnfoldAdminPasswordWidget, UnfoldBooleanSwitchWidget

from providers import actions, given, queries, registry, signin, tokens
from providers.adapter import Adapter
from providers.models import Credential, Price, State, UpstreamModel
from providers.oauth import CodePending, DevicePending, OAuthFailed, TokenSet
from providers.secrets import SealBroken
from providers.signin import Pending

MICRO = 1_000_000


# Upstream accounts


class CredentialForm(forms.ModelForm):
    # Not named like the column: that one is written by `actions` alone.
    new_secret = forms.CharField(
        label="Secret",
        required=False,
        max_length=1 << 20,
        widget=UnfoldAdminPasswordWidget(attrs={"autocomplete": "new-password"}, render_value=False),
        help_text="Sealed at once and never shown again. Empty = the one in place is kept.",
    )
    accept_policy = forms.BooleanField(
        required=False,
        widget=UnfoldBooleanSwitchWidget,
        help_text="I know what the vendor's terms say of this kind. Needed where that is restricted or ended; it is recorded.",
    )

    class Meta:
        model = Credential
        fields = ["kind", "label", "prefix", "base_url", "organization", "user", "settings", "weight", "priority", "state"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "kind" in self.fields:
            # Whatever stood first would be taken for a recommendation, or be taken without a look.
            self.fields["kind"].choices = [("", "Choose one"), *registry.choices()]  # type: ignore[attr-defined]
        if self.instance.pk:
            self.initial["settings"] = given.masked(self.instance.settings)
        if "prefix" in self.fields:
            self.fields["prefix"].required = False
            self.fields["prefix"].help_text = "Public model ids are prefix/model. Empty = the kind."

    def clean_settings(self) -> dict[str, Any]:
        said = self.cleaned_data["settings"] or {}
        if not isinstance(said, dict):
            raise ValidationError('Settings are a JSON object, such as {"listed_only": true}.')
        return given.unmasked(said, self.instance.settings if self.instance.pk else {})

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or self.cleaned_data
        kind = self.instance.kind if self.instance.pk else cleaned.get("kind")
        if not kind:
            return cleaned
        cleaned["prefix"] = cleaned.get("prefix") or kind
        adapter = given.kind(kind)
        self._ask(lambda: given.label(cleaned.get("label", "")))
        self._ask(lambda: given.prefix(cleaned["prefix"]))
        self._ask(lambda: given.base_url(adapter, cleaned.get("base_url") or ""))
        self._ask(lambda: cleaned.update(settings=given.settings(adapter, cleaned.get("settings") or {})))
        self._ask(lambda: given.weight(cleaned.get("weight") or 0))
        settings = cleaned.get("settings") or {}
        secret = cleaned.get("new_secret") or ""
        if secret or not (self.instance.pk or given.signs_in(adapter, settings)):
            self._ask(lambda: given.secret_or_tokens(adapter, secret, settings))
        elif self.instance.pk and cleaned.get("state") == State.ACTIVE:
            self._ask(lambda: actions.check_it_may_call(self.instance, settings, before=self.initial["state"]))
        self._ask(lambda: self._policy(adapter, cleaned))
        return cleaned

    def _policy(self, adapter: Adapter, cleaned: dict[str, Any]) -> None:
        accepted = bool(cleaned.get("accept_policy"))
        settings = given.settings(adapter, cleaned.get("settings") or {})
        if self.instance.pk:
            given.policy_after_change(adapter, self.instance.settings, settings, accepted=accepted)
        else:
            given.policy(adapter, settings, accepted=accepted)

    def _ask(self, rule: Callable[[], object]) -> None:
        try:
            rule()
        except ValidationError as problem:
            for field, words in problem.message_dict.items():
                field = "new_secret" if field == "secret" else field
                if field not in self.errors:
                    self.add_error(field if field in self.fields else None, words)


@admin.register(Credential)
class CredentialAdmin(ModelAdmin):
    form = CredentialForm
    # How it stands comes before what seldom changes: a narrow window cuts the end off.
    list_display = (
        "label",
        "kind_name",
        "prefix",
        "owner",
        "state_label",
        "problem",
        "resting",
        "renewed_next",
        "listed",
        "policy_label",
        "weight",
        "priority",
    )
    list_filter = ("state", "kind", "organization")
    list_select_related = ("organization", "user", "policy_accepted_by", "token")
    list_per_page = 50
    search_fields = ("label", "prefix", "base_url")
    ordering = ("prefix", "-priority", "label")
    autocomplete_fields = ("organization", "user")
    actions = (
        "refresh_chosen",
        "renew_chosen",
        "disable_chosen",
        "enable_chosen",
        "freeze_for_an_hour",
        "freeze_for_a_day",
        "thaw_chosen",
    )
    actions_detail = ("refresh_now", "sign_in")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Credential]:
        # The sealed secret is of no use to any page here.
        return super().get_queryset(request).select_related("token").prefetch_related("rests").annotate(models_listed=Count("models"))

    def get_fieldsets(self, request: HttpRequest, obj: Credential | None = None) -> Any:
        account: tuple[str, ...] = ("label", "base_url", "new_secret", "accept_policy")
        account = ("kind_label", "policy", "accepted", *account) if obj else ("kind", *account)
        use = ("prefix", "organization", "user", "weight", "priority")
        fieldsets = [
            (None, {"fields": account, **({} if obj else {"description": _kinds_with_terms()})}),
            ("Use", {"fields": (*use, "state") if obj else use}),
            ("Settings", {"fields": ("settings",), "description": _settings_of([obj.kind] if obj else registry.names())}),
        ]
        if obj:
            fieldsets.append(("Now", {"fields": self._now(obj)}))
        return fieldsets

    def get_readonly_fields(self, request: HttpRequest, obj: Credential | None = None) -> tuple[str, ...]:
        return ("kind_label", "policy", "accepted", *self._now(obj)) if obj else ()

    def _now(self, credential: Credential) -> tuple[str, ...]:
        times = ("renewed", "good_until", "renewed_next") if queries.token_of(credential) else ()
        return (
            "has_secret",
            *times,
            "standing_problem",
            "listed",
            "models_refreshed_at",
            "allowance",
            "frozen_until",
            "frozen_reason",
            "created_at",
        )

    @display(description="kind")
    def kind_label(self, credential: Credential) -> str:
        return credential.get_kind_display()

    @display(description="kind", ordering="kind")
    def kind_name(self, credential: Credential) -> str:
        return credential.kind

    @display(description="policy", label={"allowed": "success", "restricted": "warning", "ended": "danger", "not accepted": "danger"})
    def policy_label(self, credential: Credential) -> str | tuple[str, str]:
        word = _policy_of(credential)
        if word in ("allowed", "unknown") or credential.policy_accepted_at:
            return word
        return "not accepted", f"{word}, not accepted"

    @display(description="policy")
    def policy(self, credential: Credential) -> str:
        return _terms(registry.adapter(credential.kind), credential.settings) if credential.kind in registry.names() else "unknown"

    @display(description="policy accepted")
    def accepted(self, credential: Credential) -> str:
        if credential.policy_accepted_at is None:
            return "no"
        who = credential.policy_accepted_by or "on the command line"
        return f"{credential.policy_accepted_at:%Y-%m-%d %H:%M} UTC, {who}"

    @display(description="for")
    def owner(self, credential: Credential) -> str:
        owners = [str(owner) for owner in (credential.organization, credential.user) if owner is not None]
        return ", ".join(owners) or "everybody"

    @display(description="state", label={"Active": "success", "expiring": "warning", "Disabled": "warning", "needs sign-in": "danger"})
    def state_label(self, credential: Credential) -> str:
        return _state_of(credential)

    @display(description="signed in, or renewed")
    def renewed(self, credential: Credential) -> datetime | None:
        return queries.standing_of(credential).refreshed_at

    @display(description="good until")
    def good_until(self, credential: Credential) -> datetime | None:
        return queries.standing_of(credential).expires_at

    @display(description="renewed next", ordering="token__next_refresh_at")
    def renewed_next(self, credential: Credential) -> datetime | None:
        return queries.standing_of(credential).next_refresh_at

    @display(description="last problem")
    def standing_problem(self, credential: Credential) -> str:
        standing = queries.standing_of(credential)
        return f"{standing.problem} ({standing.error})" if standing.error else standing.problem

    @display(description="models listed")
    def listed(self, credential: Credential) -> int:
        return int(getattr(credential, "models_listed", 0))

    @display(description="last problem")
    def problem(self, credential: Credential) -> str:
        return queries.standing_of(credential).problem[:80]

    @display(description="rests")
    def resting(self, credential: Credential) -> str:
        """The account, or so many of its models. Why, and how to end it, is on the page of rests."""
        rests = [rest for rest in credential.rests.all() if rest.until > timezone.now()]
        whole = next((rest for rest in rests if not rest.model), None)
        if whole is not None:
            return f"until {_moment(whole.until.isoformat())}"
        return f"{len(rests)} model{'' if len(rests) == 1 else 's'}" if rests else ""

    @display(description="secret")
    def has_secret(self, credential: Credential) -> str:
        if credential.secret:
            return "sealed"
        return "signed in" if queries.token_of(credential) else "none"

    @display(description="allowance")
    def allowance(self, credential: Credential) -> str:
        """What is left of the account, as it said when its models were last asked for."""
        windows = credential.quota.get("windows")
        if not windows:
            return "not told"
        lines = format_html_join("", "{}<br>", ((_window(name, window),) for name, window in windows.items()))
        return format_html("{}read {}", lines, _moment(credential.quota["read_at"]))

    def save_model(self, request: HttpRequest, obj: Credential, form: Any, change: bool) -> None:
        said = form.cleaned_data
        if not change:
            made = actions.add_credential(
                said["kind"],
                said["label"],
                said["new_secret"],
                prefix=said["prefix"],
                base_url=said["base_url"],
                settings=said["settings"] or {},
                weight=said["weight"],
                priority=said["priority"],
                organization=said["organization"],
                user=said["user"],
                accept_policy=said["accept_policy"],
                sign_in_later=True,
                actor=_actor(request),
            )
            obj.pk = made.pk
            obj.refresh_from_db()
            return
        names = {"organization": "organization_id", "user": "user_id"}
        changes = {
            names.get(name, name): said[name].pk if name in names and said[name] is not None else said[name]
            for name in form.changed_data
            if name not in ("new_secret", "accept_policy")
        }
        notes = actions.change_credential(
            obj, secret=said["new_secret"], accept_policy=said["accept_policy"], actor=_actor(request), **changes
        )
        for note in notes:
            self.message_user(request, note, messages.WARNING)

    def response_add(self, request: HttpRequest, obj: Credential, post_url_continue: str | None = None) -> HttpResponse:
        if obj.state == State.NEEDS_REAUTH:
            return redirect("admin:providers_credential_sign_in", obj.pk)
        return super().response_add(request, obj, post_url_continue)

    def delete_model(self, request: HttpRequest, obj: Credential) -> None:
        actions.delete_credential(obj, actor=_actor(request))

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Credential]) -> None:
        for credential in queryset:
            actions.delete_credential(credential, actor=_actor(request))

    def get_deleted_objects(self, objs: Any, request: HttpRequest) -> Any:
        """The confirmation names the accounts alone: their lists of models can be long, and go with them."""
        return [str(credential) for credential in objs], {"upstream accounts": len(objs)}, set(), []

    @action(description="Ask for its models now", url_path="refresh-models", permissions=["change"])
    def refresh_now(self, request: HttpRequest, object_id: str) -> HttpResponse:
        credential = get_object_or_404(Credential, pk=object_id)
        self._refresh(request, [credential])
        return redirect("admin:providers_credential_change", credential.pk)

    @admin.action(description="Ask for their models now", permissions=["change"])
    def refresh_chosen(self, request: HttpRequest, queryset: QuerySet[Credential]) -> None:
        self._refresh(request, list(queryset))

    def _refresh(self, request: HttpRequest, credentials: list[Credential]) -> None:
        for credential, problem in actions.refresh_all(credentials):
            if problem:
                self.message_user(request, f"{credential}: {problem}", messages.ERROR)
            else:
                self.message_user(request, f"{credential}: {credential.models.count()} models listed.", messages.SUCCESS)

    @admin.action(description="Renew their sign-ins now", permissions=["change"])
    def renew_chosen(self, request: HttpRequest, queryset: QuerySet[Credential]) -> None:
        for row in tokens.in_use().filter(credential__in=queryset):
            try:
                tokens.renew(row.pk, row.generation, by_hand=True)
            except (OAuthFailed, SealBroken) as problem:
                self.message_user(request, f"{row.credential}: {problem}", messages.ERROR)
            else:
                self.message_user(request, f"{row.credential} is signed in anew.", messages.SUCCESS)

    # Signing in

    def has_sign_in_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        credential = Credential.objects.filter(pk=int(object_id)).first() if object_id and object_id.isdecimal() else None
        if credential is None or credential.kind not in registry.names():
            return False
        return given.signs_in(registry.adapter(credential.kind), credential.settings)

    @action(description="Sign in", url_path="sign-in", permissions=["change", "sign_in"])
    def sign_in(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Begin, and then paste the address that the browser ended at, or wait until the vendor says that it is done."""
        credential = get_object_or_404(Credential, pk=object_id)
        kept = request.session.get(_pending_name(credential))
        pending = signin.opened(kept, credential) if kept else None
        if request.method != "POST":
            return self._sign_in_page(request, credential, pending)
        step = request.POST.get("step")
        try:
            if step == "begin":
                pending = signin.begin(registry.adapter(credential.kind), credential.settings, credential_id=credential.pk)
                request.session[_pending_name(credential)] = signin.sealed(pending, credential)
            elif pending is not None and (found := _next_step(request, credential, pending)) is not None:
                if isinstance(found, TokenSet):
                    actions.sign_in(credential, found, actor=_actor(request))
                    request.session.pop(_pending_name(credential), None)
                    return self._signed_in(request, credential)
                request.session[_pending_name(credential)] = signin.sealed(found, credential)
                pending = found
        except (OAuthFailed, ValidationError) as problem:
            words = " ".join(problem.messages) if isinstance(problem, ValidationError) else problem.message
            if not isinstance(pending, CodePending) or getattr(problem, "code", "") in ("code_refused", "access_denied"):
                request.session.pop(_pending_name(credential), None)
            self.message_user(request, words, messages.ERROR)
            return self._on(request, credential, done=True)
        return self._on(request, credential, pending=pending)

    def _signed_in(self, request: HttpRequest, credential: Credential) -> HttpResponse:
        self.message_user(request, f"{credential} is signed in.", messages.SUCCESS)
        page = reverse("admin:providers_credential_change", args=[credential.pk])
        return JsonResponse({"go": page}) if _by_script(request) else redirect(page)

    def _on(self, request: HttpRequest, credential: Credential, *, pending: Pending | None = None, done: bool = False) -> HttpResponse:
        """The page goes on: shown anew, or, where its script asked, told how long to wait."""
        page = reverse("admin:providers_credential_sign_in", args=[credential.pk])
        if not _by_script(request):
            return redirect(page)
        if done or not isinstance(pending, DevicePending):
            return JsonResponse({"go": page})
        return JsonResponse({"wait_seconds": pending.interval_seconds})

    def _sign_in_page(self, request: HttpRequest, credential: Credential, pending: Pending | None) -> HttpResponse:
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "title": f"Sign in {credential}",
            "credential": credential,
            "state": _state_of(credential).lower(),
            "problem": queries.standing_of(credential).problem,
            "adapter": registry.adapter(credential.kind),
            "pending": pending,
            "device": isinstance(pending, DevicePending),
        }
        return TemplateResponse(request, "admin/providers/credential/sign_in.html", context)

    @admin.action(description="Disable", permissions=["change"])
    def disable_chosen(self, request: HttpRequest, queryset: QuerySet[Credential]) -> None:
        self._each(request, queryset, actions.disable)

    @admin.action(description="Enable", permissions=["change"])
    def enable_chosen(self, request: HttpRequest, queryset: QuerySet[Credential]) -> None:
        self._each(request, queryset, actions.enable)

    @admin.action(description="Freeze for an hour", permissions=["change"])
    def freeze_for_an_hour(self, request: HttpRequest, queryset: QuerySet[Credential]) -> None:
        self._freeze(request, queryset, timedelta(hours=1))

    @admin.action(description="Freeze for a day", permissions=["change"])
    def freeze_for_a_day(self, request: HttpRequest, queryset: QuerySet[Credential]) -> None:
        self._freeze(request, queryset, timedelta(days=1))

    @admin.action(description="Thaw", permissions=["change"])
    def thaw_chosen(self, request: HttpRequest, queryset: QuerySet[Credential]) -> None:
        for credential in queryset:
            if actions.thaw(credential, actor=_actor(request)):
                self.message_user(request, f"{credential} serves again.", messages.SUCCESS)

    def _freeze(self, request: HttpRequest, queryset: QuerySet[Credential], length: timedelta) -> None:
        for credential in queryset:
            until = actions.freeze(credential, length=length, actor=_actor(request))
            self.message_user(request, f"{credential} gets no calls until {until:%Y-%m-%d %H:%M} UTC.", messages.SUCCESS)

    def _each(self, request: HttpRequest, credentials: Iterable[Credential], deed: Callable[..., None]) -> None:
        for credential in credentials:
            try:
                deed(credential, actor=_actor(request))
            except ValidationError as problem:
                self.message_user(request, f"{credential}: {' '.join(problem.messages)}", messages.ERROR)
            else:
                self.message_user(request, f"{credential} is {credential.get_state_display().lower()} now.", messages.SUCCESS)


def _state_of(credential: Credential) -> str:
    state = queries.standing_of(credential).state
    return state if state == "expiring" else credential.get_state_display()


def _next_step(request: HttpRequest, credential: Credential, pending: Pending) -> TokenSet | Pending | None:
    """What the vendor says now. Raises OAuthFailed, ValidationError."""
    adapter, settings = registry.adapter(credential.kind), credential.settings
    if isinstance(pending, CodePending):
        if request.POST.get("step") != "finish":
            return None
        return signin.with_code(adapter, settings, pending, request.POST.get("pasted", ""), credential_id=credential.pk)
    return signin.poll(adapter, settings, pending, credential_id=credential.pk) if request.POST.get("step") == "poll" else None


def _pending_name(credential: Credential) -> str:
    return f"sign-in-{credential.pk}"


def _by_script(request: HttpRequest) -> bool:
    return request.headers.get("accept") == "application/json"


def _window(name: str, window: dict[str, Any]) -> str:
    """ "week: 40 of 1,000 used, until 2026-08-29 05:20 UTC" """
    used, limit = (_amount(window.get(which), str(window.get("unit", ""))) for which in ("used", "limit"))
    said = f"{used} of {limit} used" if used and limit else f"{used} used" if used else f"limit {limit}" if limit else "no figures"
    return f"{name}: {said}" + (f", until {_moment(window['resets_at'])}" if window.get("resets_at") else "")


def _moment(text: str) -> str:
    return f"{timezone.localtime(datetime.fromisoformat(text)):%Y-%m-%d %H:%M} UTC"


def _amount(value: Any, unit: str) -> str:
    """Empty where there is none."""
    if not isinstance(value, int | float):
        return ""
    return f"{value:,.2f} {unit}" if unit else f"{value:,}"


def _policy_of(credential: Credential) -> str:
    return registry.adapter(credential.kind).policy_for(credential.settings) if credential.kind in registry.names() else "unknown"


_BADGES = {
    "allowed": "bg-green-100 text-green-700 dark:bg-green-500/20 dark:text-green-400",
    "restricted": "bg-orange-100 text-orange-700 dark:bg-orange-500/20 dark:text-orange-400",
    "ended": "bg-red-100 text-red-700 dark:bg-red-500/20 dark:text-red-400",
}


def _terms(adapter: Adapter, settings: Mapping[str, object]) -> SafeString:
    """A badge, what it means, and where the vendor says so."""
    word = adapter.policy_for(settings)
    badge = format_html('<span class="inline-block font-semibold px-2 rounded-default text-xs {}">{}</span>', _BADGES.get(word, ""), word)
    # An adapter may come from an outside package: its link is one only where it leads to a page.
    link = adapter.policy_source if adapter.policy_source.startswith(("https://", "http://")) else ""
    source = format_html(' <a class="underline" href="{}" rel="noreferrer noopener" target="_blank">The vendor’s terms</a>', link)
    return format_html("{} {}{}", badge, adapter.policy_note, source if link else "")


def _kinds_with_terms() -> SafeString:
    rows = ((adapter.title or adapter.name, _terms(adapter, {})) for adapter in map(registry.adapter, registry.names()))
    return format_html('<ul class="flex flex-col gap-1">{}</ul>', format_html_join("", "<li><strong>{}</strong> {}</li>", rows))


def _settings_of(kinds: Iterable[str]) -> SafeString:
    """What may be set for accounts of these kinds."""
    known = [registry.adapter(kind) for kind in kinds if kind in registry.names()]
    rows = ((adapter.title or adapter.name, ", ".join(sorted(adapter.settings)) or "none of its own") for adapter in known)
    return format_html(
        '<p class="mb-2">A JSON object, such as {{"listed_only": true}}. For every kind: {}. {}</p><ul class="flex flex-col gap-1">{}</ul>',
        ", ".join(sorted(given.EVERY_KIND)),
        f"One that is a secret is shown as {given.MASK}, and kept where that stays.",
        format_html_join("", "<li><strong>{}</strong> {}</li>", rows),
    )


def _actor(request: HttpRequest) -> Model:
    assert isinstance(request.user, Model)
    return request.user


@admin.register(UpstreamModel)
class UpstreamModelAdmin(ModelAdmin):
    """What upstreams say they have. Only they can change it."""

    list_display = ("public_id", "credential", "seen_at")
    list_select_related = ("credential",)
    list_filter = ("credential__kind", "credential")
    search_fields = ("upstream_id",)
    ordering = ("credential__prefix", "upstream_id")
    fields = ("public_id", "credential", "upstream_id", "detail", "seen_at")
    readonly_fields = fields

    @display(description="model")
    def public_id(self, model: UpstreamModel) -> str:
        return f"{model.credential.prefix}/{model.upstream_id}"

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


# Prices


def _usd_field(label: str, help_text: str = "", *, required: bool = False) -> forms.DecimalField:
    return forms.DecimalField(
        label=label,
        min_value=Decimal(0),
        max_value=Decimal(given.DEAREST_USD),
        decimal_places=6,
        required=required,
        help_text=f"USD per million tokens. {help_text}".rstrip(),
        widget=UnfoldAdminDecimalFieldWidget(attrs={"step": "0.000001"}),
    )


class PriceForm(forms.ModelForm):
    input_usd = _usd_field("Input", required=True)
    output_usd = _usd_field("Output", required=True)
    cached_usd = _usd_field("Cached input", "Input read from the upstream's cache. Empty = as plain input.")
    cache_write_usd = _usd_field("Cache write", "Input written to the cache. Empty = as plain input.")

    class Meta:
        model = Price
        fields = ["pattern", "starts_at"]
        help_texts = {"starts_at": "In UTC."}

    def clean_pattern(self) -> str:
        try:
            return given.pattern(self.cleaned_data["pattern"])
        except ValidationError as problem:
            raise ValidationError(problem.messages) from None


class PricesNow(ChangeList):
    """Knows of each row that it shows which price is in force for what the row names."""

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        book, now = queries.price_book(), timezone.now().timestamp()
        self.result_list = list(self.result_list)  # type: ignore[has-type]
        for row in self.result_list:
            row.in_force = book.find(row.pattern, now)


@admin.register(Price)
class PriceAdmin(ModelAdmin):
    """A price never changes: a new one is a new row. One that has not begun may still be taken back."""

    list_display = ("pattern", "now", "starts_at", "input_usd", "output_usd", "cached_usd", "cache_write_usd", "long_usd", "source")
    list_filter = ("source",)
    search_fields = ("pattern",)
    ordering = ("pattern", "-starts_at")
    list_per_page = 100

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        return PricesNow

    @display(description="now", label={"in force": "success", "not yet": "info", "replaced": "default", "overruled": "warning"})
    def now(self, price: Price) -> str:
        """Whether a request now is charged by this row. Of what a pattern with * names another, closer one may charge a part."""
        if price.starts_at > timezone.now():
            return "not yet"
        in_force = price.in_force  # type: ignore[attr-defined]
        if in_force.id == price.pk:
            return "in force"
        is_older = price.starts_at.timestamp() <= in_force.starts_at  # else one by hand goes before it
        return "replaced" if in_force.pattern == price.pattern and is_older else "overruled"

    @display(description="in force now")
    def in_force(self, price: Price) -> str:
        found = queries.price_book().find(price.pattern, timezone.now().timestamp())
        if found is None:
            return "none for this"
        if found.id == price.pk:
            return "this one"
        return f"{found.pattern}{', by hand' if found.by_hand else ''}: {_usd(found.input)} in, {_usd(found.output)} out"

    def get_form(self, request: HttpRequest, obj: Price | None = None, change: bool = False, **kwargs: Any) -> Any:
        return super().get_form(request, obj, change=change, **kwargs if obj else {**kwargs, "form": PriceForm})

    def get_fields(self, request: HttpRequest, obj: Price | None = None) -> tuple[str, ...]:
        amounts = ("input_usd", "output_usd", "cached_usd", "cache_write_usd")
        return (
            ("pattern", *amounts, "long_usd", "starts_at", "in_force", "source", "created_at")
            if obj
            else ("pattern", *amounts, "starts_at")
        )

    def get_readonly_fields(self, request: HttpRequest, obj: Price | None = None) -> tuple[str, ...]:
        return self.get_fields(request, obj) if obj else ()

    @display(description="input, USD per million", ordering="input")
    def input_usd(self, price: Price) -> str:
        return _usd(price.input)

    @display(description="output", ordering="output")
    def output_usd(self, price: Price) -> str:
        return _usd(price.output)

    @display(description="cached", ordering="cache_read")
    def cached_usd(self, price: Price) -> str:
        return _usd(price.cache_read)

    @display(description="cache write", ordering="cache_write")
    def cache_write_usd(self, price: Price) -> str:
        return _usd(price.cache_write)

    @display(description="long requests")
    def long_usd(self, price: Price) -> str:
        if price.long_above is None:
            return "as all"
        return f"above {price.long_above:,} input tokens: {_usd(price.long_input)} in, {_usd(price.long_output)} out"

    def save_model(self, request: HttpRequest, obj: Price, form: Any, change: bool) -> None:
        said = form.cleaned_data
        made = actions.set_price(
            said["pattern"],
            said["input_usd"],
            said["output_usd"],
            said["cached_usd"],
            said["cache_write_usd"],
            said["starts_at"],
            actor=_actor(request),
        )
        obj.pk = made.pk
        obj.refresh_from_db()

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return super().has_delete_permission(request, obj) and isinstance(obj, Price) and obj.starts_at > timezone.now()

    def delete_model(self, request: HttpRequest, obj: Price) -> None:
        actions.take_back_price(obj, actor=_actor(request))


def _usd(micro_dollars: int | None) -> str:
    """At least two decimals and never a rounded figure."""
    if micro_dollars is None:
        return "as input"
    whole, part = divmod(micro_dollars, MICRO)
    return f"{whole}.{f'{part:06d}'.rstrip('0').ljust(2, '0')}"
