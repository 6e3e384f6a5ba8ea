import ast
import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

import protocol.run
from protocol.errors import Code
from protocol.identity import PrivateKey, digest
from protocol.layout import Layout
from protocol.run import (
    CompressionConfig,
    DataConfig,
    InnerConfig,
    ModelConfig,
    OuterConfig,
    RoundConfig,
    RunConfig,
    RunSettings,
    SignedRun,
    parse_settings,
    sign_run,
)
from tests.protocol.codec_samples import refused

OPERATOR = PrivateKey.from_bytes(bytes(range(32)))
AGGREGATORS = tuple(PrivateKey.from_bytes(bytes([i]) * 32).public for i in range(3))
TABLES = (ModelConfig, DataConfig, InnerConfig, CompressionConfig, OuterConfig, RoundConfig, RunSettings, RunConfig)


def make_run(settings: RunSettings | None = None) -> RunConfig:
    return RunConfig.of(
        settings or RunSettings("a-run"),
        operator=OPERATOR.public,
        aggregators=AGGREGATORS,
        layout=Layout.of([("w", (3, 4)), ("b", (4,))]),
        genesis_root=bytes(range(32)),
    )


def document() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(make_run().to_json())
    return parsed


def encode(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def signed(text: bytes) -> bytes:
    return b"SLRN\1\0" + len(text).to_bytes(4, "little") + text + OPERATOR.sign("run", text)


def test_settings_default_to_a_small_run() -> None:
    settings = parse_settings('name = "first"')
    assert settings == RunSettings("first")
    assert (settings.compression.k, settings.compression.code_bits, settings.compression.beta) == (128, 2, 0.95)
    assert (settings.outer.rule, settings.outer.alpha, settings.outer.alpha_q16) == ("mean_of_senders", 1.0, 65536)
    assert make_run().nominal_tokens == settings.inner.steps * settings.inner.batch_size * settings.data.sequence_length


def test_settings_are_read_from_toml_and_whole_numbers_serve_as_reals() -> None:
    text = 'name = "x"\n[inner]\nsteps = 7\nlearning_rate = 1\n[outer]\nrule = "mean"\nalpha = 0.5\n'
    settings = parse_settings(text)
    assert (settings.inner.steps, settings.inner.learning_rate, type(settings.inner.learning_rate)) == (7, 1.0, float)
    assert (settings.outer.rule, settings.outer.alpha_q16) == ("mean", 32768)


@pytest.mark.parametrize(
    ("toml", "parts"),
    [
        ("", ['"name" is missing', "write name ="]),
        ('name = "A B"', ["name = 'A B'", "a-z, 0-9", "at the top"]),
        ("name = 3", ["name = 3", "a text"]),
        ('name = "x"\ninner = 5', ["inner = 5", "expected a table", "write [inner]"]),
        ('name = "x"\n[iner]\nsteps = 5', ["'iner'", "accepted keys: name, model", 'did you mean "inner"?']),
        ('name = "x"\n[inner]\nstep = 5', ["'step' in [inner]", "steps, batch_size", 'did you mean "steps"?']),
        ('name = "x"\n[inner]\nqqq = 5', ["'qqq' in [inner]", "remove it"]),
        ('name = "x"\n[inner]\nsteps = 0', ["inner.steps = 0", "a whole number from 1 to 100000", "under [inner]"]),
        ('name = "x"\n[inner]\nsteps = 1.0', ["inner.steps = 1.0", "a whole number"]),
        ('name = "x"\n[inner]\nsteps = true', ["inner.steps = True", "a whole number"]),
        ('name = "x"\n[inner]\nlearning_rate = nan', ["inner.learning_rate = nan", "a number from"]),
        ('name = "x"\n[inner]\nlearning_rate = inf', ["inner.learning_rate = inf", "a number from"]),
        ('name = "x"\n[inner]\nlearning_rate = "1"', ["inner.learning_rate = '1'", "a number from"]),
        ('name = "x"\n[inner]\nschedule = "linear"', ["inner.schedule", '"cosine", "constant"']),
        ('name = "x"\n[compression]\nk = 4097', ["compression.k = 4097", "from 1 to 4096"]),
        ('name = "x"\n[compression]\ncode_bits = 3', ["compression.code_bits = 3", "1, 2"]),
        ('name = "x"\n[outer]\nrule = "median"', ["outer.rule", '"mean", "mean_of_senders"']),
        ('name = "x"\n[outer]\nalpha = 5', ["outer.alpha = 5", "to 4.0"]),
        ('name = "x"\n[model]\ntie_word_embeddings = 1', ["model.tie_word_embeddings = 1", "false, true"]),
        ('name = "x"\n[model]\nhidden_size = 130', ["hidden_size = 130", "multiple of 2 * num_attention_heads"]),
        ('name = "x"\n[model]\nnum_key_value_heads = 3', ["num_key_value_heads = 3", "a divisor"]),
        ('name = "x"\n[data]\ncorpus_sha256 = "AB"', ["data.corpus_sha256", "64 lower-case hexadecimal digits"]),
        ('name = "x"\n[data]\ntokenizer = "gpt2"', ["data.tokenizer", "sha256:"]),
        (
            'name = "x"\n[data]\nsequence_length = 2048',
            ["sequence_length = 2048", "raise model.max_position_embeddings"],
        ),
        ('name = "x"\n[rounds]\ngrace_s_min = 90.0', ["grace_s_min = 90.0", "grace_s_min <= grace_s_max"]),
        ("name = ", ["not TOML", "mend the line"]),
    ],
)
def test_a_bad_setting_is_named_with_what_is_accepted_and_the_remedy(toml: str, parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_settings(toml)
    for part in parts:
        assert part in str(caught.value)


def test_a_bad_value_is_refused_however_the_settings_are_made() -> None:
    with pytest.raises(ValueError, match=r"compression\.k = 0"):
        CompressionConfig(k=0)
    with pytest.raises(ValueError, match=r"outer\.alpha"):
        dataclasses.replace(OuterConfig(), alpha=0.0)


def test_every_field_says_what_it_means() -> None:
    tree = ast.parse(inspect.getsource(protocol.run))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for table in TABLES:
        body = classes[table.__name__].body
        for field, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
                assert isinstance(after, ast.Expr), f"{table.__name__}.{ast.unparse(field.target)} has no docstring"
                assert isinstance(after.value, ast.Constant)
                assert isinstance(after.value.value, str)


def test_the_json_is_canonical_and_names_the_run() -> None:
    run = make_run()
    text = run.to_json()
    assert text == encode(document())
    assert b" " not in text
    assert run.run_id == digest("run", text)
    assert RunConfig.from_json(text) == run
    assert dataclasses.replace(run, name="b-run").run_id != run.run_id


def test_reals_are_written_as_the_shortest_decimal() -> None:
    run = make_run(parse_settings('name = "x"\n[inner]\nlearning_rate = 3e-5\nweight_decay = 0\n'))
    assert b'"learning_rate":3e-05' in run.to_json()
    assert b'"weight_decay":0.0' in run.to_json()


def test_aggregators_are_kept_in_order() -> None:
    run = make_run()
    assert list(run.aggregators) == sorted(AGGREGATORS)
    with pytest.raises(ValueError, match="ascending"):
        dataclasses.replace(run, aggregators=tuple(sorted(AGGREGATORS, reverse=True)))
    with pytest.raises(ValueError, match="1 to 64 aggregators"):
        dataclasses.replace(run, aggregators=())


def test_a_run_with_an_unusable_key_or_root_is_refused() -> None:
    run = make_run()
    with pytest.raises(ValueError, match="unusable"):
        dataclasses.replace(run, operator=bytes(32))
    with pytest.raises(ValueError, match="genesis_root"):
        dataclasses.replace(run, genesis_root=bytes(31))


def test_a_signed_run_travels() -> None:
    run = make_run()
    data = sign_run(run, OPERATOR).to_bytes()
    assert data == signed(run.to_json())
    assert SignedRun.from_bytes(data, run_id=run.run_id).config == run
    assert SignedRun.from_bytes(data, run_id=None).to_bytes() == data


def test_a_signed_run_is_refused_unless_its_bytes_are_those_asked_for() -> None:
    run = make_run()
    data = sign_run(run, OPERATOR).to_bytes()
    other = sign_run(make_run(RunSettings("b-run")), OPERATOR).to_bytes()
    for bad, code in (
        (b"SLRX" + data[4:], Code.BAD_MAGIC),
        (b"", Code.BAD_MAGIC),
        (data[:9], Code.TRUNCATED),
        (data[:-1], Code.TRUNCATED),
        (data + b"\0", Code.TRAILING),
        (data[:4] + b"\2" + data[5:], Code.VERSION),
        (data[:6] + b"\xff\xff\xff\xff" + data[10:], Code.TOO_LARGE),
        (other, Code.OTHER_RUN),
        (data[:-1] + bytes([data[-1] ^ 1]), Code.BAD_SIGNATURE),
    ):
        with refused(code):
            SignedRun.from_bytes(bad, run_id=run.run_id)
    with refused(Code.BAD_SIGNATURE):
        SignedRun.from_bytes(
            signed(run.to_json())[:-64] + PrivateKey.generate().sign("run", run.to_json()), run_id=None
        )


def spoilt() -> list[tuple[str, bytes]]:
    """Texts that are not a run in canonical JSON, each for another reason."""
    good = document()

    def changed(table: str, key: str, value: Any) -> bytes:
        return encode({**good, table: {**good[table], key: value}})

    text = make_run().to_json()
    return [
        ("unknown key", encode({**good, "extra": 1})),
        ("unknown key in a table", changed("inner", "extra", 1)),
        ("missing key", encode({key: value for key, value in good.items() if key != "outer"})),
        ("missing key in a table", encode({**good, "inner": {k: v for k, v in good["inner"].items() if k != "steps"}})),
        ("blank", text.replace(b":", b": ", 1)),
        ("other order", json.dumps(dict(reversed(good.items())), separators=(",", ":")).encode()),
        ("key twice", text[:-1] + b',"name":"a-run"}'),
        ("whole number for a real", changed("inner", "learning_rate", 1)),
        ("real for a whole number", changed("inner", "steps", 20.0)),
        ("true for a number", changed("inner", "steps", True)),
        ("longer decimal", text.replace(b"0.003", b"0.0030")),
        ("NaN", text.replace(b"0.003", b"NaN")),
        ("infinity by overflow", text.replace(b"0.003", b"1e999")),
        ("value out of range", changed("compression", "k", 0)),
        ("no object", b"[]"),
        ("null", b"null"),
        ("no JSON", b"{"),
        ("not UTF-8", b"\xff"),
        ("not ASCII", text.replace(b"a-run", "ä-run".encode())),
        ("deep nesting", b"[" * 200_000),
        ("huge number", text.replace(b"0.003", b"9" * 10_000)),
        ("upper-case hex", encode({**good, "genesis_root": good["genesis_root"].upper()})),
        ("hex with blanks", encode({**good, "genesis_root": good["genesis_root"] + " "})),
        ("no hex", encode({**good, "operator": "zz"})),
        ("number for hex", encode({**good, "operator": 7})),
        ("aggregators no list", encode({**good, "aggregators": 7})),
        ("aggregator no text", encode({**good, "aggregators": [7]})),
        ("layout no list", encode({**good, "layout": 7})),
        ("tensor no pair", encode({**good, "layout": [["b"]]})),
        ("tensor name no text", encode({**good, "layout": [[7, [1]]]})),
        ("tensor extent no number", encode({**good, "layout": [["b", ["4"]]]})),
        ("tensor extent true", encode({**good, "layout": [["b", [True]]]})),
        ("tensors out of order", encode({**good, "layout": good["layout"][::-1]})),
    ]


@pytest.mark.parametrize(("why", "text"), spoilt(), ids=[why for why, _ in spoilt()])
def test_a_run_that_is_not_canonical_is_refused(why: str, text: bytes) -> None:
    with refused(Code.BAD_RUN):
        SignedRun.from_bytes(signed(text), run_id=None)


def test_nothing_is_parsed_before_the_hash_fits() -> None:
    with refused(Code.OTHER_RUN):
        SignedRun.from_bytes(signed(b"[" * 1000), run_id=make_run().run_id)


def test_the_specification_lists_every_key_with_what_is_accepted() -> None:
    specification = (Path(protocol.run.__file__).parent / "SPEC.md").read_text("utf-8")
    listed = re.findall(r"^\| `([a-z0-9_.]+)` \| (.+) \|$", specification, re.MULTILINE)
    rows = []
    for prefix, table in [("", RunSettings), *((f"{name}.", kind) for name, kind in protocol.run._TABLES.items())]:
        for name, hint in get_type_hints(table, include_extras=True).items():
            if get_origin(hint) is Annotated:
                kind, rule = get_args(hint)
                rows.append((f"{prefix}{name}", f"{protocol.run._KIND[kind]} {rule}"))
    assert listed == rows
