"""What the operator does once: make a run's keys, initial parameters, signed description and invite.

A run folder holds

    run.bin        the signed run that everybody agrees on
    invite.txt     the line that volunteers paste after `join`
    operator.key   signs this run and its later changes; keep it off the servers
    aggregator/    the home of `aggregate`: its key, its certificate and the initial parameters
    bootstrap/     the home of `bootstrap`: its key
    standby-1/     a run folder of its own for another aggregator: copy it to the machine that stands by

A standby's folder holds run.bin, an aggregator/ with its own key, and an invite.txt that names this standby.
"""

import dataclasses
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peer.errors import UserCode, UserError, os_errors
from peer.find import DHT_TTL_S, remember_ads, sign_ad
from peer.journal import RecordRow
from peer.net.directory import bootstrap_multiaddr, tcp_multiaddr
from peer.net.tls import TlsIdentity, make_tls_identity
from peer.store import Home, atomic_write, load_or_make_key
from protocol.errors import ProtocolError
from protocol.identity import PrivateKey
from protocol.invite import Invite, check_address
from protocol.layout import state_root
from protocol.ledger import RoundRecord, genesis_record
from protocol.records import Ad
from protocol.run import AGGREGATORS_MAX, RunConfig, RunSettings, SignedRun, parse_settings, sign_run


@dataclass(frozen=True)
class RunPlace:
    """Where the programs of a run are reached from outside."""

    host: str
    port: int
    bootstrap_port: int
    standbys: tuple[str, ...] = ()
    """Addresses of further aggregators, "host:port"."""

    def __post_init__(self) -> None:
        """Raise UserError BAD_ARGUMENT unless an invite can name these places."""
        try:
            for address in (f"{self.host}:{self.port}", f"{self.host}:{self.bootstrap_port}", *self.standbys):
                check_address(address)
        except ValueError as error:
            raise UserError(
                UserCode.BAD_ARGUMENT, str(error), "give --host a name or an address, and each port from 1 to 65535"
            ) from error
        if len(self.standbys) >= AGGREGATORS_MAX:
            most = AGGREGATORS_MAX - 1
            raise UserError(UserCode.BAD_ARGUMENT, "a run has at most 64 aggregators", f"name at most {most} standbys")


class OperatorFolder:
    """The folder that `run new` writes and that `bootstrap` and `aggregate` read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def aggregator_home(self) -> Path:
        """Key, certificate, ledger and blobs of the aggregator."""
        return self.path / "aggregator"

    @property
    def bootstrap_home(self) -> Path:
        """Key of the bootstrap node."""
        return self.path / "bootstrap"

    @property
    def invite_path(self) -> Path:
        """The invite as one line of text."""
        return self.path / "invite.txt"

    def load(self) -> tuple[SignedRun, Invite]:
        """Read the run and its invite. Raises UserError when this is no run folder or a damaged one."""
        path = self.path / "run.bin"
        if not path.exists():
            raise UserError(
                UserCode.NO_SUCH_FILE,
                f"{self.path} is not a run folder: it has no run.bin",
                "name the folder that `sparseloco-peer run new RUN.toml --out FOLDER` made",
            )
        with os_errors(path):
            data, text = path.read_bytes(), self.invite_path.read_text("ascii", "replace").strip()
        try:
            return SignedRun.from_bytes(data, run_id=None), Invite.from_text(text)
        except ProtocolError as error:
            raise UserError(
                UserCode.BAD_RUN_FILE, f"{self.path}: {error.detail}", "restore the folder from a backup"
            ) from error

    def tls(self) -> TlsIdentity:
        """The aggregator's certificate, made on first use."""
        path = self.aggregator_home / "tls.pem"
        if not path.exists():
            atomic_write(path, make_tls_identity().to_bytes(), mode=0o600)
        with os_errors(path):
            return TlsIdentity.from_bytes(path.read_bytes())


def read_settings(path: Path) -> RunSettings:
    """Read the operator's TOML. Raises UserError that names the key and the remedy."""
    with os_errors(path):
        try:
            return parse_settings(path.read_text("utf-8"))
        except ValueError as error:
            raise UserError(
                UserCode.BAD_RUN_FILE, f"{path}: {error}", f"mend {path} and run the same command again"
            ) from error


