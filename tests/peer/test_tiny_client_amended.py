"""The tiny client under a scripted aggregator whose operator amends the run and takes it back."""

import asyncio
import shutil
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from peer.core.model import layout_of
from peer.core.replica import initial_state
from peer.net.messages import ReceiptMsg, RoundClosed, RoundOpened, WatchEvent
from peer.net.service import serve
from protocol.amendment import Action, Amendments, ChangeSettings, Rollback, sign_amendment
from protocol.arithmetic import Contribution, merge, weight_of
from protocol.identity import NO_DIGEST, PrivateKey, leaf_hash
from protocol.invite import Invite
from protocol.layout import state_root
from protocol.ledger import CloseReason, Entry, Kind, RoundRecord, Verdict, genesis_record, sign_record
from protocol.limits import CLIP_ONE, PIECE_BYTES
from protocol.packet import check_packet
from protocol.run import (
    DataConfig,
    InnerConfig,
    ModelConfig,
    OuterConfig,
    RoundConfig,
    RunConfig,
    RunSettings,
    sign_run,
)
from protocol.update import apply_update, encode_update_section, make_update
from protocol.wire import bundle_to_wire, packet_from_wire, update_to_wire
from tests.net.room import TLS, House
from tests.peer.test_tiny_client_live import NODE, tiny_client

pytestmark = [
    pytest.mark.slow,
    pytest.mark.net,
    pytest.mark.skipif(shutil.which("node") is None, reason="the tiny client needs Node.js 20 or newer"),
]
OPERATOR, AGGREGATOR = (PrivateKey.from_bytes(bytes([number]) * 32) for number in (1, 2))


def small_run() -> RunConfig:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ModelConfig(**shape, num_key_value_heads=2, max_position_embeddings=16)  # type: ignore[arg-type]  # whole numbers all
    settings = RunSettings(
        "amended",
        model=model,
        data=DataConfig(sequence_length=16),
        inner=InnerConfig(steps=3, batch_size=1),
        outer=OuterConfig(rounds=9),
        rounds=RoundConfig(grace_s_max=20.0),
    )
    return RunConfig.of(
        settings,
        operator=OPERATOR.public,
        aggregators=(AGGREGATOR.public,),
        layout=layout_of(model),
        genesis_root=state_root(initial_state(model)),
    )


