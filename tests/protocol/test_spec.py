"""SPEC.md by itself: its Python blocks run on the standard library alone and answer as the reference does.

Both sides speak the line protocol of protocol/README.md, so one random request compares them: `answer` below is the
blocks' client, `protocol.reference_client` the numpy reference. Most requests carry damaged bytes.
"""

import base64
import builtins
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import protocol.run
from protocol import limits, reference_client, wire
from protocol.amendment import (
    Amendments,
    Ban,
    ChangeSettings,
    Pause,
    Resume,
    Rollback,
    Unban,
    sign_amendment,
)
from protocol.errors import Code, ProtocolError
from protocol.identity import PrivateKey
from protocol.invite import Invite
from protocol.layout import Layout
from protocol.run import CompressionConfig, InnerConfig, OuterConfig, RoundConfig, RunConfig, RunSettings, sign_run

ROOT = Path(__file__).parents[2]
SPEC = (ROOT / "protocol" / "SPEC.md").read_text("utf-8")
VECTORS = sorted((ROOT / "protocol" / "vectors").glob("*.json"))
LIBRARY = {"base64", "hashlib", "json", "math", "re", "struct"}

Request = Mapping[str, Any]
Answer = dict[str, Any]


def only_the_library(name: str, *rest: Any) -> ModuleType:
    if name not in LIBRARY:
        raise ImportError(f"the blocks of SPEC.md import {name}")
    return __import__(name, *rest)


def run_blocks(text: str) -> Any:
    """Execute the Python blocks of a document in their order, as one module with line numbers of the document."""
    namespace: dict[str, Any] = {"__builtins__": {**vars(builtins), "__import__": only_the_library}}
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], "SPEC.md", "exec"), namespace)
    return SimpleNamespace(**namespace)


spec = run_blocks(SPEC)


# ---------------------------------------------------------------- the blocks' client


def data(request: Request, name: str = "bytes") -> bytes:
    return bytes.fromhex(request[name])


def items(request: Request, name: str = "sections") -> list[bytes]:
    return [bytes.fromhex(item) for item in request[name]]


def the_run(request: Request) -> Any:
    return spec.parse_run(request["run"].encode())


def floats(request: Request, name: str) -> list[float]:
    return [value for (value,) in struct.iter_unpack("<f", data(request, name))]


