import dataclasses
import math
import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from peer.core import codec
from peer.core.replica import Replica, Trained, initial_state
from protocol.layout import state_root
from protocol.limits import CLIP_ONE, WEIGHT_UNIT
from protocol.run import InnerConfig, ModelConfig, RunConfig

MakeRun = Callable[..., RunConfig]
CPU = torch.device("cpu")


def text_batches(run: RunConfig, seed: int, steps: int) -> list[NDArray[np.int64]]:  # i64[B, T + 1] each
    """Windows of a text that repeats itself, so that there is something to learn in seconds."""
    text = np.frombuffer(b"the union is strong and the people are free. " * 40, dtype=np.uint8).astype(np.int64)
    length = run.data.sequence_length + 1
    starts = np.random.default_rng(seed).integers(0, len(text) - length, (steps, run.inner.batch_size))
    return [np.stack([text[start : start + length] for start in row]) for row in starts]


def replica_of(run: RunConfig) -> Replica:
    return Replica(run, CPU, torch.float32)


def quiet(_steps: int, _loss: float) -> None:
    """Hear of a step and do nothing."""


def train(replica: Replica, round: int, batches: Iterable[NDArray[np.int64]]) -> Trained:
    return replica.train_steps(round, batches, lambda: False, quiet)


def merged(run: RunConfig, packets: list[list[bytes]]) -> list[bytes]:
    rules, count = run.compression, len(packets)
    weights, clips = [WEIGHT_UNIT] * count, [CLIP_ONE] * count
    outer = run.outer
    return codec.merge(packets, weights, clips, run.layout, rules.k, rules.code_bits, outer.rule, outer.alpha_q16)


def bits(tensor: torch.Tensor) -> NDArray[np.uint32]:
    return tensor.numpy().view(np.uint32).copy()


def test_starts_from_the_genesis_of_the_run(make_run: MakeRun) -> None:
    run = make_run()
    replica = replica_of(run)
    assert state_root(replica.outer_state()) == run.genesis_root
    assert state_root(initial_state(run.model)) == run.genesis_root
    assert replica.apply(()) == run.genesis_root


def test_another_layout_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    other = dataclasses.replace(run.model, hidden_size=64)
    with pytest.raises(ValueError, match="layout"):
        replica_of(dataclasses.replace(run, model=other))


def test_three_peers_stay_bit_identical_and_learn(make_run: MakeRun) -> None:
    run = make_run(rounds=16)
    replicas = [replica_of(run) for _ in range(3)]
    held_out = text_batches(run, 999, 4)
    before = replicas[0].evaluate(held_out)
    for round in range(1, run.outer.rounds + 1):
        contributions = []
        for peer, replica in enumerate(replicas):
            done = train(replica, round, text_batches(run, 100 * round + peer, run.inner.steps))
            assert (done.steps, done.tokens) == (run.inner.steps, run.nominal_tokens)
            contributions.append(replica.make_contribution())
            replica.commit()
        update = merged(run, contributions)
        assert len({replica.apply(update) for replica in replicas}) == 1
    after = replicas[0].evaluate(held_out)
    assert before == pytest.approx(math.log(260), abs=0.1)
    assert after < 2.5, after
    assert not np.array_equal(bits(replicas[0].residual), bits(replicas[1].residual))


def test_a_tiny_model_learns_alone(make_run: MakeRun) -> None:
    run = make_run(inner=InnerConfig(steps=120, batch_size=4, warmup_steps=10, learning_rate=0.01), rounds=1)
    replica = replica_of(run)
    heard: list[float] = []
    done = replica.train_steps(1, text_batches(run, 1, 120), lambda: False, lambda _, loss: heard.append(loss))
    assert len(heard) == 120 and done.mean_loss == pytest.approx(float(np.mean(heard)))
    assert replica.evaluate(text_batches(run, 2, 4)) < 1.5


