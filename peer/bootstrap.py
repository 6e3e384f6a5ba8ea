"""The bootstrap node: a member of the DHT that stays, so that everybody else finds a way in."""

import asyncio

import structlog

from peer.errors import UserCode, UserError
from peer.net.directory import open_directory
from peer.operator import OperatorFolder
from peer.store import Home, load_key
from protocol.invite import Invite

log = structlog.get_logger()

REPORT_S = 60.0


def port_of(invite: Invite) -> int:
    """The port that the invite's bootstrap address names."""
    parts = invite.bootstraps[0].split("/")
    return int(parts[parts.index("tcp") + 1])


async def bootstrap(folder: OperatorFolder, stop: asyncio.Event, others: tuple[str, ...] = ()) -> None:
    """Serve the DHT until `stop`. Raises UserError when hivemind cannot run here."""
    signed, invite = folder.load()
    home = Home(folder.bootstrap_home)
    if not invite.bootstraps:
        raise UserError(UserCode.BAD_RUN_FILE, "the invite names no bootstrap", "make the run anew with `run new`")
    with home.lock():
        directory = await open_directory(
            identity=load_key(home.key_path),
            run_ids=[signed.config.run_id],
            aggregators={signed.config.run_id: frozenset(signed.config.aggregators)},
            bootstraps=others,
            listen=f"0.0.0.0:{port_of(invite)}",
            notice=lambda text: log.warning("directory", notice=text),
        )
        try:
            if directory.kind != "hivemind":
                raise UserError(
                    UserCode.NO_DIRECTORY,
                    f"this machine cannot be a bootstrap: {directory.reason}",
                    "run it on Linux or macOS with hivemind installed; without one, invites still carry the address",
                )
            log.info("bootstrap ready", address=invite.bootstraps[0], run=signed.config.name)
            while not stop.is_set():
                health = await directory.health()
                log.info("directory", peers=health.peers, problem=health.problem or "none")
                await wait_for_stop(stop, REPORT_S)
        finally:
            await directory.close()


async def wait_for_stop(stop: asyncio.Event, seconds: float) -> None:
    """Sleep for so long, or less when it is time to leave."""
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return