def packed(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def expand(stored: bytes) -> bytes | None:
    try:
        return zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError:
        return None


def contents(values: Sequence[tuple[int, float]]) -> Answer:
    raw = b"".join(struct.pack("<If", index, value) for index, value in values)
    return {"count": len(values), "sha256": hashlib.sha256(raw).hexdigest()}


def placed(chunks: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    return [(4096 * number + index, value) for number, chunk in enumerate(chunks) for index, value in chunk]


def check_section(request: Request) -> Answer:
    chunks = spec.decode_section(data(request), request["size"], request["k"], request["code_bits"])
    values = [
        [(index, spec.dequantize(scale, ratio, code) / 2**38) for index, code in chunk]
        for scale, ratio, chunk in chunks
    ]
    return contents(placed(values))


def check_update_section(request: Request) -> Answer:
    chunks = spec.decode_update_section(data(request), request["size"])
    return contents(placed([[(index, m * 2.0 ** (e - 38)) for index, m in chunk] for e, chunk in chunks]))


def check_run(request: Request) -> Answer:
    run = spec.check_run(data(request), None if request["run_id"] is None else data(request, "run_id"))
    return {
        "run_id": spec.run_id(run).hex(),
        "alpha_q16": spec.alpha_q16(run),
        "nominal_tokens": spec.nominal_tokens(run),
        "values": sum(spec.tensor_sizes(run)),
    }


def check_packet(request: Request) -> Answer:
    header = data(request, "header")
    spec.check_packet(the_run(request), request["round"], data(request, "base_root"), header, items(request))
    return {"digest": spec.digest("packet", header).hex()}


def check_update(request: Request) -> Answer:
    header = data(request, "header")
    spec.check_update(the_run(request), data(request, "digest"), header, items(request))
    return {"digest": spec.digest("update", header).hex()}


def check_transport(request: Request) -> Answer:
    run = the_run(request)
    form = spec.UPDATE if request["kind"] == "update-wire" else form_of(run)
    header, sections = spec.read_transport(run, data(request), *form, expand)
    return {"header": header.hex(), "sections": [section.hex() for section in sections]}


def form_of(run: Any) -> tuple[int, int]:
    return run["compression"]["k"], run["compression"]["code_bits"]


def check_bundle(request: Request) -> Answer:
    record = spec.parse_record(data(request, "record"))
    _, sections = spec.check_bundle(the_run(request), record, data(request, "base_root"), data(request), expand)
    return {"sections": [section.hex() for section in sections]}


def check_record(request: Request) -> Answer:
    record = spec.check_record(the_run(request), data(request))
    accepted = [entry["packet_digest"].hex() for entry in record["entries"] if entry["verdict"] == 0]
    return {
        "digest": record["digest"].hex(),
        **{name: record[name] for name in ("round", "epoch", "kind")},
        "accepted": accepted,
    }


def check_link(request: Request) -> Answer:
    spec.check_link(spec.parse_record(data(request, "previous")), spec.parse_record(data(request)))
    return {}


def check_dht(request: Request) -> Answer:
    places = data(request, "subkey"), data(request), request["expiration"], request["now"]
    certificate, round, digest, addresses = spec.check_dht_record(request["key"], *places)
    return {"certificate": certificate.hex(), "round": round, "digest": digest.hex(), "addresses": addresses}


def check_invite(request: Request) -> Answer:
    *fixed, addresses, bootstraps = spec.check_invite(request["text"])
    named = zip(("run_id", "aggregator", "certificate"), fixed, strict=True)
    return {**{name: value.hex() for name, value in named}, "addresses": addresses, "bootstraps": bootstraps}


def transcript(request: Request, peer: bytes) -> bytes:
    names = "client_nonce", "server_nonce", "certificate"
    text: bytes = spec.transcript(data(request, "run_id"), peer, *(data(request, name) for name in names))
    return text


def check_challenge(request: Request) -> Answer:
    aggregator, text = data(request, "aggregator"), transcript(request, data(request, "peer"))
    spec.check_challenge([aggregator], text, aggregator, data(request))
    return {}


def check_key(request: Request) -> Answer:
    spec.demand(spec.is_key(data(request)), "BAD_KEY")
    return {}


def check_signature(request: Request) -> Answer:
    spec.verify(data(request, "key"), request["domain"], data(request, "message"), data(request))
    return {}


def make_acc(request: Request) -> Answer:
    values = (floats(request, name) for name in ("residual", "outer", "local"))
    return {"acc": packed(spec.accumulate(request["beta"], *values)).hex()}


def make_compress(request: Request) -> Answer:
    chunks, residual = spec.compress(floats(request, "acc"), request["k"], request["code_bits"])
    section = spec.encode_section(chunks, request["code_bits"])
    return {"section": section.hex(), "residual_sha256": hashlib.sha256(packed(residual)).hexdigest()}


def make_weight(request: Request) -> Answer:
    return {"weight": spec.weight(request["tokens"], request["nominal"])}


def make_merge(request: Request) -> Answer:
    form = request["size"], request["k"], request["code_bits"]
    tensors = [spec.decode_section(section, *form) for section in items(request)]
    packets = list(zip(request["weights"], request["clips"], tensors, strict=True))
    merged = spec.merge(packets, request["rule"], request["alpha_q16"])
    return {"section": spec.encode_update_section(merged).hex()}


def make_apply(request: Request) -> Answer:
    outer = floats(request, "outer")
    spec.apply_update(outer, spec.decode_update_section(data(request, "section"), len(outer)))
    return {"outer": packed(outer).hex()}


def make_merkle(request: Request) -> Answer:
    return {"root": spec.merkle_root(items(request, "leaves")).hex()}


def make_state_root(request: Request) -> Answer:
    return {"root": spec.state_root(data(request, "values") * request["repeat"]).hex()}


def make_packet(request: Request) -> Answer:
    fields = data(request, "base_root"), request["tokens"], request["inner_steps"], items(request)
    header = spec.make_packet(the_run(request), data(request, "seed"), request["round"], *fields)
    return {"header": header.hex(), "digest": spec.digest("packet", header).hex()}


def make_update(request: Request) -> Answer:
    fields = request["round"], data(request, "base_root"), data(request, "new_root"), items(request)
    header = spec.make_update(the_run(request), *fields)
    return {"header": header.hex(), "digest": spec.digest("update", header).hex()}


def make_dht(request: Request) -> Answer:
    head = request["round"], data(request, "digest")
    fields = data(request, "seed"), request["expires"], data(request, "certificate"), *head, request["addresses"]
    return {"bytes": spec.make_dht_record(request["key"], *fields).hex()}


def make_invite(request: Request) -> Answer:
    fixed = (data(request, name) for name in ("run_id", "aggregator", "certificate"))
    return {"text": spec.make_invite(*fixed, request["addresses"], request["bootstraps"])}


def make_proof(request: Request) -> Answer:
    seed = data(request, "seed")
    text = transcript(request, spec.key_pair(seed)[1])
    return {"bytes": spec.prove(seed, text, data(request, "aggregator")).hex()}


def check_rollback(request: Request) -> Answer:
    spec.check_rollback(spec.parse_record(data(request)), spec.parse_record(data(request, "target")))
    return {}


def check_amendment(request: Request) -> Answer:
    amendment = spec.check_amendment(the_run(request), data(request))
    return {"digest": amendment["digest"].hex(), "number": amendment["number"], "round": amendment["round"]}


def check_amendments(request: Request) -> Answer:
    run = the_run(request)
    chain: list[Any] = []
    for item in request["known"]:
        chain = spec.append(run, chain, spec.check_amendment(run, bytes.fromhex(item)))
    amendments = [spec.check_amendment(run, bytes.fromhex(item)) for item in request["amendments"]]
    chain = spec.bring_in(run, chain, spec.parse_record(data(request, "record")), amendments)
    rounds = []
    for round in request["rounds"]:
        amended = spec.amended(run, chain, round)
        assert spec.run_id(amended) == spec.run_id(run)
        rounds.append(
            {
                "settings": spec.canonical({table: amended[table] for table in spec.AMENDABLE}).decode(),
                "banned": sorted(peer.hex() for peer in spec.banned(chain, round)),
                "paused": round >= spec.paused_from(chain),
                "rollback": spec.rollback(chain, round),
            }
        )
    return {"head": spec.newest(chain).hex(), "rounds": rounds}


def follow(request: Request) -> Answer:
    packets = [(round, bytes.fromhex(digest)) for round, digest in request["packets"]]
    stored = {spec.digest("amendment", bytes.fromhex(item)): bytes.fromhex(item) for item in request["amendments"]}

    def fetch(name: bytes) -> bytes:
        spec.demand(name in stored, "NOT_FOUND")
        return stored[name]

    replica = spec.Replica(the_run(request), spec.parse_record(data(request, "held")), packets, fetch)
    return {
        "decisions": [decide(replica, event) for event in request["events"]],
        "settled": [list(settled) for settled in replica.settled],
        "head": replica.head["digest"].hex(),
        "state_root": replica.head["state_root"].hex(),
    }


def decide(replica: Any, event: Request) -> str | int:
    if "opened" in event:
        opened = event["opened"]
        steps: int = replica.inner_steps(opened["round"], data(opened, "base_root"), opened["inner_steps"])
        return steps
    if "receipt" in event:
        return "again" if spec.send_again(event["receipt"]) else "rest"
    try:
        decision: str = replica.decide(spec.check_record(replica.run, data(event, "record")))
    except spec.Refused as refusal:
        return int(refusal.code)
    return decision


HANDLERS: dict[tuple[str, str], Callable[[Request], Answer]] = {
    ("check", "key"): check_key,
    ("check", "signature"): check_signature,
    ("check", "run"): check_run,
    ("check", "section"): check_section,
    ("check", "update-section"): check_update_section,
    ("check", "packet"): check_packet,
    ("check", "packet-wire"): check_transport,
    ("check", "update"): check_update,
    ("check", "update-wire"): check_transport,
    ("check", "bundle"): check_bundle,
    ("check", "record"): check_record,
    ("check", "link"): check_link,
    ("check", "rollback"): check_rollback,
    ("check", "amendment"): check_amendment,
    ("check", "amendments"): check_amendments,
    ("check", "dht"): check_dht,
    ("check", "invite"): check_invite,
    ("check", "challenge"): check_challenge,
    ("make", "acc"): make_acc,
    ("make", "compress"): make_compress,
    ("make", "weight"): make_weight,
    ("make", "merge"): make_merge,
    ("make", "apply"): make_apply,
    ("make", "merkle"): make_merkle,
    ("make", "state-root"): make_state_root,
    ("make", "packet"): make_packet,
    ("make", "update"): make_update,
    ("make", "dht"): make_dht,
    ("make", "invite"): make_invite,
    ("make", "proof"): make_proof,
    ("follow", ""): follow,
}


def answer(request: Request) -> Answer:
    """Answer one request of the line protocol with the blocks alone."""
    handler = HANDLERS[request["verb"], request.get("kind", "")]
    try:
        return {"ok": handler(request)}
    except spec.Refused as refusal:
        return {"refused": refusal.code}
    except ValueError:
        assert request.get("kind") == "compress", "only a sender's own values are refused without a code"
        return {"refused": 0}


def agree(verb: str, kind: str, **fields: Any) -> Answer:
    """The answer of the blocks to this request, which has to be that of the reference."""
    request = {"verb": verb, "kind": kind, **{name: plain(value) for name, value in fields.items()}}
    answered = answer(request)
    assert answered == reference_client.answer(request)
    return answered


def plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return [plain(item) for item in value] if isinstance(value, list | tuple | range) else value


# ---------------------------------------------------------------- what the document says


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, cells stripped."""
    section = SPEC.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_blocks_can_import_nothing_else() -> None:
    with pytest.raises(ImportError, match="numpy"):
        run_blocks("```python\nimport numpy\n```\n")
    with pytest.raises(ImportError, match="protocol"):
        run_blocks("```python\nfrom protocol.errors import Code\n```\n")


def test_every_code_is_listed() -> None:
    assert {code.name: code.value for code in Code} == spec.CODES


def test_the_text_names_only_codes_that_exist() -> None:
    named = set(re.findall(r"`((?:BAD|WRONG|NOT|TOO|NO)_[A-Z_]+)`", SPEC.split("## 14. Limits")[0]))
    assert named
    assert named <= set(spec.CODES)


def test_every_limit_is_listed() -> None:
    listed = {name.strip("`"): int(value) for name, value, _ in table("14. Limits")}
    assert listed == {name: value for name, value in vars(limits).items() if name.isupper()}


def test_the_messages_are_those_of_the_proto_file() -> None:
    source = re.sub(r"//.*", "", (ROOT / "proto" / "swarm.proto").read_text("utf-8"))
    (block,) = re.findall(r"^```proto\n(.*?)^```$", SPEC, re.MULTILINE | re.DOTALL)
    assert block.split() == source.split()


def test_the_rules_of_the_run_are_those_of_its_tables() -> None:
    rules: dict[str, dict[str, Any]] = {}
    for name, kind in protocol.run._TABLES.items():
        for key, hint in get_type_hints(kind, include_extras=True).items():
            if get_origin(hint) is Annotated:
                _, rule = get_args(hint)
                rules.setdefault(name, {})[key] = rule
    assert {name: set(keys) for name, keys in spec.RULES.items()} == {name: set(keys) for name, keys in rules.items()}
    for name, keys in rules.items():
        for key, rule in keys.items():
            said = spec.RULES[name][key]
            if isinstance(rule, protocol.run._Between):
                assert said == (rule.low, rule.high)
            elif isinstance(rule, protocol.run._OneOf):
                assert said == list(rule.values)
            else:
                assert isinstance(said, str)


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_the_blocks_answer_every_vector(path: Path) -> None:
    document = json.loads(path.read_text("utf-8"))
    assert document["vectors"]
    wrong = {}
    for vector in document["vectors"]:
        request = dict(vector["request"])
        if "run" in request:
            request["run"] = document["runs"][request["run"]]
        answered = answer(request)
        if answered != vector["expect"]:
            wrong[vector["name"]] = answered, vector["expect"]
    assert not wrong


# ---------------------------------------------------------------- random requests

few = settings(max_examples=40, deadline=None)
fewer = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)
sizes = st.one_of(st.integers(1, 40), st.sampled_from((4095, 4096, 4097, 8191, 8200)))
ks = st.sampled_from((1, 2, 40, 64, 128, 1000, 4095, 4096))
code_bits = st.sampled_from((1, 2))
rules = st.sampled_from(("mean", "mean_of_senders"))
edits = st.lists(
    st.tuples(st.integers(0, 2**16), st.integers(0, 255), st.sampled_from(("set", "cut", "insert"))), max_size=3
)
KEY = PrivateKey.from_bytes(bytes(range(32)))
OTHER_KEY = PrivateKey.from_bytes(bytes(range(1, 33)))
BASE = bytes([7]) * 32


def damaged(raw: bytes, changes: Sequence[tuple[int, int, str]]) -> bytes:
    """The bytes after some of them were set, inserted, or cut off from there on."""
    for place, byte, how in changes:
        at = place % (len(raw) + 1)
        if how == "cut":
            raw = raw[: len(raw) - at % 9]
        else:
            raw = raw[:at] + bytes([byte]) + raw[at + (how == "set") :]
    return raw


def gradient(size: int, seed: int) -> NDArray[np.float32]:
    """Values of many kinds, chunk by chunk: like a gradient's, few distinct ones, denormals, zeros, large ones."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(size).astype(np.float32)
    for start in range(0, size, 4096):
        chunk = values[start : start + 4096]
        kind = rng.integers(6)
        if kind == 0:
            chunk[:] = rng.integers(-2, 3, chunk.size)
        elif kind == 1:
            chunk[:] = rng.integers(0, 2**24, chunk.size).astype(np.uint32).view(np.float32)
        elif kind == 2:
            chunk[:] = np.where(rng.random(chunk.size) < 0.01, chunk, np.float32(-0.0))
        with np.errstate(over="ignore", under="ignore"):
            chunk *= np.float32(2.0) ** np.float32(rng.integers(-34, 8))
    return values


def section_of(size: int, seed: int, k: int, bits: int) -> bytes:
    request = {"verb": "make", "kind": "compress", "acc": gradient(size, seed).tobytes().hex(), "k": k}
    return bytes.fromhex(reference_client.answer({**request, "code_bits": bits})["ok"]["section"])


def update_section_of(size: int, seed: int, k: int, rule: str = "mean") -> bytes:
    sections = [section_of(size, seed + number, k, 2).hex() for number in range(3)]
    request = {"verb": "make", "kind": "merge", "size": size, "k": k, "code_bits": 2, "rule": rule}
    request |= {"alpha_q16": 65536, "weights": [1024, 1, 4096], "clips": [65536, 40000, 65536], "sections": sections}
    return bytes.fromhex(reference_client.answer(request)["ok"]["section"])


@functools.cache
def make_run(k: int = 64, bits: int = 2, rule: str = "mean") -> RunConfig:
    parts = CompressionConfig(k=k, code_bits=bits), OuterConfig(rule=rule, rounds=5), InnerConfig(steps=9)
    return RunConfig.of(
        RunSettings("spec-test", compression=parts[0], outer=parts[1], inner=parts[2], rounds=RoundConfig(quorum=2)),
        operator=KEY.public,
        aggregators=(KEY.public, OTHER_KEY.public),
        layout=Layout.of([("a", (3, 5)), ("b", ()), ("c", (4100,)), ("d", (2, 2))]),
        genesis_root=bytes([9]) * 32,
    )


@few
@given(seeds, st.integers(1, 50), st.floats(0, 1))
def test_error_feedback(seed: int, size: int, beta: float) -> None:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, (3, size), dtype=np.uint32)
    values = np.where(words >> 23 & 255 == 255, words & 0x807FFFFF, words).astype("<u4")
    residual, outer, local = (row.tobytes() for row in values)
    agree("make", "acc", beta=beta, residual=residual, outer=outer, local=local)


@few
@given(sizes, seeds, ks, code_bits)
@example(241, 0, 17, 2)  # 17 * 241 = 4097, so that one value more than one is kept
def test_compression(size: int, seed: int, k: int, bits: int) -> None:
    agree("make", "compress", acc=gradient(size, seed).tobytes(), k=k, code_bits=bits)


@few
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=12), ks, code_bits)
@example([0x7F800000], 64, 2)
@example([0xFFC00000, 0], 64, 1)
@example([0x80000000, 0x00000001], 4096, 2)
@example([0x3F800000, 0x40000000, 0x40400000], 4096, 2)  # 1, 2, 3: the second is exactly the mean, so it is low
def test_compression_of_any_bits(words: list[int], k: int, bits: int) -> None:
    agree("make", "compress", acc=np.array(words, "<u4").tobytes(), k=k, code_bits=bits)