def test_restore_is_bit_exact_and_commit_is_final(make_run: MakeRun) -> None:
    run = make_run()
    replica, absorbing = replica_of(run), replica_of(run)
    for each in (replica, absorbing):
        each.residual.copy_(torch.from_numpy(np.random.default_rng(3).standard_normal(run.layout.size) * 1e-3))
        train(each, 1, text_batches(run, 1, 3))
    absorbing.absorb()
    acc = bits(absorbing.residual)
    sections = replica.make_contribution()
    drained = bits(replica.residual)
    rules = run.compression
    assert replica.sent_values == codec.check_sections(sections, run.layout, rules.k, rules.code_bits) > 500
    assert not np.array_equal(drained, acc)
    replica.restore()
    np.testing.assert_array_equal(bits(replica.residual), acc)
    replica.apply(())
    train(replica, 2, text_batches(run, 2, 1))
    replica.make_contribution()
    replica.commit()
    settled = bits(replica.residual)
    replica.apply(())
    np.testing.assert_array_equal(bits(replica.residual), settled)


def test_sent_plus_residual_is_acc(make_run: MakeRun) -> None:
    run = make_run()
    replica, absorbing = replica_of(run), replica_of(run)
    for each in (replica, absorbing):
        train(each, 1, text_batches(run, 1, 3))
    absorbing.absorb()
    sections = replica.make_contribution()
    update = merged(dataclasses.replace(run, outer=dataclasses.replace(run.outer, alpha=1.0)), [sections])
    before = replica.outer_state().astype(np.float64)
    replica.commit()
    replica.apply(update)
    applied = before - replica.outer_state()
    total = applied + replica.residual.numpy()
    # The update rounds to 7 bits on a chunk's grid, so this holds to a hundredth of the largest value.
    largest = np.abs(applied).max()
    np.testing.assert_allclose(total, absorbing.residual.numpy(), rtol=0, atol=0.01 * largest)


def test_a_null_round_starts_the_local_parameters_again(make_run: MakeRun) -> None:
    run = make_run()
    replica = replica_of(run)
    start = replica.evaluate(text_batches(run, 7, 2))
    train(replica, 1, text_batches(run, 1, 5))
    assert replica.evaluate(text_batches(run, 7, 2)) < start
    replica.absorb()
    assert replica.apply(()) == run.genesis_root
    assert replica.evaluate(text_batches(run, 7, 2)) == start
    assert float(replica.residual.abs().max()) > 0


def test_steps_ahead_are_carried_over_and_stand_in_the_next_contribution_once(make_run: MakeRun) -> None:
    run = make_run()
    replica = replica_of(run)
    train(replica, 1, text_batches(run, 1, 3))
    sections = replica.make_contribution()
    replica.begin_ahead()
    start = replica.flat.values.clone()
    train(replica, 2, text_batches(run, 2, 2))
    way = replica.flat.values - start
    replica.commit()
    replica.apply(merged(run, [sections]))
    torch.testing.assert_close(replica.flat.values, replica.outer + way, rtol=0, atol=1e-7)
    # A null round or a whole state that comes before the work goes on moves the start once more.
    moved = replica.outer_state() + np.float32(0.25)
    replica.load_outer(moved)
    replica.apply(())
    torch.testing.assert_close(replica.flat.values, torch.from_numpy(moved) + way, rtol=0, atol=1e-6)
    trained = replica.train_steps(2, text_batches(run, 3, 2), lambda: False, quiet, done=2)
    assert (trained.steps, replica.inner.own_steps) == (2, 7)
    before, local = replica.residual.clone(), replica.flat.values.clone()
    replica.make_contribution()
    replica.restore()
    np.testing.assert_array_equal(bits(replica.residual), bits(run.compression.beta * before + (replica.outer - local)))
    replica.apply(())
    assert torch.equal(replica.flat.values, replica.outer)


def test_steps_ahead_that_are_abandoned_leave_nothing(make_run: MakeRun) -> None:
    run = make_run()
    replica = replica_of(run)
    train(replica, 1, text_batches(run, 1, 2))
    replica.make_contribution()
    held = bits(replica.residual)
    replica.begin_ahead()
    train(replica, 2, text_batches(run, 2, 2))
    replica.abandon()
    np.testing.assert_array_equal(bits(replica.residual), held)
    assert replica.apply(()) == run.genesis_root
    assert torch.equal(replica.flat.values, replica.outer)


