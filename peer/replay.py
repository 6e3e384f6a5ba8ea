"""From stored updates back to the parameters: how an aggregator recovers and how anybody follows a run afterwards."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from peer.core import codec
from peer.merge import sections_of_update
from peer.store import RunFolder
from protocol.errors import Code, ProtocolError
from protocol.identity import NO_DIGEST
from protocol.layout import state_root
from protocol.ledger import RoundRecord
from protocol.run import RunConfig


def replay(
    store: RunFolder, run: RunConfig, first: int, last: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:  # (round, f32[N])
    """Load the state after round `first`, which is stored, and follow the updates to round `last`.

    Yields (round, parameters) for first..last; the array is the same each time and changes in place. Raises
    ProtocolError BAD_STATE when the parameters at the end are not those of the record, and UserError when the disk
    fails.
    """
    rows = store.journal.records(first, last)
    flat = store.states.load(rows[0].state_root, run.layout)
    yield first, flat
    for row in rows[1:]:
        if row.update_digest != NO_DIGEST:
            data = store.blobs.get("update", row.update_digest.hex())
            assert data is not None, "updates since the last stored state are kept"
            sections = sections_of_update(data, RoundRecord.from_bytes(row.data), run)
            codec.outer_step(torch.from_numpy(flat), run.layout, sections)
        yield row.round, flat
    if state_root(flat) != rows[-1].state_root:
        raise ProtocolError(Code.BAD_STATE, f"the stored updates do not lead to the state of round {last}")