@dataclass
class Script(House):
    """An aggregator that does what the test says, round by round."""

    run: RunConfig = field(default_factory=small_run)
    arrived: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self.chain = Amendments(self.run)
        self.records = [genesis_record(self.run, AGGREGATOR, 0)]
        self.states = [initial_state(self.run.model)]
        self.blobs["run", self.run.run_id] = sign_run(self.run, OPERATOR).to_bytes()
        self._keep_state()

    async def welcome(self, peer: bytes) -> bytes:
        return self.records[-1].to_bytes()

    async def watch(self, peer: bytes) -> AsyncGenerator[WatchEvent, None]:
        yield RoundClosed(self.records[-1].to_bytes())
        while True:
            yield await self.events.get()

    async def submit(self, peer: bytes, digest: bytes, data: bytes | Path) -> ReceiptMsg:
        await self.arrived.put(data if isinstance(data, bytes) else await asyncio.to_thread(data.read_bytes))
        return ReceiptMsg(digest, True, 0)

    async def packet(self) -> bytes:
        """Open the next round, asking for more steps than there are, and wait for its packet."""
        await self.events.put(RoundOpened(len(self.records), self.records[-1].state_root, 99, 20.0))
        return await asyncio.wait_for(self.arrived.get(), 30)

    def announce(self, *items: tuple[int, Action]) -> None:
        """Let the operator sign amendments, for the next record to name."""
        for round, action in items:
            amendment = sign_amendment(self.chain.draft(action, round), OPERATOR)
            self.chain = self.chain.bring_in(amendment, len(self.records))
            self.blobs["amendment", amendment.digest] = amendment.to_bytes()

    async def apply(self, wire: bytes, *, bundle: bool = False) -> None:
        """Close the round with this packet, by the settings of the round; offer its update or its bundle alone."""
        round, base_root = len(self.records), self.records[-1].state_root
        run = self.chain.config_at(round)
        packet = packet_from_wire(wire, run)
        tensors = check_packet(packet, run, round=round, base_root=base_root)
        header = packet.header
        weight = weight_of(header.tokens, run.nominal_tokens)
        merged = merge([Contribution(tensors, weight, CLIP_ONE)], run.layout, run.outer.rule, run.outer.alpha_q16)
        state: NDArray[np.float32] = self.states[-1].copy()
        apply_update(state, run.layout, merged)
        self.states.append(state)
        sections = [encode_update_section(tensor) for tensor in merged]
        update = make_update(run, round, base_root, state_root(state), sections)
        accepted = Entry(
            header.peer, header.digest, Verdict.ACCEPTED, 0, header.tokens, header.inner_steps, weight, CLIP_ONE
        )
        record = self._close(Kind.APPLIED, CloseReason.COMPLETE, (accepted,), update.header.digest)
        form = ("bundle", self.records[-1].digest) if bundle else ("update", update.header.digest)
        self.blobs[form] = bundle_to_wire([wire]) if bundle else update_to_wire(update, run)
        await self.events.put(RoundClosed(record, 2, int(bundle)))

    async def roll_back(self, to_round: int) -> None:
        self.states.append(self.states[to_round])
        await self.events.put(RoundClosed(self._close(Kind.ROLLBACK, CloseReason.OPERATOR, (), NO_DIGEST)))

    def _close(self, kind: Kind, reason: CloseReason, entries: Sequence[Entry], update: bytes) -> bytes:
        record = RoundRecord(
            run_id=self.run.run_id,
            round=len(self.records),
            epoch=0,
            previous=self.records[-1].digest,
            kind=kind,
            reason=reason,
            state_root=state_root(self.states[-1]),
            update_digest=update,
            opened_ms=0,
            closed_ms=20_000,
            entries=tuple(entries),
            amendment=self.chain.head,
        )
        self.records.append(sign_record(record, AGGREGATOR))
        self.chain.check(self.records[-1])
        self._keep_state()
        return self.records[-1].to_bytes()

    def _keep_state(self) -> None:
        data = self.states[-1].tobytes()
        pieces = [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]
        self.blobs["state", state_root(self.states[-1])] = b"".join(map(leaf_hash, pieces))
        self.blobs.update({("piece", leaf_hash(piece)): piece for piece in pieces})


def test_it_obeys_amendments_and_follows_a_rollback(tmp_path: Path) -> None:
    assert NODE is not None
    script = asyncio.run(play(tmp_path))
    said = (tmp_path / "tiny.log").read_text()
    roots = [line.split()[-1] for line in said.splitlines() if "the state has the root" in line]
    assert roots == [record.state_root.hex()[:16] for record in script.records], said
    assert "instead" not in said and "does not fit" not in said, said
    # The amendments say that round 4 is the last one, so the client left by itself.
    assert "left after 4 rounds; 3 packets counted" in said


async def play(folder: Path) -> Script:
    script = Script()
    changes = ChangeSettings({"inner.steps": 1, "compression.k": 16, "outer.alpha": 0.5, "outer.rule": "mean"})
    server = await serve(
        script,
        host="127.0.0.1",
        port=0,
        key=AGGREGATOR,
        run_id=script.run.run_id,
        tls=TLS,
        spool=folder / "spool",
    )
    invite = Invite(script.run.run_id, AGGREGATOR.public, TLS.fingerprint, (f"127.0.0.1:{server.port}",), ())
    (folder / "invite.txt").write_text(invite.to_text())
    try:
        with tiny_client(folder, folder / "invite.txt") as client:
            first = await script.packet()
            script.announce((2, changes), (3, Rollback(1)))
            await script.apply(first)
            second = await script.packet()
            header = packet_from_wire(second, script.chain.config_at(2)).header
            assert header.inner_steps == 1 < packet_from_wire(first, script.run).header.inner_steps
            await script.apply(second, bundle=True)
            script.announce((4, ChangeSettings({"outer.rounds": 4})))
            await script.roll_back(1)
            await script.apply(await script.packet())
            await asyncio.to_thread(client.wait_end, 30)
    finally:
        await server.close(0.5)
    return script
