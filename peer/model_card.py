"""The README of an exported model: what it is, who made it, on which data, and how to check that."""

import dataclasses
import json
import math
from datetime import UTC, datetime

from peer.amendments import describe
from peer.checkpoint import Checkpoint
from protocol.run import RunConfig, RunSettings

CONTRIBUTORS_SHOWN = 1000

_BODY = """\
# {name}

{parameters:,} parameters, trained by {peers} over the open internet with
[SparseLoCo](https://arxiv.org/abs/2508.15706): after each round of {steps} inner steps every peer sent the few largest
values of what it had learned, an aggregator merged these packets exactly, and all applied the same update. This is the
model after round {round} of {rounds}.{loss}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")
```

`sparseloco-peer generate path/of/this/folder --prompt "..."` needs no transformers.

## Where it comes from

| | |
|---|---|
{origin}

The state root names these parameters bit for bit. Whoever keeps a copy of the run (`sparseloco-peer mirror`) can
recompute it from the packets of the contributors with `sparseloco-peer audit`.

## Data

{data}

## Contributors

{contributors}

## Settings of the run

```toml
{settings}
```
{amendments}"""


def model_card(checkpoint: Checkpoint, licence: str) -> str:
    """The card as Markdown, with the head that model hubs read."""
    run = checkpoint.run
    count = len(checkpoint.contributors)
    head = "\n".join(
        ("---", f"license: {json.dumps(licence)}", "library_name: transformers", "pipeline_tag: text-generation")
    )
    body = _BODY.format(
        name=run.name,
        parameters=run.layout.size,
        peers=f"{count} peer{'s' * (count != 1)}" if count else "volunteers",
        steps=run.inner.steps,
        round=checkpoint.round,
        rounds=checkpoint.rounds,
        loss=_loss(checkpoint),
        origin="\n".join(f"| {name} | {value} |" for name, value in _origin(checkpoint)),
        data=_data(run),
        contributors=_contributors(checkpoint),
        settings=_settings(run),
        amendments=_amendments(checkpoint),
    )
    return f"{head}\ntags:\n- sparseloco\n- llama\n---\n\n{body}"


def _loss(checkpoint: Checkpoint) -> str:
    if checkpoint.evaluated is None:
        return ""
    round, loss = checkpoint.evaluated
    bits = loss / math.log(2)
    return f"\nIts validation loss after round {round} was {loss:.4f} nats ({bits:.4f} bits) a token."


def _origin(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    run, head = checkpoint.run, checkpoint.head
    rows = [("run", f"`{run.run_id.hex()}`"), ("operator", f"`{run.operator.hex()}`")]
    if head is not None:
        closed = datetime.fromtimestamp(head.closed_ms / 1000, UTC).isoformat(timespec="seconds")
        rows += [
            ("ledger head", f"`{head.digest.hex()}`"),
            ("state root", f"`{head.state_root.hex()}`"),
            ("signed by", f"`{head.aggregator.hex()}`"),
            ("closed", closed),
        ]
    return rows


def _data(run: RunConfig) -> str:
    data = run.data
    tokens = "one token a byte" if data.tokenizer == "bytes" else f"the tokenizer `{data.tokenizer}`"
    return (
        f"The corpus `{data.corpus}` (tokens with SHA-256 `{data.corpus_sha256}`), in sequences of "
        f"{data.sequence_length} tokens, {tokens}. {100 * data.validation_fraction:g} % of it was kept for validation."
    )


def _contributors(checkpoint: Checkpoint) -> str:
    given = sorted(checkpoint.contributors.items(), key=lambda item: (-item[1].rounds, item[0]))
    if not given:
        return "The ledger of the run names them; this export was made from a copy without one."
    rows = [f"| `{peer.hex()}` | {given.rounds:,} | {given.tokens:,} |" for peer, given in given[:CONTRIBUTORS_SHOWN]]
    more = len(given) - len(rows)
    table = ["Keys of the peers whose packets were merged.\n", "| key | rounds | tokens |", "|---|---|---|", *rows]
    return "\n".join([*table, f"\nand {more:,} more"] if more else table)


def _amendments(checkpoint: Checkpoint) -> str:
    chain = () if checkpoint.amendments is None else checkpoint.amendments.chain
    if not chain:
        return ""
    rows = "\n".join(f"- {describe(amendment)}" for amendment in chain)
    return f"\nThe operator amended them while the run went on:\n\n{rows}\n"


def _settings(run: RunConfig) -> str:
    """What the operator wrote, defaults included, as TOML."""
    lines = [f"name = {json.dumps(run.name)}"]
    for item in dataclasses.fields(RunSettings):
        table = getattr(run, item.name)
        if dataclasses.is_dataclass(table) and not isinstance(table, type):
            lines.append(f"\n[{item.name}]")
            # JSON writes numbers, texts and flags as TOML does.
            lines += [f"{name} = {json.dumps(value)}" for name, value in dataclasses.asdict(table).items()]
    return "\n".join(lines)
