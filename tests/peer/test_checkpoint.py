"""Any round of a ledger, a peer's home or a stored state becomes an export, and every checkpoint writes text."""

import dataclasses
import shutil
import subprocess
import sys
import time
import tomllib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from peer import keep
from peer.checkpoint import open_checkpoint
from peer.cli import main
from peer.commands.export import _texts
from peer.core.generate import build_model, sample
from peer.core.model import layout_of
from peer.core.replica import Replica, initial_state
from peer.data.tokenizer import ByteTokenizer
from peer.errors import UserError
from peer.export import Model, exported_round, open_export
from peer.store import Home, load_key
from protocol.amendment import Amendments, ChangeSettings, sign_amendment
from protocol.identity import NO_DIGEST
from protocol.layout import state_root
from protocol.ledger import CloseReason, Kind, RoundRecord, sign_record
from protocol.run import ModelConfig
from tests.peer.test_audit import NULL_ROUND, PEER_KEYS, ROUNDS, Maker

pytestmark = pytest.mark.filterwarnings("error")
BACK, TO = 9, 6  # the round that takes the run back, and to which one


class Story:
    """A ledger in which round 9 goes back to round 6, and the parameters after each round."""

    def __init__(self, folder: Path, rounds: int = ROUNDS) -> None:
        self.folder, self.maker = folder, Maker(folder)
        self.states: list[NDArray[np.float32]] = [self.maker.flat.copy()]  # f32[N] each
        self.records = [self.maker.record]
        for round in range(1, rounds + 1):
            self.next(round)

    def next(self, round: int) -> None:
        maker = self.maker
        if round == BACK:
            maker.flat[:] = self.states[TO]
            fields = (maker.run.run_id, round, 0, maker.record.digest, Kind.ROLLBACK, CloseReason.OPERATOR)
            record = RoundRecord(*fields, self.records[TO].state_root, NO_DIGEST, round, round + 1, ())
            maker.append(sign_record(record, maker.key))
        else:
            maker.round(round)
        self.states.append(maker.flat.copy())
        self.records.append(maker.record)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    story = Story(tmp_path_factory.mktemp("ledger") / "run")
    story.maker.store.close()
    return story


@pytest.fixture
def peer(story: Story, tmp_path: Path) -> Path:
    """The home of a peer as it is while the run goes on: no ledger and no state, but the run and its replica."""
    home = Home(tmp_path / "peer")
    run = story.maker.run
    with closing(home.run(run.run_id)) as folder:
        shutil.copy(story.folder / "run.bin", folder.path / "run.bin")
        replica = Replica(run, torch.device("cpu"), torch.float32)
        replica.load_outer(story.states[7])
        keep.save(folder.replica_path, replica, story.records[7], None, lambda: False)
    return home.path


def test_every_round_of_a_ledger_can_be_opened(story: Story) -> None:
    for round, (state, record) in enumerate(zip(story.states, story.records, strict=True)):
        checkpoint = open_checkpoint(story.folder, round)
        assert np.array_equal(checkpoint.state, state) and checkpoint.head == record, round
    assert open_checkpoint(story.folder).round == ROUNDS


def test_contributors_are_those_whose_packets_are_in_the_parameters(story: Story) -> None:
    # Of the rounds 7 and 8 nothing is left after the way back, and the null round took nothing in.
    undone, null = BACK - 1 - TO, int(NULL_ROUND <= TO)
    for round, rounds in (
        (0, 0),
        (4, 4),
        (TO, TO - null),
        (8, 8 - null),
        (BACK, TO - null),
        (ROUNDS, 12 - undone - 1 - null),
    ):
        given = open_checkpoint(story.folder, round).contributors
        assert {key: each.rounds for key, each in given.items()} == (
            {key.public: rounds for key in PEER_KEYS} if rounds else {}
        ), round


def test_a_peer_gives_its_replica_and_then_the_end_of_the_run(story: Story, peer: Path) -> None:
    during = open_checkpoint(peer)
    assert during.round == 7 and np.array_equal(during.state, story.states[7]) and during.head == story.records[7]
    run = story.maker.run
    with closing(Home(peer).run(run.run_id)) as folder:
        folder.states.save(story.states[ROUNDS], run.layout, {"round": str(ROUNDS)})
        (file,) = folder.states.folder.glob("*.safetensors")
    for source in (peer, file):
        end = open_checkpoint(source)
        assert end.round == ROUNDS and np.array_equal(end.state, story.states[ROUNDS])
        with pytest.raises(UserError, match="SL820"):
            open_checkpoint(source, 3)


def test_bits_that_are_not_the_ledgers_are_refused(story: Story, peer: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(story.folder, tmp_path / "copy")
    (replica,) = peer.rglob("replica.safetensors")
    for path in (*copy.rglob("*.safetensors"), replica):
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        at = start if path != replica else data.index(story.states[7][:8].tobytes())
        data[at] ^= 1
        path.write_bytes(data)
    with pytest.raises(UserError, match="SL811"):
        open_checkpoint(copy)
    with pytest.raises(UserError, match="SL819"):
        open_checkpoint(peer)
    for path in copy.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="SL806"):
        open_checkpoint(copy)


