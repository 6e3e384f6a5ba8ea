"""How the demo ends: a table, a loss curve as PNG and `summary.json`. Pure functions of what was measured."""

import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.table import Table

from peer.store import atomic_write
from peer.telemetry import duration


@dataclass(frozen=True)
class Summary:
    """What a run came to. The field names are the keys of `summary.json`; losses are nats a token."""

    initial_val_loss: float
    """Validation loss of the parameters that everybody started from."""
    final_val_loss: float
    """Validation loss of the parameters that everybody holds at the end."""
    final_perplexity: float | None
    """e to that loss; None where no double holds it."""
    final_bits_per_byte: float
    """That loss as bits a byte of the held-out text, whatever the tokenizer is."""
    solo_val_loss: float
    """Validation loss of one peer that trained alone on as many tokens as each peer of the swarm."""
    rounds: int
    """Rounds that the ledger holds, the genesis record not counted."""
    peers: int
    """Peers that took part."""
    tokens: int
    """Tokens that all peers together trained on."""
    parameters: int
    """Values in the model."""
    bytes_up_per_peer_round: float
    """Bytes that a peer sent in a round, on average."""
    bytes_down_per_peer_round: float
    """Bytes that a peer received in a round, on average."""
    update_bytes_per_round: float
    """Bytes of a round's update in transport form, on average."""
    bundle_bytes_per_round: float
    """Bytes of a round's packets together, on average: the other form of the update."""
    rounds_by_bundle: int
    """Rounds in which the packets together were smaller than their update, so that peers fetched them instead."""
    bits_per_value: float
    """Bits of a packet for each value in it: header, tables, scales and signature included."""
    inner_time_share: float
    """Share of the peers' wall time that went into inner steps, 0 to 1."""
    state_roots_equal: bool
    """Whether all peers and the aggregator ended with the same bits."""
    state_root: str
    """The state root of the aggregator after the last round, hex."""
    wall_s: float
    """Seconds from the first round's opening to the last round's end."""
    kernels: str
    """What packets, merge and outer steps ran on."""


@dataclass(frozen=True)
class Curve:
    """Validation loss along the way: a point for each measurement."""

    label: str
    tokens_per_peer: Sequence[int]
    val_loss: Sequence[float]

    def __post_init__(self) -> None:
        assert len(self.tokens_per_peer) == len(self.val_loss), "a curve has as many losses as places"


def summary_json(summary: Summary) -> str:
    """The summary as JSON text. Raises ValueError on a NaN or infinity, which JSON does not have."""
    return json.dumps(dataclasses.asdict(summary), indent=2, allow_nan=False) + "\n"


def summary_table(summary: Summary, state_roots: Mapping[str, str]) -> Table:
    """The table for people; `state_roots` maps each participant to the root (hex) that it ended with."""
    gain = summary.initial_val_loss - summary.final_val_loss
    perplexity = math.inf if summary.final_perplexity is None else summary.final_perplexity
    against_solo = summary.solo_val_loss - summary.final_val_loss
    table = Table(title="What the swarm did", show_header=False, min_width=72)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right")
    bundle = f"{size_text(summary.bundle_bytes_per_round)} (smaller in {summary.rounds_by_bundle} rounds)"
    rows = [
        ("validation loss, before", f"{summary.initial_val_loss:.3f} nats a token"),
        ("validation loss, after", f"{summary.final_val_loss:.3f} ({_difference(gain)})"),
        ("the same", f"perplexity {perplexity:.2f}, {summary.final_bits_per_byte:.3f} bits a byte"),
        ("one peer alone, same tokens", f"{summary.solo_val_loss:.3f} (the swarm is {_difference(against_solo)})"),
        ("peers, rounds", f"{summary.peers}, {summary.rounds}"),
        ("parameters", f"{summary.parameters:,}"),
        ("tokens trained on", f"{summary.tokens:,}"),
        ("sent, a peer and round", size_text(summary.bytes_up_per_peer_round)),
        ("received, a peer and round", size_text(summary.bytes_down_per_peer_round)),
        ("an update, a bundle of packets", f"{size_text(summary.update_bytes_per_round)}, {bundle}"),
        ("bits a sent value, all included", f"{summary.bits_per_value:.2f}"),
        ("wall time in inner steps", f"{100 * summary.inner_time_share:.0f} %"),
        ("wall time", duration(summary.wall_s)),
        ("kernels", summary.kernels),
    ]
    for name, value in rows:
        table.add_row(name, value)
    table.add_section()
    for name, root in state_roots.items():
        # Sixteen digits are enough to compare by eye; summary.json has them all.
        mark = "" if root == summary.state_root else "  [red]differs[/red]"
        table.add_row(f"state root, {name}", f"{root[:16]}{mark}")
    verdict = "[green]equal, bit for bit[/green]" if summary.state_roots_equal else "[red]NOT equal[/red]"
    table.add_row("all state roots", verdict)
    return table


def _difference(gain: float) -> str:
    return f"{abs(gain):.3f} {'better' if gain >= 0 else 'worse'}"


def size_text(size_bytes: float) -> str:
    """A number of bytes as people write it: 512 B, 51.2 kB, 1.5 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return (
                f"{size_bytes / scale:.3g} {unit}" if size_bytes < 1000 * scale else f"{size_bytes / scale:,.0f} {unit}"
            )
    return f"{size_bytes:.0f} B"


def loss_figure(curves: Sequence[Curve], title: str) -> Figure:
    """Validation loss against the tokens that each peer trained on; the first curve is the swarm's."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, curve in enumerate(curves):
        points = list(zip(curve.tokens_per_peer, curve.val_loss, strict=True))
        style = {0: "-"}.get(index, "--")
        axes.plot(
            *zip(*points, strict=True) if points else ([], []), style, marker="o", markersize=4, label=curve.label
        )
        if points:
            place, loss = points[-1]
            # The swarm ends below the others, so its number goes below its curve and theirs above.
            shift = (0, -14) if index == 0 else (0, 10)
            axes.annotate(f"{loss:.3f}", (place, loss), xytext=shift, textcoords="offset points", ha="right")
    axes.set_title(title)
    axes.set_xlabel("tokens per peer")
    axes.set_ylabel("validation loss (nats a token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.margins(x=0.04, y=0.1)
    if curves:
        axes.legend()
    return figure


def png_bytes(figure: Figure) -> bytes:
    """Draw a figure without a screen and without matplotlib's global state."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write_report(folder: Path, summary: Summary, curves: Sequence[Curve], title: str, sample: str) -> None:
    """Write `summary.json`, `loss.png`, `curves.json` and `sample.txt` into a folder. Raises UserError."""
    atomic_write(folder / "summary.json", summary_json(summary).encode())
    points = [dataclasses.asdict(curve) for curve in curves]
    atomic_write(folder / "curves.json", (json.dumps(points, indent=1, allow_nan=False) + "\n").encode())
    atomic_write(folder / "loss.png", png_bytes(loss_figure(curves, title)))
    atomic_write(folder / "sample.txt", sample.encode("utf-8"))
