"""What the dashboard asks of the aggregator's memory."""

import asyncio

from peer.aggregator import Aggregator
from peer.evaluate import Evaluator
from peer.web.board import Live, Loss, known_bytes_per_token


def live_of(program: Aggregator, evaluator: Evaluator | None) -> Live:
    """The aggregator that leads as it is now. Call it in the aggregator's event loop."""
    round, newest = program.round, None if evaluator is None else evaluator.newest
    is_open = not round.closed and not program.finished.is_set()
    return Live(
        leading=True,
        connected=len(round.members),
        open_round=round.round if is_open else None,
        closes_in_s=max(0.0, round.deadline_at_s - asyncio.get_running_loop().time()),
        newest=None if newest is None else Loss(newest.round, newest.loss_micronats / 1e6),
        bytes_per_token=known_bytes_per_token(program.run) if evaluator is None else evaluator.bytes_per_token,
    )
