import shlex

import pytest

from peer.cli import main
from peer.sim.settings import Sizes


def test_the_command_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("simulate --peers 3 --rounds 4 --seed 5 --seeds 2")) == 0
    out = capsys.readouterr().out
    for word in (
        "seed 5: 3 peers, 4 rounds",
        "seed 6:",
        "4 complete",
        "12 of 12 peer-rounds",
        "digest ",
        "utilisation",
    ):
        assert word in out
    assert "values at k" not in out


def test_a_what_if_says_whose_sizes_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    words = "simulate --peers 4 --rounds 3 --up 10 --down 100 --values 1e9 --k 64 --inner-seconds 120"
    assert main(shlex.split(words)) == 0
    out = capsys.readouterr().out
    assert "computed for a model of 1,000,000,000 values at k = 64" in out
    assert " MB up" in out


@pytest.mark.parametrize("words", ["simulate --peers 0", "simulate --k 9999", "simulate --deadline -1"])
def test_what_cannot_be_simulated_is_refused_with_a_reason(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(words)) == 1
    assert "--help" in capsys.readouterr().err


# docs/log.md, "update or bundle?": bytes of an update and of R packets, of a model of 1,378,368 parameters.
MEASURED = [
    (64, 4, 98_067, 100_871),
    (64, 20, 242_583, 504_700),
    (64, 64, 386_712, 1_615_460),
    (256, 4, 306_538, 315_629),
    (256, 20, 585_920, 1_578_035),
]


@pytest.mark.parametrize(("k", "contributors", "update", "bundle"), MEASURED)
def test_the_computed_sizes_are_near_those_that_were_measured(
    k: int, contributors: int, update: int, bundle: int
) -> None:
    sizes = Sizes(1_378_368, k)
    assert sizes.update(b"", contributors) == pytest.approx(update, rel=0.34)
    assert sizes.bundle([b""] * contributors) == pytest.approx(bundle, rel=0.1)
    assert sizes.state(b"") == 4 * 1_378_368


def test_without_a_large_model_sizes_are_those_of_the_bytes_themselves() -> None:
    sizes = Sizes(0, 64)
    assert (sizes.packet(b"abc"), sizes.update(b"abcd", 5), sizes.state(b"ab")) == (3, 4, 2)
