"""Every test of the programs trains with one thread, as those of the core do."""

from tests.core.conftest import one_thread

__all__ = ["one_thread"]
