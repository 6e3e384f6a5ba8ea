import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.core.outer import outer_step
from protocol.layout import Layout
from protocol.update import UpdateTensor, apply_update, to_update_tensor

LAYOUT = Layout.of([("a", (5000,)), ("b", (30, 40)), ("c", (7,)), ("d", (2 * 4096,))])


def random_update(rng: np.random.Generator, size: int, density: float) -> UpdateTensor:
    step = rng.integers(-(1 << 40), 1 << 40, size) >> rng.integers(0, 40, size)
    return to_update_tensor(np.where(rng.random(size) < density, step, 0))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32), density=st.sampled_from([0.0, 0.02, 1.0]))
def test_outer_step_equals_the_reference(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    updates = [random_update(rng, tensor.size, density) for tensor in LAYOUT.tensors]
    expected = rng.standard_normal(LAYOUT.size).astype(np.float32)
    expected[::7] = -0.0
    outer = torch.from_numpy(expected.copy())
    apply_update(expected, LAYOUT, updates)
    outer_step(outer, LAYOUT, updates)
    np.testing.assert_array_equal(outer.numpy().view(np.uint32), expected.view(np.uint32))
