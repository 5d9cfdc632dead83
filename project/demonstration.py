"""What `manage.py demo_data` makes: two organizations with teams, people, keys, upstream accounts of kind demo, and a month of usage.

The usage goes through the ledger's own functions. Each day's calls follow from its date alone, so that a second run adds nothing
but what has happened since.
"""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

from django.db import transaction
from django.db.models import Max

from accounts import actions as accounts
from accounts.models import ApiKey, AuditEntry, Membership, Organization, Role, Team, User
from accounts.policy import Allowance
from providers.actions import add_credential, set_price
from providers.models import Credential, Price, PriceSource
from providers.price import PriceBook, Tokens
from proxy import ledger
from proxy.call import Tried
from proxy.journal import Settled
from proxy.models import KeyDay, KeyTotal, ModelTotal, RefusedCalls, UsageEvent, UsageTotal
from proxy.refusals import Refusal

DAYS = 30
DOMAIN = "demo.example"  # nobody can have it: RFC 2606
LOST = "fast/echo-old"  # a model without a price


@dataclass(frozen=True, slots=True)
class Person:
    name: str
    role: Role
    teams: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """A key and how it is used. `calls`: on a working day; `night`: the share of those that come outside working hours."""

    name: str
    of: str  # the first name of its holder
    team: str
    calls: int
    models: tuple[str, ...]
    prompt: int = 600
    answer: int = 250
    streams: float = 0.7
    cached: float = 0.0
    night: float = 0.05
    failing: float = 0.01
    limits: tuple[Allowance, ...] = ()
    allowed: tuple[str, ...] = ()
    state: str = "active"  # or revoked, expired, rotated


@dataclass(frozen=True, slots=True)
class House:
    slug: str
    name: str
    time_zone: str
    people: tuple[Person, ...]
    programs: tuple[Program, ...]
    prefixes: tuple[str, ...]
    limits: tuple[Allowance, ...] = ()


def _usd(dollars: float, window: str = "month") -> Allowance:
    return Allowance("money", round(dollars * 1_000_000), window)


HOUSES = (
    House(
        slug="demo-northwind",
        name="Northwind (demo)",
        time_zone="Europe/Berlin",
        prefixes=("fast", "deep"),
        limits=(_usd(400), Allowance("rpm", 1200)),
        people=(
            Person("Ada", Role.OWNER, ("Search", "Support")),
            Person("Grace", Role.ADMIN, ("Search",)),
            Person("Linus", Role.MEMBER, ("Support",)),
            Person("Barbara", Role.MEMBER, ("Search",)),
            Person("Edsger", Role.VIEWER),
        ),
        programs=(
            Program("search ranking", "Grace", "Search", 60, ("fast/echo",), prompt=1800, answer=120, streams=0.0, cached=0.6, night=0.4),
            Program("support assistant", "Linus", "Support", 45, ("deep/reasoning", "fast/echo"), limits=(_usd(60), Allowance("rpm", 120))),
            Program("nightly summaries", "Grace", "Search", 25, ("deep/long",), prompt=9000, answer=900, streams=0.0, night=1.0),
            Program("Ada's editor", "Ada", "", 18, ("deep/reasoning", LOST), answer=500, streams=1.0, allowed=("deep/*", "fast/*")),
            Program("Barbara's notebook", "Barbara", "Search", 8, ("fast/echo", "deep/tools"), failing=0.12),
            Program("old crawler", "Grace", "Search", 20, ("fast/echo",), state="revoked"),
            Program("ci", "Ada", "", 12, ("fast/json",), streams=0.0, limits=(_usd(1, "day"),), state="rotated"),
            Program("workshop in spring", "Ada", "", 0, ("fast/echo",), state="expired"),
            Program("not used yet", "Linus", "Support", 0, ("fast/echo",)),
        ),
    ),
    House(
        slug="demo-aurora",
        name="Aurora Labs (demo)",
        time_zone="America/Los_Angeles",
        prefixes=("aurora",),
        people=(Person("Katherine", Role.OWNER, ("Research",)), Person("Alan", Role.MEMBER, ("Research",))),
        programs=(
            Program("evaluation", "Katherine", "Research", 70, ("aurora/echo", "aurora/reasoning"), streams=0.2, night=0.5, cached=0.3),
            Program("Alan's terminal", "Alan", "Research", 15, ("aurora/reasoning",), streams=1.0),
        ),
    ),
)

# US dollars per million tokens: input, output, cached input. Demo models cost nothing; with prices there is something to look at.
PRICES = {
    "fast/*": ("0.50", "1.50", "0.05"),
    "deep/*": ("3", "15", "0.30"),
    "aurora/*": ("1.25", "10", "0.125"),
}
# What goes wrong, and how often of all that does.
FAILURES = (
    (499, "client_closed", 40),
    (502, "upstream_error", 15),
    (504, "upstream_timeout", 10),
    (400, "invalid_request", 15),
    (429, "rate_limit_exceeded", 20),
)
REFUSALS = ((429, "rate_limit_exceeded", 9), (404, "model_not_found", 3), (403, "model_not_allowed", 2))


