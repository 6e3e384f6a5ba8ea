"""What the page is told, as plain values for JSON: everything at first, then what came since."""

import dataclasses
import heapq
import json
from importlib.metadata import version
from typing import Any

from peer.web.board import ROUNDS_MAPPED, Live, Loss, PeerSums, View, alarms, newest_loss, paused, with_bits
from protocol.amendment import Action, Amendment, Ban, ChangeSettings, Pause, Resume, Rollback, Unban
from protocol.ledger import Verdict
from protocol.run import RunConfig

PEERS_SHOWN = 100
TABLES = ("model", "data", "inner", "compression", "outer", "rounds")
MARKS = {Verdict.ACCEPTED: "a", Verdict.LATE: "l", Verdict.REFUSED: "r"}


def message(view: View, live: Live, now_ms: int, since: View | None) -> dict[str, Any]:
    """What somebody has to hear who knows the view `since`; None knows nothing."""
    if since is None or since.branch != view.branch:
        losses, rounds, fresh = view.losses, view.rounds, True
    else:
        last = since.losses[-1].round if since.losses else -1
        losses = tuple(loss for loss in view.losses if loss.round > last)
        rounds = tuple(round for round in view.rounds if round.round > since.head.round)
        fresh = False
    told: dict[str, Any] = {"fresh": fresh, "now": _now(view, live, now_ms)}
    if fresh or (since is not None and since.settings != view.settings) or _amended(view, since):
        told["run"] = _run(view)
    if fresh or rounds:
        told["rounds"] = [dataclasses.asdict(round) for round in rounds]
        told["peers"] = _peers(view)
        told["mapped"] = list(view.verdicts)
    if losses:
        told["losses"] = [[loss.round, loss.loss] for loss in losses]
    return told


def _amended(view: View, since: View | None) -> bool:
    return since is not None and since.amendments.head != view.amendments.head


def _now(view: View, live: Live, now_ms: int) -> dict[str, Any]:
    newest = newest_loss(view, live)
    return {
        "time_ms": now_ms,
        "leading": live.leading,
        "connected": live.connected,
        "complete": view.complete,
        "paused": paused(view, live),
        "behind": view.behind,
        "head": view.head.round,
        "epoch": view.head.epoch,
        "closed_ms": view.head.closed_ms,
        "state_root": view.head.state_root.hex(),
        "open_round": live.open_round,
        "closes_in_s": live.closes_in_s,
        "receipts": [[packet.peer.hex(), packet.arrived_ms, packet.tokens] for packet in view.open_packets],
        "bytes_per_token": live.bytes_per_token,
        "newest": None if newest is None else with_bits(newest, live),
        "lowest": _lowest(view.lowest, newest),
        "tokens": view.sums.tokens,
        "alarms": [dataclasses.asdict(alarm) for alarm in alarms(view, live, now_ms)],
    }


def _lowest(known: Loss | None, newest: Loss | None) -> float | None:
    losses = [loss.loss for loss in (known, newest) if loss is not None]
    return min(losses, default=None)


def _run(view: View) -> dict[str, Any]:
    run, settings = view.run, view.settings
    return {
        "name": run.name,
        "run_id": run.run_id.hex(),
        "operator": run.operator.hex(),
        "aggregators": [key.hex() for key in run.aggregators],
        "version": version("sparseloco-peer"),
        "parameters": run.layout.size,
        "rounds": settings.outer.rounds,
        "quorum": settings.rounds.quorum,
        "packet_bytes_max": view.packet_bytes_max,
        "download_bytes_max": view.download_bytes_max,
        "settings": [[name, _table(run, settings, name)] for name in TABLES],
        "amendments": [_amendment(amendment) for amendment in view.amendments.chain],
    }


def _table(run: RunConfig, settings: RunConfig, name: str) -> list[list[str]]:
    """Key, value now, and the value that was signed at first, of each setting of a table.

    As texts, for JavaScript has no whole numbers of 64 bits.
    """
    now, first = (dataclasses.asdict(getattr(config, name)) for config in (settings, run))
    return [[key, _text(now[key]), _text(first[key])] for key in now]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _amendment(amendment: Amendment) -> dict[str, Any]:
    return {"number": amendment.number, "round": amendment.round, "text": _told(amendment.action)}


def _told(action: Action) -> str:
    match action:
        case ChangeSettings(changes):
            return ", ".join(f"{key} = {value}" for key, value in changes.items())
        case Pause():
            return "the run pauses"
        case Resume():
            return "the run goes on"
        case Rollback(to_round):
            return f"back to the state of round {to_round}"
        case Ban(peer):
            return f"packets of {peer.hex()} no longer count"
        case Unban(peer):
            return f"packets of {peer.hex()} count again"


def _peers(view: View) -> list[dict[str, Any]]:
    """Those of the newest rounds with the most accepted packets, and then others."""
    recent = view.head.round - ROUNDS_MAPPED

    def rank(item: tuple[bytes, PeerSums]) -> tuple[bool, int, bytes]:
        return item[1].last_round > recent, item[1].accepted, item[0]

    return [
        {
            "key": key.hex(),
            **dataclasses.asdict(sums),
            "marks": "".join(MARKS[Verdict(row[key][0])] if key in row else "-" for row in view.verdicts.values()),
            "codes": {round: row[key][1] for round, row in view.verdicts.items() if key in row and row[key][1]},
        }
        for key, sums in heapq.nlargest(PEERS_SHOWN, view.peers.items(), key=rank)
    ]
