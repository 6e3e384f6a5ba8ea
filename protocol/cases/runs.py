"""Signed runs (SPEC 2 and 3): one encoding, every rule of every key."""

import json
from collections.abc import Iterator
from typing import Any

from protocol.cases.vector import BASE, OPERATOR, PEER, STRANGER, Fields, Row, Vector, make_run, noise, table
from protocol.errors import Code
from protocol.identity import PrivateKey, digest
from protocol.run import canonical_json

Document = dict[str, Any]

# For each key of the tables of a run a value just outside its rule.
OUTSIDE: dict[str, Any] = {
    "model.architecture": "gpt",
    "model.vocab_size": 1,
    "model.hidden_size": 0,
    "model.intermediate_size": 4194305,
    "model.num_hidden_layers": 1025,
    "model.num_attention_heads": 0,
    "model.num_key_value_heads": 0,
    "model.max_position_embeddings": 16777217,
    "model.rope_theta": 0.5,
    "model.rms_norm_eps": 0.011,
    "model.tie_word_embeddings": 1,
    "model.initializer_range": 1.5,
    "model.init_seed": 9223372036854775808,
    "data.corpus": "-name",
    "data.corpus_sha256": "ABCDEF0123456789" * 4,
    "data.tokenizer": "sha256:" + "0" * 63,
    "data.sequence_length": 0,
    "data.validation_fraction": 0.51,
    "data.seed": -1,
    "inner.steps": 100001,
    "inner.batch_size": 0,
    "inner.learning_rate": 1.1,
    "inner.adam_beta1": 0.99991,
    "inner.adam_beta2": 1.0,
    "inner.adam_eps": 0.2,
    "inner.weight_decay": -0.1,
    "inner.grad_clip_norm": 0.0,
    "inner.warmup_steps": 1000001,
    "inner.schedule": "linear",
    "inner.min_lr_ratio": 1.0000000000000002,
    "inner.overlap": "yes",
    "compression.k": 4097,
    "compression.code_bits": 3,
    "compression.beta": 1.0000000000000002,
    "outer.rule": "median",
    "outer.alpha": 4.000000000000001,
    "outer.rounds": 0,
    "rounds.quorum": 1025,
    "rounds.grace_s_min": -1.0,
    "rounds.grace_s_max": 86401.0,
    "rounds.deadline_s": 604801.0,
    "rounds.start_peers": 0,
}


def document() -> Document:
    """The JSON of a run that is in order, to be changed."""
    parsed: Document = json.loads(make_run().to_json())
    return parsed


def changed(**changes: Any) -> bytes:
    """The canonical JSON of a run with some keys changed; `table__key` names a key in a table."""
    run = document()
    for path, value in changes.items():
        name, _, key = path.partition("__")
        if key:
            run[name][key] = value
        else:
            run[name] = value
    return canonical_json(run)


def signed(text: bytes, key: PrivateKey = OPERATOR) -> bytes:
    """A signed run, whatever its text says."""
    return b"SLRN\1\0" + len(text).to_bytes(4, "little") + text + key.sign("run", text)


def asked(data: bytes, run_id: bytes | None = None) -> Fields:
    """The fields of a request."""
    return {"run_id": run_id, "bytes": data}


