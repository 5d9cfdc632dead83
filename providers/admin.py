"""The operators' admin of upstream accounts, the models they list, and prices.

A secret goes in and never comes out: its field is always empty, and empty means that the one in place is kept. All
writing is done by `actions`; a form only asks them first whether they would refuse. Who may open it is said once, by
the site itself: operators alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db.models import Count, Model, QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect
from django.utils import timezone
from unfold.admin import ModelAdmin
from unfold.decorators import action, display
from unfold.widgets import UnfoldAdminDecimalFieldWidget, UnfoldAdminPasswordWidget, UnfoldBooleanSwitchWidget

from providers import actions, given
from providers.models import Credential, Price, State, UpstreamModel

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
        help_text="I know what the vendor's terms say of this kind. Needed for kinds that are restricted or ended.",
    )

    class Meta:
        model = Credential
        fields = ["kind", "label", "prefix", "base_url", "organization", "user", "settings", "weight", "priority", "state"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "prefix" in self.fields:
            self.fields["prefix"].required = False
            self.fields["prefix"].help_text = "Public model ids are prefix/model. Empty = the kind."

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
        self._ask(lambda: given.settings(adapter, cleaned.get("settings") or {}))
        self._ask(lambda: given.weight(cleaned.get("weight") or 0))
        if cleaned.get("new_secret") or not self.instance.pk:
            self._ask(lambda: given.secret(adapter, cleaned.get("new_secret") or ""))
        elif adapter.needs_secret and not self.instance.secret and cleaned.get("state") == State.ACTIVE:
            self.add_error("state", "It has no secret: give one first.")
        if not self.instance.pk:
            self._ask(lambda: given.policy(adapter, accepted=bool(cleaned.get("accept_policy"))))
        return cleaned

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
    list_display = ("label", "kind_name", "prefix", "owner", "state_label", "weight", "priority", "listed", "problem")
    list_filter = ("state", "kind", "organization")
    list_select_related = ("organization", "user")
    list_per_page = 50
    search_fields = ("label", "prefix", "base_url")
    ordering = ("prefix", "-priority", "label")
    autocomplete_fields = ("organization", "user")
    actions = ("refresh_chosen", "disable_chosen", "enable_chosen")
    actions_detail = ("refresh_now",)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Credential]:
        # The sealed secret is of no use to any page here.
        return super().get_queryset(request).annotate(models_listed=Count("models"))

    def get_fieldsets(self, request: HttpRequest, obj: Credential | None = None) -> Any:
        account = ("label", "base_url", "new_secret") if obj else ("kind", "label", "base_url", "new_secret", "accept_policy")
        use = ("prefix", "organization", "user", "weight", "priority")
        fieldsets = [
            (None, {"fields": ("kind_label", *account) if obj else account}),
            ("Use", {"fields": (*use, "state") if obj else use}),
            ("Settings", {"fields": ("settings",), "description": "For every kind: pass_through, listed_only, proxy_url, ca_pem."}),
        ]
        if obj:
            fieldsets.append(("Now", {"fields": ("has_secret", "listed", "models_refreshed_at", "last_error", "created_at")}))
        return fieldsets

    def get_readonly_fields(self, request: HttpRequest, obj: Credential | None = None) -> tuple[str, ...]:
        return ("kind_label", "has_secret", "listed", "models_refreshed_at", "last_error", "created_at") if obj else ()

    @display(description="kind")
    def kind_label(self, credential: Credential) -> str:
        return credential.get_kind_display()

    @display(description="kind", ordering="kind")
    def kind_name(self, credential: Credential) -> str:
        return credential.kind

    @display(description="for")
    def owner(self, credential: Credential) -> str:
        owners = [str(owner) for owner in (credential.organization, credential.user) if owner is not None]
        return ", ".join(owners) or "everybody"

    @display(description="state", label={"Active": "success", "Disabled": "warning", "needs sign-in": "danger"})
    def state_label(self, credential: Credential) -> str:
        return credential.get_state_display()

    @display(description="models listed")
    def listed(self, credential: Credential) -> int:
        return int(getattr(credential, "models_listed", 0))

    @display(description="last problem")
    def problem(self, credential: Credential) -> str:
        return credential.last_error[:80]

    @display(description="secret")
    def has_secret(self, credential: Credential) -> str:
        return "sealed" if credential.secret else "none"

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
        for note in actions.change_credential(obj, secret=said["new_secret"], actor=_actor(request), **changes):
            self.message_user(request, note, messages.WARNING)

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

    @admin.action(description="Disable", permissions=["change"])
    def disable_chosen(self, request: HttpRequest, queryset: QuerySet[Credential]) -> None:
        self._each(request, queryset, actions.disable)

    @admin.action(description="Enable", permissions=["change"])
    def enable_chosen(self, request: HttpRequest, queryset: QuerySet[Credential]) -> None:
        self._each(request, queryset, actions.enable)

    def _each(self, request: HttpRequest, credentials: Iterable[Credential], deed: Callable[..., None]) -> None:
        for credential in credentials:
            try:
                deed(credential, actor=_actor(request))
            except ValidationError as problem:
                self.message_user(request, f"{credential}: {' '.join(problem.messages)}", messages.ERROR)
            else:
                self.message_user(request, f"{credential} is {credential.get_state_display().lower()} now.", messages.SUCCESS)


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


def _usd_field(help_text: str, *, required: bool = False) -> forms.DecimalField:
    return forms.DecimalField(
        min_value=Decimal(0),
        max_value=Decimal(given.DEAREST_USD),
        decimal_places=6,
        required=required,
        help_text=help_text,
        widget=UnfoldAdminDecimalFieldWidget(attrs={"step": "0.000001"}),
    )


class PriceForm(forms.ModelForm):
    input_usd = _usd_field("USD per million tokens.", required=True)
    output_usd = _usd_field("USD per million tokens.", required=True)
    cached_usd = _usd_field("Input read from the upstream's cache. Empty = as plain input.")
    cache_write_usd = _usd_field("Input written to it. Empty = as plain input.")

    class Meta:
        model = Price
        fields = ["pattern", "starts_at"]

    def clean_pattern(self) -> str:
        try:
            return given.pattern(self.cleaned_data["pattern"])
        except ValidationError as problem:
            raise ValidationError(problem.messages) from None


@admin.register(Price)
class PriceAdmin(ModelAdmin):
    """A price never changes: a new one is a new row. One that has not begun may still be taken back."""

    list_display = ("pattern", "starts_at", "input_usd", "output_usd", "cached_usd", "cache_write_usd", "long_usd", "source")
    list_filter = ("source",)
    search_fields = ("pattern",)
    ordering = ("pattern", "-starts_at")
    list_per_page = 100
    show_full_result_count = False

    def get_form(self, request: HttpRequest, obj: Price | None = None, change: bool = False, **kwargs: Any) -> Any:
        return super().get_form(request, obj, change=change, **kwargs if obj else {**kwargs, "form": PriceForm})

    def get_fields(self, request: HttpRequest, obj: Price | None = None) -> tuple[str, ...]:
        amounts = ("input_usd", "output_usd", "cached_usd", "cache_write_usd")
        return ("pattern", *amounts, "long_usd", "starts_at", "source", "created_at") if obj else ("pattern", *amounts, "starts_at")

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
