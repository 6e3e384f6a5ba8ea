"""What an audit found, for people and as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

_KINDS = ("records", "packets", "updates", "bundles", "states", "amendments")


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be. `missing` says that it is not there at all."""

    round: int
    what: str
    why: str
    file: str
    missing: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.why}\n    in {self.file}"


@dataclass
class Report:
    """What an audit of one store found. `recomputed` are the rounds of which everything was computed anew and fits."""

    store: str
    run: str
    first: int
    last: int
    recomputed: int = 0
    records: int = 0
    packets: int = 0
    updates: int = 0
    bundles: int = 0
    states: int = 0
    amendments: int = 0
    seconds: float = 0.0
    state_root: str = ""
    findings: list[Finding] = field(default_factory=list)

    @property
    def asked(self) -> int:
        """How many rounds were to be recomputed."""
        return self.last - self.first + 1

    @property
    def passed(self) -> bool:
        """Whether all that was asked for was recomputed, and nothing is wrong."""
        return not self.findings and self.recomputed == self.asked

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {**asdict(self), "passed": self.passed}

    def lines(self) -> list[str]:
        """The report for people."""
        wrong = [finding for finding in self.findings if not finding.missing]
        gone = [finding for finding in self.findings if finding.missing]
        lines = [
            f"{self.store}",
            f"  run {self.run}, rounds {self.first} to {self.last}",
            f"  recomputed {self.recomputed} of {self.asked} rounds in {self.seconds:.1f} s",
            "  read " + ", ".join(f"{getattr(self, kind)} {kind}" for kind in _KINDS),
            *(f"  WRONG {finding}" for finding in wrong),
            *(f"  missing {finding}" for finding in gone),
        ]
        if self.passed:
            return [*lines, f"  all of it fits, to state root {self.state_root}"]
        return [*lines, f"  NOT PASSED: {len(wrong)} wrong, {len(gone)} missing"]