@few
@given(sizes, seeds, ks, code_bits, edits)
def test_sections(size: int, seed: int, k: int, bits: int, changes: list[tuple[int, int, str]]) -> None:
    raw = damaged(section_of(size, seed, k, bits), changes)[: spec.section_bytes_max(size, k, bits)]
    agree("check", "section", size=size, k=k, code_bits=bits, bytes=raw)


@few
@given(sizes, seeds, ks, edits)
def test_update_sections(size: int, seed: int, k: int, changes: list[tuple[int, int, str]]) -> None:
    raw = damaged(update_section_of(size, seed, k), changes)[: spec.section_bytes_max(size, *spec.UPDATE)]
    agree("check", "update-section", size=size, bytes=raw)


@settings(max_examples=150, deadline=None)
@given(sizes, seeds, ks, st.sampled_from((1, 2, 8)), st.data())
def test_one_damaged_byte_of_a_table(size: int, seed: int, k: int, bits: int, draw: st.DataObject) -> None:
    raw = update_section_of(size, seed, k) if bits == 8 else section_of(size, seed, k, bits)
    _, *planes = spec.split_section(raw, size, *(spec.UPDATE if bits == 8 else (k, bits)))
    which = draw.draw(st.sampled_from([place for place, plane in enumerate(planes) if plane]))
    at = draw.draw(st.integers(0, len(planes[which]) - 1))
    odd = st.one_of(st.sampled_from((0, 1, 35, 36, 63, 64, 128, 254, 255)), st.integers(0, 255))
    planes[which] = planes[which][:at] + bytes([draw.draw(odd)]) + planes[which][at + 1 :]
    form = {"size": size} if bits == 8 else {"size": size, "k": k, "code_bits": bits}
    agree("check", "update-section" if bits == 8 else "section", **form, bytes=b"".join(planes))


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_sections_of_several_blocks(bits: int) -> None:
    size, k = 4096 * 2050 + 3, 1
    rng = np.random.default_rng(bits)
    values = np.where(rng.random(size) < 0.0001, rng.standard_normal(size), 0).astype(np.float32)
    request = {"verb": "make", "kind": "compress", "acc": values.tobytes().hex(), "k": k, "code_bits": min(bits, 2)}
    raw = bytes.fromhex(reference_client.answer(request)["ok"]["section"])
    if bits == 8:
        merged = {"size": size, "k": k, "code_bits": 2, "rule": "mean", "alpha_q16": 65536}
        raw = bytes.fromhex(
            agree("make", "merge", **merged, weights=[7], clips=[65536], sections=[raw])["ok"]["section"]
        )
    form = {"size": size} if bits == 8 else {"size": size, "k": k, "code_bits": bits}
    kind = "update-section" if bits == 8 else "section"
    assert "ok" in agree("check", kind, **form, bytes=raw)
    blocks_at = sum(spec.table_bytes(size, bits)[:2])
    for block in (0, 1):
        place = blocks_at + 4 * block
        moved = raw[:place] + bytes([(raw[place] + 1) % 256]) + raw[place + 1 :]
        assert agree("check", kind, **form, bytes=moved) == {"refused": Code.BAD_BLOCKS}