def good_rows() -> Iterator[Row]:
    """Runs that must be accepted, at the ends of what is allowed."""
    text = make_run().to_json()
    yield "usual", "A run in order.", asked(signed(text), digest("run", text)), None
    yield "unasked", "Without a run_id any run is read.", asked(signed(text)), None
    extremes: dict[str, tuple[str, dict[str, Any]]] = {
        "alpha-half-to-even-down": ("alpha * 65536 = 2.5 rounds to 2.", {"outer__alpha": 2.5 / 65536}),
        "alpha-half-to-even-up": ("alpha * 65536 = 1.5 rounds to 2.", {"outer__alpha": 1.5 / 65536}),
        "alpha-largest": ("alpha_q16 is at most 2^18.", {"outer__alpha": 4.0}),
        "seed-63-bits": ("A seed may need all of 63 bits.", {"model__init_seed": 2**63 - 1, "data__seed": 2**63 - 1}),
        "small-reals": (
            "Reals are written as Python's repr does, 1e-08 for example.",
            {"inner__learning_rate": 1e-8, "inner__adam_eps": 0.0001, "model__rms_norm_eps": 1.5e-12},
        ),
        "large-reals": (
            "Reals below 1e16 are written without exponent and with a point.",
            {"model__rope_theta": 1e9, "inner__grad_clip_norm": 123456.7},
        ),
        "minus-zero": ("A real -0.0 is 0, and written -0.0.", {"compression__beta": -0.0}),
        "names": ("A name may hold a quote and a backslash, which JSON escapes.", {"layout": [['"', [1]], ["\\", []]]}),
        "name-200": ("A tensor's name has at most 200 characters.", {"layout": [["a" * 200, [1]]]}),
        "largest": ("2^40 values in all.", {"layout": [[f"t{number:03}", [2**31]] for number in range(512)]}),
        "sequence-longest": ("As long as the model's positions.", {"data__sequence_length": 1024}),
        "equal-times": (
            "Grace and deadline may be one.",
            {"rounds__grace_s_min": 30.0, "rounds__grace_s_max": 30.0, "rounds__deadline_s": 30.0},
        ),
        "shapes": ("Eight dimensions are allowed.", {"layout": [["a", [1, 2, 1, 2, 1, 2, 1, 2]], ["b", [2**31]]]}),
        "one-aggregator": ("One aggregator is enough.", {"aggregators": [PEER.public.hex()]}),
    }
    for name, (why, changes) in extremes.items():
        yield name, why, asked(signed(changed(**changes))), None


def envelope_rows() -> Iterator[Row]:
    """What is around the text, and the order of the rules."""
    text = make_run().to_json()
    data, run_id = signed(text), digest("run", text)
    broken = signed(text[:-1] + b" ")
    large = b"SLRN\1\0" + (4 * 2**20 + 1).to_bytes(4, "little")
    yield "magic", "It begins with SLRN.", asked(b"SLRM" + data[4:]), Code.BAD_MAGIC
    yield "empty", "No bytes have no magic.", asked(b""), Code.BAD_MAGIC
    yield "version", "Version 2 is not this one.", asked(data[:4] + b"\2\0" + data[6:]), Code.VERSION
    yield (
        "length-before-version",
        "Without a whole head nobody speaks of versions.",
        asked(b"SLRN\2\0\0\0\0"),
        Code.TRUNCATED,
    )
    yield "version-first", "The version comes before the length.", asked(b"SLRN\2\0" + bytes(4)), Code.VERSION
    yield "head-cut", "The head has ten bytes.", asked(data[:9]), Code.TRUNCATED
    yield "text-cut", "The text ends early.", asked(data[:200]), Code.TRUNCATED
    yield "signature-cut", "The signature lacks its last byte.", asked(data[:-1]), Code.TRUNCATED
    yield "trailing", "A byte follows the signature.", asked(data + b"\0"), Code.TRAILING
    yield "length-hostile", "A text has at most 4 MiB, whatever is there.", asked(large + text), Code.TOO_LARGE
    yield "length-2-32", "A declared length is believed of nobody.", asked(b"SLRN\1\0\xff\xff\xff\xff"), Code.TOO_LARGE
    yield "other", "Another run than the one asked for.", asked(data, digest("run", b"")), Code.OTHER_RUN
    yield "other-first", "The digest is compared before anything is parsed.", asked(broken, run_id), Code.OTHER_RUN
    yield "signer", "Only the operator's signature counts.", asked(signed(text, STRANGER)), Code.BAD_SIGNATURE
    flipped = asked(data[:-1] + bytes([data[-1] ^ 1]))
    yield "signature", "One bit of the signature differs.", flipped, Code.BAD_SIGNATURE
    yield "text-first", "The text is checked before the signature.", asked(broken[:-1] + b"\0"), Code.BAD_RUN


