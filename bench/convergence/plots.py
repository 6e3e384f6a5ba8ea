"""The curves, as PNG and SVG."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.convergence.results import Results
from bench.convergence.suite import Part, Trial
from bench.convergence.training import Point, Result

WIDTH_IN, HEIGHT_IN, DPI = 7.2, 5.0, 150
SKIPPED = 0.15  # the first part of a curve, where all fall steeply, would squeeze the rest


def draw(parts: Mapping[str, Part], results: Results, folder: Path, size: str) -> list[Path]:
    """Draw each part whose trials are trained, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams.update({"font.size": 10, "svg.hashsalt": "convergence", "svg.fonttype": "none"})
    written = []
    for name, part in parts.items():
        done = [trial for trial in part.trials if _of(trial, part, results)]
        if len(done) < 2 or name == "tune":
            continue
        if name == "ablations":
            figures = {name: _bars(part, done, results)}
        else:
            # What is compared at equal accepted tokens is drawn over them.
            at_accepted = part.trials[0].setup.until == "accepted"
            label, x_of = (
                ("accepted tokens, millions", _accepted) if at_accepted else ("trained tokens, millions", _trained)
            )
            figures = {f"{name}-tokens": _curves(part, done, results, label, x_of)}
        if name.startswith("headline"):
            figures[f"{name}-bytes"] = _curves(part, done, results, "bytes up a peer, megabytes", _megabytes, log=True)
        for stem, figure in figures.items():
            for kind in ("png", "svg"):
                path = folder / f"convergence-{size}-{stem}.{kind}"
                figure.savefig(path, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
                written.append(path)
            plt.close(figure)
    return written


def _of(trial: Trial, part: Part, results: Results) -> list[Result]:
    return [result for result in results.seeds(trial.setup) if result.seed in part.seeds and math.isfinite(result.loss)]


def _trained(point: Point) -> float:
    return point.trained / 1e6


def _accepted(point: Point) -> float:
    return point.accepted / 1e6


def _megabytes(point: Point) -> float:
    return point.bytes_up / 1e6


def _figure(title: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _curves(
    part: Part,
    trials: Sequence[Trial],
    results: Results,
    xlabel: str,
    x_of: Callable[[Point], float],
    *,
    log: bool = False,
) -> Figure:
    """Validation loss, the mean over seeds as a line and all seeds as a band."""
    figure, axes = _figure(part.question)
    for number, trial in enumerate(trials):
        found = _of(trial, part, results)
        # Seeds of a disturbed swarm need different numbers of points; what all have is drawn.
        rows = list(zip(*(result.curve for result in found), strict=False))
        rows = rows[max(1, int(SKIPPED * len(rows))) :]
        xs = [statistics.fmean(map(x_of, row)) for row in rows]
        losses = [[point.loss for point in row] for row in rows]
        means = list(map(statistics.fmean, losses))
        style = ("-", "--", "-.", ":")[number // 10 if len(trials) > 10 else number % 4]
        (line,) = axes.plot(xs, means, style, color=f"C{number % 10}", label=f"{trial.label}  {means[-1]:.3f}")
        axes.fill_between(xs, list(map(min, losses)), list(map(max, losses)), color=line.get_color(), alpha=0.2, lw=0)
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel("validation loss, nats a byte")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _bars(part: Part, trials: Sequence[Trial], results: Results) -> Figure:
    """The last loss of each trial against that of the first."""
    figure, axes = _figure(part.question)
    figure.set_size_inches(WIDTH_IN, 1.2 + 0.24 * len(trials))
    base = statistics.fmean(result.loss for result in _of(trials[0], part, results))
    gaps = [100 * (statistics.fmean(r.loss for r in _of(trial, part, results)) / base - 1) for trial in trials]
    axes.barh([trial.label for trial in trials], gaps, color=["C2" if gap <= 0 else "C3" for gap in gaps])
    axes.bar_label(axes.containers[0], fmt="%+.1f", padding=3, fontsize=9)  # type: ignore[arg-type]  # a bar container
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"validation loss against the default's {base:.3f}, %")
    return figure
