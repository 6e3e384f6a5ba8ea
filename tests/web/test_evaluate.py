"""The loss that the aggregator measures is that of the replica, and it measures without anybody waiting."""

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders

from peer.aggregator import Aggregator
from peer.core.replica import Replica, initial_state
from peer.data.prepare import prepare, write_corpus
from peer.data.tokenizer import JsonTokenizer
from peer.evaluate import MICRONATS_MAX, WINDOWS, Evaluator, bytes_per_token, micronats
from peer.operator import OperatorFolder
from peer.store import Home, load_key
from protocol.run import DataConfig
from tests.data.test_tokenizer import bpe_file
from tests.peer.test_audit import whole

__all__ = ["whole"]


@asynccontextmanager
async def aggregator(folder: Path) -> AsyncGenerator[Aggregator, None]:
    operator = OperatorFolder(folder)
    signed, _ = operator.load()
    home = Home(operator.aggregator_home)
    store = home.run(signed.config.run_id)
    program = Aggregator(signed, load_key(home.key_path), store)
    try:
        yield program
    finally:
        await program.close()
        store.close()


async def evaluated(program: Aggregator, cache: Path) -> Evaluator:
    evaluator = Evaluator(program.run, cache, 1)
    following = asyncio.create_task(evaluator.follow(program))
    async with asyncio.timeout(60):
        while evaluator.newest is None and not following.done():  # noqa: ASYNC110 - it tells nobody when it is done
            await asyncio.sleep(0.02)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    return evaluator


async def test_the_loss_is_the_replicas(whole: Path) -> None:
    threads = torch.get_num_threads()
    async with aggregator(whole) as program:
        run, cache = program.run, OperatorFolder(whole).aggregator_home / "data"
        evaluator = await evaluated(program, cache)
        replica = Replica(run, torch.device("cpu"), torch.float32)
        replica.load_outer(program.state)
        wanted = replica.evaluate(prepare(run.data, cache, {}).validation_batches(WINDOWS, 16))
        replica.load_outer(initial_state(run.model))
        assert abs(replica.evaluate(prepare(run.data, cache, {}).validation_batches(WINDOWS, 16)) - wanted) > 1e-5
    assert evaluator.newest is not None and evaluator.newest.round == program.head.round
    assert evaluator.newest.loss_micronats == pytest.approx(1e6 * wanted, abs=2)
    assert program.evaluation == evaluator.newest and evaluator.bytes_per_token == 1.0
    assert torch.get_num_threads() == threads
    assert await asyncio.to_thread(torch.get_num_threads) == threads


async def test_without_the_text_the_aggregator_leads_on(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    async with aggregator(whole) as program:
        evaluator = await evaluated(program, tmp_path / "file")
        assert evaluator.newest is None and program.evaluation is None


def test_the_loss_of_a_record() -> None:
    assert micronats(2.5) == 2_500_000
    assert micronats(0.0) == 1, "zero would say that nothing was measured"
    assert micronats(math.nan) == micronats(math.inf) == micronats(5000.0) == MICRONATS_MAX


def test_bytes_are_counted_where_tokens_are_longer(tmp_path: Path) -> None:
    path = bpe_file(tmp_path, ["<|endoftext|>"])
    fast = FastTokenizer.from_file(str(path))
    fast.decoder = decoders.ByteLevel()
    fast.save(str(path))
    tokenizer = JsonTokenizer(path)
    text = "the union is strong, the union is large " * 40
    write_corpus([text] * 30, 30, tokenizer, tmp_path, 0.2)
    config = DataConfig(corpus="own", tokenizer=f"sha256:{tokenizer.sha256}", sequence_length=16)
    data = prepare(config, tmp_path / "cache", {"own": tmp_path})
    tokens = len(tokenizer.encode(text)) + 1
    assert bytes_per_token(config, data) == pytest.approx(len(text) / tokens, rel=0.02)
    assert bytes_per_token(DataConfig(), data) == 1.0