def new_run(settings: RunSettings, out: Path, place: RunPlace, data: Path | None = None) -> Invite:
    """Make the run folder and return its invite. Raises UserError when the folder is already a run.

    `data` is the folder of the run's corpus where that is not embedded.
    """
    from peer.core.model import layout_of  # noqa: PLC0415  torch takes seconds to import
    from peer.core.replica import initial_state  # noqa: PLC0415
    from peer.data.prepare import prepare  # noqa: PLC0415

    folder = OperatorFolder(out)
    if (out / "run.bin").exists():
        raise UserError(UserCode.BAD_ARGUMENT, f"{out} already holds a run", "name another folder with --out")
    operator = load_or_make_key(out / "operator.key")
    standbys = [OperatorFolder(out / f"standby-{number}") for number in range(1, len(place.standbys) + 1)]
    keys = [load_or_make_key(each.aggregator_home / "key") for each in (folder, *standbys)]
    bootstrap = load_or_make_key(folder.bootstrap_home / "key")
    home = Home(folder.aggregator_home)
    try:
        dataset = prepare(settings.data, home.path / "data", {settings.data.corpus: data} if data else {})
        dataset.check_vocabulary(settings.model.vocab_size)
    except ValueError as error:
        raise UserError(UserCode.NO_CORPUS, str(error), "mend [data] or [model] in the run's TOML") from error
    pinned = dataclasses.replace(settings.data, corpus_sha256=dataset.sha256)
    layout = layout_of(settings.model)
    flat = initial_state(settings.model)
    config = RunConfig.of(
        dataclasses.replace(settings, data=pinned),
        operator=operator.public,
        aggregators=tuple(sorted(key.public for key in keys)),
        layout=layout,
        genesis_root=state_root(flat),
    )
    signed = sign_run(config, operator)
    bootstraps = (bootstrap_multiaddr(bootstrap.public, place.host, place.bootstrap_port),)
    addresses = (f"{place.host}:{place.port}", *place.standbys)
    invites = [
        Invite(config.run_id, key.public, each.tls().fingerprint, (address,), bootstraps)
        for each, key, address in zip((folder, *standbys), keys, addresses, strict=True)
    ]
    genesis = genesis_record(config, keys[0], time.time_ns() // 1_000_000)
    ads = [_ad_of(invite, key, genesis) for invite, key in zip(invites, keys, strict=True)]
    for each, invite in zip((folder, *standbys), invites, strict=True):
        _fill(each, signed, genesis, flat, ads)
        atomic_write(each.invite_path, invite.to_text().encode("ascii") + b"\n")
    # Written last: a folder with run.bin is complete.
    for each in (*standbys, folder):
        atomic_write(each.path / "run.bin", signed.to_bytes())
    return invites[0]


def move(folder: OperatorFolder, host: str | None, port: int | None, bootstrap_port: int | None) -> Invite:
    """Let the run's invite name another place, and return it; what is None stays. Raises UserError BAD_ARGUMENT."""
    _, invite = folder.load()
    old_host, _, old_port = invite.addresses[0].rpartition(":")
    bootstraps = tuple(_moved(text, host, bootstrap_port) for text in invite.bootstraps)
    place = RunPlace(host or old_host, int(old_port) if port is None else port, _bootstrap_port(bootstraps))
    moved = dataclasses.replace(invite, addresses=(f"{place.host}:{place.port}",), bootstraps=bootstraps)
    if moved != invite:
        atomic_write(folder.invite_path, moved.to_text().encode("ascii") + b"\n")
    return moved


def _moved(bootstrap: str, host: str | None, port: int | None) -> str:
    """A bootstrap's multiaddr, "/dns4/HOST/tcp/PORT/p2p/NAME", with another host or port."""
    _, _, name = bootstrap.rpartition("/")
    parts = bootstrap.split("/")
    place = RunPlace(host or parts[2], 1, int(parts[4]) if port is None else port)
    return f"{tcp_multiaddr(place.host, place.bootstrap_port)}/p2p/{name}"


def _bootstrap_port(bootstraps: tuple[str, ...]) -> int:
    return int(bootstraps[0].split("/")[4]) if bootstraps else 1


def _ad_of(invite: Invite, key: PrivateKey, genesis: RoundRecord) -> bytes:
    """Where this aggregator will be; it expires long before it is of no use, and is then replaced by newer ones."""
    ad = Ad(invite.addresses, invite.certificate_sha256, genesis.round, genesis.digest)
    return sign_ad(invite.run_id, key, ad, genesis.closed_ms // 1000 + DHT_TTL_S)


def _fill(
    folder: OperatorFolder, signed: SignedRun, genesis: RoundRecord, flat: NDArray[np.float32], ads: list[bytes]
) -> None:  # flat: f32[N]
    """Give an aggregator what it begins with: the ledger's first record, its state, and where the others are."""
    home, config = Home(folder.aggregator_home), signed.config
    with closing(home.run(config.run_id)) as store:
        store.states.save(flat, config.layout, {"run": config.name, "round": "0"})
        row = RecordRow(0, genesis.digest, genesis.state_root, genesis.update_digest, genesis.to_bytes())
        store.journal.close_round(row, {})
    remember_ads(home, signed, ads)
