"""The model copy that a peer trains: outer parameters that all replicas share, local ones, and the residual.

In a round: `train_steps` moves the local parameters, `make_contribution` takes the packet's values out of
acc, `commit` or `restore` settles them when the record is known, and `apply` takes the outer step and
starts the local parameters from it again. Until it is settled a contribution can be put back bit for bit, so
nothing that was learned is lost when a packet is late or refused.

With overlap `begin_ahead` lets the steps of the next round start from the local parameters while the contribution
travels; `apply` then carries them over to the new outer parameters.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peer.core import codec
from peer.core.flat import Flat, flatten
from peer.core.inner import InnerOptimizer, autocast
from peer.core.model import Llama, initial_parameters, layout_of
from peer.core.sparseloco import DIVERGED, Sent, error_feedback
from protocol.layout import state_root
from protocol.run import ModelConfig, RunConfig


@dataclass(frozen=True)
class Trained:
    """What `train_steps` did. `mean_loss` is in nats a token, NaN when there was no step."""

    steps: int
    tokens: int
    mean_loss: float


def initial_state(config: ModelConfig) -> NDArray[np.float32]:  # f32[N]
    """The outer parameters of round 0; `state_root` of them is the run's genesis_root."""
    state: NDArray[np.float32] = flatten(initial_parameters(config), layout_of(config)).numpy()
    return state