def spelling_rows() -> Iterator[Row]:
    """Texts that mean a run and are not its canonical JSON."""
    text = make_run().to_json()
    name, beta = b'"name":"vectors"', b'"beta":0.95'
    spellings: dict[str, tuple[str, bytes]] = {
        "blank": ("There are no blanks.", text.replace(b",", b", ", 1)),
        "line-end": ("Nothing follows the closing brace.", text + b"\n"),
        "order": ("Keys are sorted.", b"{" + name + b"," + text[1:].replace(name + b",", b"")),
        "twice": ("No key comes twice.", text.replace(name, name + b"," + name)),
        "escape": ("A character that needs no escape has none.", text.replace(b"vectors", b"\\u0076ectors")),
        "zero-at-end": ("Reals are as short as they can be.", text.replace(beta, beta + b"0")),
        "exponent": ("Reals are written as Python's repr does.", text.replace(beta, b'"beta":95e-2')),
        "capital-exponent": ("The exponent is a small e.", text.replace(b'"adam_eps":1e-08', b'"adam_eps":1E-08')),
        "short-exponent": ("The exponent has two digits.", text.replace(b'"adam_eps":1e-08', b'"adam_eps":1e-8')),
        "more-digits": ("The shortest decimal, not a longer one.", text.replace(beta, b'"beta":0.94999999999999996')),
        "real-without-point": ("A real has a point or an exponent.", text.replace(b'"alpha":1.0', b'"alpha":1')),
        "whole-with-point": ("A whole number has none.", text.replace(b'"quorum":2', b'"quorum":2.0')),
        "nan": ("No NaN.", text.replace(beta, b'"beta":NaN')),
        "infinity": ("No infinity.", text.replace(b'"rope_theta":10000.0', b'"rope_theta":Infinity')),
        "overflow": ("A real beyond float64 is an infinity.", text.replace(beta, b'"beta":1e999')),
        "not-ascii": ("ASCII alone.", text.replace(b"vectors", "véctors".encode())),
        "not-json": ("The braces must close.", text[:-1]),
        "empty": ("A text of no bytes.", b""),
        "list": ("A run is an object.", b"[]"),
        "deep": ("Nesting that would exhaust a parser's stack.", b"[" * 5000 + b"]" * 5000),
        "capital-hex": (
            "Hexadecimal digits are lower case.",
            text.replace(BASE.hex().encode(), BASE.hex().upper().encode()),
        ),
    }
    for label, (why, spelling) in spellings.items():
        assert spelling != text, label
        yield label, why, asked(signed(spelling)), Code.BAD_RUN