def make(now: datetime) -> tuple[int, int]:
    """Make what is missing. How many organizations there are, and how many usage rows are new. Raises ValidationError."""
    with transaction.atomic():
        for house in HOUSES:
            _people_and_keys(house, now)
        for pattern, (put_in, got_out, cached) in PRICES.items():
            if not Price.objects.filter(pattern=pattern, source=PriceSource.HAND).exists():  # an account of kind demo brings a price of 0
                set_price(pattern, put_in, got_out, cached_usd=cached, starts_at=_midnight(now) - timedelta(days=DAYS + 2))
    stored = sum(_use(house, now) for house in HOUSES)
    return len(HOUSES), stored


def remove() -> int:
    """Take all of it away again. How many usage rows went."""
    slugs = [house.slug for house in HOUSES]
    with transaction.atomic():
        organizations = list(Organization.objects.filter(slug__in=slugs).values_list("pk", flat=True))
        keys = list(ApiKey.objects.filter(organization__in=organizations).values_list("pk", flat=True))
        RefusedCalls.objects.filter(key_id__in=keys).delete()
        for sums in (UsageTotal, ModelTotal, KeyTotal, KeyDay):
            sums._default_manager.filter(organization_id__in=organizations).delete()
        gone, _ = UsageEvent.objects.filter(organization_id__in=organizations).delete()
        ApiKey.objects.filter(pk__in=keys).update(replaced_by=None)
        ApiKey.objects.filter(pk__in=keys).delete()
        Credential.objects.filter(organization__in=organizations).delete()
        AuditEntry.objects.filter(organization__in=organizations).delete()
        Organization.objects.filter(pk__in=organizations).delete()
        people = User.objects.filter(email__endswith=f".{DOMAIN}", memberships=None, is_superuser=False)
        AuditEntry.objects.filter(subject__endswith=f".{DOMAIN}").delete()
        people.delete()
        AuditEntry.objects.filter(action="price.set", subject__in=PRICES).delete()
        # A price never changes; these are the ones that nothing refers to any more.
        Price.objects.filter(pattern__in=PRICES).delete()
    return gone


# People, keys, accounts


def _people_and_keys(house: House, now: datetime) -> None:
    organization = accounts.ensure_organization(house.slug)
    Organization.objects.filter(pk=organization.pk).update(name=house.name, time_zone=house.time_zone)
    organization.refresh_from_db()
    teams = {name: Team.objects.get_or_create(organization=organization, name=name)[0] for one in house.people for name in one.teams}
    for person in house.people:
        place = accounts.ensure_membership(accounts.ensure_user(_email(person.name, house)), organization, role=person.role)
        place.teams.add(*[teams[name] for name in person.teams])
    for limit in house.limits:
        accounts.set_limit(organization, limit)
    for prefix in house.prefixes:
        for number in (1, 2) if prefix == "fast" else (1,):
            label = f"{prefix} {number}"
            if not Credential.objects.filter(organization=organization, label=label).exists():
                add_credential("demo", label, "", prefix=prefix, organization=organization)
    for program in house.programs:
        if not ApiKey.objects.filter(organization=organization, name=program.name).exists():
            holder = Membership.objects.get(organization=organization, user__email=_email(program.of, house))
            _issue(program, organization, holder, teams, now)


def _issue(program: Program, organization: Organization, place: Membership, teams: dict[str, Team], now: datetime) -> None:
    today = _midnight(now)
    key, _ = accounts.issue_key(
        organization=organization,
        user=place.user,
        name=program.name,
        team=teams.get(program.team),
        models=program.allowed,
        limits=program.limits,
    )
    ApiKey.objects.filter(pk=key.pk).update(created_at=today - timedelta(days=DAYS + 40))
    if program.state == "revoked":
        accounts.revoke_key(key)
        ApiKey.objects.filter(pk=key.pk).update(revoked_at=today - timedelta(days=9))
    elif program.state == "expired":
        ApiKey.objects.filter(pk=key.pk).update(expires_at=today - timedelta(days=120))
    elif program.state == "rotated":
        accounts.rotate_key(key)


def _email(name: str, house: House) -> str:
    return f"{name.lower()}@{house.slug.removeprefix('demo-')}.{DOMAIN}"


# A month of usage


def _use(house: House, now: datetime) -> int:
    organization = Organization.objects.get(slug=house.slug)
    book = PriceBook(row.in_memory() for row in Price.objects.all())
    pools = {
        prefix: list(Credential.objects.filter(organization=organization, prefix=prefix).order_by("pk").values_list("pk", flat=True))
        for prefix in house.prefixes
    }
    stored = 0
    for program in house.programs:
        # A rotated key's calls were its predecessor's: the older of the two.
        key = ApiKey.objects.filter(organization=organization, name=program.name).order_by("pk")[0]
        days = [_midnight(now).date() - timedelta(days=back) for back in range(DAYS, -1, -1)]
        settled = [one for day in days for one in _calls(program, key, day, organization, pools, book)]
        until = min(now, key.revoked_at or now, key.expires_at if program.state == "expired" and key.expires_at else now)
        stored += ledger.store(ledger.rows_of(one for one in settled if one.at <= until.timestamp() * 1000))
        last = UsageEvent.objects.filter(key_id=key.pk, at__lte=now).aggregate(last=Max("at"))["last"]
        ApiKey.objects.filter(pk=key.pk).update(last_used_at=last)
        _refuse(program, key, days, until)
    return stored


