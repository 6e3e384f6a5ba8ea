"""What a loss in nats a token is in other words."""

import math

NATS_MAX = 700.0  # beyond that no double holds the perplexity


def perplexity(loss: float) -> float | None:
    """Among how many equally likely tokens the model chooses, so to speak: e to the loss; None where none is known."""
    return math.exp(loss) if loss < NATS_MAX else None


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """The loss in bits a byte of text, which compares models whose tokenizers differ."""
    return loss / math.log(2) / bytes_per_token
