"""The journal keeps every record through crashes, full disks and rotation."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import journal
from proxy.journal import Admitted, Journal, JournalFull, Settled


def admitted(name: str, **fields) -> Admitted:
    return Admitted(**{"request_id": name, "at": 1, "organization": 1, "user": 1, "key": 1, "model": "m", "endpoint": "e"} | fields)


def settled(name: str, **fields) -> Settled:
    return Settled(
        **{"request_id": name, "at": 1, "organization": 1, "user": 1, "key": 1, "model": "m", "endpoint": "e", "status": 200} | fields
    )


def everything(folder: Path) -> list:
    return [record for segment in journal.segments(folder) for record, _ in journal.read(segment)]


def test_what_is_written_is_read_back_in_order(tmp_path):
    mine = Journal(tmp_path)
    records = [admitted("a"), admitted("b", stream=True), settled("a", cost=12), settled("b", status=499, error="client_closed")]
    for record in records:
        (mine.admitted if isinstance(record, Admitted) else mine.settled)(record)

    assert everything(mine.folder) == records
    assert mine.position() == (1, mine.segment(1).stat().st_size)


@given(cut=st.integers(min_value=0, max_value=400))
def test_a_torn_tail_hides_nothing_before_it(tmp_path_factory, cut):
    mine = Journal(tmp_path_factory.mktemp("journal"))
    records = [admitted("a"), admitted("b"), settled("a")]
    ends = []
    for record in records:
        (mine.admitted if isinstance(record, Admitted) else mine.settled)(record)
        ends.append(mine.position()[1])
    os.truncate(mine.segment(1), min(cut, ends[-1]))

    assert everything(mine.folder) == [record for record, end in zip(records, ends, strict=True) if end <= cut]


def test_a_flipped_byte_ends_the_reading_there(tmp_path):
    mine = Journal(tmp_path)
    mine.admitted(admitted("a"))
    first = mine.position()[1]
    mine.admitted(admitted("b"))
    data = bytearray(mine.segment(1).read_bytes())
    data[first + journal.HEAD.size + 3] ^= 1
    mine.segment(1).write_bytes(data)

    assert everything(mine.folder) == [admitted("a")]


def test_rotation_carries_open_admissions_so_that_an_old_segment_can_go(tmp_path):
    mine = Journal(tmp_path, segment_bytes=4096)
    mine.admitted(admitted("long stream"))
    for number in range(100):
        mine.admitted(admitted(f"r{number}"))
        mine.settled(settled(f"r{number}"))
    assert mine.position()[0] > 1

    for number in range(1, mine.position()[0]):
        mine.drop(number)

    assert admitted("long stream") in everything(mine.folder)
    assert mine.size == mine.position()[1]


def test_at_the_size_cap_nothing_new_is_admitted_but_what_runs_is_settled(tmp_path):
    mine = Journal(tmp_path, max_bytes=600)
    names = []
    with pytest.raises(JournalFull):
        for number in range(20):
            mine.admitted(admitted(f"r{number}"))
            names.append(f"r{number}")
    for name in names:
        mine.settled(settled(name))

    assert [record.request_id for record in everything(mine.folder) if isinstance(record, Settled)] == names


def test_a_full_disk_refuses_admissions_and_still_records_what_runs(tmp_path):
    """A limit on the size of files stands for the full disk: a write beyond it fails as ENOSPC does."""
    script = textwrap.dedent(
        f"""
        import resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path.cwd())!r})
        from proxy.journal import Journal, JournalFull
        from tests.proxy.test_journal import admitted, settled
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        mine = Journal(Path({str(tmp_path)!r}))
        mine.admitted(admitted("runs"))
        size = mine.position()[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, resource.RLIM_INFINITY))
        try:
            mine.admitted(admitted("too late"))
        except JournalFull as problem:
            print("refused:", problem)
        assert mine.position()[1] == size == mine.segment(1).stat().st_size, "a torn record was left behind"
        mine.settled(settled("runs"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        mine.admitted(admitted("again"))
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert "refused:" in done.stdout
    [folder] = journal.folders(tmp_path)
    assert everything(folder) == [admitted("runs"), settled("runs"), admitted("again")]


def test_only_a_dead_workers_journal_can_be_locked(tmp_path):
    script = f"from pathlib import Path; from proxy.journal import Journal; j = Journal(Path({str(tmp_path)!r})); "
    script += "print('made', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"made\n"
    [folder] = journal.folders(tmp_path)
    assert journal.lock(folder) is None

    child.send_signal(signal.SIGKILL)
    child.wait()
    held = journal.lock(folder)
    assert held is not None
    journal.remove(folder, held)
    assert journal.folders(tmp_path) == []


def test_the_second_adopter_sees_that_the_first_was_there(tmp_path):
    mine = Journal(tmp_path)
    mine.close()
    descriptor = os.open(mine.folder / "lock", os.O_RDWR)  # it opened the file, and then was slow
    journal.remove(mine.folder, journal.lock(mine.folder))

    assert journal.lock(mine.folder) is None
    os.close(descriptor)