def _calls(
    program: Program, key: ApiKey, day: date, organization: Organization, pools: dict[str, list[int]], book: PriceBook
) -> Iterator[Settled]:
    """What a program does on a day, always the same."""
    chance = random.Random(f"{organization.slug}/{program.name}/{day}")  # noqa: S311 the same each time is what is wanted
    busy = 0.25 if day.weekday() >= 5 else 1.0
    for number in range(_about(chance, program.calls * busy)):
        at = _moment(chance, program, day, organization.time_zone)
        model = program.models[0] if chance.random() < 0.75 else chance.choice(program.models)
        yield _call(chance, program, key, at, model, number, pools, book)


def _call(
    chance: random.Random,
    program: Program,
    key: ApiKey,
    at: int,
    model: str,
    number: int,
    pools: dict[str, list[int]],
    book: PriceBook,
) -> Settled:
    status, error = 200, ""
    if chance.random() < program.failing + 0.01:
        status, error, _ = chance.choices(FAILURES, [weight for *_, weight in FAILURES])[0]
    stream = chance.random() < program.streams
    answered = status in (200, 499)
    tokens = _tokens(chance, program, model, whole=status == 200) if answered else Tokens()
    price = None if model == LOST else book.find(model, at / 1000)
    cost = price.cost(tokens) if price is not None else None if tokens.total else 0
    first = round(chance.lognormvariate(6.0, 0.5))
    pool = pools[model.partition("/")[0]]
    tried = (Tried(pool[(number + 1) % len(pool)], "demo", "upstream_unreachable", "next", 0, 5),) if chance.random() < 0.03 else ()
    return Settled(
        request_id=_request_id(at, chance),
        at=at,
        organization=key.organization_id,
        team=key.team_id,
        user=key.user_id,
        key=key.pk,
        model=model,
        served_model=model,
        endpoint="chat/completions",
        status=status,
        error=error,
        stream=stream,
        provider="demo",
        credential=pool[number % len(pool)],
        attempts=len(tried) + 1,
        tried=tried,
        fresh_input=tokens.fresh_input,
        cache_read=tokens.cache_read,
        output=tokens.output,
        reasoning=tokens.reasoning,
        cost=cost,
        price=price.id if price is not None and cost is not None else None,
        usage_source="reported" if status == 200 else "estimated" if answered else "missing",
        first_byte_ms=first if answered else None,
        duration_ms=first + tokens.all_output * chance.randint(4, 12) if answered else chance.randint(20, 4000),
    )


def _tokens(chance: random.Random, program: Program, model: str, *, whole: bool) -> Tokens:
    prompt, answer = _about(chance, program.prompt), _about(chance, program.answer * (1 if whole else 0.3))
    cached = int(prompt * program.cached * chance.random())
    thought = int(answer * 0.6) if model.endswith("reasoning") else 0
    return Tokens(fresh_input=prompt - cached, cache_read=cached, output=answer - thought, reasoning=thought)


def _moment(chance: random.Random, program: Program, day: date, time_zone: str) -> int:
    """Milliseconds since the epoch: mostly in working hours there."""
    hour = chance.uniform(0, 24) if chance.random() < program.night else min(23.9, max(0.0, chance.gauss(13.5, 2.5)))
    local = datetime.combine(day, datetime.min.time(), ZoneInfo(time_zone)) + timedelta(hours=hour)
    return int(local.timestamp() * 1000)


def _request_id(at: int, chance: random.Random) -> str:
    """A UUIDv7 as the gateway makes them, from this sequence of chances."""
    value = at << 80 | 7 << 76 | chance.getrandbits(12) << 64 | 2 << 62 | chance.getrandbits(62)
    return str(uuid.UUID(int=value))


def _refuse(program: Program, key: ApiKey, days: Iterable[date], until: datetime) -> None:
    """Counts are added, not replaced: an hour that has some is left as it is."""
    if not program.limits and program.failing < 0.1:
        return
    counts: dict[Refusal, int] = {}
    for day in days:
        chance = random.Random(f"refused/{program.name}/{day}")  # noqa: S311 the same each time is what is wanted
        for status, code, times in REFUSALS:
            hour = int(datetime.combine(day, datetime.min.time(), UTC).timestamp()) + 3600 * chance.randint(8, 17)
            if chance.random() < 0.4 and hour < until.timestamp():
                counts[hour, key.pk, status, code] = _about(chance, times)
    known = set(RefusedCalls.objects.filter(key_id=key.pk).values_list("hour", "status", "code"))
    ledger.store_refusals(
        {one: count for one, count in counts.items() if (datetime.fromtimestamp(one[0], UTC), one[2], one[3]) not in known and count}
    )


def _about(chance: random.Random, amount: float) -> int:
    return max(0, math.floor(amount * chance.lognormvariate(0, 0.35) + chance.random())) if amount else 0


def _midnight(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