@few
@given(sizes, seeds, ks, code_bits, rules, st.data())
def test_merges(size: int, seed: int, k: int, bits: int, rule: str, draw: st.DataObject) -> None:
    sections = [section_of(size, seed + number, k, bits) for number in range(draw.draw(st.integers(1, 5)))]
    weights = [draw.draw(st.one_of(st.integers(1, 4096), st.just(4096))) for _ in sections]
    clips = [draw.draw(st.one_of(st.integers(1, 65536), st.just(65536))) for _ in sections]
    alpha = draw.draw(st.one_of(st.integers(1, 1 << 18), st.sampled_from((1, 65536, 1 << 18))))
    form = {"size": size, "k": k, "code_bits": bits, "rule": rule, "alpha_q16": alpha}
    agree("make", "merge", **form, weights=weights, clips=clips, sections=sections)


@few
@given(sizes, seeds, ks, rules)
def test_outer_steps(size: int, seed: int, k: int, rule: str) -> None:
    outer = gradient(size, seed + 9).tobytes()
    agree("make", "apply", outer=outer, section=update_section_of(size, seed, k, rule))


@few
@given(st.lists(st.binary(max_size=5), min_size=1, max_size=20))
def test_merkle_roots(leaves: list[bytes]) -> None:
    agree("make", "merkle", leaves=leaves)


@pytest.mark.parametrize("repeat", [1, 1 << 18, (1 << 18) + 1, 3 << 18])
def test_state_roots(repeat: int) -> None:
    agree("make", "state-root", values=gradient(4, repeat).tobytes(), repeat=repeat)


@few
@given(st.integers(1, 2**48), st.integers(1, 2**48))
def test_weights(tokens: int, nominal: int) -> None:
    agree("make", "weight", tokens=tokens, nominal=nominal)


# ---------------------------------------------------------------- whole packets, updates, bundles


def text_of(run: RunConfig) -> str:
    return run.to_json().decode("ascii")


@functools.cache
def a_packet(run: RunConfig, seed: int, key: PrivateKey = KEY, round: int = 3) -> tuple[bytes, tuple[bytes, ...]]:
    form = run.compression.k, run.compression.code_bits
    sections = tuple(section_of(tensor.size, seed + 7 * i, *form) for i, tensor in enumerate(run.layout.tensors))
    fields = {"seed": key.to_bytes(), "round": round, "base_root": BASE, "tokens": 5000, "inner_steps": 9}
    made = agree("make", "packet", run=text_of(run), **fields, sections=sections)
    return bytes.fromhex(made["ok"]["header"]), sections


@functools.cache
def an_update(run: RunConfig, seed: int) -> tuple[bytes, bytes, tuple[bytes, ...]]:
    sections = tuple(update_section_of(tensor.size, seed, run.compression.k) for tensor in run.layout.tensors)
    made = agree("make", "update", run=text_of(run), round=3, base_root=BASE, new_root=bytes(32), sections=sections)
    return bytes.fromhex(made["ok"]["digest"]), bytes.fromhex(made["ok"]["header"]), sections


runs = st.builds(make_run, st.sampled_from((3, 64, 4096)), code_bits, rules)
small_seeds = st.integers(0, 3)


@few
@given(runs, small_seeds, edits, edits, st.sampled_from((None, None, None, 0, 2, 3, "fewer", "more")))
def test_packets(run: RunConfig, seed: int, changes: Any, section_changes: Any, which: Any) -> None:
    header, sections = a_packet(run, seed)
    sections = spoiled(sections, section_changes, which)
    fields = {"round": 3, "base_root": BASE, "header": damaged(header, changes), "sections": sections}
    agree("check", "packet", run=text_of(run), **fields)


@pytest.mark.parametrize("kind", ["packet", "packet-wire", "update", "update-wire", "record", "run", "dht"])
def test_versions_have_two_bytes(kind: str) -> None:
    run = make_run()
    of_update = kind.startswith("update")
    header, sections = an_update(run, 0)[1:] if of_update else a_packet(run, 0)
    raw = {"record": record_of(run, KEY), "run": signed_run(run), "dht": b"SLDR\1\0" + bytes(75)}.get(kind, header)
    raw = raw[:5] + b"\1" + raw[6:]
    fields: dict[str, Any] = {"run": text_of(run), "bytes": raw}
    if kind in ("packet", "update"):
        fields |= {"header": raw, "sections": sections, "round": 3, "base_root": BASE, "digest": BASE}
    elif kind == "run":
        fields["run_id"] = None
    elif kind == "dht":
        fields |= {"key": f"slp/{BASE.hex()}/peers", "subkey": KEY.public, "expiration": 0, "now": 0}
    assert agree("check", kind, **fields) == {"refused": Code.VERSION}


def spoiled(sections: tuple[bytes, ...], changes: Any, which: Any) -> tuple[bytes, ...]:
    if which == "fewer":
        return sections[:-1]
    if which == "more":
        return (*sections, b"")
    if which is None:
        return sections
    return (*sections[:which], damaged(sections[which], changes), *sections[which + 1 :])


@few
@given(runs, small_seeds, edits, st.sampled_from((0, 2)), st.booleans())
def test_signed_packets_with_bad_sections(run: RunConfig, seed: int, changes: Any, which: int, other: bool) -> None:
    sections = spoiled(a_packet(run, seed)[1], changes, which)
    fields: dict[str, Any] = {"round": 3, "base_root": BASE}
    made = {"seed": bytes(range(32)), "tokens": 1, "inner_steps": 1, "sections": sections, "run": text_of(run)}
    header = bytes.fromhex(agree("make", "packet", **fields, **made)["ok"]["header"])
    fields["round"] += other
    agree("check", "packet", run=text_of(run), **fields, header=header, sections=sections)


@few
@given(runs, small_seeds, edits, edits, st.sampled_from((None, None, None, 0, 2, 3, "fewer", "more")), st.booleans())
def test_updates(run: RunConfig, seed: int, changes: Any, section_changes: Any, which: Any, honest: bool) -> None:
    digest, header, sections = an_update(run, seed)
    header, sections = damaged(header, changes), spoiled(sections, section_changes, which)
    digest = spec.digest("update", header) if honest else digest
    agree("check", "update", run=text_of(run), digest=digest, header=header, sections=sections)


