import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from peer.data.shards import write_shard
from peer.errors import UserCode, UserError
from peer.inspect import inspect
from peer.operator import OperatorFolder, RunPlace, new_run
from peer.store import load_key
from protocol.compress import compress
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey
from protocol.ledger import genesis_record
from protocol.packet import Packet, make_packet
from protocol.packing import encode_section
from protocol.run import RunConfig, parse_settings
from protocol.update import Update, encode_update_section, make_update, to_update_tensor
from protocol.wire import bundle_to_wire, packet_to_wire, update_to_wire
from tests.peer.swarm import SETTINGS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and one file of each kind."""
    folder = tmp_path_factory.mktemp("inspect")
    settings = parse_settings(SETTINGS.format(rounds=4, steps=5, grace_s=3.0))
    new_run(settings, folder / "run", RunPlace("127.0.0.1", 7700, 7701))
    run = OperatorFolder(folder / "run").load()[0].config
    packet, update = a_packet(run), an_update(run)
    (folder / "packet").write_bytes(packet_to_wire(packet, run))
    (folder / "bundle").write_bytes(bundle_to_wire([packet_to_wire(packet, run)] * 2))
    (folder / "update").write_bytes(update_to_wire(update, run))
    key = load_key(folder / "run" / "aggregator" / "key")
    (folder / "record").write_bytes(genesis_record(run, key, 1_700_000_000_000).to_bytes())
    shutil.copy(folder / "run" / "run.bin", folder / "run.bin")
    shutil.copy(folder / "run" / "invite.txt", folder / "invite")
    (folder / "key").write_text(PrivateKey.from_bytes(bytes(range(32))).to_text() + "\n")
    write_shard(folder / "shard", [np.arange(100)], 300)
    (state,) = (folder / "run").rglob("*.safetensors")
    shutil.copy(state, folder / "state")
    (folder / "summary").write_text(json.dumps({"final_val_loss": 2.5, "rounds": 4}))
    return folder


def run_of(folder: Path) -> RunConfig:
    return OperatorFolder(folder / "run").load()[0].config


def a_packet(run: RunConfig) -> Packet:
    random = np.random.default_rng(7)
    parts = [random.standard_normal(tensor.size).astype(np.float32) * 1e-3 for tensor in run.layout.tensors]
    k, code_bits = run.compression.k, run.compression.code_bits
    sections = [encode_section(compress(part, k, code_bits)[0], k, code_bits) for part in parts]
    return make_packet(run, PrivateKey.from_bytes(bytes(range(32))), 1, run.genesis_root, 320, 5, sections)


def an_update(run: RunConfig) -> Update:
    random = np.random.default_rng(8)
    steps = [random.integers(-(1 << 20), 1 << 20, tensor.size) for tensor in run.layout.tensors]
    sections = [encode_update_section(to_update_tensor(step)) for step in steps]
    return make_update(run, 1, run.genesis_root, bytes(32), sections)


def test_a_run_shows_its_name_keys_and_sizes(made: Path) -> None:
    text = "\n".join(inspect(made / "run.bin", None))
    run = run_of(made)
    assert "signed run 'small'" in text and run.run_id.hex() in text and run.operator.hex() in text
    assert f"{run.layout.size:,} in {len(run.layout.tensors)} tensors" in text


def test_a_packet_is_decoded_in_full_where_the_run_is_known(made: Path) -> None:
    header = a_packet(run_of(made)).header
    short, full = inspect(made / "packet", None), inspect(made / "packet", made / "run.bin")
    for lines in (short, full):
        assert f"digest        {header.digest.hex()}" in lines and "round         1" in lines
    assert any(line.startswith("not checked") for line in short)
    (bits,) = [line for line in full if line.startswith("bits a value")]
    assert 1 < float(bits.split()[3].rstrip(",")) < 40
    assert "signature     valid" in full


def test_a_bundle_lists_its_packets(made: Path) -> None:
    first, *packets = inspect(made / "bundle", None)
    assert first.startswith("bundle of 2 packets, ")
    assert len(packets) == 2 and all(a_packet(run_of(made)).header.digest.hex()[:16] in line for line in packets)


@pytest.mark.parametrize("cut", [8, 9, 100, -1])
def test_a_bundle_that_ends_inside_a_packet_is_refused(made: Path, tmp_path: Path, cut: int) -> None:
    (tmp_path / "cut").write_bytes((made / "bundle").read_bytes()[:cut])
    with pytest.raises((UserError, ProtocolError)):
        inspect(tmp_path / "cut", None)


def test_an_update_is_decoded_in_full(made: Path) -> None:
    header = an_update(run_of(made)).header
    full = inspect(made / "update", made / "run.bin")
    assert f"digest        {header.digest.hex()}" in full
    assert any(line.startswith("bits a value") for line in full)


def test_a_record_shows_its_fields(made: Path) -> None:
    text = "\n".join(inspect(made / "record", made / "run.bin"))
    assert "valid in this run" in text and "genesis" in text and run_of(made).genesis_root.hex() in text
    assert "2023-11-14T22:13:20" in text


def test_a_key_file_never_shows_the_private_half(made: Path) -> None:
    key = PrivateKey.from_bytes(bytes(range(32)))
    text = "\n".join(inspect(made / "key", None))
    assert key.public.hex() in text
    assert key.to_bytes().hex() not in text and key.to_text().split()[1] not in text


def test_the_other_kinds(made: Path) -> None:
    run = run_of(made)
    assert "address       127.0.0.1:7700" in inspect(made / "invite", None)
    shard = "\n".join(inspect(made / "shard", None))
    assert "100 of type uint16" in shard and "300" in shard
    assert f"computed root {run.genesis_root.hex()}" in inspect(made / "state", None)
    assert any(line.split() == ["final_val_loss", "2.5"] for line in inspect(made / "summary", None))


KINDS = ["run.bin", "packet", "update", "record", "invite", "key", "shard", "state"]


@pytest.mark.parametrize("kind", [*KINDS, "summary"])
def test_a_file_cut_anywhere_is_refused_with_a_code(made: Path, tmp_path: Path, kind: str) -> None:
    data = (made / kind).read_bytes().rstrip(b"\n")
    cut = tmp_path / "cut"
    for length in sorted({0, 1, 4, 7, 9, 30, 63, 100, 215, len(data) // 2, len(data) - 1}):
        if length < len(data):
            cut.write_bytes(data[:length])
            with pytest.raises((UserError, ProtocolError)):
                inspect(cut, made / "run.bin")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_described_but_never_crashes(made: Path, tmp_path: Path, kind: str) -> None:
    data = (made / kind).read_bytes()
    random = np.random.default_rng(11)
    bad = tmp_path / "bad"
    refused = 0
    for place in random.integers(0, min(len(data), 4000), 20):
        damaged = bytearray(data)
        damaged[place] ^= int(random.integers(1, 256))
        bad.write_bytes(damaged)
        try:
            inspect(bad, made / "run.bin")
        except (UserError, ProtocolError):
            refused += 1
    assert refused


def test_a_packet_of_another_run_is_named_so(made: Path, tmp_path: Path) -> None:
    settings = parse_settings(SETTINGS.format(rounds=5, steps=5, grace_s=3.0))
    new_run(settings, tmp_path / "other", RunPlace("127.0.0.1", 7700, 7701))
    for kind in ("packet", "update"):
        with pytest.raises(ProtocolError) as caught:
            inspect(made / kind, tmp_path / "other" / "run.bin")
        assert caught.value.code == Code.OTHER_RUN


def test_foreign_and_missing_files_are_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").write_bytes(b"\x7fELF" + bytes(300))
    for file, code in (("foreign", UserCode.BAD_FILE), ("nothing", UserCode.NO_SUCH_FILE)):
        with pytest.raises(UserError) as caught:
            inspect(tmp_path / file, None)
        assert caught.value.code == code
    with pytest.raises((UserError, ProtocolError)):
        inspect(made / "packet", made / "invite")
    with pytest.raises(UserError):
        inspect(tmp_path, None)


def test_a_huge_file_is_refused_before_it_is_read(made: Path, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    for kind in ("run.bin", "record", "packet", "invite", "summary", "key"):
        with huge.open("wb") as file:
            file.write((made / kind).read_bytes())
            file.truncate(1 << 40)
        with pytest.raises(ProtocolError) as caught:
            inspect(huge, made / "run.bin")
        assert caught.value.code == Code.TOO_LARGE
