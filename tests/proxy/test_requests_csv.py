"""A key's requests as CSV: who gets which columns, that nothing in it is a formula, and that it is read piece by piece."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, cast

import pytest
from asgiref.sync import async_to_sync
from django.core.management import call_command
from django.db import connection
from django.http import StreamingHttpResponse
from django.test import AsyncClient
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from accounts.models import ApiKey, User
from proxy import queries
from proxy.queries import USAGE_COLUMNS
from proxy.sheets import csv_line
from tests.accounts.conftest import People
from tests.proxy.test_request_page import OWN, SHARED, account
from tests.proxy.used import used

FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "＝1", "\r=1")


@pytest.fixture
def people(transactional_db: None) -> People:
    """Between two pieces the connection is given back, which no transaction of a test outlives."""
    return People()


def path(key: ApiKey, span: str = "24h") -> str:
    return f"/keys/{key.pk}/requests.csv?range={span}"


@async_to_sync
async def get(user: User, path: str) -> tuple[Any, str]:
    client = AsyncClient()
    await client.aforce_login(user)
    answer = await client.get(path)
    if not answer.streaming:
        return answer, answer.content.decode()
    pieces = cast(AsyncIterator[bytes], cast(StreamingHttpResponse, answer).streaming_content)
    return answer, b"".join([piece async for piece in pieces]).decode()


def table(user: User, key: ApiKey, span: str = "24h") -> list[dict[str, str]]:
    answer, said = get(user, path(key, span))
    assert (answer.status_code, answer["content-type"]) == (200, "text/csv; charset=utf-8")
    return list(csv.DictReader(io.StringIO(said, newline="")))


def test_it_is_what_the_command_prints_for_an_operator_and_without_what_is_theirs_for_others(people: People):
    key = people.key(people.bob)
    shared, own = account(SHARED), account(OWN, organization=people.acme)
    for number, credential in enumerate((shared, own, None)):
        used(key, timezone.now() - timedelta(hours=number), credential_id=credential and credential.pk, upstream_cost=1000 + number)
    used(key, cost=None, attempts=2)
    printed = io.StringIO()
    call_command("usage", format="csv", key=str(key.pk), stdout=printed)

    assert get(people.olga, path(key))[1] == printed.getvalue()
    seen = {user: table(user, key) for user in (people.alice, people.amy, people.bob, people.vera)}
    for rows in seen.values():
        assert list(rows[0]) == [name for name in USAGE_COLUMNS if name != "upstream_cost_usd"]
        assert [row["cost_usd"] for row in rows] == ["0.0015", "0.0015", "", "0.0015"]  # the oldest first, and unpriced is not 0
    assert {row["credential"] for row in seen[people.alice]} == {OWN, ""}
    assert seen[people.alice] == seen[people.amy]
    assert {row["credential"] for row in seen[people.bob]} == {row["credential"] for row in seen[people.vera]} == {""}


def test_it_has_the_window_of_the_page_and_this_key_alone(people: People):
    key = people.key(people.bob)
    used(people.key(people.bob, name="other"))
    for days in (0, 3, 20, 40):
        used(key, timezone.now() - timedelta(days=days, minutes=1), model=f"of-{days}")

    def models(span: str) -> list[str]:
        return [row["model"] for row in table(people.bob, key, span)]

    assert models("24h") == models("no such") == ["of-0"]
    assert models("7d") == ["of-3", "of-0"]
    assert models("30d") == ["of-20", "of-3", "of-0"]
    assert get(people.bob, path(key, "7d"))[0]["content-disposition"] == f'attachment; filename="sluice-key-{key.pk}-7d.csv"'


def test_a_foreign_key_is_answered_like_a_missing_one(people: People):
    bobs, alices = people.key(people.bob), people.key(people.alice)

    for user, where in ((people.charlie, path(bobs)), (people.bob, path(alices)), (people.alice, "/keys/987654/requests.csv")):
        assert get(user, where)[0].status_code == 404


@pytest.mark.parametrize("name", FORMULAS)
def test_no_name_that_a_client_chose_is_a_formula(people: People, name: str):
    key = people.key(people.bob)
    used(key, model=name, served_model=name, error=name)

    [row] = table(people.bob, key)

    assert {row["model"], row["served_model"], row["error"]} == {f"'{name}"}


def test_a_name_stays_in_its_cell_and_figures_stay_figures(people: People):
    key = people.key(people.bob)
    for nasty in ('a",b\n=c;\td', "a\nb", "a\r=b"):
        used(key, timezone.now(), model=nasty, output=-5, cost=-1500)
        row = table(people.bob, key)[-1]
        assert (row["model"], row["output_tokens"], row["cost_usd"]) == (nasty, "2", "-0.0015")
    assert csv_line(["plain", -1, -0.5, None, "a-b", "x=1"]) == "plain,-1,-0.5,,a-b,x=1"


def test_it_is_read_piece_by_piece_as_the_client_takes_it(people: People, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(queries, "_CHUNK_ROWS", 3)
    key = people.key(people.bob)
    for minutes in range(10):
        used(key, timezone.now() - timedelta(minutes=minutes))

    @async_to_sync
    async def take(pieces: int) -> int:
        client = AsyncClient()
        await client.aforce_login(people.bob)
        answer = cast(StreamingHttpResponse, await client.get(path(key)))
        stream = cast(AsyncIterator[bytes], answer.streaming_content)
        return b"".join([await anext(stream) for _ in range(pieces)]).count(b"\n")

    def taken(pieces: int) -> tuple[int, int]:
        """How often the log was read, and how many lines had come, when so many pieces were taken."""
        with CaptureQueriesContext(connection) as seen:
            lines = take(pieces)
        return sum("request_id" in query["sql"] for query in seen), lines

    assert [taken(pieces) for pieces in (1, 2, 3, 5)] == [(0, 1), (1, 4), (2, 7), (4, 11)]
