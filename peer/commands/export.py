"""`export` and `generate`: take the model out of a run, and hear what it writes."""

import argparse
import asyncio
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from peer.commands.options import AddParser, add_json, until_stopped
from peer.errors import UserCode, UserError
from peer.telemetry import Telemetry
from protocol.errors import ProtocolError

if TYPE_CHECKING:
    import torch

    from peer.export import Model

POLL_S = 2.0
_SOURCE = "folder of a run, an aggregator, a mirror or a peer, or the file of a stored state"


def add(add_parser: AddParser) -> None:
    """Add `export` and `generate`."""
    export = add_parser("export", help="write the model as a Hugging Face folder, once or whenever it is newer")
    export.add_argument("source", type=Path, help=_SOURCE)
    export.add_argument("--out", type=Path, required=True, help="folder to write; an export of the same run is updated")
    export.add_argument("--round", type=int, help="after which round (default: the newest)")
    export.add_argument("--follow", action="store_true", help="go on and write each newer state until the run is over")
    export.add_argument("--every", type=int, metavar="ROUNDS", help="with --follow: only when so many rounds newer (1)")
    export.add_argument("--license", default="unknown", help="what the model card says under `license` (unknown)")
    _add_tokenizer(export)
    add_json(export)
    export.set_defaults(command=_export)
    _add_generate(add_parser("generate", help="let a model write: an exported one, or one out of a run"))