def shrink(plane: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(plane)


def transport(run: RunConfig, header: bytes, sections: Sequence[bytes], cuts: Sequence[int], form: Any) -> bytes:
    """The blocks' transport form, in frames that begin at these sections; the reference has to read it too."""
    sizes = [tensor.size for tensor in run.layout.tensors]
    borders = sorted({0, len(sizes), *cuts})
    spans = [slice(start, stop) for start, stop in itertools.pairwise(borders)]
    return header + b"".join(spec.write_frame(sections[span], sizes[span], *form, shrink) for span in spans)


@few
@given(runs, small_seeds, st.lists(st.integers(1, 3), max_size=2), edits, st.booleans())
def test_transport_forms(run: RunConfig, seed: int, cuts: list[int], changes: Any, of_update: bool) -> None:
    header, sections = an_update(run, seed)[1:] if of_update else a_packet(run, seed)
    form = spec.UPDATE if of_update else (run.compression.k, run.compression.code_bits)
    kind = "update-wire" if of_update else "packet-wire"
    raw = transport(run, header, sections, cuts, form)
    assert agree("check", kind, run=text_of(run), bytes=raw)["ok"]["sections"] == plain(sections)
    frames = damaged(raw[len(header) :], changes)
    agree("check", kind, run=text_of(run), bytes=header + frames)


@pytest.mark.parametrize("of_update", [False, True])
def test_the_references_transport_form_is_read(of_update: bool) -> None:
    run = make_run()
    header, sections = an_update(run, 0)[1:] if of_update else a_packet(run, 0)
    kind = "update-wire" if of_update else "packet-wire"
    raw = transport(run, header, sections, (), spec.UPDATE if of_update else (64, 2))
    if of_update:
        again = wire.update_to_wire(wire.update_from_wire(raw, run), run)
    else:
        again = wire.packet_to_wire(wire.packet_from_wire(raw, run), run)
    answered = agree("check", kind, run=text_of(run), bytes=again)
    assert answered["ok"] == {"header": header.hex(), "sections": plain(sections)}
    for at in range(len(header), len(again)):
        broken = again[:at] + bytes([again[at] ^ 1]) + again[at + 1 :]
        if at < len(header) + 40 or at % 97 == 0:
            agree("check", kind, run=text_of(run), bytes=broken)
            agree("check", kind, run=text_of(run), bytes=again[:at])


ZSTD_HEADERS = {  # flags, the fields behind them, and whether a plane may have them
    "single segment": (0x20, bytes([30]), True),
    "four bytes of size": (0xA0, struct.pack("<I", 30), True),
    "eight bytes of size": (0xE0, struct.pack("<Q", 30), True),
    "two bytes of size": (0x60, struct.pack("<H", 30), False),
    "a window of 1 KiB": (0x80, b"\0" + struct.pack("<I", 30), True),
    "a window of 8 MiB": (0x80, bytes([13 << 3]) + struct.pack("<I", 30), True),
    "a window of 9 MiB": (0x80, bytes([13 << 3 | 1]) + struct.pack("<I", 30), False),
    "a window of 2 TiB": (0x80, b"\xff" + struct.pack("<I", 30), False),
    "no size": (0x00, b"\0", False),
    "dictionary 0": (0x21, b"\0" + bytes([30]), True),
    "dictionary 1": (0x21, b"\1" + bytes([30]), False),
    "a reserved bit": (0x28, bytes([30]), False),
    "an unused bit": (0x30, bytes([30]), True),
    "a checksum that is cut off": (0x24, bytes([30]), False),
    "another size": (0x20, bytes([31]), False),
}


@pytest.mark.parametrize("name", ZSTD_HEADERS)
def test_zstd_frames(name: str) -> None:
    """A plane of thirty zeros, the scales of thirty small tensors, behind a zstd header of each kind."""
    run = dataclasses.replace(make_run(), layout=Layout.of([(f"t{number:02}", (1,)) for number in range(30)]))
    flags, fields, good = ZSTD_HEADERS[name]
    block = (30 << 3 | 3).to_bytes(3, "little") + b"\0"  # one block: thirty times a zero
    scales = b"\x28\xb5\x2f\xfd" + bytes([flags]) + fields + block
    frame = struct.pack("<7I", 30, 0, len(scales), 30, 0, 0, 0) + scales + bytes(30)
    header = a_packet(make_run(), 0)[0]
    header = header[:8] + run.run_id + header[40:]
    answered = agree("check", "packet-wire", run=text_of(run), bytes=header + frame)
    assert "ok" in answered if good else answered == {"refused": Code.BAD_ZSTD}


@fewer
@given(code_bits, rules, small_seeds, edits, st.booleans(), st.booleans())
def test_bundles(bits: int, rule: str, seed: int, changes: Any, swapped: bool, lost: bool) -> None:
    run = make_run(64, bits, rule)
    packets = sorted((a_packet(run, seed + number, key) for number, key in enumerate((KEY, OTHER_KEY))), key=signer)
    wires = [transport(run, header, sections, (), (64, bits)) for header, sections in packets]
    weights, clips = (1024, 4096), (65536, 30000)
    columns = zip(*(sections for _, sections in packets), strict=True)
    merge = {"k": 64, "code_bits": bits, "rule": rule, "alpha_q16": 65536, "weights": weights, "clips": clips}
    merged = [
        agree("make", "merge", size=tensor.size, **merge, sections=sections)["ok"]["section"]
        for tensor, sections in zip(run.layout.tensors, columns, strict=True)
    ]
    update = agree("make", "update", run=text_of(run), round=3, base_root=BASE, new_root=bytes(32), sections=merged)
    entries = [
        entry_of(header[76:108], spec.digest("packet", header), weight=weight, clip=clip)
        for (header, _), weight, clip in zip(packets, weights, clips, strict=True)
    ]
    head = {"kind": 1, "reason": 1, "state_root": bytes(32), "update_digest": bytes.fromhex(update["ok"]["digest"])}
    record = record_of(run, KEY, round=3, previous=BASE, entries=entries, **head)
    wires = wires[::-1] if swapped else wires
    raw = b"".join(struct.pack("<I", len(item)) + item for item in wires[: 2 - lost])
    known = {"run": text_of(run), "base_root": BASE, "record": record}
    whole = agree("check", "bundle", **known, bytes=raw)
    assert whole == (
        {"refused": Code.TRUNCATED if lost else Code.WRONG_DIGEST} if lost or swapped else {"ok": {"sections": merged}}
    )
    agree("check", "bundle", **known, bytes=damaged(raw, changes))


def signer(packet: tuple[bytes, Any]) -> bytes:
    return packet[0][76:108]


# ---------------------------------------------------------------- records and what follows from them


def entry_of(peer: bytes, packet: bytes, **changed: int) -> bytes:
    fields = {"verdict": 0, "code": 0, "tokens": 5, "inner_steps": 1, "weight": 1, "clip": 65536} | changed
    return struct.pack("<32s32sBHQIHI", peer, packet, *fields.values())


def record_of(run: RunConfig, key: PrivateKey, *, entries: Sequence[bytes] = (), **changed: Any) -> bytes:
    """A signed record whose fields need not fit each other."""
    fields: dict[str, Any] = {"kind": 2, "reason": 3, "run_id": run.run_id, "round": 1, "epoch": 0}
    fields |= {"previous": bytes(32), "state_root": run.genesis_root, "update_digest": bytes(32)}
    fields |= {"amendment": bytes(32), "opened_ms": 5, "closed_ms": 6, "evaluated_round": 0, "loss_micronats": 0}
    fields |= changed
    head = struct.pack("<4sHBB32sII32s32s32s32sQQIII", b"SLRR", 1, *fields.values(), len(entries))
    unsigned = head + b"".join(entries) + key.public
    return unsigned + key.sign("record", unsigned)


def digests(count: int) -> list[bytes]:
    return [bytes([number]) * 32 for number in range(count)]


some_entries = st.lists(
    st.builds(
        entry_of,
        st.sampled_from(digests(3)),
        st.sampled_from(digests(3)),
        verdict=st.sampled_from((0, 0, 0, 1, 2, 3)),
        code=st.sampled_from((0, 0, 319)),
        weight=st.sampled_from((1, 1, 4096, 0, 4097)),
        clip=st.sampled_from((1, 65536, 65536, 0, 65537)),
    ),
    max_size=3,
)
good_entries = st.builds(
    lambda peers: [entry_of(peer, peer) for peer in sorted(peers)], st.sets(st.sampled_from(digests(4)))
)
applied = {"kind": 1, "reason": 1, "update_digest": bytes([1]) * 32}
some_fields = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.integers(0, 4),
        "reason": st.integers(0, 5),
        "round": st.integers(0, 2),
        "previous": st.sampled_from(digests(2)),
        "update_digest": st.sampled_from(digests(2)),
        "run_id": st.sampled_from(digests(1)),
        "state_root": st.sampled_from(digests(1)),
        "closed_ms": st.integers(4, 6),
        "amendment": st.sampled_from(digests(2)),
        "evaluated_round": st.integers(0, 2),
        "loss_micronats": st.integers(0, 1),
    },
)