def rule_rows() -> Iterator[Row]:
    """Texts in canonical JSON that break one rule."""
    for path, value in OUTSIDE.items():
        text = changed(**{path.replace(".", "__"): value})
        yield path, f"{path} is {value!r}, outside its rule."[:110], asked(signed(text)), Code.BAD_RUN
    first, second = document()["aggregators"]
    rules: dict[str, tuple[str, dict[str, Any]]] = {
        "name": ("A name has no capital letters.", {"name": "Vectors"}),
        "name-65": ("A name has at most 64 characters.", {"name": "v" * 65}),
        "name-empty": ("A name has a character.", {"name": ""}),
        "name-line-end": ("A line end is no character of a name.", {"name": "vectors\n"}),
        "heads-width": ("hidden_size is a multiple of 2 * num_attention_heads.", {"model__hidden_size": 132}),
        "heads-groups": (
            "num_attention_heads is a multiple of num_key_value_heads.",
            {"model__num_key_value_heads": 3},
        ),
        "sequence": ("A sequence fits the model's positions.", {"data__sequence_length": 1025}),
        "grace-order": ("grace_s_min is at most grace_s_max.", {"rounds__grace_s_min": 31.0}),
        "deadline-order": ("grace_s_max is at most deadline_s.", {"rounds__deadline_s": 29.0}),
        "unknown-key": ("A key that nobody knows.", {"colour": "red"}),
        "unknown-key-in-table": ("A key that nobody knows, in a table.", {"inner__colour": "red"}),
        "null": ("null is no value.", {"inner__steps": None}),
        "text-for-number": ("A text is no number.", {"inner__steps": "4"}),
        "flag-for-number": ("A flag is no number.", {"inner__steps": True}),
        "number-for-table": ("A table is an object.", {"inner": 4}),
        "list-for-table": ("A table is an object.", {"inner": []}),
        "operator-short": ("A key has 64 digits.", {"operator": OPERATOR.public.hex()[:-2]}),
        "operator-blank": ("Digits and nothing else.", {"operator": OPERATOR.public.hex()[:-1] + " "}),
        "operator-small-order": ("The operator's key is valid.", {"operator": "00" * 32}),
        "aggregator-not-a-point": ("An aggregator's key is valid.", {"aggregators": ["02" + "00" * 31]}),
        "genesis-short": ("A root has 64 digits.", {"genesis_root": "00" * 31}),
        "genesis-null": ("A root is a text.", {"genesis_root": None}),
        "aggregators-none": ("There is at least one aggregator.", {"aggregators": []}),
        "aggregators-order": ("Aggregators ascend.", {"aggregators": [second, first]}),
        "aggregators-twice": ("Each aggregator once.", {"aggregators": [first, first]}),
        "aggregators-text": ("Aggregators are a list.", {"aggregators": first}),
        "aggregators-65": ("At most 64 aggregators.", {"aggregators": many_keys(65)}),
        "layout-none": ("A layout has a tensor.", {"layout": []}),
        "layout-order": ("Tensors are sorted by name.", {"layout": [["b", [1]], ["a", [1]]]}),
        "layout-twice": ("Each name once.", {"layout": [["a", [1]], ["a", [1]]]}),
        "layout-pair": ("An entry is a name and a shape.", {"layout": [["a"]]}),
        "layout-name-empty": ("A name has a character.", {"layout": [["", [1]]]}),
        "layout-name-201": ("A tensor's name has at most 200 characters.", {"layout": [["a" * 201, [1]]]}),
        "layout-name-blank": ("No blank in a tensor's name.", {"layout": [["a b", [1]]]}),
        "layout-name-accent": ("Names are ASCII.", {"layout": [["é", [1]]]}),
        "layout-dimension-0": ("Every dimension is at least 1.", {"layout": [["a", [4, 0]]]}),
        "layout-dimension-negative": ("Every dimension is at least 1.", {"layout": [["a", [-4, -4]]]}),
        "layout-dimension-real": ("A dimension is a whole number.", {"layout": [["a", [4.0]]]}),
        "layout-dimension-flag": ("A flag is no dimension.", {"layout": [["a", [True]]]}),
        "layout-9-dimensions": ("At most 8 dimensions.", {"layout": [["a", [1] * 9]]}),
        "layout-tensor-large": ("At most 2^31 values in a tensor.", {"layout": [["a", [65536, 32769]]]}),
        "layout-tensor-overflow": ("A product that wraps around in 64 bits.", {"layout": [["a", [2**31, 2**31, 4]]]}),
        "layout-large": ("At most 2^40 values in all.", {"layout": [[f"t{i:03}", [2**31]] for i in range(513)]}),
    }
    for label, (why, changes) in rules.items():
        yield label, why, asked(signed(changed(**changes))), Code.BAD_RUN
    for path in ("operator", "inner", "layout", "rounds__quorum"):
        run, (name, _, key) = document(), path.partition("__")
        del (run[name] if key else run)[key or name]
        label = path.replace("__", ".")
        yield f"without-{label}", f"{label} is missing.", asked(signed(canonical_json(run))), Code.BAD_RUN


def many_keys(count: int) -> list[str]:
    """So many valid keys, ascending."""
    return sorted(PrivateKey.from_bytes(noise(f"key {number}", 32)).public.hex() for number in range(count))


def vectors() -> Iterator[Vector]:
    """All vectors of the file."""
    yield from table("run", "check run", good_rows())
    yield from table("run-envelope", "check run", envelope_rows())
    yield from table("run-spelling", "check run", spelling_rows())
    yield from table("run-rule", "check run", rule_rows())