def _add_generate(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("source", type=Path, metavar="CHECKPOINT", help=f"an exported folder; or the {_SOURCE}")
    generate.add_argument("--prompt", default="", help="text to continue (default: the beginning of a document)")
    generate.add_argument("--tokens", type=int, default=400, help="how many to write (400)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token (0.8)")
    generate.add_argument("--top-k", type=int, default=50, help="choose among so many of the likeliest tokens (50)")
    generate.add_argument("--seed", type=int, default=1)
    generate.add_argument("--round", type=int, help="after which round (default: the newest)")
    generate.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    generate.add_argument("--threads", type=int, default=0, help="CPU threads (default: as many as torch finds right)")
    _add_tokenizer(generate)
    generate.set_defaults(command=_generate)


def _add_tokenizer(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tokenizer", type=Path, help="tokenizer.json, if the run uses another than bytes")


def _demand(holds: bool, what: str, remedy: str) -> None:
    if not holds:
        raise UserError(UserCode.BAD_ARGUMENT, what, remedy)


def _export(arguments: argparse.Namespace) -> int:
    _demand(arguments.every is None or arguments.every >= 1, "--every is below 1", "give 1 or more rounds")
    _demand(arguments.follow or arguments.every is None, "--every goes with --follow", "give both, or neither")
    _demand(
        not (arguments.follow and arguments.round is not None), "--round and --follow exclude each other", "drop one"
    )
    with Telemetry("export", file=None, json_stdout=arguments.json):
        if arguments.follow:
            return until_stopped(lambda stop: _follow(arguments, stop))
        _write(arguments)
        return 0


def _write(arguments: argparse.Namespace) -> bool:
    """Export once; return whether the run is over with that."""
    import structlog

    from peer.checkpoint import open_checkpoint
    from peer.export import export_checkpoint, tokenizer_of

    checkpoint = open_checkpoint(arguments.source, arguments.round)
    tokenizer = tokenizer_of(checkpoint.run, arguments.tokenizer)
    export_checkpoint(checkpoint, arguments.out, tokenizer, arguments.license)
    structlog.get_logger().info("exported", round=checkpoint.round, of=checkpoint.rounds, folder=arguments.out)
    return checkpoint.round >= checkpoint.rounds


async def _follow(arguments: argparse.Namespace, stop: asyncio.Event) -> None:
    """Export whenever the ledger is far enough ahead of the folder, and at the end of the run."""
    import structlog

    from peer.bootstrap import wait_for_stop
    from peer.checkpoint import newest_round
    from peer.export import exported_round

    log, every = structlog.get_logger(), arguments.every or 1
    # The first export says what is wrong with the arguments.
    over = await asyncio.to_thread(_write, arguments)
    newest, _ = await asyncio.to_thread(newest_round, arguments.source)
    _demand(newest >= 0, f"{arguments.source} holds no ledger to follow", "name an aggregator's or a mirror's folder")
    while not over and not stop.is_set():
        await wait_for_stop(stop, POLL_S)
        try:
            newest, last = await asyncio.to_thread(newest_round, arguments.source)
            done = exported_round(arguments.out)
            if newest >= done + (1 if last else every):
                over = await asyncio.to_thread(_write, arguments)
        except (UserError, ProtocolError) as error:
            # An aggregator deletes old states while we read; the next look sees newer ones. A full disk may be freed.
            log.warning("will try again", why=str(error))


def _generate(arguments: argparse.Namespace) -> int:
    temperature = arguments.temperature
    _demand(1 <= arguments.tokens <= 1 << 20, "--tokens is out of range", "give 1 to 1048576 tokens")
    _demand(math.isfinite(temperature) and temperature >= 0, "--temperature is no such number", "give 0 or more")
    _demand(arguments.top_k >= 1, "--top-k is below 1", "give 1 or more tokens to choose from")
    _demand(0 <= arguments.seed < 1 << 63, "--seed is out of range", "give a whole number from 0 to 2^63 - 1")
    _demand(0 <= arguments.threads <= 1024, "--threads is out of range", "give 0 to 1024 threads")
    from peer.core.device import pick_device, set_threads

    set_threads(arguments.threads)
    try:
        device = pick_device(arguments.device)
    except ValueError as error:
        raise UserError(UserCode.NO_DEVICE, str(error), "leave --device away to take what is there") from error
    from peer.core.generate import build_model, sample

    model = _model(arguments)
    prompt = _prompt(model, arguments.prompt)
    tokens = sample(
        build_model(model.config, model.state, device),
        prompt,
        arguments.tokens,
        temperature=temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    )
    sys.stdout.write(_visible(arguments.prompt))
    for text in _texts(model, tokens):
        sys.stdout.write(text)
        sys.stdout.flush()
    print()
    return 0


def _model(arguments: argparse.Namespace) -> "Model":
    from peer.checkpoint import open_checkpoint
    from peer.export import CONFIG, WEIGHTS, Model, open_export, tokenizer_of

    source: Path = arguments.source
    folder = source.parent if source.name == WEIGHTS else source
    if (folder / CONFIG).is_file():
        _demand(arguments.round is None, f"{folder} is an export of one round", "leave --round away")
        return open_export(folder)
    checkpoint = open_checkpoint(source, arguments.round)
    return Model(checkpoint.run.model, checkpoint.state, tokenizer_of(checkpoint.run, arguments.tokenizer))


def _prompt(model: "Model", text: str) -> "torch.Tensor":  # i64[P]
    import numpy as np
    import torch

    _demand(text == text.encode("utf-8", "replace").decode("utf-8"), "the prompt is no text", "give it in UTF-8")
    ids = model.tokenizer.encode(text).astype(np.int64) if text else np.array([model.tokenizer.end_of_document])
    _demand(int(ids.max(initial=0)) < model.config.vocab_size, "the tokenizer is not the model's", "name the right one")
    return torch.from_numpy(ids)


def _texts(model: "Model", tokens: Iterator[int]) -> Iterator[str]:
    """The text as it grows. A character whose last byte is not there yet waits for it."""
    import numpy as np

    made: list[int] = []
    shown = 0
    for token in tokens:
        made.append(token)
        text = model.tokenizer.decode(np.array(made))
        if not text.endswith("\ufffd"):
            yield _visible(text[shown:])
            shown = len(text)
    yield _visible(model.tokenizer.decode(np.array(made))[shown:])


def _visible(text: str) -> str:
    """A model may have learned what steers a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