@settings(max_examples=100, deadline=None)
@given(st.one_of(some_entries, good_entries), st.one_of(some_fields, st.just(applied)), st.booleans(), edits)
@example([], {"kind": 0, "round": 0, "reason": 0}, True, [])
@example([], {"kind": 0, "round": 0, "reason": 0, "state_root": bytes(32)}, True, [])
@example([], {"kind": 3, "reason": 4}, True, [])
def test_records(entries: list[bytes], fields: dict[str, Any], ours: bool, changes: Any) -> None:
    run = make_run()
    record = record_of(run, KEY if ours else PrivateKey.from_bytes(bytes(32)), entries=entries, **fields)
    agree("check", "record", run=text_of(run), bytes=record)
    agree("check", "record", run=text_of(run), bytes=damaged(record, changes))


@few
@given(st.integers(1, 3), st.integers(0, 3), st.booleans(), st.booleans(), st.integers(0, 2), st.integers(1, 3))
def test_links(round: int, next_round: int, known: bool, same_root: bool, epoch: int, kind: int) -> None:
    run = make_run()
    previous = record_of(run, KEY, round=round, epoch=1)
    fields: dict[str, Any] = {"previous": spec.digest("record", previous) if known else bytes(32)}
    fields["state_root"] = run.genesis_root if same_root else bytes(32)
    entries = [entry_of(bytes(32), bytes(32))] if kind == 1 else []
    fields |= {"kind": kind, "reason": 4 if kind == 3 else 3, "update_digest": bytes([kind == 1]) * 32, "epoch": epoch}
    record = record_of(run, KEY, round=next_round or round + 1, entries=entries, **fields)
    agree("check", "link", previous=previous, bytes=record)


def random_chain(draw: st.DataObject, run: RunConfig) -> list[bytes]:
    """Records of a few rounds on branches of a few epochs; some follow each other, some do not."""
    records = [(0, 0, record_of(run, KEY, kind=0, reason=0, round=0))]
    for _ in range(draw.draw(st.integers(2, 7))):
        round, epoch, before = draw.draw(st.sampled_from((*records, *records[-1:] * len(records))))
        epoch += draw.draw(st.sampled_from((0, 0, 0, 1)))
        packets = draw.draw(st.sets(st.sampled_from((0, 0, round + 1, round + 1, round + 2)), max_size=3))
        entries = [entry_of(bytes([number]) * 32, bytes([number]) * 32) for number in sorted(packets)]
        fields: dict[str, Any] = {"round": round + 1, "epoch": epoch, "previous": spec.digest("record", before)}
        fields["state_root"] = spec.parse_record(before)["state_root"]
        if entries:
            fields |= {"kind": 1, "reason": 1, "update_digest": bytes([1]) * 32}
            fields["state_root"] = bytes([draw.draw(st.integers(0, 255))]) * 32
        records.append((round + 1, epoch, record_of(run, KEY, entries=entries, **fields)))
    return [record for _, _, record in records]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_following_a_chain(draw: st.DataObject) -> None:
    run = make_run()
    records = random_chain(draw, run)
    held = draw.draw(st.sampled_from(records[:2]))
    events: list[dict[str, Any]] = []
    missed = draw.draw(st.integers(0, len(records)))
    told_again = draw.draw(st.lists(st.sampled_from(records), max_size=4))
    for record in [*records[:missed], *records[missed + 1 :], *told_again]:
        told = spec.parse_record(record)
        events.append({"record": damaged(record, draw.draw(st.sampled_from(([], [], [], [(70, 1, "set")])))).hex()})
        round, root = told["round"] + draw.draw(st.sampled_from((1, 1, 0))), told["state_root"].hex()
        steps = draw.draw(st.sampled_from((0, 4, 9, 2**32 - 1)))
        events.append({"opened": {"round": round, "base_root": root, "inner_steps": steps}})
    events.append({"receipt": draw.draw(st.sampled_from((0, 319, *spec.CODES.values())))})
    packets = [[round, bytes([round]) * 32] for round in draw.draw(st.sets(st.integers(1, 5), min_size=2))]
    agree("follow", "", run=text_of(run), held=held, packets=packets, events=events, amendments=[])


# ---------------------------------------------------------------- amendments

some_settings = st.dictionaries(
    st.sampled_from(
        (
            "inner.steps",
            "inner.learning_rate",
            "rounds.grace_s_min",
            "rounds.grace_s_max",
            "rounds.deadline_s",
            "data.seed",
        )
    ),
    st.sampled_from((1, 2, 0.5, 30.0, 90.0, 250.0, 400.0, True)),
    max_size=2,
)
some_actions = st.one_of(
    st.builds(lambda key, value: ChangeSettings({key: value}), st.just("inner.steps"), st.integers(1, 9)),
    st.builds(
        lambda key, value: ChangeSettings({key: value}),
        st.sampled_from(("rounds.grace_s_min", "rounds.grace_s_max", "rounds.deadline_s")),
        st.sampled_from((1.0, 30.0, 90.0, 250.0)),
    ),
    st.just(Pause()),
    st.just(Resume()),
    st.builds(Rollback, st.just(0)),
    st.builds(Ban, st.sampled_from(digests(2))),
    st.builds(Unban, st.sampled_from(digests(2))),
)


@few
@given(st.one_of(some_actions, st.builds(ChangeSettings, some_settings)), st.integers(0, 3), edits, st.booleans())
def test_amendments(action: Any, round: int, changes: Any, ours: bool) -> None:
    run = make_run()
    amendment = Amendments(run).draft(action, round)
    data = sign_amendment(amendment, KEY if ours else OTHER_KEY).to_bytes()
    agree("check", "amendment", run=text_of(run), bytes=data)
    agree("check", "amendment", run=text_of(run), bytes=damaged(data, changes))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(some_actions, st.integers(1, 4)), max_size=6), st.data())
def test_chains_of_amendments(wanted: list[tuple[Any, int]], draw: st.DataObject) -> None:
    """Amendments in any order; now and then one is left out, named wrongly or comes too late."""
    run = make_run()
    chain = Amendments(run)
    for action, round in wanted:
        amendment = sign_amendment(chain.draft(action, round), KEY)
        if draw.draw(st.integers(0, 3)):
            chain = Amendments(run, (*chain.chain, amendment))  # whatever the rules say of it
    # What is called known is in order; the record brings in the rest.
    known = Amendments(run)
    for item in chain.chain[: draw.draw(st.integers(0, 6))]:
        with contextlib.suppress(ProtocolError):
            known = known.append(item)
    rest = chain.chain[len(known.chain) :]
    peers = draw.draw(st.sets(st.sampled_from(digests(3)), max_size=2))
    fields: dict[str, Any] = {"round": draw.draw(st.integers(1, 4)), "amendment": chain.head}
    if draw.draw(st.booleans()):
        fields |= {"kind": 3, "reason": 4}
    elif peers:
        fields |= applied
    entries = [entry_of(peer, peer) for peer in sorted(peers)] if fields.get("kind") == 1 else []
    request = {"known": [item.to_bytes() for item in known.chain], "amendments": [item.to_bytes() for item in rest]}
    record = record_of(run, KEY, entries=entries, **fields)
    agree("check", "amendments", run=text_of(run), record=record, rounds=range(6), **request)


# ---------------------------------------------------------------- runs, keys, meeting each other


@functools.cache
def signed_run(run: RunConfig) -> bytes:
    return sign_run(run, KEY).to_bytes()


def resigned(text: bytes) -> bytes:
    return b"SLRN\1\0" + struct.pack("<I", len(text)) + text + KEY.sign("run", text)


