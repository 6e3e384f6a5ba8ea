from pathlib import Path

import pytest

from tests.sim.mutations import MUTATIONS, Mutation, hunt, plant


def test_every_mutation_fits_the_program_of_today(tmp_path: Path) -> None:
    for number, mutation in enumerate(MUTATIONS):
        plant(mutation, tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.bug.replace(" ", "-"))
def test_the_simulator_finds_the_bug(mutation: Mutation) -> None:
    assert hunt(mutation)
