"""Which device to train on and in which type to multiply."""

import torch


def pick_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda" or "mps" into a device; "auto" prefers CUDA, then MPS.

    Raises ValueError when the wanted device is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in available.items() if present)
    if not available.get(name, False):
        present = ", ".join(kind for kind, there in available.items() if there)
        raise ValueError(f'device = "{name}" is not available here (there is: {present}); set device = "auto"')
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn "auto", "float32" or "bfloat16" into the type of the matrix products.

    "auto" takes bfloat16 where the hardware multiplies it. Parameters, gradients and optimizer stay float32 either
    way. Raises ValueError on another name.
    """
    if name == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    if name not in ("float32", "bfloat16"):
        raise ValueError(f'dtype = "{name}" is not accepted; set dtype to "auto", "float32" or "bfloat16"')
    return torch.float32 if name == "float32" else torch.bfloat16


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # Without these instructions the CPU widens every operand first and is slower than in float32. Older
        # versions of torch do not tell; then float32 is the safe choice.
        features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return False


def set_threads(count: int) -> None:
    """Use so many CPU threads for tensors in this process, 0 for as many as torch finds right.

    1 is right where several peers share a machine.
    """
    if count:
        torch.set_num_threads(count)