@few
@given(runs, edits, st.booleans())
def test_signed_runs(run: RunConfig, changes: Any, known: bool) -> None:
    run_id = run.run_id if known else None
    assert "ok" in agree("check", "run", run_id=run_id, bytes=signed_run(run))
    agree("check", "run", run_id=run_id, bytes=damaged(signed_run(run), changes))


LEAVES = [(name, key) for name, keys in spec.RULES.items() for key in keys]
odd_values: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(
        (0, 1, -1, 0.0, -0.0, 1.0, 0.5, 4096, 4097, 2**63, 1e308, None, True, False, "", "a", "bytes", [], {})
    ),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(2**70), 2**70),
    st.text(max_size=4),
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(LEAVES), odd_values)
def test_values_of_runs(leaf: tuple[str, str], value: Any) -> None:
    document = json.loads(make_run().to_json())
    document[leaf[0]][leaf[1]] = value
    agree("check", "run", run_id=None, bytes=resigned(spec.canonical(document)))


LAYOUTS: list[Any] = [
    [],
    {},
    {"ab": 1},
    [["a", [1]]],
    [["a", []]],
    [["a", {}]],
    [["a", ""]],
    ["ab"],
    [["a", [1]], ["a", [1]]],
    [["b", [1]], ["a", [1]]],
    [["B", [1]], ["a", [1]]],
    [["a", [0]]],
    [["a", [True]]],
    [["a", [1.0]]],
    [["a", [1] * 8]],
    [["a", [1] * 9]],
    [["a", [1 << 31]]],
    [["a", [1 << 16, (1 << 15) + 1]]],
    [[f"{number:03}", [1 << 31]] for number in range(512)],
    [[f"{number:03}", [1 << 31]] for number in range(513)],
    [["a" * 200, [1]]],
    [["a" * 201, [1]]],
    [["", [1]]],
    [['!"\\~', [1]]],
    [["a b", [1]]],
    [["ä", [1]]],
    [["a", [1], 1]],
    [["a"]],
    [[1, [1]]],
    None,
    7,
    "ab",
]
TOP: list[tuple[str, Any]] = [
    *(("layout", layout) for layout in LAYOUTS),
    ("aggregators", []),
    ("aggregators", {KEY.public.hex(): 1}),
    ("aggregators", [KEY.public.hex()] * 2),
    ("aggregators", sorted((KEY.public.hex(), OTHER_KEY.public.hex()), reverse=True)),
    ("aggregators", [KEY.public.hex().upper()]),
    ("aggregators", [bytes(32).hex()]),
    ("aggregators", KEY.public.hex()),
    ("aggregators", sorted(PrivateKey.from_bytes(bytes([number]) * 32).public.hex() for number in range(64))),
    ("aggregators", sorted(PrivateKey.from_bytes(bytes([number]) * 32).public.hex() for number in range(65))),
    ("operator", OTHER_KEY.public.hex()),
    ("operator", bytes(32).hex()),
    ("operator", (b"\xff" * 32).hex()),
    ("operator", KEY.public.hex()[:-1] + " "),
    ("operator", 7),
    ("genesis_root", bytes(31).hex()),
    ("genesis_root", ("AB" * 32)),
    ("name", ""),
    ("name", ".a"),
    ("name", "a" * 64),
    ("name", "a" * 65),
    ("name", "a\n"),
    ("name", 1),
    ("model", []),
    ("model", None),
    ("rounds", {}),
    ("another", 1),
]


@pytest.mark.parametrize(("key", "value"), TOP, ids=[f"{key}-{number}" for number, (key, _) in enumerate(TOP)])
def test_tops_of_runs(key: str, value: Any) -> None:
    document = json.loads(make_run().to_json()) | {key: value}
    agree("check", "run", run_id=None, bytes=resigned(spec.canonical(document)))


BROKEN_RULES = [
    ("model", "hidden_size", 124),
    ("model", "num_key_value_heads", 3),
    ("data", "sequence_length", 1025),
    ("rounds", "grace_s_min", 61.0),
    ("rounds", "grace_s_max", 301.0),
    ("rounds", "deadline_s", 60.0),
    ("outer", "alpha", 2**-16 * 1.5),
    ("outer", "alpha", 2**-16 * 2.5),
    ("inner", "learning_rate", 1e-8),
    ("inner", "learning_rate", 0.0001),
    ("inner", "learning_rate", 1.25e-05),
]


@pytest.mark.parametrize(("name", "key", "value"), BROKEN_RULES)
def test_rules_between_values_of_runs(name: str, key: str, value: Any) -> None:
    document = json.loads(make_run().to_json())
    document[name][key] = value
    agree("check", "run", run_id=None, bytes=resigned(spec.canonical(document)))


