"""A short run of both fuzzers; `make fuzz` is the long one."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.kernels.fuzz import compiler, fuzz_sections, fuzz_transport

SEED = 7


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mutated_sections_harm_no_decoder_under_the_sanitizers(tmp_path: Path) -> None:
    try:
        compiler()
    except LookupError as missing:
        pytest.skip(str(missing))
    try:
        figures = fuzz_sections(tmp_path, SEED, 1_000_000, seconds=10)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"seed {SEED}: {error}; the sanitizers' report stands above")
    sys.stdout.write(f"seed {SEED}\n{figures}")
    assert "accepted: " in figures and "refused 302: " in figures


@pytest.mark.slow
def test_mutated_packets_and_updates_are_read_or_refused() -> None:
    figures = fuzz_transport(SEED, 1_000_000, seconds=10)
    sys.stdout.write("\n".join([f"seed {SEED}", *figures.lines()]))
    assert figures.mutations > 100 and figures.outcomes["accepted"] > 0
