"""The operators' admin of people, organizations, keys and limits.

No secret is ever shown or typed here: a key is made by `actions.issue_key` and shown once, on the answer to the form
that made it. Every change leaves an AuditEntry, in the same transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from allauth.account.models import EmailAddress
from django import forms
from django.contrib import admin, messages
from django.contrib.auth.admin import UserAdmin as DjangosUserAdmin
from django.contrib.auth.models import Group
from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import Model, QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from unfold.admin import ModelAdmin
from unfold.decorators import action, display
from unfold.forms import AdminPasswordChangeForm, UserCreationForm
from unfold.widgets import UnfoldAdminDecimalFieldWidget, UnfoldAdminTextareaWidget, UnfoldAdminTextInputWidget

from accounts import actions, policy
from accounts.models import ApiKey, AuditEntry, Limit, Membership, Metric, Organization, Team, User
from accounts.money import in_usd, parse_usd
from accounts.policy import Allowance

# Signing in needs neither: rights come from memberships, and a person's e-mail is on the person.
admin.site.unregister(Group)
admin.site.unregister(EmailAddress)


class Audited(ModelAdmin):
    """Writes an AuditEntry for whatever its forms add, change or delete."""

    list_per_page = 50
    audit_name = ""

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        super().save_related(request, form, formsets, change)
        detail = {field: _now(form, field) for field in form.changed_data if "password" not in field}
        if detail or not change:
            self.audit(request, form.instance, "changed" if change else "created", **detail)

    def delete_model(self, request: HttpRequest, obj: Any) -> None:
        self.audit(request, obj, "deleted")
        super().delete_model(request, obj)

    @transaction.atomic
    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        for obj in queryset:
            self.audit(request, obj, "deleted")
        super().delete_queryset(request, queryset)

    def audit(self, request: HttpRequest, obj: Any, deed: str, **detail: Any) -> None:
        organization = obj if isinstance(obj, Organization) else getattr(obj, "organization", None)
        if isinstance(obj, Organization) and deed == "deleted":
            organization = None
        actions.record(_operator(request), organization, f"{self.audit_name}.{deed}", str(obj), **detail)


class Freezes(ModelAdmin):
    """Freeze and thaw what is chosen in a list; another length, and a reason, go over the API."""

    freezing = ("frozen_until", "frozen_reason")

    def get_actions(self, request: HttpRequest) -> Any:
        found = super().get_actions(request)
        for name, words, length in (("hour", "an hour", timedelta(hours=1)), ("day", "a day", timedelta(days=1))):
            found[f"freeze_for_{name}"] = (self._freezing(length), f"freeze_for_{name}", f"Freeze for {words}")
        found["thaw_chosen"] = (type(self)._thaw, "thaw_chosen", "Thaw")
        return found

    def _freezing(self, length: timedelta) -> Callable[..., None]:
        def freeze(self: Freezes, request: HttpRequest, queryset: QuerySet[Any]) -> None:
            for thing in queryset:
                until = actions.freeze(thing, length=length, actor=_operator(request))
                self.message_user(request, f"{thing} is frozen until {until:%Y-%m-%d %H:%M} UTC.", messages.SUCCESS)

        return freeze

    def _thaw(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        for thing in queryset:
            if actions.thaw(thing, actor=_operator(request)):
                self.message_user(request, f"{thing} may call models again.", messages.SUCCESS)


class NeverDeleted:
    """What the usage log and the audit refer to is switched off or revoked, never deleted."""

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


# People


class UserForm(forms.ModelForm):
    actor: User

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or self.cleaned_data
        if self.instance == self.actor:
            for field in ("is_active", "is_superuser"):
                if not cleaned.get(field):
                    self.add_error(field, "You cannot take this from yourself: another operator has to.")
        return cleaned


@admin.register(User)
class UserAdmin(NeverDeleted, Audited, DjangosUserAdmin):
    audit_name = "user"
    form = UserForm
    add_form = UserCreationForm
    change_password_form = AdminPasswordChangeForm
    fieldsets = (
        (None, {"fields": ("email", "name")}),
        (
            "Access",
            {
                "fields": ("is_active", "is_superuser"),
                "description": "Switched off, a person can neither sign in nor use a key. A superuser is an operator: sees and may do all.",
            },
        ),
        ("Dates", {"fields": ("last_login", "date_joined")}),
    )
    add_fieldsets = ((None, {"fields": ("email", "name", "usable_password", "password1", "password2")}),)
    readonly_fields = ("last_login", "date_joined")
    list_display = ("email", "name", "is_active", "is_superuser", "last_login")
    list_filter = ("is_active", "is_superuser")
    search_fields = ("email", "name")
    ordering = ("email",)
    filter_horizontal = ()
    actions_detail = ("set_password",)

    def get_form(self, request: HttpRequest, obj: User | None = None, change: bool = False, **kwargs: Any) -> Any:
        form = super().get_form(request, obj, change=change, **kwargs)
        return type(form.__name__, (form,), {"actor": request.user})

    def save_model(self, request: HttpRequest, obj: User, form: Any, change: bool) -> None:
        # The two go together: the admin is the only thing that staff may open, and it is for operators.
        obj.is_staff = obj.is_superuser
        super().save_model(request, obj, form, change)

    def response_add(self, request: HttpRequest, obj: User, post_url_continue: str | None = None) -> HttpResponse:
        return ModelAdmin.response_add(self, request, obj, post_url_continue)

    @transaction.atomic
    def user_change_password(self, request: HttpRequest, id: str, form_url: str = "") -> HttpResponse:  # noqa: A002
        before = User.objects.filter(pk=id).values_list("password", flat=True).first()
        response = super().user_change_password(request, id, form_url)
        user = User.objects.filter(pk=id).first()
        if user is not None and user.password != before:
            self.audit(request, user, "password_changed")
        return response

    @action(description="Set a password", url_path="set-password", permissions=["change"])
    def set_password(self, request: HttpRequest, object_id: str) -> HttpResponse:
        return HttpResponseRedirect(reverse("admin:auth_user_password_change", args=[object_id]))


@admin.register(Organization)
class OrganizationAdmin(Freezes, Audited):
    audit_name = "organization"
    fields = ("name", "slug", "time_zone", "is_active", "created_at", *Freezes.freezing)
    readonly_fields = ("created_at", *Freezes.freezing)
    prepopulated_fields = {"slug": ("name",)}
    list_display = ("name", "slug", "time_zone", "is_active", "created_at")
    list_filter = ("is_active",)
    search_fields = ("name", "slug")
    ordering = ("name",)

    def get_prepopulated_fields(self, request: HttpRequest, obj: Organization | None = None) -> Any:
        return {} if obj else self.prepopulated_fields


@admin.register(Team)
class TeamAdmin(Freezes, Audited):
    audit_name = "team"
    fields = ("organization", "name", *Freezes.freezing)
    list_display = ("name", "organization")
    list_select_related = ("organization",)
    list_filter = ("organization",)
    search_fields = ("name", "organization__name")
    ordering = ("organization__name", "name")

    def get_readonly_fields(self, request: HttpRequest, obj: Team | None = None) -> tuple[str, ...]:
        return ("organization", *self.freezing) if obj else self.freezing


class MembershipForm(forms.ModelForm):
    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or self.cleaned_data
        organization = cleaned.get("organization") or self.instance.organization
        if any(team.organization_id != organization.pk for team in cleaned.get("teams", ())):
            self.add_error("teams", f"Choose teams of {organization}.")
        if self.instance.pk:
            _complain(self, lambda: actions.check_an_owner_stays(self.instance, cleaned.get("role")))
        return cleaned


@admin.register(Membership)
class MembershipAdmin(Audited):
    audit_name = "member"
    form = MembershipForm
    fields = ("organization", "user", "role", "teams")
    autocomplete_fields = ("user", "teams")
    list_display = ("user", "organization", "role")
    list_select_related = ("user", "organization")
    list_filter = ("organization", "role")
    search_fields = ("user__email", "organization__name")
    ordering = ("organization__name", "user__email")

    def get_readonly_fields(self, request: HttpRequest, obj: Membership | None = None) -> tuple[str, ...]:
        return ("organization", "user") if obj else ()


# Keys


class WordsField(forms.Field):
    """A list of words, written one a line or separated by commas, each checked by a rule of `policy`."""

    widget = UnfoldAdminTextareaWidget(attrs={"rows": 3})

    def __init__(self, rule: Callable[[Iterable[str]], list[str]], **options: Any) -> None:
        super().__init__(required=False, **options)
        self._rule = rule

    def prepare_value(self, value: Any) -> Any:
        return "\n".join(value) if isinstance(value, list) else value

    def to_python(self, value: Any) -> list[str]:
        return self._rule(str(value or "").replace(",", "\n").splitlines())


class KeyForm(forms.ModelForm):
    models = WordsField(policy.clean_models, help_text="One a line, such as gpt-4o or demo/*. Empty: all models.")
    networks = WordsField(policy.clean_networks, help_text="One a line, such as 10.0.0.0/8. Empty: from anywhere.")
    tags = WordsField(policy.clean_tags, help_text="One a line.")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["expires_at"].help_text = "In UTC. Empty: never."
        if self.instance.pk:
            self.initial.update(models=self.instance.allowed_models, networks=self.instance.allowed_networks)

    def clean_name(self) -> str:
        return policy.clean_name(self.cleaned_data["name"])

    def clean_expires_at(self) -> Any:
        moment = self.cleaned_data["expires_at"]
        return policy.clean_expiry(moment) if "expires_at" in self.changed_data else moment

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or self.cleaned_data
        if self.instance.pk and self.instance.revoked_at:
            raise ValidationError("This key has been revoked: it can no longer be changed.")
        organization = cleaned.get("organization") or getattr(self.instance, "organization", None)
        user = cleaned.get("user") or getattr(self.instance, "user", None)
        if organization and user and (not self.instance.pk or "team" in self.changed_data):
            _complain(self, lambda: actions.check_holder(organization, user, cleaned.get("team")), email="user")
        return cleaned


class RotationForm(forms.Form):
    overlap_hours = forms.FloatField(
        label="Hours for which the old key goes on working",
        initial=actions.OVERLAP // timedelta(hours=1),
        min_value=0,
        max_value=actions.LONGEST_OVERLAP / timedelta(hours=1),
        help_text="0 stops it at once; at most 30 days.",
        widget=UnfoldAdminDecimalFieldWidget(),
    )


@admin.register(ApiKey)
class ApiKeyAdmin(NeverDeleted, Freezes, Audited):
    audit_name = "key"
    form = KeyForm
    autocomplete_fields = ("user", "team")
    add_fieldsets = (
        (None, {"fields": ("organization", "user", "team", "name")}),
        ("What it may do", {"fields": ("models", "networks", "expires_at", "tags")}),
    )
    fieldsets = (
        (None, {"fields": ("name", "hint", "state", "organization", "user", "team")}),
        ("What it may do", {"fields": ("models", "networks", "expires_at", "tags", "its_limits")}),
        ("Dates", {"fields": ("created_at", "last_used_at", "revoked_at", "replaced_by", *Freezes.freezing, "frozen_by")}),
    )
    list_display = ("name", "hint", "state_label", "organization", "user", "last_used_at", "expires_at")
    list_select_related = ("organization", "user")
    list_filter = ("organization",)
    search_fields = ("name", "handle", "last_four", "user__email")
    ordering = ("-pk",)
    actions_row = ("rotate", "revoke")
    actions_detail = ("rotate", "revoke")

    def get_readonly_fields(self, request: HttpRequest, obj: ApiKey | None = None) -> tuple[str, ...]:
        always = ("hint", "state", "its_limits", "created_at", "last_used_at", "revoked_at", "replaced_by", *self.freezing, "frozen_by")
        return ("organization", "user", *always) if obj else always

    @display(
        description="state", label={"active": "success", "retiring": "warning", "frozen": "info", "expired": "default", "revoked": "danger"}
    )
    def state_label(self, key: ApiKey) -> str:
        return key.state

    @display(description="limits of this key")
    def its_limits(self, key: ApiKey) -> str:
        return ", ".join(_limit_in_words(limit) for limit in key.limits.all()) or "none"

    def save_model(self, request: HttpRequest, obj: ApiKey, form: Any, change: bool) -> None:
        fields = ("name", "team", "models", "networks", "tags", "expires_at")
        if change:
            actions.change_key(
                obj, actor=_operator(request), **{field: form.cleaned_data[field] for field in fields if field in form.changed_data}
            )
            return
        key, request.issued_key = actions.issue_key(  # type: ignore[attr-defined]
            organization=obj.organization, user=obj.user, actor=_operator(request), **{field: form.cleaned_data[field] for field in fields}
        )
        obj.pk = key.pk
        obj.refresh_from_db()

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        """Nothing is related, and the action has written its own audit entry."""

    def response_add(self, request: HttpRequest, obj: ApiKey, post_url_continue: str | None = None) -> HttpResponse:
        return self._shown_once(request, obj, request.issued_key)  # type: ignore[attr-defined]

    @action(description="Rotate", icon="autorenew", permissions=["change"])
    def rotate(self, request: HttpRequest, object_id: str) -> HttpResponse:
        key = self._key(request, object_id)
        form = RotationForm(request.POST or None)
        if request.method == "POST" and form.is_valid():
            try:
                sibling, clear = actions.rotate_key(
                    key, overlap=timedelta(hours=form.cleaned_data["overlap_hours"]), actor=_operator(request)
                )
            except (ValidationError, actions.Conflict) as problem:
                return self._refused(request, key, problem)
            self.log_change(request, key, "Rotated.")
            return self._shown_once(request, sibling, clear)
        return self._confirm(request, key, "Rotate", "A new key with the same rights and limits takes its place.", form)

    @action(description="Revoke", icon="block", permissions=["change"])
    def revoke(self, request: HttpRequest, object_id: str) -> HttpResponse:
        key = self._key(request, object_id)
        if request.method == "POST":
            if actions.revoke_key(key, actor=_operator(request)):
                self.log_change(request, key, "Revoked.")
            messages.success(request, f"{key} is revoked: it stops everywhere within 5 seconds.")
            return self._back(key)
        return self._confirm(request, key, "Revoke", "It stops within 5 seconds, and cannot be brought back.", None)

    def _key(self, request: HttpRequest, object_id: str) -> ApiKey:
        key = self.get_object(request, object_id)
        if key is None:
            raise Http404("There is no such key.")
        return key

    def _back(self, key: ApiKey) -> HttpResponse:
        return HttpResponseRedirect(reverse("admin:accounts_apikey_change", args=[key.pk]))

    def _refused(self, request: HttpRequest, key: ApiKey, problem: ValidationError | actions.Conflict) -> HttpResponse:
        messages.error(request, " ".join(problem.messages) if isinstance(problem, ValidationError) else str(problem))
        return self._back(key)

    def _confirm(self, request: HttpRequest, key: ApiKey, deed: str, consequence: str, form: forms.Form | None) -> HttpResponse:
        context = {"title": f"{deed} {key}?", "key": key, "deed": deed, "consequence": consequence, "form": form}
        return self._page(request, "confirm", context)

    def _shown_once(self, request: HttpRequest, key: ApiKey, clear: str) -> HttpResponse:
        # On the answer itself, which the site marks `no-store` as it does all its pages: not in a message, which lives in a cookie
        # or the session, and not behind a redirect, which would have to keep the key somewhere.
        return self._page(request, "issued", {"title": f"The key '{key.name}'", "key": key, "clear": clear})

    def _page(self, request: HttpRequest, name: str, context: dict[str, Any]) -> HttpResponse:
        return TemplateResponse(
            request, f"admin/accounts/apikey/{name}.html", {**self.admin_site.each_context(request), "opts": self.opts, **context}
        )


# Limits


class LimitForm(forms.ModelForm):
    amount = forms.CharField(
        max_length=30,
        widget=UnfoldAdminTextInputWidget(),
        help_text="Requests or tokens per minute, open requests, or for money US dollars such as 12.50.",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.instance.pk:
            is_money = self.instance.metric == Metric.MONEY
            self.initial["amount"] = in_usd(self.instance.amount) if is_money else str(self.instance.amount)

    def clean(self) -> dict[str, Any]:
        cleaned = super().clean() or self.cleaned_data
        limit = self.instance
        metric, window = cleaned.get("metric", limit.metric), cleaned.get("window", limit.window)
        if "amount" in cleaned:
            _complain(self, lambda: cleaned.update(amount=_amount(metric, cleaned["amount"])), everything="amount")
        if not self.errors:
            _complain(
                self, lambda: policy.clean_allowance(Allowance(metric, cleaned["amount"], window, cleaned["mode"])), everything="window"
            )
        if not self.errors and not limit.pk:
            team, user, key = cleaned["team"], cleaned["user"], cleaned["key"]
            _complain(self, lambda: actions.check_scope(cleaned["organization"], team=team, user=user, key=key))
        return cleaned


@admin.register(Limit)
class LimitAdmin(Audited):
    audit_name = "limit"
    form = LimitForm
    fields = ("organization", "team", "user", "key", "metric", "amount", "window", "mode")
    autocomplete_fields = ("team", "user", "key")
    list_display = ("organization", "applies_to", "in_words", "mode")
    list_display_links = ("organization", "applies_to", "in_words")
    list_select_related = ("organization", "team", "user", "key")
    list_filter = ("organization", "metric", "mode")
    search_fields = ("organization__name", "team__name", "user__email", "key__name")
    ordering = ("organization__name", "pk")

    def get_readonly_fields(self, request: HttpRequest, obj: Limit | None = None) -> tuple[str, ...]:
        return ("organization", "team", "user", "key", "metric", "window") if obj else ()

    @display(description="applies to")
    def applies_to(self, limit: Limit) -> str:
        return str(limit.key or limit.user or limit.team or "everybody together")

    @display(description="limit")
    def in_words(self, limit: Limit) -> str:
        return _limit_in_words(limit)

    def save_model(self, request: HttpRequest, obj: Limit, form: Any, change: bool) -> None:
        allowance = Allowance.of(obj)
        limit = actions.set_limit(obj.organization, allowance, team=obj.team, user=obj.user, key=obj.key, actor=_operator(request))
        obj.pk = limit.pk

    def save_related(self, request: HttpRequest, form: Any, formsets: Any, change: bool) -> None:
        """Nothing is related, and the action has written its own audit entry."""

    def delete_model(self, request: HttpRequest, obj: Limit) -> None:
        actions.remove_limit(obj, actor=_operator(request))

    @transaction.atomic
    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Limit]) -> None:
        for limit in queryset:
            actions.remove_limit(limit, actor=_operator(request))


# The record


@admin.register(AuditEntry)
class AuditEntryAdmin(ModelAdmin):
    list_display = ("at", "action", "subject", "actor", "organization")
    list_select_related = ("actor", "organization")
    list_filter = ("organization",)
    search_fields = ("subject", "action")
    ordering = ("-pk",)
    list_per_page = 50

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


def _operator(request: HttpRequest) -> User:
    assert isinstance(request.user, User), "the site lets nobody in who is not signed in"
    return request.user


def _amount(metric: str, text: str) -> int:
    if metric == Metric.MONEY:
        return parse_usd(text)
    if not (text.isascii() and text.isdigit()):
        raise ValidationError("Give a whole number.")
    return int(text)


def _limit_in_words(limit: Limit) -> str:
    if limit.metric != Metric.MONEY:
        return f"{limit.amount} {limit.get_metric_display()}"
    return f"{in_usd(limit.amount)} USD {'in total' if limit.window == 'total' else f'per {limit.window}'}"


def _complain(form: forms.BaseForm, check: Callable[[], object], *, everything: str | None = None, **renamed: str) -> None:
    """Put what a rule of ours says at the form's field of that name, or at `everything`."""
    try:
        check()
    except ValidationError as problem:
        if not hasattr(problem, "error_dict"):
            form.add_error(everything, problem)
            return
        for field, errors in problem.error_dict.items():
            name = renamed.get(field, field)
            form.add_error(name if name in form.fields else None, errors)


def _now(form: Any, field: str) -> Any:
    """The field as it is stored now, fit for JSON."""
    value = form.cleaned_data.get(field)
    if isinstance(value, QuerySet):
        return [str(one) for one in value]
    value = getattr(form.instance, field, value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)
