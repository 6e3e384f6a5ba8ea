import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from peer.errors import UserCode, UserError
from peer.journal import PacketRow, RecordRow
from peer.store import BlobStore, Home, RunFolder, StateStore, atomic_write, load_key, load_or_make_key, replacing
from protocol.identity import merkle_root_of_hashes
from protocol.layout import Layout, state_root

RUN_ID = bytes(range(32))


def digest(number: int) -> bytes:
    return number.to_bytes(32, "big")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def limited(size: int, code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process whose files may not grow beyond `size` bytes: the nearest thing to a full disk."""
    # Set inside the new process, not between fork and exec: gRPC's threads in this one do not survive a fork.
    limit = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    )
    command = [sys.executable, "-c", limit + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


# Files


def test_atomic_write_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    atomic_write(path, b"old")
    atomic_write(path, memoryview(b"new bytes"))
    assert path.read_bytes() == b"new bytes"
    assert names_in(path.parent) == ["file"]


def test_a_write_that_fails_half_way_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")
    with pytest.raises(RuntimeError, match="half-way"), replacing(path) as file:
        file.write(b"new")
        raise RuntimeError("half-way")
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


def test_a_full_disk_is_a_user_error_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")
    code = """
        import sys
        from pathlib import Path
        from peer.errors import UserError
        from peer.store import atomic_write
        try:
            atomic_write(Path(sys.argv[1]), bytes(1 << 20))
        except UserError as error:
            print(error)
    """
    run = limited(1 << 16, code, path)
    assert run.stdout.startswith("SL803 disk-full"), run.stderr
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


def test_a_file_in_place_of_a_folder_is_a_user_error(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", b"")
    with pytest.raises(UserError) as caught:
        Home(tmp_path / "file" / "home")
    assert caught.value.code is UserCode.NO_SUCH_FILE


# Keys


def test_a_key_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = load_or_make_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_or_make_key(path).public == key.public == load_key(path).public


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_can_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    load_or_make_key(path)
    path.chmod(mode)
    with pytest.raises(UserError) as caught:
        load_or_make_key(path)
    assert caught.value.code is UserCode.OPEN_KEY
    assert "chmod 600" in caught.value.remedy


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"ssh-ed25519 AAAA", b"sparseloco-peer-key-1 AAAA\n"])
def test_a_damaged_key_is_never_replaced_silently(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    atomic_write(path, content, mode=0o600)
    with pytest.raises(UserError) as caught:
        load_or_make_key(path)
    assert caught.value.code is UserCode.BAD_KEY_FILE
    assert path.read_bytes() == content


# Home


def test_a_home_is_private_and_held_by_one_process(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    assert home.path.stat().st_mode & 0o777 == 0o700
    code = """
        import sys
        from pathlib import Path
        from peer.errors import UserError
        from peer.store import Home
        try:
            with Home(Path(sys.argv[1])).lock():
                print("held")
        except UserError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(home.path)]
    with home.lock():
        assert "SL809 home-in-use" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "held\n"