class Replica:
    """One model copy on one device. It starts from the run's initial state with an empty residual."""

    def __init__(self, run: RunConfig, device: torch.device, dtype: torch.dtype, micro_batch: int = 0) -> None:
        """`dtype` is the type of the matrix products; a batch passes `micro_batch` sequences at a time, 0 is all.

        Raises ValueError when this program's model has other tensors than the run's layout.
        """
        if layout_of(run.model) != run.layout:
            raise ValueError("the run's layout is not that of its model in this version; use the version of the run")
        self.run, self.device, self.dtype, self.micro_batch = run, device, dtype, micro_batch
        # The parameters are overwritten at once, so the module is built without drawing any.
        with torch.device("meta"):
            model = Llama(run.model)
        self.model = model
        self.flat = Flat(model, run.layout, device)
        total_steps = run.inner.steps * run.outer.rounds
        self.inner = InnerOptimizer(model, self.flat, run.inner, total_steps, dtype)
        self.outer = torch.zeros(run.layout.size, device=device)  # f32[N]
        self.residual = torch.zeros(run.layout.size, device=device)  # f32[N]
        self._sent: Sent | None = None
        self._taken = False  # the local parameters' way from outer is already part of the residual
        # f32[N] with overlap: where the local parameters stood when the steps ahead began. Their way from there counts.
        self._start: Tensor | None = None
        self._ahead = False
        self.load_outer(initial_state(run.model))

    def change(self, run: RunConfig) -> None:
        """Go on with other settings of the same run, as amendments made them. Parameters and moments stay."""
        assert run.run_id == self.run.run_id, "what is amended keeps its run_id"
        if run is not self.run:
            self.run = run
            self.inner.change(run.inner, run.inner.steps * run.outer.rounds)

    def load_outer(self, state: NDArray[np.float32]) -> bytes:  # f32[N]
        """Adopt outer parameters, start the local ones from them and return their state root."""
        assert state.dtype == np.float32 and state.shape == (self.run.layout.size,)
        self.outer.copy_(torch.from_numpy(np.require(state, requirements="W")))  # torch warns of read-only memory
        return self._restart_local()

    def outer_state(self) -> NDArray[np.float32]:  # f32[N]
        """The outer parameters on the CPU; they may share memory with the replica, so copy before keeping them."""
        state: NDArray[np.float32] = self.outer.cpu().numpy()
        return state

    def train_steps(
        self,
        round: int,
        batches: Iterable[NDArray[np.int64]],  # i64[B, T + 1] each
        should_stop: Callable[[], bool],
        on_step: Callable[[int, float], None],
        done: int = 0,
    ) -> Trained:
        """Do one inner step per batch until they end or `should_stop` says so between two steps.

        `on_step(steps, loss)` hears of every step. The learning rate follows the steps of the whole run: `round` counts
        from 1, and `done` of its steps are done. Raises ValueError when training diverges; then `abandon` starts again
        from the outer parameters, and the residual is untouched.
        """
        steps, tokens, loss_sum = 0, 0, 0.0
        self.model.train()
        for batch in batches:
            if should_stop():
                break
            step = (round - 1) * self.run.inner.steps + done + steps
            loss = self.inner.step(torch.from_numpy(batch), step, self.micro_batch)
            steps += 1
            tokens += batch.shape[0] * (batch.shape[1] - 1)
            loss_sum += loss
            on_step(steps, loss)
        return Trained(steps, tokens, loss_sum / steps if steps else float("nan"))

    def begin_ahead(self) -> None:
        """Let the inner steps from here on count for the next contribution, with one in flight. Takes f32[N] once."""
        assert self._sent is not None, "steps ahead are done while a contribution is in flight"
        if self._start is None:
            self._start = torch.empty_like(self.flat.values)
        self._start.copy_(self.flat.values)
        self._ahead = True

    def drop_ahead(self) -> None:
        """Throw away steps ahead that no longer count, after an amendment or a rollback."""
        if self._ahead:
            self.abandon()

    def abandon(self) -> None:
        """Throw away the inner steps that no contribution has taken, and start again from the outer parameters."""
        self._ahead = False
        self.flat.values.copy_(self.outer)

    def make_contribution(self) -> list[bytes]:
        """Take what the packet sends out of acc = beta * residual + (outer - local); the rest is the new residual.

        Returns the packet's sections. Raises ValueError when NaN or infinity has come into the parameters, which
        `train_steps` mostly notices before. The residual is made in place, so it is then lost and starts again from 0.
        """
        self._demand_nothing_taken()
        rules = self.run.compression
        try:
            sections, self._sent = codec.compress(
                self.residual, self.outer, self.flat.values, self.run.layout, rules.beta, rules.k, rules.code_bits
            )
        except ValueError:
            self.residual.zero_()
            raise
        self._taken, self._ahead = True, False
        return sections

    @property
    def sent_values(self) -> int:
        """How many values the contribution in flight sends."""
        assert self._sent is not None, "there is no contribution in flight"
        return len(self._sent.positions)

    def absorb(self) -> None:
        """Move what was trained since the last outer step into the residual without sending anything.

        For a round that closed before the packet was made. Raises ValueError when training diverged; then the
        residual is as it was.
        """
        self._demand_nothing_taken()
        layout = self.run.layout
        spans = [slice(*ends) for ends in pairwise(layout.offsets)]
        if not all(bool(torch.isfinite(self.flat.values[span]).all()) for span in spans):
            raise ValueError(DIVERGED)
        for span in spans:
            error_feedback(self.residual[span], self.outer[span], self.flat.values[span], self.run.compression.beta)
        self._taken, self._ahead = True, False

    def commit(self) -> None:
        """The record accepted our packet: what was sent has left for good."""
        assert self._sent is not None, "there is no contribution to commit"
        self._sent = None

    def restore(self) -> None:
        """The record does not have our packet: what was sent returns to the residual, bit for bit."""
        assert self._sent is not None, "there is no contribution to restore"
        self._sent.put_back(self.residual)
        self._sent = None

    def apply(self, sections: Sequence[bytes]) -> bytes:
        """Take the outer step of an update's sections, which were checked, and start the local parameters from it.

        Returns the new state root. A null round has no update: pass nothing, and only the local parameters start
        again.
        """
        if sections:
            codec.outer_step(self.outer, self.run.layout, sections)
        return self._restart_local()

    def evaluate(self, batches: Iterable[NDArray[np.int64]]) -> float:  # i64[B, T + 1] each
        """Mean loss of the local parameters in nats a token; after `apply` these are the outer ones, unless there are
        steps ahead of them."""
        loss_sum, count = 0.0, 0
        self.model.eval()
        with torch.inference_mode(), autocast(self.device, self.dtype):
            for batch in batches:
                loss_sum += float(self.model.loss(torch.from_numpy(batch).to(self.device))) * len(batch)
                count += len(batch)
        assert count > 0, "there is nothing to evaluate on"
        return loss_sum / count

    def state(self) -> dict[str, Tensor]:
        """All that a restart needs, between two rounds or with a contribution in flight; not copied.

        Local parameters are not part of it: inner steps that are not yet in a contribution are done again.
        """
        state = {"outer": self.outer, "residual": self.residual}
        state |= {f"inner.{name}": value for name, value in self.inner.state().items()}
        if self._sent is not None:
            state |= {"sent.positions": self._sent.positions, "sent.originals": self._sent.originals}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> bytes:
        """Continue from a state of `state`, copied, and return its state root.

        Raises ValueError when it belongs to another model, KeyError when it is not complete.
        """
        size = self.run.layout.size
        if any(state[name].shape != (size,) or state[name].dtype != torch.float32 for name in ("outer", "residual")):
            raise ValueError(f"the saved state does not fit this model of {size} parameters")
        sent = self._sent_of(state)
        prefix = "inner."
        self.inner.load_state({name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)})
        self.residual.copy_(state["residual"])
        self._sent = sent
        self.outer.copy_(state["outer"])
        return self._restart_local()

    def _sent_of(self, state: Mapping[str, Tensor]) -> Sent | None:
        """The contribution in flight of a saved state. Its positions are checked, for a GPU dies of a wrong one."""
        if "sent.positions" not in state:
            return None
        positions, originals = (state[f"sent.{name}"].to(self.device, copy=True) for name in ("positions", "originals"))
        inside = bool(((positions >= 0) & (positions < self.run.layout.size)).all())
        if positions.dtype != torch.int64 or positions.shape != originals.shape or not inside:
            raise ValueError("the contribution in flight of the saved state does not fit this model")
        return Sent(positions, originals)

    def _demand_nothing_taken(self) -> None:
        assert self._sent is None, "the last contribution is neither committed nor restored"
        assert not self._taken, "the inner steps since the last outer step are already in the residual"

    def _restart_local(self) -> bytes:
        """Start from the outer parameters, and from the steps ahead of them if there are any."""
        if self._ahead:
            assert self._start is not None, "steps ahead have a start"
            self.flat.values.sub_(self._start).add_(self.outer)
            self._start.copy_(self.outer)
        else:
            self.flat.values.copy_(self.outer)
        self._taken = False
        return state_root(self.outer_state())