TEXTS = [
    *(b"", b"{}", b"[]", b"null", b"NaN", b'{"name":NaN}', b"[" * 100_000, b"\xff", b'"\\ud800"', b"1" * 5000),
    *(make_run().to_json().replace(b'"k":64', k) for k in (b'"k":64.0', b'"k": 64', b'"k":64,"k":64', b'"k":6.4e1')),
    *(make_run().to_json().replace(b"0.95", x) for x in (b"0.950", b"9.5e-1", b"NaN", b"Infinity", b"1e999", b"1")),
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_other_texts_of_runs(text: bytes) -> None:
    assert agree("check", "run", run_id=None, bytes=resigned(text)) == {"refused": Code.BAD_RUN}


POINTS = {
    y: y.to_bytes(32, "little") for y in (0, 1, 2, 3, 4, 5, spec.P - 1, spec.P, spec.P + 1, spec.P + 3, 2**255 - 1)
}


@few
@given(st.one_of(st.sampled_from(sorted(POINTS.values())), st.binary(min_size=31, max_size=33)), st.booleans())
def test_keys(key: bytes, negative: bool) -> None:
    key = key[:31] + bytes([key[31] | negative << 7]) + key[32:] if len(key) > 31 else key
    agree("check", "key", bytes=key)


@few
@given(st.sampled_from(sorted(spec.CODES)), st.binary(max_size=40), edits, st.integers(0, 3))
def test_signatures(domain: str, message: bytes, changes: Any, shift: int) -> None:
    domain = "run" if len(domain) % 2 else "join-peer"
    signature = KEY.sign(domain, message)
    assert spec.sign(KEY.to_bytes(), domain, message) == signature
    s = int.from_bytes(signature[32:], "little") + shift * spec.ORDER
    signature = signature[:32] + (s % 2**256).to_bytes(32, "little")
    fields = {"key": KEY.public, "domain": domain, "message": message}
    assert ("ok" in agree("check", "signature", **fields, bytes=signature)) == (shift == 0)
    agree("check", "signature", **fields, bytes=damaged(signature, changes))


def test_keys_of_small_order_are_refused_whatever_signs() -> None:
    """The eight points of the torsion group, made from one of order 8, and sums of them with a good key."""
    order_8 = next(
        spec.times(spec.ORDER, point)
        for point in (spec.decode_point(bytes([y]) + bytes(31)) for y in range(2, 90))
        if point is not None and spec.encode_point(spec.times(4 * spec.ORDER, point))[:31] != b"\1" + bytes(30)
    )
    small = {spec.encode_point(spec.times(number, order_8)) for number in range(8)}
    assert len(small) == 8
    for key in small:
        assert agree("check", "key", bytes=key) == {"refused": Code.BAD_KEY}
    mixed = spec.encode_point(spec.add(spec.decode_point(KEY.public), order_8))
    assert "ok" in agree("check", "key", bytes=mixed)
    for number in range(16):
        message = bytes([number])
        signature = mixed_signature(mixed, message)
        agree("check", "signature", key=mixed, domain="run", message=message, bytes=signature)


def mixed_signature(key: bytes, message: bytes) -> bytes:
    """A signature by the secret of KEY under a key that has a part of small order: right for one hash in eight."""
    secret, _ = spec.key_pair(KEY.to_bytes())
    r = spec.encode_point(spec.times(12345, spec.BASE))
    s = (12345 + spec.hash_scalar(r, key, spec.tag("run"), message) * secret) % spec.ORDER
    return bytes(r) + int(s).to_bytes(32, "little")


addresses = st.lists(
    st.sampled_from(("a:1", "a.b-c:65535", "[::1]:80", "127.0.0.1:4000", "a" * 249 + ":65535", "[1.2.3.4]:1")),
    max_size=3,
)
bad_addresses = st.lists(
    st.sampled_from(("a:0", "a:01", "a:65536", "-a:1", "a", ":1", "[::1:80", "a b:1", "[g]:1", "[:]:1")),
    min_size=1,
    max_size=1,
)
multiaddrs = st.lists(
    st.sampled_from(("/ip4/1.2.3.4/tcp/1/p2p/12D3Koo", "/dns4/a-b.c/tcp/4/p2p/x", "/a/p2p/b/p2p/c")), max_size=2
)
bad_multiaddrs = st.lists(
    st.sampled_from(("/p2p/x", "a/p2p/x", "/a//p2p/x", "/a/p2p/", "/a/p2p/x/", "/a/p2p/x-y", "")),
    max_size=1,
)


@few
@given(addresses, st.one_of(st.just([]), bad_addresses), st.binary(max_size=40), st.booleans())
def test_invites(good: list[str], bad: list[str], damage: bytes, zero_key: bool) -> None:
    bootstraps = ["/dns4/a/tcp/1/p2p/x"]
    fixed = {"run_id": BASE, "aggregator": KEY.public, "certificate": bytes(32)}
    made = agree("make", "invite", **fixed, addresses=good, bootstraps=bootstraps)["ok"]["text"]
    assert agree("check", "invite", text=made)["ok"]["addresses"] == good
    assert "ok" in agree("check", "invite", text=f" {made[:30]}\r\n\t{made[30:]}\n")
    key = bytes(32) if zero_key else KEY.public
    agree("check", "invite", text=spec.make_invite(BASE, key, bytes(32), good + bad, bootstraps))
    body = base64_of(made) + damage
    agree("check", "invite", text=with_checksum(body))


@few
@given(addresses, multiaddrs, bad_multiaddrs)
def test_bootstraps_of_invites(good: list[str], bootstraps: list[str], bad: list[str]) -> None:
    agree("check", "invite", text=spec.make_invite(BASE, KEY.public, bytes(32), good, bootstraps + bad))


def base64_of(invite: str) -> bytes:
    return base64.urlsafe_b64decode(invite[4:] + "=" * (-len(invite) % 4))[:-4]


def with_checksum(body: bytes) -> str:
    encoded = base64.urlsafe_b64encode(body + spec.digest("invite", body)[:4]).decode()
    return "slp1" + encoded.rstrip("=")


INVITE = Invite(BASE, KEY.public, bytes(32), ("localhost:4001",), ()).to_text()
INVITE_HEAD = base64_of(INVITE)[:96]
DAMAGED_INVITES = {
    "nothing": "",
    "the prefix": "slp1",
    "a character less": INVITE[:-1],
    "a character more": INVITE + "A",
    "padding": INVITE + "=",
    "capitals": INVITE.upper(),
    "another version": "slp2" + INVITE[4:],
    "padding in front": INVITE.replace("slp1", "slp1="),
    "a plus": INVITE[:40] + "+" + INVITE[41:],
    "an umlaut": INVITE[:40] + "ä" + INVITE[41:],
    "a zero": INVITE[:40] + "\0" + INVITE[41:],
    "thousands of blanks": INVITE + " " * 5000,
    "a loose last bit": INVITE[:-1] + chr(ord(INVITE[-1]) + 1),
    "nowhere to dial": with_checksum(INVITE_HEAD + b"\0\0"),
    "no addresses": with_checksum(INVITE_HEAD),
    "no bootstraps": with_checksum(INVITE_HEAD + b"\0"),
    "an address that is not ASCII": with_checksum(INVITE_HEAD + b"\1\3\xff:1\0"),
    "too long": with_checksum(INVITE_HEAD + bytes([8]) + (b"\xfa" + b"a" * 246 + b":123") * 8 + b"\0"),
}


@pytest.mark.parametrize("name", DAMAGED_INVITES)
def test_damaged_invites(name: str) -> None:
    assert agree("check", "invite", text=DAMAGED_INVITES[name]) == {"refused": Code.BAD_INVITE}


@few
@given(
    addresses, st.sampled_from(("aggregators", "peers")), st.sampled_from((29, 30, 1800, 1801)), edits, st.booleans()
)
def test_dht_records(places: list[str], name: str, ahead: int, changes: Any, crossed: bool) -> None:
    key = f"slp/{BASE.hex()}/{name}"
    fields = {"certificate": bytes(32), "round": 7, "digest": BASE, "addresses": places}
    value = bytes.fromhex(agree("make", "dht", key=key, seed=KEY.to_bytes(), expires=5000, **fields)["ok"]["bytes"])
    asked = {"key": key, "subkey": KEY.public, "expiration": 5000, "now": 5000 - ahead}
    assert ("ok" in agree("check", "dht", **asked, bytes=value)) == (30 <= ahead <= 1800)
    asked["now"] = 4000
    agree("check", "dht", **asked, bytes=damaged(value, changes))
    asked["subkey"] = OTHER_KEY.public if crossed else bytes(32)
    assert "refused" in agree("check", "dht", **asked, bytes=value)


@few
@given(st.one_of(st.binary(max_size=80), bad_addresses.map(spec.pack_texts)), st.integers(1, 3))
def test_payloads_of_dht_records(rest: bytes, kind: int) -> None:
    key = f"slp/{BASE.hex()}/peers"
    payload = bytes(68)[: 68 - len(rest) % 3] + rest
    unsigned = struct.pack("<4sHBQH", b"SLDR", 1, kind, 5000, len(payload)) + payload
    value = unsigned + KEY.sign("dht", spec.dht_message(key, KEY.public, unsigned))
    agree("check", "dht", key=key, subkey=KEY.public, expiration=5000, now=4000, bytes=value)


@pytest.mark.parametrize("length", [1023, 1024, 1025])
def test_dht_records_of_about_a_kibibyte(length: int) -> None:
    places = ["a" * 249 + ":65535"] * 3 + ["a" * (length - 921) + ":1"]
    fields = {"certificate": bytes(32), "round": 7, "head_digest": BASE, "addresses": places}
    key = f"slp/{BASE.hex()}/peers"
    value = spec.make_dht_record(key, KEY.to_bytes(), 5000, **fields)
    assert len(value) == length
    asked = {"key": key, "subkey": KEY.public, "expiration": 5000, "now": 4000}
    assert ("ok" in agree("check", "dht", **asked, bytes=value)) == (length <= 1024)


DHT_KEYS = ("", "slp", "slp/{}", "slp/{}/peers/", "slp/A{}/peers", "slq/{}/peers", "slp/{}/peer", "slp/{}/peers\n")


@pytest.mark.parametrize("form", [*DHT_KEYS, "slp/0{}/peers"])
def test_other_dht_keys(form: str) -> None:
    request = {
        "key": form.format(BASE.hex()),
        "subkey": KEY.public,
        "expiration": 5000,
        "now": 4000,
        "bytes": bytes(100),
    }
    assert agree("check", "dht", **request) == {"refused": Code.BAD_DHT_KEY}


@few
@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32), edits)
def test_joining(nonce: bytes, certificate: bytes, changes: Any) -> None:
    parts = {"run_id": BASE, "client_nonce": nonce, "server_nonce": nonce[::-1], "certificate": certificate}
    agree("make", "proof", **parts, seed=OTHER_KEY.to_bytes(), aggregator=KEY.public)
    text = spec.transcript(BASE, OTHER_KEY.public, nonce, nonce[::-1], certificate)
    signature = damaged(KEY.sign("join-aggregator", text), changes)
    parts |= {"peer": OTHER_KEY.public, "aggregator": KEY.public}
    agree("check", "challenge", **parts, bytes=signature)
