"""What people fill in. The rules themselves are in `accounts.policy`; here texts become its values."""

from __future__ import annotations

from datetime import MAXYEAR, date, datetime, time, timedelta
from typing import Any

from django import forms
from django.core.exceptions import ValidationError

from accounts import policy
from accounts import queries as accounts
from accounts.actions import LONGEST_OVERLAP
from accounts.models import Membership, Metric, Team, User, Window
from accounts.money import parse_usd
from accounts.policy import LONGEST_FREEZE, Allowance
from proxy.queries import zone_of

_MOST = 10**15


class KeyForm(forms.Form):
    """A new key. What is left empty is not limited."""

    name = forms.CharField(max_length=150, label="Name")
    email = forms.EmailField(max_length=254, label="Owner", help_text="A member of the organization; the key is theirs.")
    team = forms.ModelChoiceField(Team.objects.none(), required=False, label="Team", empty_label="No team")
    models = forms.CharField(
        required=False, max_length=4000, label="Models", help_text="Names or patterns with *, separated by commas. Empty = all models."
    )
    expires_on = forms.DateField(
        required=False, label="Last day", help_text="Empty = it never expires.", widget=forms.DateInput(attrs={"type": "date"})
    )
    rpm = forms.IntegerField(required=False, min_value=0, max_value=_MOST, label="Requests per minute")
    tpm = forms.IntegerField(required=False, min_value=0, max_value=_MOST, label="Tokens per minute")
    concurrency = forms.IntegerField(required=False, min_value=0, max_value=_MOST, label="Open requests at a time")
    budget = forms.CharField(required=False, max_length=20, label="Budget in US dollars", help_text="Such as 25 or 12.50.")
    window = forms.ChoiceField(
        required=False,
        label="Budget for each",
        choices=[("day", "day"), ("week", "week"), ("month", "month"), ("total", "whole life of the key")],
        initial="month",
    )
    once = forms.CharField(max_length=64, widget=forms.HiddenInput)

    BASIC = ("name",)
    PLACES = ("email", "team", "models", "expires_on")
    LIMITS = ("rpm", "tpm", "concurrency", "budget", "window")

    def __init__(self, place: Membership, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.place = place
        if place.manages:
            # An operator who is no member holds no key there: whose it is has to be said.
            self.fields["email"].initial = place.user.email if place.pk else ""
            self.fields["email"].widget.attrs["placeholder"] = "Whose it is: a member’s e-mail"
            teams = Team.objects.filter(organization=place.organization)
        else:
            del self.fields["email"]
            teams = Team.objects.filter(organization=place.organization, members__user=place.user)
        self.fields["team"].queryset = teams.order_by("name")  # type: ignore[attr-defined]
        self.fields["name"].widget.attrs.update(autocomplete="off", placeholder="What it is for, such as “ci” or “notebook”")
        self.fields["budget"].widget.attrs["inputmode"] = "decimal"

    @property
    def owner(self) -> forms.BoundField | None:
        """Where it has to be said, beside the name: who may issue keys and has no place here himself."""
        return self["email"] if "email" in self.fields and not self.fields["email"].initial else None

    @property
    def places(self) -> list[forms.BoundField]:
        return [self[name] for name in self.PLACES if name in self.fields and not (name == "email" and self.owner)]

    @property
    def limits(self) -> list[forms.BoundField]:
        return [self[name] for name in self.LIMITS]

    @property
    def is_unfolded(self) -> bool:
        """A mistake in what is folded away: it has to be open then."""
        return any(field.errors for field in (*self.places, *self.limits))

    def clean_name(self) -> str:
        return policy.clean_name(self.cleaned_data["name"])

    def clean_models(self) -> list[str]:
        return policy.clean_models(self.cleaned_data["models"].split(","))

    def clean_email(self) -> User:
        email = self.cleaned_data["email"]
        holder = accounts.member_of(self.place.organization, email)
        if holder is None:
            raise ValidationError("Nobody with this e-mail is a member of the organization.")
        return holder

    def clean_expires_on(self) -> datetime | None:
        """The end of the day that was given, where the organization is."""
        last_day: date | None = self.cleaned_data["expires_on"]
        if last_day is None:
            return None
        if last_day.year >= MAXYEAR:
            raise ValidationError("This day is too far away: leave it empty for a key that never expires.")
        return policy.clean_expiry(datetime.combine(last_day + timedelta(days=1), time(), zone_of(self.place.organization)))

    def clean_budget(self) -> int | None:
        text = self.cleaned_data["budget"]
        return parse_usd(text) if text else None

    def asked(self) -> dict[str, Any]:
        """The arguments of `issue_key`."""
        said = self.cleaned_data
        return {
            "organization": self.place.organization,
            "user": said.get("email", self.place.user),
            "name": said["name"],
            "team": said["team"],
            "models": said["models"],
            "expires_at": said["expires_on"],
            "limits": list(self._allowances()),
        }

    def _allowances(self) -> list[Allowance]:
        said = self.cleaned_data
        found = [Allowance(metric, said[metric]) for metric in ("rpm", "tpm", "concurrency") if said[metric] is not None]
        if said["budget"] is not None:
            found.append(Allowance(Metric.MONEY, said["budget"], said["window"] or Window.MONTH))
        return found

    def complain(self, problem: ValidationError) -> None:
        """Put an action's complaint beside the field it is about."""
        names = {"expires_at": "expires_on", "limits": "budget"}
        if not hasattr(problem, "error_dict"):
            return self.add_error(None, problem)
        for field, errors in problem.error_dict.items():
            name = names.get(field, field)
            self.add_error(name if name in self.fields else None, errors)
        return None


class RenameForm(forms.Form):
    name = forms.CharField(max_length=150, label="Name")


class FreezeForm(forms.Form):
    minutes = forms.IntegerField(
        label="For how many minutes", min_value=1, max_value=LONGEST_FREEZE // timedelta(minutes=1), initial=60, help_text="1440 are a day."
    )
    reason = forms.CharField(
        required=False, max_length=200, label="Why", help_text="Shown on the key’s page, and told to whoever calls with the key meanwhile."
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["reason"].widget.attrs["autocomplete"] = "off"


class RotateForm(forms.Form):
    """How long the old key goes on working beside the new one."""

    hours = forms.TypedChoiceField(
        label="The old key works on for",
        coerce=int,
        initial=24,
        choices=[
            (0, "not at all: it stops at once"),
            (1, "1 hour"),
            (24, "24 hours"),
            (24 * 7, "7 days"),
            (LONGEST_OVERLAP.days * 24, "30 days"),
        ],
    )
    once = forms.CharField(max_length=64, widget=forms.HiddenInput)
