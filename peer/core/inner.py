"""The inner steps: AdamW with clipping, warm-up and a schedule, its moments kept from round to round."""

import contextlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from peer.core.flat import Flat
from peer.core.model import Llama
from protocol.run import InnerConfig


def learning_rate(config: InnerConfig, step: int, own_steps: int, total_steps: int) -> float:
    """The learning rate of inner step `step` of the run (from 0), the `own_steps`-th of these Adam moments (from 0).

    After the warm-up the cosine goes down to `min_lr_ratio` at `total_steps` and stays there. The warm-up counts the
    steps that the moments have seen: in a replica that was there from the start these are the run's steps, and a
    late joiner, whose moments are zero, warms up as well.
    """
    warmup = min(1.0, (own_steps + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.learning_rate * warmup
    span = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, max(0.0, (step - config.warmup_steps) / span))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * warmup * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)


class InnerOptimizer:
    """AdamW over a flat model. `first` and `second` (f32[N]) are its moments, `own_steps` the steps they have seen."""

    def __init__(self, model: Llama, flat: Flat, config: InnerConfig, total_steps: int, dtype: torch.dtype) -> None:
        """Start with zero moments. `dtype` is the type of the matrix products."""
        self.model, self.flat, self.config, self.total_steps, self.dtype = model, flat, config, total_steps, dtype
        self.own_steps = 0
        self.first = torch.zeros_like(flat.values)  # f32[N]
        self.second = torch.zeros_like(flat.values)  # f32[N]
        parameters = list(flat.parameters.values())
        device = flat.values.device
        self._adam = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=device.type in ("cpu", "cuda"),
        )
        # The moments are views of flat buffers too, so that saving and restoring them is a copy.
        for parameter, first, second in zip(parameters, flat.views(self.first), flat.views(self.second), strict=True):
            step = torch.zeros((), device=device)
            self._adam.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}

    @property
    def learning_rate(self) -> float:
        """That of the last step."""
        rate: float = self._adam.param_groups[0]["lr"]
        return rate

    def change(self, config: InnerConfig, total_steps: int) -> None:
        """Go on with other settings; the moments and the steps that they have seen stay."""
        self.config, self.total_steps = config, total_steps
        matrices, others = self._adam.param_groups
        matrices["weight_decay"] = config.weight_decay
        for group in (matrices, others):
            group.update(betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps)

    def step(self, tokens: Tensor, step: int, micro_batch: int) -> float:  # i64[B, T + 1] on the CPU
        """Do inner step `step` of the run on one batch and return its mean loss in nats a token.

        The batch goes through the model `micro_batch` sequences at a time; 0 means all at once. Raises ValueError when
        the loss or the gradient is no longer finite, before parameters and moments see it.
        """
        total = self.backward(tokens, micro_batch, self.dtype)
        norm = torch.linalg.vector_norm(self.flat.gradients)
        # Both in one transfer: on a GPU each is a wait.
        loss_value, norm_value = torch.stack((total, norm)).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise ValueError(f"training diverged at inner step {step} (loss {loss_value}); lower the learning rate")
        self.flat.gradients.mul_((self.config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self._adam.param_groups:
            group["lr"] = learning_rate(self.config, step, self.own_steps, self.total_steps)
        self._adam.step()
        self.own_steps += 1
        return float(loss_value)

    def backward(self, tokens: Tensor, micro_batch: int, dtype: torch.dtype) -> Tensor:  # i64[B, T + 1] -> f32[]
        """Leave the gradient of the batch's mean loss (nats a token) in the flat gradients, and return that loss."""
        device = self.flat.values.device
        self.flat.gradients.zero_()
        total = torch.zeros((), device=device)
        size = micro_batch or len(tokens)
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            with autocast(device, dtype):
                loss = self.model.loss(part.to(device, non_blocking=True)) * (len(part) / len(tokens))
            torch.autograd.backward(loss)
            total += loss.detach()
        return total

    def state(self) -> dict[str, Tensor]:
        """What a restart needs: both moments (f32[N], not copied) and the steps that they have seen (i64[])."""
        return {"first": self.first, "second": self.second, "own_steps": torch.tensor(self.own_steps)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a state of `state`, copied. Raises ValueError when it belongs to another model."""
        for name, buffer in (("first", self.first), ("second", self.second)):
            if state[name].shape != buffer.shape or state[name].dtype != buffer.dtype:
                raise ValueError(f"the saved optimizer moments do not fit this model of {buffer.numel()} parameters")
            buffer.copy_(state[name])
        self.own_steps = int(state["own_steps"])
        for entry in self._adam.state.values():
            entry["step"].fill_(self.own_steps)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Multiply matrices in `dtype` inside the context; everything else stays float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)