def test_stopping_is_between_two_steps(make_run: MakeRun) -> None:
    run = make_run()
    replica = replica_of(run)
    asked = iter([False, False, True])
    done = replica.train_steps(1, text_batches(run, 1, 5), lambda: next(asked), quiet)
    assert (done.steps, done.tokens) == (2, 2 * run.inner.batch_size * run.data.sequence_length)
    nothing = replica.train_steps(1, text_batches(run, 1, 5), lambda: True, quiet)
    assert nothing.steps == 0 and math.isnan(nothing.mean_loss)


def test_a_restart_continues_bit_for_bit(make_run: MakeRun) -> None:
    run = make_run()
    one, other = replica_of(run), replica_of(run)
    train(one, 1, text_batches(run, 1, 5))
    sections = one.make_contribution()
    saved = {name: value.clone() for name, value in one.state().items()}
    assert other.load_state(saved) == run.genesis_root
    update = merged(run, [sections])
    roots = set()
    for replica in (one, other):
        replica.restore()
        roots.add(replica.apply(update))
        train(replica, 2, text_batches(run, 2, 5))
    assert len(roots) == 1
    assert one.make_contribution() == other.make_contribution()
    np.testing.assert_array_equal(bits(one.residual), bits(other.residual))


# What the record says of the packet of each round; LATE is a round that closed before there was one.
ACCEPTED, REFUSED, NULL, LATE = "accepted", "refused", "null", "late"
# Where a replica is lost and another one goes on from what was stored last.
WHERE = ("stored", "sent", "settled", "applied", "trained")


class Storing:
    """A replica beside a ledger that is fixed from the start; it stores its state where a peer does."""

    def __init__(self, run: RunConfig, verdicts: Sequence[str], crashes: frozenset[tuple[int, str]]) -> None:
        self.run, self.verdicts, self.crashes = run, verdicts, crashes
        self.others = [merged(run, [other_packet(run, round)]) for round in range(1, len(verdicts) + 1)]
        self.replica = replica_of(run)
        self.stored: dict[str, torch.Tensor] = {}
        self.base = 0  # the round whose state the stored outer parameters are
        self.packets: dict[int, list[bytes]] = {}
        self.store(0)

    def store(self, base: int) -> None:
        self.stored = {name: value.clone() for name, value in self.replica.state().items()}
        self.base = base

    def crash(self, round: int, where: str) -> bool:
        """Lose the replica here, if the test says so, and bring the next one to the state before `round`."""
        if (round, where) not in self.crashes:
            return False
        self.crashes -= {(round, where)}
        self.replica = replica_of(self.run)
        self.replica.load_state(self.stored)
        for missed in range(self.base + 1, round):
            self.close(missed)
        return True

    def close(self, round: int) -> None:
        self.settle(round)
        self.apply(round)

    def settle(self, round: int) -> None:
        if "sent.positions" in self.replica.state():
            (self.replica.commit if self.verdicts[round - 1] == ACCEPTED else self.replica.restore)()

    def apply(self, round: int) -> None:
        self.replica.apply(() if self.verdicts[round - 1] == NULL else self.others[round - 1])

    def work(self, round: int) -> None:
        while True:
            train(self.replica, round, text_batches(self.run, round, 3))
            if not self.crash(round, "trained"):
                break
        if self.verdicts[round - 1] == LATE:
            self.replica.absorb()
        else:
            self.packets[round] = self.replica.make_contribution()
        self.store(round - 1)
        for where in ("stored", "sent"):
            self.crash(round, where)

    def run_through(self) -> None:
        for round in range(1, len(self.verdicts) + 1):
            self.work(round)
            self.settle(round)
            if self.crash(round, "settled"):
                self.settle(round)
            self.apply(round)
            self.crash(round + 1, "applied")


def other_packet(run: RunConfig, round: int) -> list[bytes]:
    """What some other peer sends in this round."""
    draw = np.random.default_rng(1000 + round)
    residual, zero = torch.from_numpy(draw.standard_normal(run.layout.size).astype(np.float32) * 1e-3), torch.zeros(1)
    rules, zeros = run.compression, zero.expand(run.layout.size).clone()
    return codec.compress(residual, zeros, zeros.clone(), run.layout, 1.0, rules.k, rules.code_bits)[0]


