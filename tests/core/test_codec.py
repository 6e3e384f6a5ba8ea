"""The door to the codec: whatever path it takes, sections, residual and parameters are those of the reference."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from peer.core import codec
from protocol import arithmetic
from protocol import compress as reference
from protocol.errors import Code, ProtocolError
from protocol.layout import Layout
from protocol.limits import CHUNK, CLIP_ONE
from protocol.packing import decode_section, encode_section
from protocol.update import apply_update, decode_update_section, encode_update_section

LAYOUT = Layout.of([("a", (5000,)), ("b", (30, 40)), ("c", (7,)), ("d", (2 * CHUNK,)), ("e", ())])
CPU = torch.device("cpu")


@pytest.fixture(params=["fastest", "numpy"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What serves here anyway, and what serves on a machine without a C++ compiler."""
    name: str = request.param
    if name == "numpy":
        monkeypatch.setattr(codec, "_NATIVE", None)
    return name


def normal(seed: int, scale: float = 1e-3) -> NDArray[np.float32]:  # -> f32[N]
    return np.random.default_rng(seed).standard_normal(LAYOUT.size).astype(np.float32) * np.float32(scale)


def bits(values: NDArray[np.float32] | torch.Tensor) -> NDArray[np.uint32]:
    array = values.cpu().numpy() if isinstance(values, torch.Tensor) else values
    return array.view(np.uint32)


def parts(flat: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return np.split(flat, LAYOUT.offsets[1:-1])


def check_compress(device: torch.device, code_bits: int, beta: float, seed: int) -> list[bytes]:
    before = [normal(seed + number) for number in range(3)]
    acc = reference.error_feedback(before[0], before[1], before[2], beta)
    expected = [reference.compress(part, 64, code_bits) for part in parts(acc)]
    residual, outer, local = (torch.tensor(values, device=device) for values in before)
    sections, sent = codec.compress(residual, outer, local, LAYOUT, beta, 64, code_bits)
    assert sections == [encode_section(sparse, 64, code_bits) for sparse, _ in expected]
    np.testing.assert_array_equal(bits(residual), bits(np.concatenate([rest for _, rest in expected])))
    for given_values, values in zip((outer, local), before[1:], strict=True):
        np.testing.assert_array_equal(bits(given_values), bits(values), "only the residual changes")
    sent.put_back(residual)
    np.testing.assert_array_equal(bits(residual), bits(acc))
    return sections


@pytest.mark.parametrize("code_bits", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.95, 1.0])
def test_compress_equals_the_reference_on_every_path(path: str, code_bits: int, beta: float) -> None:
    sections = check_compress(CPU, code_bits, beta, 5)
    count = codec.check_sections(sections, LAYOUT, 64, code_bits)
    assert count == sum(tensor.chunks * 64 for tensor in LAYOUT.tensors if tensor.size % CHUNK == 0) + 64 + 15 + 19 + 2


def test_what_is_absent_is_not_counted(path: str) -> None:
    zeros = torch.zeros(LAYOUT.size)
    sections, sent = codec.compress(zeros.clone(), zeros, zeros, LAYOUT, 0.95, 64, 2)
    assert len(sent.positions) == len(sent.originals) == codec.check_sections(sections, LAYOUT, 64, 2) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 4999, LAYOUT.size - 1])
def test_divergence_is_refused_on_every_path(path: str, bad: float, place: int) -> None:
    residual, outer, local = (torch.from_numpy(normal(number)) for number in range(3))
    local[place] = bad
    with pytest.raises(ValueError, match="diverged"):
        codec.compress(residual, outer, local, LAYOUT, 0.95, 64, 2)


def packets_of(count: int, code_bits: int) -> list[list[bytes]]:
    """Packets of many magnitudes, so that the update has every exponent."""
    packets = []
    for peer in range(count):
        acc = normal(10 + peer, 2.0 ** (3 * (peer % 10) - 24))
        packets.append([encode_section(reference.compress(p, 64, code_bits)[0], 64, code_bits) for p in parts(acc)])
    return packets


@pytest.mark.parametrize("rule", ["mean", "mean_of_senders"])
@pytest.mark.parametrize("code_bits", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 16])
def test_merge_equals_the_reference_on_every_path(path: str, rule: str, code_bits: int, count: int) -> None:
    packets = packets_of(count, code_bits)
    weights = [1 + (977 * number) % 4096 for number in range(count)]
    clips = [1 + (31337 * number + CLIP_ONE - 1) % CLIP_ONE for number in range(count)]
    decoded = [
        [decode_section(s, t.size, 64, code_bits) for s, t in zip(packet, LAYOUT.tensors, strict=True)]
        for packet in packets
    ]
    contributions = [arithmetic.Contribution(*each) for each in zip(decoded, weights, clips, strict=True)]
    expected = arithmetic.merge(contributions, LAYOUT, rule, 40_000)
    update = codec.merge(packets, weights, clips, LAYOUT, 64, code_bits, rule, 40_000)
    assert update == [encode_update_section(tensor) for tensor in expected]
    assert codec.check_update_sections(update, LAYOUT) == sum(len(tensor.indices) for tensor in expected) > 0


