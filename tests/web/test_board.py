"""The sums of the dashboard, against a ledger that was written by hand."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from peer.errors import UserError
from peer.journal import RecordRow
from peer.store import load_key
from peer.web.board import PEERS_KEPT, READ_AT_ONCE, Board, Live, Loss, PeerSums, alarms, newest_store, paused
from peer.web.messages import message
from protocol.amendment import Amendments, ChangeSettings, Pause, sign_amendment
from protocol.errors import Code
from protocol.ledger import CloseReason, Verdict
from protocol.wire import packet_wire_bytes_max
from tests.peer.test_audit import NULL_ROUND, PEERS, ROUNDS, Maker, journal, whole
from tests.web.ledger import close_round, entry

__all__ = ["whole"]

LIVE = Live(bytes_per_token=1.0)


@pytest.fixture
def maker(tmp_path: Path) -> Iterator[Maker]:
    maker = Maker(tmp_path / "run")
    yield maker
    maker.store.close()


def test_a_real_ledger(whole: Path) -> None:
    with closing(Board(newest_store(whole))) as board:
        view = board.read()
        assert view is not None and view is board.read()
    assert (view.head.round, len(view.rounds), view.behind, view.complete) == (ROUNDS, ROUNDS, False, True)
    assert view.sums.rounds == {("applied", "complete"): ROUNDS - 1, ("null", "deadline"): 1}
    assert view.sums.verdicts == {"accepted": PEERS * (ROUNDS - 1), "refused": PEERS}
    assert view.sums.codes == {Code.NO_QUORUM: PEERS}
    assert view.sums.tokens == sum(round.tokens for round in view.rounds) > 0
    assert sorted(view.peers) == sorted(view.verdicts[1]) and len(view.peers) == PEERS
    for sums in view.peers.values():
        assert (sums.accepted, sums.refused, sums.last_round) == (ROUNDS - 1, 1, ROUNDS)
    null, last = view.rounds[NULL_ROUND - 1], view.rounds[-1]
    assert (null.kind, null.packet_bytes, null.download_bytes) == ("null", 0, 0)
    sizes = [path.stat().st_size for path in (journal(whole).parent / "blobs" / "packet").rglob("*") if path.is_file()]
    assert 0 < last.packet_bytes <= max(sizes) <= packet_wire_bytes_max(view.run)
    assert last.download_bytes > last.packet_bytes and last.state_root == view.head.state_root.hex()


def test_a_long_ledger_is_read_in_parts(maker: Maker) -> None:
    for round in range(1, READ_AT_ONCE + 5):
        close_round(maker, round, entries=(entry(1, round),), reason=CloseReason.COMPLETE)
    with closing(Board(maker.store.path)) as board:
        first, second = board.read(), board.read()
    assert first is not None and second is not None
    assert (first.head.round, first.behind) == (READ_AT_ONCE - 1, True)
    assert (second.head.round, second.behind) == (READ_AT_ONCE + 4, False)
    assert second.peers[bytes([1] * 32)].accepted == READ_AT_ONCE + 4


def test_a_takeover_that_gives_up_records(maker: Maker) -> None:
    common = close_round(maker, 1, entries=(entry(1, 1),), reason=CloseReason.COMPLETE)
    close_round(maker, 2, entries=(entry(2, 2),), reason=CloseReason.COMPLETE, loss=3.0)
    with closing(Board(maker.store.path)) as board:
        before = board.read()
        assert before is not None and len(before.peers) == 2 and before.losses
        maker.store.journal.rewind(1)
        maker.record = common
        close_round(maker, 2, entries=(entry(3, 2),), reason=CloseReason.GRACE, epoch=1)
        after = board.read()
    assert after is not None and after.branch != before.branch
    assert sorted(after.peers) == [bytes([1] * 32), bytes([3] * 32)] and after.losses == ()
    told = message(after, LIVE, 0, since=before)
    assert told["fresh"] and [round["reason"] for round in told["rounds"]] == ["complete", "grace"]


def test_what_changed_is_told_once(maker: Maker) -> None:
    close_round(maker, 1, entries=(entry(1, 1),), reason=CloseReason.COMPLETE)
    with closing(Board(maker.store.path)) as board:
        first = board.read()
        assert first is not None
        close_round(maker, 2, entries=(entry(1, 2), entry(2, 2, Verdict.LATE, Code.LATE)), loss=2.5)
        second = board.read()
        assert second is not None
    told = message(second, LIVE, 0, since=first)
    assert not told["fresh"] and [round["round"] for round in told["rounds"]] == [2] and "run" not in told
    assert told["losses"] == [[1, 2.5]]
    late = next(peer for peer in told["peers"] if peer["key"] == "02" * 32)
    assert (late["marks"], late["codes"]) == ("-l", {2: int(Code.LATE)})
    quiet = message(second, LIVE, 0, since=second)
    assert set(quiet) == {"fresh", "now"}


def test_the_alarms(maker: Maker) -> None:
    everybody, at_ms = (entry(1, 1),), 10_000_000
    close_round(maker, 1, entries=everybody, reason=CloseReason.COMPLETE, loss=2.0, closed_ms=at_ms)
    deadline_ms = int(1000 * maker.run.rounds.deadline_s)

    def standing(now_ms: int, live: Live = LIVE) -> list[str]:
        with closing(Board(maker.store.path)) as board:
            view = board.read()
            assert view is not None
            return [alarm.name for alarm in alarms(view, live, now_ms)]

    assert standing(at_ms) == standing(at_ms + deadline_ms) == []
    assert standing(at_ms + 2 * deadline_ms) == ["stale_head"]
    assert standing(at_ms, Live(newest=Loss(1, 2.19))) == []
    assert standing(at_ms, Live(newest=Loss(1, 2.21))) == ["divergence"]
    close_round(maker, 2, loss=4294.967295, closed_ms=at_ms)
    assert standing(at_ms) == ["divergence", "unguarded"]
    for round in range(3, 13):
        close_round(maker, round, entries=(entry(1, round),), reason=CloseReason.GRACE, loss=1.9, closed_ms=at_ms)
    assert standing(at_ms) == []
    assert standing(at_ms + 2 * deadline_ms) == []  # the last round has closed


def test_what_the_operator_changed(maker: Maker, tmp_path: Path) -> None:
    chain, key = Amendments(maker.run), load_key(tmp_path / "run" / "operator.key")
    for action, round in ((ChangeSettings({"inner.learning_rate": 0.0625, "outer.rounds": 99}), 2), (Pause(), 3)):
        amendment = sign_amendment(chain.draft(action, round), key)
        chain = chain.append(amendment)
        maker.store.blobs.put("amendment", amendment.digest.hex(), amendment.to_bytes())
    close_round(maker, 1, entries=(entry(1, 1),), amendment=chain.head, closed_ms=10_000_000)
    with closing(Board(maker.store.path)) as board:
        first = board.read()
        close_round(maker, 2, entries=(entry(1, 2),), amendment=chain.head, closed_ms=10_000_000)
        second = board.read()
    assert first is not None and second is not None
    assert (first.settings.outer.rounds, first.complete, paused(first, LIVE)) == (99, False, False)
    assert paused(second, LIVE) and not paused(second, Live(open_round=3))
    assert alarms(second, LIVE, 20_000_000) == [], "whoever waits for the operator is not late"
    told = message(second, LIVE, 0, since=None)["run"]
    assert ["learning_rate", "0.0625", "0.003"] in dict(told["settings"])["inner"]
    assert [item["text"] for item in told["amendments"]] == [
        "inner.learning_rate = 0.0625, outer.rounds = 99",
        "the run pauses",
    ]


def test_strangers_cannot_fill_the_memory(maker: Maker) -> None:
    with closing(Board(maker.store.path)) as board:
        assert board.read() is not None
        board._peers = {bytes(28) + number.to_bytes(4, "big"): PeerSums() for number in range(PEERS_KEPT)}
        close_round(maker, 1, entries=(entry(1, 1),))
        view = board.read()
    assert view is not None and len(view.peers) == PEERS_KEPT and bytes([1] * 32) in view.peers


def test_a_ledger_without_a_first_record(maker: Maker, tmp_path: Path) -> None:
    with closing(maker.store.journal._connection.cursor()) as cursor:
        cursor.execute("DELETE FROM records")
    with closing(Board(maker.store.path)) as board:
        assert board.read() is None


def test_a_folder_without_a_ledger(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no ledger"):
        newest_store(tmp_path)


def test_the_furthest_of_several_ledgers(tmp_path: Path) -> None:
    makers = [Maker(tmp_path / name) for name in ("one", "two")]
    for round in (1, 2):
        close_round(makers[0], round, entries=(entry(1, round),), reason=CloseReason.COMPLETE)
    close_round(makers[1], 1, entries=(entry(1, 1),), reason=CloseReason.COMPLETE, epoch=1)
    for maker in makers:
        maker.store.close()
    assert newest_store(tmp_path) == makers[1].store.path


def test_a_row_of_garbage_is_an_error_of_the_ledger(maker: Maker) -> None:
    maker.store.journal.close_round(RecordRow(1, bytes(32), bytes(32), bytes(32), b"garbage"), {})
    with closing(Board(maker.store.path)) as board, pytest.raises(Exception, match="not a round record"):
        board.read()
