"""What the operator does once: make a run's keys, initial parameters, signed description and invite.

A run folder holds

    run.bin        the signed run that everybody agrees on
    invite.txt     the line that volunteers paste after `join`
    operator.key   signs this run and its later changes; keep it off the servers
    aggregator/    the home of `aggregate`: its key, its certificate and the initial parameters
    bootstrap/     the home of `bootstrap`: its key
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from peer.errors import UserCode, UserError, os_errors
from peer.net.directory import bootstrap_multiaddr
from peer.net.tls import TlsIdentity, make_tls_identity
from peer.store import Home, atomic_write, load_or_make_key
from protocol.errors import ProtocolError
from protocol.invite import Invite, check_address
from protocol.layout import state_root
from protocol.run import RunConfig, RunSettings, SignedRun, parse_settings, sign_run


@dataclass(frozen=True)
class RunPlace:
    """Where the programs of a run are reached from outside."""

    host: str
    port: int
    bootstrap_port: int

    def __post_init__(self) -> None:
        """Raise UserError BAD_ARGUMENT unless an invite can name these places."""
        try:
            for port in (self.port, self.bootstrap_port):
                check_address(f"{self.host}:{port}")
        except ValueError as error:
            raise UserError(
                UserCode.BAD_ARGUMENT, str(error), "give --host a name or an address, and each port from 1 to 65535"
            ) from error


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
            data, text = path.read_bytes(), self.invite_path.read_text("ascii").strip()
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


def new_run(settings: RunSettings, out: Path, place: RunPlace) -> Invite:
    """Make the run folder and return its invite. Raises UserError when the folder is already a run."""
    from peer.core.model import layout_of  # noqa: PLC0415  torch takes seconds to import
    from peer.core.replica import initial_state  # noqa: PLC0415
    from peer.data.prepare import prepare  # noqa: PLC0415

    folder = OperatorFolder(out)
    if (out / "run.bin").exists():
        raise UserError(UserCode.BAD_ARGUMENT, f"{out} already holds a run", "name another folder with --out")
    operator = load_or_make_key(out / "operator.key")
    aggregator = load_or_make_key(folder.aggregator_home / "key")
    bootstrap = load_or_make_key(folder.bootstrap_home / "key")
    home = Home(folder.aggregator_home)
    try:
        dataset = prepare(settings.data, home.path / "data", {})
        dataset.check_vocabulary(settings.model.vocab_size)
    except ValueError as error:
        raise UserError(UserCode.NO_CORPUS, str(error), "mend [data] or [model] in the run's TOML") from error
    data = dataclasses.replace(settings.data, corpus_sha256=dataset.sha256)
    layout = layout_of(settings.model)
    flat = initial_state(settings.model)
    config = RunConfig.of(
        dataclasses.replace(settings, data=data),
        operator=operator.public,
        aggregators=(aggregator.public,),
        layout=layout,
        genesis_root=state_root(flat),
    )
    signed = sign_run(config, operator)
    run_folder = home.run(config.run_id)
    run_folder.states.save(flat, layout, {"run": config.name, "round": "0"})
    run_folder.close()
    invite = Invite(
        config.run_id,
        aggregator.public,
        folder.tls().fingerprint,
        (f"{place.host}:{place.port}",),
        (bootstrap_multiaddr(bootstrap.public, place.host, place.bootstrap_port),),
    )
    atomic_write(folder.invite_path, invite.to_text().encode("ascii") + b"\n")
    # Written last: a folder with run.bin is complete.
    atomic_write(out / "run.bin", signed.to_bytes())
    return invite