@pytest.mark.parametrize("seed", range(12))
def test_a_replica_that_was_lost_again_and_again_ends_with_the_same_bits(make_run: MakeRun, seed: int) -> None:
    draw = random.Random(seed)
    run = make_run()
    verdicts = [draw.choice([ACCEPTED, ACCEPTED, REFUSED, NULL, LATE]) for _ in range(6)]
    crashes = frozenset((draw.randrange(1, 7), draw.choice(WHERE)) for _ in range(5))
    calm, shaken = Storing(run, verdicts, frozenset()), Storing(run, verdicts, crashes)
    calm.run_through()
    shaken.run_through()
    said = f"seed {seed}: {verdicts}, lost at {sorted(crashes)}"
    assert not {crash for crash in shaken.crashes if crash != (1, "applied")}, said
    assert calm.packets == shaken.packets, said
    states = calm.replica.state(), shaken.replica.state()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.numpy().tobytes() == states[1][name].numpy().tobytes(), f"{name} differs; {said}"
    assert int(states[0]["inner.own_steps"]) == 18


def test_a_foreign_state_is_refused(make_run: MakeRun) -> None:
    state = replica_of(make_run()).state()
    other = replica_of(make_run(ModelConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=1)))
    with pytest.raises(ValueError, match="does not fit"):
        other.load_state(state)
    sent = {"sent.positions": torch.tensor([10**9]), "sent.originals": torch.tensor([1.0])}
    with pytest.raises(ValueError, match="contribution in flight"):
        other.load_state({**other.state(), **sent})


def test_outer_parameters_come_from_bytes_that_cannot_be_written(make_run: MakeRun) -> None:
    run = make_run()
    state = initial_state(dataclasses.replace(run.model, init_seed=5))
    replica = replica_of(run)
    assert replica.load_outer(np.frombuffer(state.tobytes(), np.float32)) == state_root(state)


def with_a_residual(run: RunConfig) -> Replica:
    replica = replica_of(run)
    train(replica, 1, text_batches(run, 1, 2))
    replica.absorb()
    replica.apply(())
    assert float(replica.residual.abs().max()) > 0
    return replica


def test_training_that_diverges_is_noticed_before_the_residual_is_touched(make_run: MakeRun) -> None:
    run = make_run()
    replica = with_a_residual(run)
    before = bits(replica.residual)
    replica.flat.values[17] = math.nan
    with pytest.raises(ValueError, match="diverged at inner step 5"):
        train(replica, 2, text_batches(run, 2, 1))
    with pytest.raises(ValueError, match="diverged"):
        replica.absorb()
    np.testing.assert_array_equal(bits(replica.residual), before)
    assert replica.apply(()) == run.genesis_root
    assert train(replica, 2, text_batches(run, 2, 1)).steps == 1


@pytest.mark.parametrize("place", [17, -1])
def test_divergence_in_the_very_last_step_costs_the_residual_and_nothing_else(make_run: MakeRun, place: int) -> None:
    run = make_run()
    replica = with_a_residual(run)
    replica.flat.values[place] = math.nan
    with pytest.raises(ValueError, match="diverged"):
        replica.make_contribution()
    assert not bool(replica.residual.any())
    assert replica.apply(()) == run.genesis_root
    assert math.isfinite(replica.evaluate(text_batches(run, 1, 1)))
    replica.make_contribution()


def test_nothing_is_counted_or_settled_twice(make_run: MakeRun) -> None:
    replica = replica_of(make_run())
    with pytest.raises(AssertionError):
        replica.commit()
    replica.make_contribution()
    with pytest.raises(AssertionError):
        replica.make_contribution()
    replica.restore()
    with pytest.raises(AssertionError):
        replica.absorb()
    with pytest.raises(AssertionError):
        replica.restore()


def test_micro_batches_train_the_same_model(make_run: MakeRun) -> None:
    run = make_run()
    whole, parts = replica_of(run), Replica(run, CPU, torch.float32, micro_batch=1)
    for replica in (whole, parts):
        train(replica, 1, text_batches(run, 1, 5))
    held_out = text_batches(run, 3, 2)
    assert parts.evaluate(held_out) == pytest.approx(whole.evaluate(held_out), rel=1e-3)