def test_the_card_says_where_the_model_comes_from(story: Story, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert main(["export", str(story.folder), "--out", str(out), "--round", "8", "--license", "cc-by-4.0"]) == 0
    assert exported_round(out) == 8 and np.array_equal(open_export(out).state, story.states[8])
    card = (out / "README.md").read_text()
    head, run = story.records[8], story.maker.run
    assert card.startswith('---\nlicense: "cc-by-4.0"\n')
    for told in (run.run_id, run.operator, head.digest, head.state_root, head.aggregator):
        assert f"`{told.hex()}`" in card
    for key in PEER_KEYS:
        assert f"| `{key.public.hex()}` | 7 | " in card
    assert run.data.corpus_sha256 in card and "after round 8 of 12" in card
    written = tomllib.loads(card.partition("```toml\n")[2].partition("```")[0])
    assert written["inner"] == dataclasses.asdict(run.inner) and written["name"] == run.name
    assert main(["export", str(story.folder), "--out", str(out)]) == 0
    assert exported_round(out) == ROUNDS


def test_the_card_has_the_loss_and_the_amendments_of_the_ledger(tmp_path: Path) -> None:
    story = Story(tmp_path / "run", rounds=2)
    maker = story.maker
    measured = dataclasses.replace(maker.record, evaluated_round=1, loss_micronats=2_345_678)
    record = dataclasses.replace(measured, round=3, previous=maker.record.digest, kind=Kind.NULL)
    longer = Amendments(maker.run).draft(ChangeSettings({"outer.rounds": 40}), 4)
    amendment = sign_amendment(longer, load_key(story.folder / "operator.key"))
    maker.store.blobs.put("amendment", amendment.digest.hex(), amendment.to_bytes())
    record = dataclasses.replace(record, reason=CloseReason.DEADLINE, update_digest=NO_DIGEST, entries=())
    record = dataclasses.replace(record, amendment=amendment.digest)
    maker.append(sign_record(record, maker.key))
    maker.store.close()
    assert main(["export", str(story.folder), "--out", str(tmp_path / "model")]) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "validation loss after round 1 was 2.3457 nats (3.3841 bits) a token" in card
    assert "after round 3 of 40" in card and "- from round 4 on outer.rounds = 40" in card


def test_only_an_export_of_the_same_run_is_written_over(
    story: Story, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    other = Story(tmp_path / "other", rounds=0)
    other.maker.store.close()
    assert main(["export", str(story.folder), "--out", str(tmp_path / "full")]) == 1
    assert main(["export", str(story.folder), "--out", str(tmp_path / "repository")]) == 0
    assert main(["export", str(other.folder), "--out", str(tmp_path / "repository")]) == 1
    assert capfd.readouterr().err.count("error SL820") == 2
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_following_keeps_a_whole_model_of_the_newest_round(tmp_path: Path) -> None:
    story = Story(tmp_path / "run", rounds=2)
    out = tmp_path / "model"
    command = ["export", str(story.folder), "--out", str(out), "--follow", "--every", "3"]
    process = subprocess.Popen([sys.executable, "-m", "peer.cli", *command], stderr=subprocess.PIPE, text=True)
    seen: list[int] = []
    try:
        for round in range(2, ROUNDS + 1):
            if round > 2:
                story.next(round)
            end_s = time.monotonic() + 60
            # Every third round is waited for, so that none of them is passed over on a busy machine.
            while round in (2, 5, 8, 11) and (not seen or seen[-1] != round):
                assert process.poll() is None and time.monotonic() < end_s
                look(out, story, seen)
        while process.poll() is None:
            look(out, story, seen)
        look(out, story, seen)
    finally:
        process.kill()
        _, said = process.communicate()
        story.maker.store.close()
    assert process.returncode == 0, said
    assert seen == [2, 5, 8, 11, ROUNDS]


def look(out: Path, story: Story, seen: list[int]) -> None:
    """What lies in the folder at this moment is the model of one round, whole."""
    time.sleep(0.02)
    if not (out / "README.md").exists():  # the first export is not complete
        return
    state = open_export(out).state
    roots = [record.state_root for record in story.records]
    assert state_root(state) in roots
    round = exported_round(out)
    if not seen or seen[-1] != round:
        seen.append(round)


def test_the_same_seed_writes_the_same_text_from_every_kind_of_checkpoint(
    story: Story, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert main(["export", str(story.folder), "--out", str(out)]) == 0
    (state,) = story.folder.rglob(f"{story.records[8].state_root.hex()}.safetensors")
    capfd.readouterr()
    texts = []
    for arguments in (
        [str(out)],
        [str(out / "model.safetensors")],
        [str(story.folder)],
        [str(story.folder), "--round", "8"],
        [str(state)],
    ):
        for seed in ("1", "2"):
            options = ["--prompt", "We ", "--tokens", "40", "--seed", seed, "--threads", "1"]
            assert main(["generate", *arguments, *options]) == 0
            text, err = capfd.readouterr()
            assert text.startswith("We ") and text.endswith("\n") and not err
            texts.append(text)
    assert texts[0] == texts[2] == texts[4] and texts[1] == texts[3] == texts[5] and texts[6] == texts[8]
    assert len({texts[0], texts[1], texts[6]}) == 3


def test_no_temperature_takes_the_likeliest_token_each_time() -> None:
    config = ModelConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, max_position_embeddings=16)
    state = initial_state(config)
    model = build_model(config, state, torch.device("cpu"))
    tokens = torch.tensor([72, 105])
    for token in sample(model, tokens, 30, temperature=0.0, top_k=5, seed=1):
        with torch.no_grad():
            assert token == int(model(tokens[None, -16:])[0, -1].argmax())
        tokens = torch.cat((tokens, torch.tensor([token])))
    assert len(tokens) == 32 and layout_of(config).size == state.size


def test_text_is_shown_character_by_character_and_steers_no_terminal() -> None:
    model = Model(ModelConfig(), np.zeros(1, np.float32), ByteTokenizer())
    written = "a\n☃é\x1b[2Jz".encode()
    shown = list(_texts(model, iter([*written, 256, 0xE2, 0x98])))
    assert "".join(shown) == "a\n☃é\ufffd[2Jz\n\n\ufffd"
    assert shown[:4] == ["a", "\n", "☃", "é"]