def check_outer_step(device: torch.device, seed: int) -> None:
    update = codec.merge(packets_of(8, 2), [1024] * 8, [CLIP_ONE] * 8, LAYOUT, 64, 2, "mean_of_senders", 1 << 16)
    expected = normal(seed)
    expected[::7] = -0.0
    outer = torch.tensor(expected, device=device)
    apply_update(
        expected, LAYOUT, [decode_update_section(s, t.size) for s, t in zip(update, LAYOUT.tensors, strict=True)]
    )
    codec.outer_step(outer, LAYOUT, update)
    np.testing.assert_array_equal(bits(outer), bits(expected))


@pytest.mark.parametrize("seed", [1, 2])
def test_outer_step_equals_the_reference_on_every_path(path: str, seed: int) -> None:
    check_outer_step(CPU, seed)


def test_what_is_wrong_with_a_section_has_the_same_code_on_every_path(path: str) -> None:
    (packet,) = packets_of(1, 2)
    update = codec.merge([packet], [1024], [CLIP_ONE], LAYOUT, 64, 2, "mean", 1 << 16)
    ratio_too_large = bytes([*packet[0][:2], 64, *packet[0][3:]])
    value_zero = update[0][:-1] + b"\0"
    cases = [(packet[0][:3], Code.TRUNCATED), (packet[0][:-1], Code.BAD_BLOCKS), (ratio_too_large, Code.BAD_RATIO)]
    for section, code in cases:
        with pytest.raises(ProtocolError) as caught:
            codec.check_sections([section, *packet[1:]], LAYOUT, 64, 2)
        assert caught.value.code is code
    for section, code in ((update[0][:5], Code.TRUNCATED), (value_zero, Code.BAD_VALUE)):
        with pytest.raises(ProtocolError) as caught:
            codec.check_update_sections([section, *update[1:]], LAYOUT)
        assert caught.value.code is code


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.sampled_from([1, 63, 4097, 3 * CHUNK]), min_size=1, max_size=3), seed=st.integers(0, 1 << 32))
def test_sent_values_return_to_their_places_in_any_layout(sizes: list[int], seed: int) -> None:
    layout = Layout.of((f"t{index}", (size,)) for index, size in enumerate(sizes))
    values = np.random.default_rng(seed).standard_normal((3, layout.size)).astype(np.float32)
    residual, outer, local = (torch.tensor(row) for row in values)
    acc = reference.error_feedback(values[0], values[1], values[2], 0.95)
    _, sent = codec.compress(residual, outer, local, layout, 0.95, 64, 2)
    np.testing.assert_array_equal(sent.originals.numpy(), acc[sent.positions.numpy()])
    sent.put_back(residual)
    np.testing.assert_array_equal(bits(residual), bits(acc))


def test_the_path_is_named_and_the_slow_one_says_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    assert codec.kernels_in_use(CPU).startswith(("C++ (", "torch and numpy: "))
    monkeypatch.setattr(codec, "_NATIVE", None)
    assert codec.kernels_in_use(CPU).startswith("torch and numpy: no C++ compiler")
    assert "install one" in codec.kernels_in_use(CPU)
    assert "there are no kernels for mps" in codec.kernels_in_use(torch.device("mps"))


@pytest.mark.gpu
@pytest.mark.parametrize("code_bits", [1, 2])
def test_the_door_gives_the_same_bits_on_a_gpu(code_bits: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    check_compress(device, code_bits, 0.95, 9)
    check_outer_step(device, 9)
    assert codec.kernels_in_use(device).startswith(("Triton", "torch"))


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that numpy and Python held at once during the work, beyond what they held before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(codec.kernels_in_use(CPU).startswith("torch"), reason="no C++ kernels here")
def test_memory_beyond_inputs_and_outputs_is_less_than_one_tensor() -> None:
    layout = Layout.of((f"t{index}", (64 * CHUNK,)) for index in range(16))
    one_tensor = 4 * 64 * CHUNK
    values = np.random.default_rng(1).standard_normal((3, layout.size), np.float32)
    residual, outer, local = (torch.from_numpy(row) for row in values)
    packets: list[list[bytes]] = []

    def compress() -> None:
        packets.append(codec.compress(residual, outer, local, layout, 0.95, 64, 2)[0])

    def merge() -> None:
        update.extend(codec.merge(packets * 8, [1024] * 8, [CLIP_ONE] * 8, layout, 64, 2, "mean", 1 << 16))

    update: list[bytes] = []
    assert peak_bytes(compress) - sum(map(len, packets[0])) < one_tensor
    assert peak_bytes(merge) - sum(map(len, update)) < one_tensor
    assert peak_bytes(lambda: codec.outer_step(outer, layout, update)) < one_tensor
    assert peak_bytes(lambda: codec.check_sections(packets[0], layout, 64, 2)) < one_tensor
