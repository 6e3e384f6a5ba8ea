"""The tables: mean and spread over seeds, against the first trial of the part."""

import math
import statistics

from bench.convergence.methods import FLOAT_BYTES
from bench.convergence.results import Results
from bench.convergence.suite import Part
from bench.convergence.training import Result

COLUMNS = (
    *("loss", "spread", "bits a byte", "to the first", "seeds"),
    *("rounds", "accepted tokens", "up, kB a peer", "times less than dense rounds", "down, kB"),
)


def markdown(name: str, part: Part, results: Results) -> str:
    """A part as a table. A trial that is not trained yet has a dash."""
    lines = [
        f"**{name}**: {part.question}",
        "",
        "| | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    first = results.seeds(part.trials[0].setup)
    for trial in part.trials:
        found = [result for result in results.seeds(trial.setup) if result.seed in part.seeds]
        lines.append(f"| {trial.label} | " + " | ".join(_cells(found, first)) + " |")
    return "\n".join(lines)


def _cells(found: list[Result], first: list[Result]) -> list[str]:
    if not found:
        return ["-"] * len(COLUMNS)
    losses = [result.loss for result in found]
    if not all(map(math.isfinite, losses)):
        return ["diverged", *["-"] * 3, str(len(found)), *["-"] * 4]
    mean, ends = statistics.fmean(losses), [result.curve[-1] for result in found]
    return [
        f"{mean:.4f}",
        f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-",
        f"{mean / math.log(2):.3f}",
        gap(found, first),
        str(len(found)),
        f"{statistics.fmean(end.round for end in ends):.0f}",
        f"{statistics.fmean(end.accepted for end in ends):,.0f}",
        f"{statistics.fmean(end.bytes_up for end in ends) / 1000:,.0f}",
        _times_less(found),
        f"{statistics.fmean(end.bytes_down for end in ends) / 1000:,.0f}",
    ]


def _times_less(found: list[Result]) -> str:
    """How many times fewer bytes up than all parameters in float32 once a round, which is what DiLoCo sends."""
    ends = [(FLOAT_BYTES * result.parameters * result.curve[-1].round, result.curve[-1].bytes_up) for result in found]
    if not all(sent for _, sent in ends):
        return "-"
    return f"{statistics.fmean(dense / sent for dense, sent in ends):,.3g}"


def gap(found: list[Result], first: list[Result]) -> str:
    """How far above the first trial, seed by seed: mean and, from two seeds on, the standard error of the mean."""
    base = {result.seed: result.loss for result in first}
    gaps = [100 * (result.loss / base[result.seed] - 1) for result in found if result.seed in base]
    if not gaps or not all(map(math.isfinite, gaps)):
        return "-"
    error = f" ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.2f}" if len(gaps) > 1 else ""
    return f"{statistics.fmean(gaps):+.2f}{error} %"
