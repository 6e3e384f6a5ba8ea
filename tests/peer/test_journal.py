import signal
import sqlite3
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from peer.errors import UserCode, UserError
from peer.journal import Journal, PacketRow, RecordRow

RUN_ID = bytes(range(32))


def digest(number: int) -> bytes:
    return number.to_bytes(32, "big")


def record(number: int) -> RecordRow:
    return RecordRow(number, digest(100 + number), digest(200 + number), digest(300 + number), b"record %d" % number)


def packet(number: int, round_number: int = 1) -> PacketRow:
    return PacketRow(digest(number), round_number, digest(number % 7), 1000, 15, 5000 - number)


def test_what_was_written_is_there_after_reopening(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", RUN_ID)
    assert journal.head() is None and journal.record(0) is None
    journal.close_round(record(0), {})
    for number in (1, 2, 3):
        journal.add_packet(packet(number))
    journal.add_packet(replace(packet(1), tokens=9))
    journal.close_round(record(1), {digest(1): (0, 0), digest(2): (2, 316)})
    journal.set_meta("run", b"signed")
    journal.close()

    journal = Journal(tmp_path / "journal", RUN_ID)
    assert journal.head() == record(1) == journal.record_by_digest(digest(101))
    assert journal.records(0, 9) == [record(0), record(1)]
    assert [row.digest for row in journal.packets(1)] == [digest(3), digest(2), digest(1)], "by arrival"
    assert journal.packet(digest(1)) == replace(packet(1), verdict=0)
    assert journal.packet(digest(2)) == replace(packet(2), verdict=2, code=316)
    assert journal.packet(digest(3)) == packet(3)
    assert journal.packet(digest(4)) is None and journal.record_by_digest(digest(4)) is None
    assert journal.meta("run") == b"signed" and journal.meta("other") is None
    assert journal.blobs_of(1) == [
        *(("packet", digest(n)) for n in (3, 2, 1)),
        ("update", digest(301)),
        ("bundle", digest(101)),
    ]
    journal.close()


def test_it_survives_a_power_cut_in_the_sense_of_sqlite(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, RUN_ID)
    mode = journal._connection.execute("PRAGMA journal_mode").fetchone()
    full = journal._connection.execute("PRAGMA synchronous").fetchone()
    assert (mode, full) == (("wal",), (2,))
    journal.close()


def test_a_kill_between_two_writes_loses_neither(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from peer.journal import Journal, PacketRow, RecordRow
        journal = Journal(Path(sys.argv[1]), bytes(range(32)))
        zero = bytes(32)
        journal.close_round(RecordRow(0, zero, zero, zero, b"genesis"), {})
        journal.add_packet(PacketRow(zero, 1, zero, 1, 1, 1))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "journal")]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL
    journal = Journal(tmp_path / "journal", RUN_ID)
    head = journal.head()
    assert head is not None and head.data == b"genesis"
    assert [row.digest for row in journal.packets(1)] == [bytes(32)]
    journal.close()


def test_rounds_only_follow_each_other_and_a_failed_close_changes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", RUN_ID)
    journal.close_round(record(5), {})
    journal.add_packet(packet(1))
    for wrong in (record(5), record(4), record(7)):
        with pytest.raises(ValueError, match="does not follow"):
            journal.close_round(wrong, {digest(1): (0, 0)})
    with pytest.raises(sqlite3.IntegrityError):
        journal.close_round(replace(record(6), digest=digest(105)), {digest(1): (0, 0)})
    assert journal.head() == record(5)
    assert journal.packet(digest(1)) == packet(1)
    journal.close()


def test_another_run_a_newer_schema_and_damage_are_user_errors(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path, RUN_ID).close()
    with pytest.raises(UserError) as caught:
        Journal(path, bytes(32))
    assert caught.value.code is UserCode.OTHER_RUN_STORED

    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(UserError) as caught:
        Journal(path, RUN_ID)
    assert caught.value.code is UserCode.NEWER_STORE

    path.write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(UserError) as caught:
        Journal(path, RUN_ID)
    assert caught.value.code is UserCode.DAMAGED_STORE

    with pytest.raises(UserError) as caught:
        Journal(tmp_path / "missing" / "journal", RUN_ID)
    assert caught.value.code is UserCode.NO_PERMISSION


def test_a_full_disk_is_a_user_error_and_the_journal_goes_on_afterwards(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", RUN_ID)
    journal.close_round(record(0), {})
    (pages,) = journal._connection.execute("PRAGMA page_count").fetchone()
    journal._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(UserError) as caught:
        journal.close_round(replace(record(1), data=bytes(1 << 20)), {})
    assert caught.value.code is UserCode.DISK_FULL
    assert journal.head() == record(0)
    journal._connection.execute("PRAGMA max_page_count = 1000000")
    journal.close_round(record(1), {})
    assert journal.head() == record(1)
    journal.close()


def test_a_second_program_may_read_while_the_first_writes(tmp_path: Path) -> None:
    writer = Journal(tmp_path / "journal", RUN_ID)
    reader = Journal(tmp_path / "journal", RUN_ID)
    writer.close_round(record(0), {})
    assert reader.head() == record(0)
    reader.close()
    writer.close()