def test_the_lock_clears_what_a_killed_writer_left(tmp_path: Path) -> None:
    home = Home(tmp_path)
    folder = home.run(RUN_ID)
    code = """
        import os, signal, sys
        from pathlib import Path
        from peer.store import replacing
        with replacing(Path(sys.argv[1])) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    target = folder.path / "blobs" / "packet" / "aa" / ("a" * 64)
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(target)], check=False, timeout=60)
    assert len(list(target.parent.iterdir())) == 1 and not target.exists()
    with home.lock():
        assert list(target.parent.iterdir()) == []
    folder.close()


# Blobs


def test_blobs_come_back_by_digest(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    name = digest(7).hex()
    assert blobs.get("packet", name) is None
    assert blobs.path("packet", name) is None
    path = blobs.put("packet", name, b"bytes")
    assert blobs.put("packet", name, b"other") == path, "content never changes under its name"
    assert blobs.get("packet", name) == b"bytes"
    assert blobs.path("packet", name) == path
    assert blobs.size("packet", name) == 5
    assert blobs.get("update", name) is None
    blobs.delete("packet", name)
    blobs.delete("packet", name)
    assert blobs.get("packet", name) is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("packet", "../../../../etc/passwd"),
        ("packet", ""),
        ("packet", "A" * 64),
        ("packet", "a" * 63),
        ("packet", "a" * 64 + "\n"),
        ("..", "a" * 64),
        ("key", "a" * 64),
    ],
)
def test_only_digests_become_paths(tmp_path: Path, kind: str, name: str) -> None:
    blobs = BlobStore(tmp_path)
    with pytest.raises(ValueError, match="names no blob"):
        blobs.get(kind, name)
    with pytest.raises(ValueError, match="names no blob"):
        blobs.put(kind, name, b"")


def fill(folder: RunFolder, rounds: int, size: int) -> None:
    """A run of `rounds` rounds with two packets and one update each, every blob of `size` bytes."""
    for number in range(rounds + 1):
        packets = [digest(1000 + number * 2), digest(1001 + number * 2)] if number else []
        for packet in packets:
            folder.blobs.put("packet", packet.hex(), bytes(size))
            folder.journal.add_packet(PacketRow(packet, number, digest(1), 10, 1, number))
        update = digest(5000 + number) if number else bytes(32)
        if number:
            folder.blobs.put("update", update.hex(), bytes(size))
        record = RecordRow(number, digest(9000 + number), digest(1), update, b"record")
        folder.journal.close_round(record, dict.fromkeys(packets, (0, 0)))


def held(folder: RunFolder) -> list[int]:
    return [
        number
        for number in range(100)
        if any(folder.blobs.size(k, d.hex()) for k, d in folder.journal.blobs_of(number))
    ]


def test_old_rounds_are_forgotten_by_bytes_but_never_the_newest(tmp_path: Path) -> None:
    folder = Home(tmp_path).run(RUN_ID)
    assert folder.forget(keep_rounds=3, blob_bytes_max=0) == 0
    fill(folder, rounds=10, size=100)
    assert folder.forget(keep_rounds=3, blob_bytes_max=10_000) == 0
    assert folder.forget(keep_rounds=3, blob_bytes_max=1_600) == 5 * 300
    assert held(folder) == [6, 7, 8, 9, 10]
    assert folder.forget(keep_rounds=3, blob_bytes_max=1_600) == 0
    assert folder.forget(keep_rounds=3, blob_bytes_max=0) == 2 * 300
    assert held(folder) == [8, 9, 10]
    assert len(folder.journal.records(0, 100)) == 11, "the story stays"
    folder.close()


# States


def example_state(seed: int = 1) -> tuple[NDArray[np.float32], Layout]:
    """Three tensors, more than two pieces of 4 MiB."""
    layout = Layout.of([("b.weight", (1500, 1500)), ("a.norm", (5,)), ("c.weight", (3, 7))])
    return np.random.default_rng(seed).standard_normal(layout.size, dtype=np.float32), layout


def test_a_state_comes_back_bit_for_bit_and_is_plain_safetensors(tmp_path: Path) -> None:
    flat, layout = example_state()
    flat[:3] = [np.float32("nan"), np.float32("-0"), np.float32(1e-45)]
    states = StateStore(tmp_path)
    root = states.save(flat, layout, {"round": "3"})
    assert root == state_root(flat)
    assert states.roots() == [root]
    assert states.load(root, layout).tobytes() == flat.tobytes()
    tensors = load_file(tmp_path / f"{root.hex()}.safetensors")
    for tensor, start in zip(layout.tensors, layout.offsets, strict=False):
        assert tensors[tensor.name].shape == tensor.shape
        assert tensors[tensor.name].tobytes() == flat[start : start + tensor.size].tobytes()


def test_pieces_are_served_from_the_file_also_after_a_restart(tmp_path: Path) -> None:
    flat, layout = example_state()
    root = StateStore(tmp_path).save(flat, layout, {})
    states = StateStore(tmp_path)
    hashes = states.hashes(root)
    assert hashes is not None and len(hashes) == 3 * 32
    pieces = [hashes[start : start + 32] for start in range(0, len(hashes), 32)]
    assert merkle_root_of_hashes(pieces) == root
    assert b"".join(states.piece(piece) or b"" for piece in pieces) == flat.tobytes()
    assert states.piece(bytes(32)) is None
    assert states.hashes(bytes(32)) is None


@pytest.mark.parametrize("lost", ["*.pieces", "*.safetensors"])
def test_keep_deletes_the_half_of_a_state_that_a_crash_has_left(tmp_path: Path, lost: str) -> None:
    states = StateStore(tmp_path)
    flat, layout = example_state()
    states.save(flat, layout, {})
    next(tmp_path.glob(lost)).unlink()
    assert states.roots() == [] and len(list(tmp_path.iterdir())) == 1
    root = states.save(flat + np.float32(1), layout, {})
    states.keep([root])
    assert states.roots() == [root] and len(list(tmp_path.iterdir())) == 2


def test_keep_deletes_the_other_states_but_no_shared_piece(tmp_path: Path) -> None:
    first, layout = example_state()
    second = first.copy()
    second[-1] += 1
    states = StateStore(tmp_path)
    old, new = states.save(second, layout, {}), states.save(first, layout, {})
    shared = (states.hashes(old) or b"")[:32]
    states.keep([old])
    assert states.roots() == [old] and not states.has(new)
    assert states.piece(shared) == first.tobytes()[: 4 << 20]
    assert states.piece((StateStore(tmp_path).hashes(old) or b"")[-32:]) is not None
    assert {path.suffix for path in tmp_path.iterdir()} == {".pieces", ".safetensors"}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("where", ["first", "middle", "last", "cut", "other-layout"])
def test_a_damaged_state_is_named_and_refused(tmp_path: Path, where: str) -> None:
    flat, layout = example_state()
    states = StateStore(tmp_path)
    root = states.save(flat, layout, {})
    path = tmp_path / f"{root.hex()}.safetensors"
    data = bytearray(path.read_bytes())
    if where == "cut":
        del data[-1]
    elif where == "other-layout":
        layout = Layout.of([("other", (layout.size,))])
    else:
        data[{"first": 9, "middle": len(data) // 2, "last": -1}[where]] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        states.load(root, layout)
    assert caught.value.code is UserCode.DAMAGED_STORE
    assert str(path) in caught.value.message


def test_an_absent_state_is_a_user_error(tmp_path: Path) -> None:
    _, layout = example_state()
    with pytest.raises(UserError) as caught:
        StateStore(tmp_path).load(bytes(32), layout)
    assert caught.value.code is UserCode.NO_SUCH_FILE
