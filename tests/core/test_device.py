import pytest
import torch

from peer.core.device import pick_device, pick_dtype, set_threads


def test_auto_device_is_one_that_works() -> None:
    device = pick_device("auto")
    assert float(torch.ones(2, device=device).sum()) == 2.0
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "", "cuda:99", "meta"])
def test_absent_device_is_refused_with_the_choice(name: str) -> None:
    with pytest.raises(ValueError, match=r'there is: .*cpu.*set device = "auto"'):
        pick_device(name)


def test_dtype_follows_the_hardware() -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("float32", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    features = torch.cpu.get_capabilities()
    fast = features.get("avx512_bf16") or features.get("amx_bf16")
    assert pick_dtype("auto", cpu) == (torch.bfloat16 if fast else torch.float32)
    with pytest.raises(ValueError, match='dtype = "float16"'):
        pick_dtype("float16", cpu)


def test_threads_are_set_by_the_caller() -> None:
    set_threads(2)
    assert torch.get_num_threads() == 2
    set_threads(1)
    assert torch.get_num_threads() == 1
    set_threads(0)
    assert torch.get_num_threads() == 1, "0 leaves the choice as it is"
