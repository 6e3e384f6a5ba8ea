"""What a peer trains with: the run's data, a replica on the best device of this machine, and room on the disk."""

from dataclasses import dataclass

import structlog

from peer.config import PeerConfig
from peer.controls import MEGABYTE, folder_bytes
from peer.core import codec
from peer.core.device import pick_device, pick_dtype, set_threads
from peer.core.replica import Replica
from peer.data.prepare import Dataset, prepare
from peer.errors import UserCode, UserError
from peer.fit import fit_micro_batch
from peer.limits import Limits
from peer.store import Home
from protocol.run import RunConfig

log = structlog.get_logger()

STORED_TWICE_BYTES = 33  # of each parameter: the replica's file takes 16.2, and twice that while it is replaced


@dataclass(frozen=True)
class Equipment:
    """The data and the replica of a run."""

    data: Dataset
    replica: Replica


def equip(run: RunConfig, home: Home, config: PeerConfig, peer: bytes) -> Equipment:
    """Get everything ready for training; it takes its time. `peer` is our key. Raises UserError."""
    try:
        device = pick_device(config.device)
    except ValueError as error:
        raise UserError(UserCode.NO_DEVICE, str(error), "leave --device out: then the best one here is used") from error
    set_threads(config.threads)
    try:
        data = prepare(run.data, home.path / "data", config.data_paths)
        data.check_vocabulary(run.model.vocab_size)
        replica = Replica(run, device, pick_dtype(config.dtype, device), config.micro_batch)
        path, _, why = codec.kernels_in_use(device).partition(": ")
    except ValueError as error:
        raise UserError(UserCode.NO_CORPUS, str(error), "get what the run needs, then start again") from error
    log.info("kernels", path=path, why=why)
    if not config.micro_batch:
        inner = run.inner
        batch = next(data.training_batches(1, peer, inner.steps, inner.batch_size))
        fitted = fit_micro_batch(replica, batch, dtype=config.dtype)
        fitted.apply(replica)
        log.info("fitted", micro_batch=fitted.micro_batch, step_s=round(fitted.step_s, 4), why=fitted.why)
    log.info(
        "run",
        name=run.name,
        run_id=run.run_id,
        parameters=run.layout.size,
        device=str(device),
        rounds=run.outer.rounds,
        inner_steps=run.inner.steps,
    )
    return Equipment(data, replica)


def demand_room(run: RunConfig, home: Home, limits: Limits) -> None:
    """Say before anything is fetched that the cap on the disk is too small for this run. Raises UserError."""
    replica, cap = home.path / "runs" / run.run_id.hex() / "replica.safetensors", limits.disk_mb
    if not cap or replica.exists():
        return
    held, need = folder_bytes(home.path) / MEGABYTE, STORED_TWICE_BYTES * run.layout.size / MEGABYTE
    if held + need > cap:
        raise UserError(
            UserCode.DISK_FULL,
            f"this run needs {need:.0f} MB in {home.path}, which holds {held:.0f} MB already; disk_mb allows {cap:g}",
            f"allow {held + need:.0f} MB with `sparseloco-peer limits --disk-mb`, or join a run with a smaller model",
        )
