"""The numpy reference behind the line protocol of README.md: `python -m protocol.reference_client`."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol import invite, ledger, records, wire
from protocol.amendment import Amendment, Amendments, check_rollback
from protocol.arithmetic import Contribution, merge, weight_of
from protocol.compress import compress, dequantize, error_feedback, to_float32
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST, PrivateKey, check_key, digest, merkle_root, verify
from protocol.layout import Layout, TensorSpec, state_root
from protocol.packet import Packet, PacketHeader, check_packet, make_packet
from protocol.packing import decode_section, encode_section
from protocol.round import RESENDABLE
from protocol.run import AMENDABLE, RunConfig, SignedRun, canonical_json
from protocol.update import (
    Update,
    UpdateHeader,
    apply_update,
    check_update,
    decode_update_section,
    encode_update_section,
    make_update,
    update_values,
)

Request = Mapping[str, Any]
Facts = dict[str, Any]

_CONTENT = np.dtype([("index", "<u4"), ("value", "<f4")])


def answer(request: Request) -> Facts:
    """Answer one request of the line protocol."""
    handler = _HANDLERS.get((request["verb"], request.get("kind", "")))
    if handler is None:
        return {"unsupported": True}
    try:
        return {"ok": handler(request)}
    except ProtocolError as error:
        return {"refused": int(error.code)}
    except ValueError:
        # Our own input is at fault, for example a pseudo-gradient with NaN; no code stands for that.
        return {"refused": 0}


def _bytes(request: Request, name: str = "bytes") -> bytes:
    return bytes.fromhex(request[name])


def _list(request: Request, name: str = "sections") -> list[bytes]:
    return [bytes.fromhex(item) for item in request[name]]


def _run(request: Request) -> RunConfig:
    return RunConfig.from_json(request["run"].encode("ascii"))


def _floats(request: Request, name: str) -> NDArray[np.float32]:
    return np.frombuffer(_bytes(request, name), "<f4").astype(np.float32)


def _hex(floats: NDArray[np.float32]) -> str:
    return floats.astype("<f4").tobytes().hex()


def _one_tensor(size: int) -> Layout:
    return Layout((TensorSpec("tensor", (size,)),))


# ---------------------------------------------------------------- check


def _check_key(request: Request) -> Facts:
    check_key(_bytes(request))
    return {}


def _check_signature(request: Request) -> Facts:
    verify(_bytes(request, "key"), request["domain"], _bytes(request, "message"), _bytes(request))
    return {}


def _check_run(request: Request) -> Facts:
    run_id = None if request["run_id"] is None else _bytes(request, "run_id")
    run = SignedRun.from_bytes(_bytes(request), run_id=run_id).config
    return {
        "run_id": run.run_id.hex(),
        "alpha_q16": run.outer.alpha_q16,
        "nominal_tokens": run.nominal_tokens,
        "values": run.layout.size,
    }


def _contents(indices: NDArray[np.int64], values: NDArray[np.float32]) -> Facts:
    content = np.empty(len(indices), _CONTENT)
    content["index"], content["value"] = indices, values
    return {"count": len(indices), "sha256": hashlib.sha256(content.tobytes()).hexdigest()}


def _check_section(request: Request) -> Facts:
    sparse = decode_section(_bytes(request), request["size"], request["k"], request["code_bits"])
    return _contents(sparse.indices, to_float32(dequantize(sparse)))


def _check_update_section(request: Request) -> Facts:
    update = decode_update_section(_bytes(request), request["size"])
    return _contents(update.indices, update_values(update))


def _check_packet(request: Request) -> Facts:
    packet = Packet(PacketHeader.from_bytes(_bytes(request, "header")), tuple(_list(request)))
    check_packet(packet, _run(request), round=request["round"], base_root=_bytes(request, "base_root"))
    return {"digest": packet.header.digest.hex()}


def _check_update(request: Request) -> Facts:
    update = Update(UpdateHeader.from_bytes(_bytes(request, "header")), tuple(_list(request)))
    check_update(update, _run(request), digest=_bytes(request, "digest"))
    return {"digest": update.header.digest.hex()}


def _parts(thing: Packet | Update) -> Facts:
    return {"header": thing.header.to_bytes().hex(), "sections": [section.hex() for section in thing.sections]}


def _check_packet_wire(request: Request) -> Facts:
    return _parts(wire.packet_from_wire(_bytes(request), _run(request)))


def _check_update_wire(request: Request) -> Facts:
    return _parts(wire.update_from_wire(_bytes(request), _run(request)))


def _check_bundle(request: Request) -> Facts:
    run, record, base_root = (
        _run(request),
        ledger.RoundRecord.from_bytes(_bytes(request, "record")),
        request["base_root"],
    )
    entries = [entry for entry in record.entries if entry.verdict == ledger.Verdict.ACCEPTED]
    parts = wire.bundle_from_wire(_bytes(request), len(entries), run)
    contributions = []
    for part, entry in zip(parts, entries, strict=True):
        packet = wire.packet_from_wire(part, run)
        if packet.header.digest != entry.packet_digest:
            raise ProtocolError(Code.WRONG_DIGEST, "the bundle holds another packet than the record names")
        tensors = check_packet(packet, run, round=record.round, base_root=bytes.fromhex(base_root))
        contributions.append(Contribution(tensors, entry.weight, entry.clip))
    merged = merge(contributions, run.layout, run.outer.rule, run.outer.alpha_q16)
    sections = [encode_update_section(tensor) for tensor in merged]
    update = make_update(run, record.round, bytes.fromhex(base_root), record.state_root, sections)
    if update.header.digest != record.update_digest:
        raise ProtocolError(Code.WRONG_DIGEST, "the packets do not lead to the update that the record names")
    return {"sections": [section.hex() for section in sections]}


def _check_record(request: Request) -> Facts:
    record = ledger.RoundRecord.from_bytes(_bytes(request))
    ledger.check_record(record, _run(request))
    accepted = [entry.packet_digest.hex() for entry in record.entries if entry.verdict == ledger.Verdict.ACCEPTED]
    facts = {"digest": record.digest.hex(), "round": record.round, "epoch": record.epoch, "kind": int(record.kind)}
    return {**facts, "accepted": accepted}


def _check_amendment(request: Request) -> Facts:
    amendment = Amendment.from_bytes(_bytes(request), _run(request))
    return {"digest": amendment.digest.hex(), "number": amendment.number, "round": amendment.round}


def _amendments(run: RunConfig, items: Sequence[str]) -> list[Amendment]:
    return [Amendment.from_bytes(bytes.fromhex(item), run) for item in items]


def _check_amendments(request: Request) -> Facts:
    run = _run(request)
    chain = Amendments(run)
    for amendment in _amendments(run, request["known"]):
        chain = chain.append(amendment)
    record = ledger.RoundRecord.from_bytes(_bytes(request, "record"))
    chain = chain.follow(record, _amendments(run, request["amendments"]))
    return {"head": chain.head.hex(), "rounds": [_in_force(chain, round) for round in request["rounds"]]}


def _in_force(chain: Amendments, round: int) -> Facts:
    run = chain.config_at(round)
    settings = canonical_json({table: dataclasses.asdict(getattr(run, table)) for table in AMENDABLE})
    return {
        "settings": settings.decode("ascii"),
        "banned": sorted(peer.hex() for peer in chain.banned_at(round)),
        "paused": chain.paused_at(round),
        "rollback": chain.rollback_at(round),
    }


def _check_link(request: Request) -> Facts:
    previous = ledger.RoundRecord.from_bytes(_bytes(request, "previous"))
    ledger.check_link(previous, ledger.RoundRecord.from_bytes(_bytes(request)))
    return {}


def _check_rollback(request: Request) -> Facts:
    target = ledger.RoundRecord.from_bytes(_bytes(request, "target"))
    check_rollback(ledger.RoundRecord.from_bytes(_bytes(request)), target)
    return {}


def _check_dht(request: Request) -> Facts:
    key, value = request["key"].encode("ascii"), _bytes(request)
    expiration, now = request["expiration"], request["now"]
    record = records.check_dht_record(key, _bytes(request, "subkey"), value, expiration, now)
    ad = records.Ad.from_payload(record.payload)
    facts = {"certificate": ad.certificate_sha256.hex(), "round": ad.head_round, "digest": ad.head_digest.hex()}
    return {**facts, "addresses": list(ad.addresses)}


def _check_invite(request: Request) -> Facts:
    found = invite.Invite.from_text(request["text"])
    return {
        "run_id": found.run_id.hex(),
        "aggregator": found.aggregator_key.hex(),
        "certificate": found.certificate_sha256.hex(),
        "addresses": list(found.addresses),
        "bootstraps": list(found.bootstraps),
    }


def _transcript(request: Request, peer: bytes) -> bytes:
    nonces = _bytes(request, "client_nonce") + _bytes(request, "server_nonce")
    return _bytes(request, "run_id") + peer + nonces + _bytes(request, "certificate")


def _check_challenge(request: Request) -> Facts:
    signed = _transcript(request, _bytes(request, "peer"))
    verify(_bytes(request, "aggregator"), "join-aggregator", signed, _bytes(request))
    return {}


# ---------------------------------------------------------------- make


def _make_acc(request: Request) -> Facts:
    residual, outer, local = (_floats(request, name) for name in ("residual", "outer", "local"))
    with np.errstate(over="ignore"):  # an infinity is the right sum, and compress refuses it
        acc = error_feedback(residual, outer, local, request["beta"])
    return {"acc": _hex(acc)}


def _make_compress(request: Request) -> Facts:
    acc, k, code_bits = _floats(request, "acc"), request["k"], request["code_bits"]
    sparse, residual = compress(acc, k, code_bits)
    section = encode_section(sparse, k, code_bits)
    return {"section": section.hex(), "residual_sha256": hashlib.sha256(residual.astype("<f4").tobytes()).hexdigest()}


def _make_weight(request: Request) -> Facts:
    return {"weight": weight_of(request["tokens"], request["nominal"])}


def _make_merge(request: Request) -> Facts:
    size, k, code_bits = request["size"], request["k"], request["code_bits"]
    packets = zip(_list(request), request["weights"], request["clips"], strict=True)
    contributions = [
        Contribution([decode_section(section, size, k, code_bits)], weight, clip) for section, weight, clip in packets
    ]
    (merged,) = merge(contributions, _one_tensor(size), request["rule"], request["alpha_q16"])
    return {"section": encode_update_section(merged).hex()}


def _make_apply(request: Request) -> Facts:
    outer = _floats(request, "outer")
    apply_update(outer, _one_tensor(outer.size), [decode_update_section(_bytes(request, "section"), outer.size)])
    return {"outer": _hex(outer)}


def _make_merkle(request: Request) -> Facts:
    return {"root": merkle_root(_list(request, "leaves")).hex()}


def _make_state_root(request: Request) -> Facts:
    return {"root": state_root(np.tile(_floats(request, "values"), request["repeat"])).hex()}


def _make_packet(request: Request) -> Facts:
    key, base_root = PrivateKey.from_bytes(_bytes(request, "seed")), _bytes(request, "base_root")
    tokens, steps, sections = request["tokens"], request["inner_steps"], _list(request)
    header = make_packet(_run(request), key, request["round"], base_root, tokens, steps, sections).header
    return {"header": header.to_bytes().hex(), "digest": header.digest.hex()}


def _make_update(request: Request) -> Facts:
    base_root, new_root = _bytes(request, "base_root"), _bytes(request, "new_root")
    header = make_update(_run(request), request["round"], base_root, new_root, _list(request)).header
    return {"header": header.to_bytes().hex(), "digest": header.digest.hex()}


def _make_dht(request: Request) -> Facts:
    ad = records.Ad(
        tuple(request["addresses"]), _bytes(request, "certificate"), request["round"], _bytes(request, "digest")
    )
    key, dht_key = PrivateKey.from_bytes(_bytes(request, "seed")), request["key"].encode("ascii")
    kind = records.DhtKind.AGGREGATOR if dht_key.endswith(b"/aggregators") else records.DhtKind.PEER
    return {"bytes": records.make_dht_record(key, dht_key, kind, ad.to_payload(), request["expires"]).hex()}


def _make_invite(request: Request) -> Facts:
    run_id, key, certificate = (_bytes(request, name) for name in ("run_id", "aggregator", "certificate"))
    addresses, bootstraps = tuple(request["addresses"]), tuple(request["bootstraps"])
    return {"text": invite.Invite(run_id, key, certificate, addresses, bootstraps).to_text()}


def _make_proof(request: Request) -> Facts:
    key = PrivateKey.from_bytes(_bytes(request, "seed"))
    return {"bytes": key.sign("join-peer", _transcript(request, key.public) + _bytes(request, "aggregator")).hex()}


# ---------------------------------------------------------------- follow


@dataclass
class _Replica:
    """SPEC 12 as far as it needs no clock: which record is the head, and what became of the packets."""

    run: RunConfig
    head: ledger.RoundRecord
    packets: dict[int, bytes]
    stored: dict[bytes, bytes]
    chain: Amendments
    held: dict[int, ledger.RoundRecord] = field(default_factory=dict)
    heads: set[bytes] = field(default_factory=set)
    waiting: tuple[int, bytes] | None = None
    settled: list[list[Any]] = field(default_factory=list)

    def move(self, record: ledger.RoundRecord) -> None:
        """Settle the packet that waits, then hold this record and make the packet of the round after it."""
        if self.waiting is not None:
            round, digest = self.waiting
            self.settled.append([round, record.round == round and record.accepted(digest)])
        self.head = record
        self.held[record.round] = record
        self.heads.add(record.digest)
        made = self.packets.pop(record.round + 1, None)
        self.waiting = None if made is None else (record.round + 1, made)

    def take(self, record: ledger.RoundRecord) -> str:
        """Decide about a record that passed section 8 by itself."""
        if record.digest in self.heads:
            return "known"
        if record.epoch < self.head.epoch:
            return "lower"
        if self._follows(record):
            self.chain = self.chain.follow(record, self.trace(self.chain, record.amendment))
            self.move(record)
            return "rollback" if record.kind == ledger.Kind.ROLLBACK else "next"
        if record.round > self.head.round + 1:
            return "gap"
        if record.epoch > self.head.epoch:
            self.load(record)
            self.held.clear()
            self.move(record)
            return "branch"
        return "second" if record.round > self.head.round or record.round in self.held else "old"

    def train(self, round: int, base_root: bytes, steps: int) -> int:
        """How many inner steps to do in a round that an aggregator says is open."""
        run = self.chain.config_at(self.head.round + 1)
        fits = round == self.head.round + 1 and base_root == self.head.state_root
        if not fits or self.waiting is not None or self.head.round >= run.outer.rounds:
            return 0
        return min(max(steps, 1), run.inner.steps)

    def load(self, record: ledger.RoundRecord) -> None:
        """Take in all amendments that a record names whose state is loaded."""
        chain = Amendments(self.run)
        for amendment in self.trace(chain, record.amendment):
            chain = chain.append(amendment)
        chain.check(record)
        self.chain = chain

    def trace(self, known: Amendments, head: bytes) -> list[Amendment]:
        """Fetch the amendments after the known ones up to the one of this digest."""
        found: list[Amendment] = []
        while head != known.head:
            if head == NO_DIGEST:
                raise ProtocolError(Code.BAD_AMENDMENT, "the amendments do not go on from the known ones")
            if head not in self.stored:
                raise ProtocolError(Code.NOT_FOUND, "the amendment is not there")
            found.insert(0, Amendment.from_bytes(self.stored[head], self.run))
            head = found[0].previous if found[0].number > 1 else NO_DIGEST
        return found

    def _follows(self, record: ledger.RoundRecord) -> bool:
        try:
            ledger.check_link(self.head, record)
        except ProtocolError:
            return False
        return True


def _follow(request: Request) -> Facts:
    run, held = _run(request), ledger.RoundRecord.from_bytes(_bytes(request, "held"))
    stored = {digest("amendment", data): data for data in _list(request, "amendments")}
    packets = {round: bytes.fromhex(packet) for round, packet in request["packets"]}
    replica = _Replica(run, held, packets, stored, Amendments(run))
    replica.load(held)
    replica.move(held)
    return {
        "decisions": [_decide(replica, event) for event in request["events"]],
        "settled": replica.settled,
        "head": replica.head.digest.hex(),
        "state_root": replica.head.state_root.hex(),
    }


def _decide(replica: _Replica, event: Request) -> str | int:
    if "opened" in event:
        opened = event["opened"]
        return replica.train(opened["round"], _bytes(opened, "base_root"), opened["inner_steps"])
    if "receipt" in event:
        return "again" if event["receipt"] in RESENDABLE else "rest"
    try:
        record = ledger.RoundRecord.from_bytes(_bytes(event, "record"))
        ledger.check_record(record, replica.run)
        return replica.take(record)
    except ProtocolError as error:
        return int(error.code)


_HANDLERS: dict[tuple[str, str], Callable[[Request], Facts]] = {
    ("check", "key"): _check_key,
    ("check", "signature"): _check_signature,
    ("check", "run"): _check_run,
    ("check", "section"): _check_section,
    ("check", "update-section"): _check_update_section,
    ("check", "packet"): _check_packet,
    ("check", "packet-wire"): _check_packet_wire,
    ("check", "update"): _check_update,
    ("check", "update-wire"): _check_update_wire,
    ("check", "bundle"): _check_bundle,
    ("check", "record"): _check_record,
    ("check", "link"): _check_link,
    ("check", "amendment"): _check_amendment,
    ("check", "amendments"): _check_amendments,
    ("check", "rollback"): _check_rollback,
    ("check", "dht"): _check_dht,
    ("check", "invite"): _check_invite,
    ("check", "challenge"): _check_challenge,
    ("make", "acc"): _make_acc,
    ("make", "compress"): _make_compress,
    ("make", "weight"): _make_weight,
    ("make", "merge"): _make_merge,
    ("make", "apply"): _make_apply,
    ("make", "merkle"): _make_merkle,
    ("make", "state-root"): _make_state_root,
    ("make", "packet"): _make_packet,
    ("make", "update"): _make_update,
    ("make", "dht"): _make_dht,
    ("make", "invite"): _make_invite,
    ("make", "proof"): _make_proof,
    ("follow", ""): _follow,
}


def main() -> None:
    """Answer one request a line until the input ends."""
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(json.loads(line)), separators=(",", ":")) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
