"""Golden transcripts of the round machines: what goes in at the left margin, what comes out indented below it.

`python -m tests.protocol.transcripts` writes the outcomes in tests/scenarios anew; read the difference before you keep
it. A short text stands for 32 bytes; a line `record NAME field=value ...` declares a record, which goes by that name;
`run=inner.steps:5` is the run with another setting.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from protocol import round as machines
from protocol.errors import Code
from protocol.identity import NO_DIGEST
from protocol.ledger import CloseReason, Entry, Kind, RoundRecord, Verdict
from protocol.round import AggregatorRound, ArrivalHistory, Arrived, Close, ReplicaRound
from protocol.run import InnerConfig, OuterConfig, RoundConfig, RunConfig, RunSettings
from tests.protocol.codec_samples import make_run

SCENARIOS = Path(__file__).parent.parent / "scenarios"


def named(text: str) -> bytes:
    return text.encode("ascii").ljust(32, b"\0")


def name_of(data: bytes) -> str:
    return data.rstrip(b"\0").decode("ascii")


def run_of(fields: dict[str, str]) -> RunConfig:
    low, _, high = fields.get("grace", "2..60").partition("..")
    rules = RoundConfig(
        quorum=int(fields.get("quorum", "1")),
        grace_s_min=float(low),
        grace_s_max=float(high),
        deadline_s=float(fields.get("deadline", "300")),
        start_peers=int(fields.get("start_peers", "1")),
    )
    outer = OuterConfig(rounds=int(fields.get("rounds", "60")))
    inner = InnerConfig(overlap=fields.get("overlap") == "yes")
    settings = RunSettings("scenario", inner=inner, outer=outer, rounds=rules)
    run = make_run()
    return RunConfig.of(
        settings, operator=run.operator, aggregators=run.aggregators, layout=run.layout, genesis_root=named("s0")
    )


class Player:
    """Plays one scenario and writes it down with what came out."""

    def __init__(self) -> None:
        self.machine: AggregatorRound | ReplicaRound | None = None
        self.records: dict[str, RoundRecord] = {}
        self.now_s = 0.0

    def play(self, text: str) -> str:
        lines: list[str] = []
        for line in text.splitlines():
            if line.startswith("    "):
                continue
            lines.append(line)
            if line and not line.startswith("#"):
                lines += ["    " + item for item in self._perform(line)]
        return "\n".join(lines) + "\n"

    def _perform(self, line: str) -> list[str]:
        first, *words = line.split()
        if first.startswith("t="):
            self.now_s = float(first[2:])
            event = self._event(words[0], fields_of(words[1:]))
            assert self.machine is not None
            return [item for effect in self.machine.handle(event, self.now_s) for item in self._shown(effect)]
        name = words[0] if words and "=" not in words[0] else ""
        fields = fields_of(words[1:] if name else words)
        if first == "record":
            self.records[name] = self._record(fields)
        elif first == "next":
            assert isinstance(self.machine, AggregatorRound)
            run = self._value("run", fields["run"]) if "run" in fields else self.machine.run
            self.machine = self.machine.next(run, named(fields["root"]), self.now_s)
        elif first == "aggregator":
            self.machine = self._aggregator(fields)
        else:
            assert first == "replica", line
            record = self.records[fields["record"]] if "record" in fields else None
            round, _, digest = fields.get("packet", "").partition(":")
            packet = (int(round), named(digest)) if round else None
            self.machine = ReplicaRound(run_of(fields), record=record, packet=packet)
        return []

    def _aggregator(self, fields: dict[str, str]) -> AggregatorRound:
        history = tuple(float(item) for item in split(fields.get("history", "")))
        taken_up = [item.split(":") for item in split(fields.get("taken_up", ""))]
        return AggregatorRound(
            run_of(fields),
            int(fields.get("round", "5")),
            named("s4"),
            self.now_s,
            members=frozenset(named(item) for item in split(fields.get("members", ""))),
            history=ArrivalHistory(history),
            taken_up=[Arrived(named(peer), named(digest), 5120, 20) for peer, digest in taken_up],
            returning=frozenset(named(item) for item in split(fields.get("returning", ""))),
        )

    def _record(self, fields: dict[str, str]) -> RoundRecord:
        accepted = [named(item) for item in split(fields.get("accepted", ""))]
        previous = self.records[fields["after"]].digest if "after" in fields else named("unknown")
        kind = Kind[fields.get("kind", "applied").upper()]
        closed_ms = int(float(fields.get("seconds", "100")) * 1000)
        return RoundRecord(
            run_id=NO_DIGEST,
            round=int(fields["round"]),
            epoch=int(fields.get("epoch", "0")),
            previous=previous,
            kind=kind,
            reason=CloseReason.OPERATOR if kind == Kind.ROLLBACK else CloseReason.DEADLINE,
            state_root=named(fields["root"]),
            update_digest=named("u") if kind == Kind.APPLIED else NO_DIGEST,
            opened_ms=0,
            closed_ms=closed_ms,
            entries=tuple(Entry(item, item, Verdict.ACCEPTED, 0, 1, 1, 1, 1) for item in accepted),
        )

    def _event(self, kind: str, fields: dict[str, str]) -> Any:
        event = getattr(machines, kind)
        return event(**{key: self._value(key, text) for key, text in fields.items()})

    def _value(self, key: str, text: str) -> Any:
        match key:
            case "head":
                return self.records[text]
            case "records":
                return tuple(self.records[item] for item in split(text))
            case "code":
                return 0 if text == "0" else Code[text]
            case "accepted" | "gone":
                return text == "yes"
            case "reason":
                return text
            case "closes_in_s":
                return float(text)
            case "run":
                assert self.machine is not None
                changes = dict(item.split(":") for item in split(text))
                return self.machine.run.amended({key: json.loads(value) for key, value in changes.items()})
            case "round" | "steps" | "tokens" | "inner_steps":
                return int(text)
            case "digest" if text in self.records:
                return self.records[text].digest
            case _:
                return named(text)

    def _shown(self, effect: Any) -> list[str]:
        fields = {item.name: getattr(effect, item.name) for item in dataclasses.fields(effect)}
        submissions = fields.pop("submissions", ())
        usual = {item.name: item.default for item in dataclasses.fields(effect)}
        words = [f"{key}={self._text(key, value)}" for key, value in fields.items() if value != usual[key]]
        lines = [" ".join([type(effect).__name__, *words])]
        assert not submissions or isinstance(effect, Close)
        for item in submissions:
            fate = item.verdict.name + (f" {Code(item.code).name}" if item.code else "")
            lines.append(f"    {name_of(item.peer)} {name_of(item.digest)} {fate}")
        return lines

    def _text(self, key: str, value: Any) -> str:
        if isinstance(value, RoundRecord):
            return next(name for name, record in self.records.items() if record == value)
        if isinstance(value, bytes):
            return name_of(value)
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, Kind | CloseReason | Code):
            return value.name
        return repr(value) if key == "reason" else f"{value:g}"


def fields_of(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


def split(text: str) -> list[str]:
    return text.split(",") if text else []


if __name__ == "__main__":
    for path in sorted(SCENARIOS.glob("*.txt")):
        path.write_text(Player().play(path.read_text("utf-8")), "utf-8")
