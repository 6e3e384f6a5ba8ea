import pytest

from tests.sim.weather import BLOCK, live_through


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", range(100, 200, BLOCK))
def test_seeds_of_fifty_rounds(first: int) -> None:
    live_through(first)
