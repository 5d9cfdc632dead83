"""Short forms of the long loops in tests/loops: tokens that are renewed."""

import pytest

from tests.loops import oauth_kill9, oauth_race

ONCE_EACH = {"refreshes": 4, "reused": 0, "failed": 0, "differing": 0, "spoilt": 0}


@pytest.mark.slow
def test_o01_eight_processes_renew_a_token_once():
    counts = oauth_race.run(8, 4)
    assert {name: counts[name] for name in ONCE_EACH} == ONCE_EACH


@pytest.mark.slow
@pytest.mark.postgres
def test_o01_the_same_over_postgres(postgres_url):
    counts = oauth_race.run(8, 4, DATABASE_URL=postgres_url, SECRET_KEY="s" * 50, KEYRING="k" * 50)
    assert {name: counts[name] for name in ONCE_EACH} == ONCE_EACH


@pytest.mark.slow
@pytest.mark.postgres
def test_o03_who_loses_a_race_spoils_nothing_even_where_no_lock_holds_it(postgres_url):
    counts = oauth_race.run(8, 4, naive=True, lenient=True, DATABASE_URL=postgres_url, SECRET_KEY="s" * 50, KEYRING="k" * 50)
    assert (counts["refreshes"], counts["spoilt"]) == (4, 0)
    assert counts["reused"] >= 4  # they did race


@pytest.mark.slow
def test_o02_kill_9_at_any_step_of_a_renewal_loses_no_token_that_was_committed():
    assert oauth_kill9.problems(oauth_kill9.run()) == []


@pytest.mark.slow
@pytest.mark.postgres
def test_o02_the_same_over_postgres(postgres_url):
    assert oauth_kill9.problems(oauth_kill9.run(DATABASE_URL=postgres_url, SECRET_KEY="s" * 50, KEYRING="k" * 50)) == []
