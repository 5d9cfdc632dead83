"""The keyring's text, and the file that is made when there is none."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from project.keyring import Keyring, secret_file
from providers.secrets import redact

OLD, NEW, PEPPER = "o" * 32, "n" * 40, "p" * 32


def test_the_newest_entry_comes_first_and_old_ones_stay():
    ring, old = Keyring(f"{NEW}\n{OLD}\n", None), Keyring(OLD, None)

    assert len(ring.keys("seal")) == 2
    assert list(ring.keys("seal").values())[1] == old.keys("seal").popitem()[1]
    assert all(len(key) == 32 for key in ring.keys("seal").values())


def test_lines_and_commas_are_the_same():
    assert Keyring(f"{NEW},{OLD}", None).keys("seal") == Keyring(f"  {NEW}\r\n\n{OLD} ", None).keys("seal")


def test_each_purpose_has_a_key_of_its_own():
    ring = Keyring(OLD, None)

    assert ring.keys("seal").keys() == ring.keys("pepper").keys()
    assert set(ring.keys("seal").values()).isdisjoint(ring.keys("pepper").values())


def test_an_entry_may_serve_one_purpose_alone():
    ring = Keyring(f"seal:{NEW}\npepper:{PEPPER}\nseal:{OLD}", None)

    assert len(ring.keys("seal")) == 2
    assert len(ring.keys("pepper")) == 1
    assert ring.keys("pepper") == Keyring(PEPPER, None).keys("pepper")
    with pytest.raises(ImproperlyConfigured, match="no entry for 'pepper'"):
        Keyring(f"seal:{NEW}", None).keys("pepper")


@pytest.mark.parametrize("text", ["x" * 31, f"{OLD}\nshort", "seal:" + "x" * 31])
def test_an_entry_that_is_too_short_is_refused_without_showing_it(text: str):
    with pytest.raises(ImproperlyConfigured, match="at least 32 characters") as raised:
        Keyring(text, None).keys("seal")

    assert text not in str(raised.value)


@pytest.mark.parametrize("text", ["", "  \n "])
def test_an_empty_keyring_is_refused(text: str):
    with pytest.raises(ImproperlyConfigured, match="no entry"):
        Keyring(text, None).keys("seal")


def test_without_a_file_of_its_own_a_keyring_must_be_given():
    with pytest.raises(ImproperlyConfigured, match="KEYRING"):
        Keyring(None, None).keys("seal")


def test_the_file_is_made_at_the_first_use_readable_by_its_owner_alone(tmp_path: Path):
    path = tmp_path / "data" / "keyring"
    ring = Keyring(None, path)
    assert not path.exists()

    keys = ring.keys("seal")

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Keyring(None, path).keys("seal") == keys
    assert [entry.name for entry in path.parent.iterdir()] == ["keyring"]


def test_two_processes_that_start_at_once_make_one_file(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from project.keyring import secret_file\n"
        "at = float(sys.argv[2]); time.sleep(max(0, at - time.time())); print(secret_file(Path(sys.argv[1])))"
    )
    import time

    at = str(time.time() + 1.5)
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "secret"), at], stdout=subprocess.PIPE, text=True) for _ in range(6)
    ]
    said = {process.communicate(timeout=60)[0] for process in started}

    assert len(said) == 1
    assert said == {secret_file(tmp_path / "secret") + "\n"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


def test_a_race_that_is_lost_takes_the_winners_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "secret"
    monkeypatch.setattr("project.keyring.secrets.token_bytes", lambda count: path.write_text("w" * 40) and bytes(count))

    assert secret_file(path) == "w" * 40
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


def test_its_entries_are_taken_out_of_texts_once_it_is_read_and_again_when_it_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "keyring"
    path.write_text(f"the-first-of-them-{'a' * 32}\n")
    keyring = Keyring(None, path)
    keyring.keys("seal")
    path.write_text(f"pepper:the-newer-of-them-{'b' * 32}\nthe-first-of-them-{'a' * 32}\n")
    assert redact(f"the-first-of-them-{'a' * 32}") == "[redacted]"
    assert redact(f"the-newer-of-them-{'b' * 32}") != "[redacted]"
    keyring.keys("seal")
    assert redact(f"the-newer-of-them-{'b' * 32}, the-first-of-them-{'a' * 32}") == "[redacted], [redacted]"


def test_a_file_that_has_changed_is_read_again_and_a_bad_one_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keyring"
    path.write_text("a" * 40)
    keyring = Keyring("a" * 40, None, given=path)
    [first] = keyring.keys("seal")
    path.write_text("b" * 41 + "\n" + "a" * 40)
    assert list(keyring.keys("seal"))[1:] == [first]
    path.write_text("short")
    assert len(keyring.keys("seal")) == 2
    assert "stays in force" in caplog.text
    path.unlink()
    assert len(keyring.keys("seal")) == 2
    path.write_text("seal:" + "b" * 41 + "\npepper:" + "a" * 40)
    assert len(keyring.keys("seal")) == 1
    assert list(keyring.keys("pepper")) == [first]
