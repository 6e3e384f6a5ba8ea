"""What a vector is, and the small things that the files of cases share."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from protocol.errors import Code
from protocol.identity import PrivateKey
from protocol.layout import Layout
from protocol.reference_client import answer
from protocol.run import CompressionConfig, DataConfig, InnerConfig, OuterConfig, RoundConfig, RunConfig, RunSettings

Fields = Mapping[str, Any]
Row = tuple[str, str, Fields, Code | int | None]  # name, why, fields, the code that refuses it

OPERATOR, AGGREGATOR, PEER, STRANGER, SECOND = (PrivateKey.from_bytes(bytes([number]) * 32) for number in range(1, 6))
BASE = bytes([0xBA]) * 32
SHAPES: tuple[tuple[str, tuple[int, ...]], ...] = (("bias", ()), ("embed", (2, 2500)), ("norm", (13,)))


@dataclass(frozen=True)
class Vector:
    """One request with the answer that every client must give."""

    name: str
    why: str
    request: dict[str, Any]
    expect: dict[str, Any]


def plain(value: Any) -> Any:
    """Put a value into the form of the line protocol: bytes become hexadecimal."""
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def request_of(what: str, fields: Fields) -> dict[str, Any]:
    """A request; `what` is the verb and the kind, "check packet" for example."""
    verb, _, kind = what.partition(" ")
    return {"verb": verb, **({"kind": kind} if kind else {}), **plain(fields)}


def table(prefix: str, what: str, rows: Iterable[Row]) -> Iterator[Vector]:
    """Vectors of one verb and kind. Without a code the client answers ok, with the facts that the reference finds.

    A code is what SPEC.md says, whatever the reference does.
    """
    for name, why, fields, code in rows:
        request = request_of(what, fields)
        expect = {"refused": int(code)} if code is not None else answer(request)
        assert code is not None or "ok" in expect, f"{prefix}/{name}: {expect}"
        yield Vector(f"{prefix}/{name}", why, request, expect)


def noise(seed: str, count: int) -> bytes:
    """Bytes that look random and are the same in every version of everything."""
    return hashlib.shake_128(seed.encode("ascii")).digest(count)


def make_run(
    *,
    k: int = 64,
    code_bits: int = 2,
    rule: str = "mean_of_senders",
    alpha: float = 1.0,
    rounds: int = 8,
    shapes: Sequence[tuple[str, tuple[int, ...]]] = SHAPES,
) -> RunConfig:
    """A small run of the vectors' own operator, with two aggregators."""
    settings = RunSettings(
        "vectors",
        data=DataConfig(sequence_length=8),
        inner=InnerConfig(steps=4, batch_size=2),
        compression=CompressionConfig(k=k, code_bits=code_bits),
        outer=OuterConfig(rule=rule, alpha=alpha, rounds=rounds),
        rounds=RoundConfig(quorum=2, grace_s_max=30.0),
    )
    return RunConfig.of(
        settings,
        operator=OPERATOR.public,
        aggregators=(AGGREGATOR.public, SECOND.public),
        layout=Layout.of(shapes),
        genesis_root=BASE,
    )


def text_of(run: RunConfig) -> str:
    """A run as requests carry it."""
    return run.to_json().decode("ascii")
