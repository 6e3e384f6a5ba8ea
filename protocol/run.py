"""What all participants of a run agree on: RunConfig, its canonical bytes, its name and its signature (SPEC 2).

An operator writes `RunSettings` as TOML. `run new` adds the keys, the layout and the state root of the initial
parameters, which makes a `RunConfig`; its canonical JSON is hashed to the `run_id` and signed.
"""

import dataclasses
import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from protocol.errors import Code, ProtocolError
from protocol.identity import SIGNATURE_BYTES, PrivateKey, check_key, digest, verify
from protocol.layout import Layout, TensorSpec
from protocol.limits import ALPHA_MAX, ALPHA_ONE, CHUNK, CONTRIBUTORS_MAX, RUN_BYTES_MAX, VERSION

_MAGIC = b"SLRN"
_HEAD_BYTES = 10
AGGREGATORS_MAX = 64
AMENDABLE = ("inner", "compression", "outer", "rounds")  # the tables that an amendment may change
Setting = bool | int | float | str


@dataclass(frozen=True)
class _Between:
    """A number from low to high, both included."""

    low: float
    high: float

    def accepts(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high)

    def __str__(self) -> str:
        return f"from {self.low} to {self.high}"


@dataclass(frozen=True)
class _OneOf:
    """One of a few values."""

    values: tuple[Any, ...]

    def accepts(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return "that is one of " + ", ".join(json.dumps(value) for value in self.values)


@dataclass(frozen=True)
class _Text:
    """A text of a certain form."""

    pattern: str
    form: str

    def accepts(self, value: Any) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return f"of the form: {self.form}"


_KIND = {int: "a whole number", float: "a number", str: "a text", bool: "a flag"}
_NAME = _Text("[a-z0-9][a-z0-9._-]{0,63}", "1 to 64 of a-z, 0-9, dot, underscore and hyphen")


class _Table:
    """A table of the settings. Every field is checked on construction, wherever its value came from."""

    table: ClassVar[str]

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            if get_origin(hint) is Annotated:
                kind, rule = get_args(hint)
                self._check(name, kind, rule)

    def _check(self, name: str, kind: type, rule: _Between | _OneOf | _Text) -> None:
        value = getattr(self, name)
        if kind is float and type(value) is int:
            value = float(value)
            object.__setattr__(self, name, value)
        finite = type(value) is not float or math.isfinite(value)
        if type(value) is not kind or not finite or not rule.accepts(value):
            key, place = (f"{self.table}.{name}", f"under [{self.table}]") if self.table else (name, "at the top")
            raise ValueError(
                f"{key} = {_shown(value)} is not accepted; expected {_KIND[kind]} {rule}; "
                f"write such a value for {name} {place}"
            )

    def _demand(self, holds: bool, problem: str, remedy: str) -> None:
        if not holds:
            place = f"[{self.table}] " if self.table else ""
            raise ValueError(f"{place}{problem}; {remedy}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class ModelConfig(_Table):
    """Shape of the model, in Hugging Face's names, and how its first parameters are drawn."""

    table: ClassVar[str] = "model"

    architecture: Annotated[str, _OneOf(("llama",))] = "llama"
    """Family of the model: a Llama-style decoder (RMSNorm, rotary positions, SwiGLU, grouped queries)."""
    vocab_size: Annotated[int, _Between(2, 1 << 24)] = 260
    """Number of distinct tokens; at least what the tokenizer needs (260 for bytes)."""
    hidden_size: Annotated[int, _Between(1, 1 << 20)] = 128
    """Width of the residual stream, in values per token."""
    intermediate_size: Annotated[int, _Between(1, 1 << 22)] = 352
    """Width of the feed-forward layer; about 8/3 of hidden_size."""
    num_hidden_layers: Annotated[int, _Between(1, 1024)] = 4
    """Number of decoder layers."""
    num_attention_heads: Annotated[int, _Between(1, 1024)] = 4
    """Number of query heads; hidden_size is a multiple of it."""
    num_key_value_heads: Annotated[int, _Between(1, 1024)] = 4
    """Number of key and value heads; num_attention_heads is a multiple of it."""
    max_position_embeddings: Annotated[int, _Between(1, 1 << 24)] = 1024
    """Longest context in tokens that the exported model declares; at least data.sequence_length."""
    rope_theta: Annotated[float, _Between(1.0, 1e9)] = 10000.0
    """Base of the rotary position frequencies."""
    rms_norm_eps: Annotated[float, _Between(1e-12, 1e-2)] = 1e-5
    """Added to the mean square in RMSNorm so that it never divides by zero."""
    tie_word_embeddings: Annotated[bool, _OneOf((False, True))] = True
    """Whether the output layer shares the embedding matrix; saves a third of a small model."""
    initializer_range: Annotated[float, _Between(1e-6, 1.0)] = 0.02
    """Standard deviation of the initial weights."""
    init_seed: Annotated[int, _Between(0, 2**63 - 1)] = 1
    """Seed of the initial weights; the same seed gives the same genesis_root everywhere."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._demand(
            self.hidden_size % (2 * self.num_attention_heads) == 0,
            f"hidden_size = {self.hidden_size} does not give {self.num_attention_heads} heads of even width",
            "make hidden_size a multiple of 2 * num_attention_heads",
        )
        self._demand(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads = {self.num_key_value_heads}",
            "make num_key_value_heads a divisor of num_attention_heads",
        )


@dataclass(frozen=True)
class DataConfig(_Table):
    """Which text is trained on and how it is cut into sequences."""

    table: ClassVar[str] = "data"

    corpus: Annotated[str, _NAME] = "state-of-the-union"
    """The embedded corpus, or a name that each peer maps to a folder of token shards in its own settings."""
    corpus_sha256: Annotated[str, _Text("([0-9a-f]{64})?", "64 lower-case hexadecimal digits, or empty")] = ""
    """Hash of the corpus, so that all train on the same text; empty lets `run new` fill it in."""
    tokenizer: Annotated[
        str, _Text("bytes|sha256:[0-9a-f]{64}", '"bytes", or "sha256:" and the hash of a tokenizer.json')
    ] = "bytes"
    """How text becomes tokens: one a byte, or by the tokenizer.json with this hash, which each peer maps to a path."""
    sequence_length: Annotated[int, _Between(1, 1 << 20)] = 256
    """Tokens predicted in one training sequence."""
    validation_fraction: Annotated[float, _Between(0.0001, 0.5)] = 0.02
    """Share of the corpus that nobody trains on."""
    seed: Annotated[int, _Between(0, 2**63 - 1)] = 1
    """Seed of the order in which windows of the corpus are dealt to rounds and peers."""


@dataclass(frozen=True)
class InnerConfig(_Table):
    """The local optimizer (AdamW) between two outer steps."""

    table: ClassVar[str] = "inner"

    steps: Annotated[int, _Between(1, 100_000)] = 20
    """Inner steps in a round (H). More steps mean less traffic a token and more drift between replicas."""
    batch_size: Annotated[int, _Between(1, 1 << 16)] = 8
    """Sequences in the batch of one inner step on one replica."""
    learning_rate: Annotated[float, _Between(1e-8, 1.0)] = 0.003
    """Peak learning rate. Small models want about 3e-3, a billion parameters about 3e-4."""
    adam_beta1: Annotated[float, _Between(0.0, 0.9999)] = 0.9
    """Decay of the mean of the gradients."""
    adam_beta2: Annotated[float, _Between(0.0, 0.99999)] = 0.95
    """Decay of the mean of their squares."""
    adam_eps: Annotated[float, _Between(1e-12, 0.1)] = 1e-8
    """Added to the denominator of the step."""
    weight_decay: Annotated[float, _Between(0.0, 1.0)] = 0.1
    """Decoupled weight decay on matrices; norms are exempt."""
    grad_clip_norm: Annotated[float, _Between(1e-6, 1e6)] = 1.0
    """The gradient is scaled down to at most this norm before each step."""
    warmup_steps: Annotated[int, _Between(0, 1_000_000)] = 20
    """Inner steps over which the learning rate rises from zero."""
    schedule: Annotated[str, _OneOf(("cosine", "constant"))] = "cosine"
    """How the learning rate goes on after the warm-up, over inner.steps * outer.rounds steps."""
    min_lr_ratio: Annotated[float, _Between(0.0, 1.0)] = 0.1
    """Where the cosine ends, as a share of learning_rate."""
    overlap: Annotated[bool, _OneOf((False, True))] = False
    """Whether replicas train on while packet and update travel; hides the network and costs a little loss."""


@dataclass(frozen=True)
class CompressionConfig(_Table):
    """What a packet keeps of the pseudo-gradient."""

    table: ClassVar[str] = "compression"

    k: Annotated[int, _Between(1, CHUNK)] = 128
    """Values kept of each chunk of 4096. Runs of over 150 rounds do well with 64; short runs want 128 to 256."""
    code_bits: Annotated[int, _OneOf((1, 2))] = 2
    """Bits of a sent value: 2 is a sign and one of two magnitudes per chunk, 1 is the sign alone."""
    beta: Annotated[float, _Between(0.0, 1.0)] = 0.95
    """Share of the residual that is carried into the next round (error feedback)."""


@dataclass(frozen=True)
class OuterConfig(_Table):
    """How packets become the update that every replica applies."""

    table: ClassVar[str] = "outer"

    rule: Annotated[str, _OneOf(("mean", "mean_of_senders"))] = "mean_of_senders"
    """Divide each value by all contributors (`mean`) or by those that sent it (`mean_of_senders`).

    These are two algorithms: the second takes steps 6 to 16 times larger at 20 peers. Tune alpha for each."""
    alpha: Annotated[float, _Between(1 / ALPHA_ONE, ALPHA_MAX / ALPHA_ONE)] = 1.0
    """Outer learning rate; rounded to a multiple of 2^-16."""
    rounds: Annotated[int, _Between(1, 100_000_000)] = 60
    """Applied or null rounds after which the run is complete."""

    @property
    def alpha_q16(self) -> int:
        """Alpha in units of 2^-16, from 1 to 2^18; a half rounds to even."""
        return round(self.alpha * ALPHA_ONE)


@dataclass(frozen=True)
class RoundConfig(_Table):
    """When a round closes."""

    table: ClassVar[str] = "rounds"

    quorum: Annotated[int, _Between(1, CONTRIBUTORS_MAX)] = 1
    """Packets that a round needs; with fewer at the deadline it is a null round, which changes nothing."""
    grace_s_min: Annotated[float, _Between(0.0, 86400.0)] = 2.0
    """After the quorum, wait at least this many seconds for the others."""
    grace_s_max: Annotated[float, _Between(0.0, 86400.0)] = 60.0
    """After the quorum, wait at most this many seconds for the others."""
    deadline_s: Annotated[float, _Between(0.1, 604800.0)] = 300.0
    """Seconds after its opening when a round closes whatever has arrived."""
    start_peers: Annotated[int, _Between(1, CONTRIBUTORS_MAX)] = 1
    """The first round does not close early before so many peers are present."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._demand(
            self.grace_s_min <= self.grace_s_max <= self.deadline_s,
            f"grace_s_min = {self.grace_s_min}, grace_s_max = {self.grace_s_max} and deadline_s = {self.deadline_s} "
            "are out of order",
            "make grace_s_min <= grace_s_max <= deadline_s",
        )


@dataclass(frozen=True)
class RunSettings(_Table):
    """The part of a run that its operator writes."""

    table: ClassVar[str] = ""

    name: Annotated[str, _NAME]
    """What people call this run; the run_id names it exactly."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape and initialization of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus and tokens."""
    inner: InnerConfig = field(default_factory=InnerConfig)
    """Local optimizer."""
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    """What a packet keeps."""
    outer: OuterConfig = field(default_factory=OuterConfig)
    """Aggregation rule and outer step."""
    rounds: RoundConfig = field(default_factory=RoundConfig)
    """When a round closes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._demand(
            self.data.sequence_length <= self.model.max_position_embeddings,
            f"data.sequence_length = {self.data.sequence_length} is above model.max_position_embeddings = "
            f"{self.model.max_position_embeddings}",
            "raise model.max_position_embeddings or lower data.sequence_length",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig(RunSettings):
    """Everything the participants of a run agree on. Its canonical JSON is hashed to `run_id`."""

    operator: bytes
    """Public key that signs the run."""
    aggregators: tuple[bytes, ...]
    """Public keys that may sign round records, in ascending order."""
    layout: Layout
    """Names and shapes of the tensors."""
    genesis_root: bytes
    """State root of the initial parameters."""
    amends: bytes = b""
    """Of settings that amendments changed: the run_id, which stays that of the run. Not part of the JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in (self.operator, *self.aggregators):
            try:
                check_key(key)
            except ProtocolError as error:
                raise ValueError(f"a key of the operator or an aggregator is unusable: {error.detail}") from None
        self._demand(
            1 <= len(self.aggregators) <= AGGREGATORS_MAX and list(self.aggregators) == sorted(set(self.aggregators)),
            "aggregators are not distinct keys in ascending order",
            f"name 1 to {AGGREGATORS_MAX} aggregators, sorted, each once",
        )
        self._demand(len(self.genesis_root) == 32, "genesis_root is not a state root", "it has 32 bytes")

    @classmethod
    def of(
        cls,
        settings: RunSettings,
        *,
        operator: bytes,
        aggregators: tuple[bytes, ...],
        layout: Layout,
        genesis_root: bytes,
    ) -> "RunConfig":
        """Complete what the operator wrote with what `run new` computed; aggregators in any order."""
        written = {item.name: getattr(settings, item.name) for item in dataclasses.fields(RunSettings)}
        keys = tuple(sorted(set(aggregators)))
        return cls(**written, operator=operator, aggregators=keys, layout=layout, genesis_root=genesis_root)

    def to_json(self) -> bytes:
        """The canonical JSON of SPEC 2."""
        document: dict[str, Any] = {"name": self.name}
        for name in _TABLES:
            document[name] = dataclasses.asdict(getattr(self, name))
        document["operator"] = self.operator.hex()
        document["aggregators"] = [key.hex() for key in self.aggregators]
        document["layout"] = [[tensor.name, list(tensor.shape)] for tensor in self.layout.tensors]
        document["genesis_root"] = self.genesis_root.hex()
        return canonical_json(document)

    @classmethod
    def from_json(cls, data: bytes) -> "RunConfig":
        """Read a run's canonical JSON. Raises ProtocolError BAD_RUN on anything else."""
        try:
            document = json.loads(data.decode("ascii"), parse_constant=_refuse_constant)
            config = _run_of(document)
        except (ValueError, TypeError, RecursionError) as error:
            raise ProtocolError(Code.BAD_RUN, str(error) or type(error).__name__) from None
        if config.to_json() != data:
            raise ProtocolError(Code.BAD_RUN, "the run is not written in canonical JSON")
        return config

    @cached_property
    def run_id(self) -> bytes:
        """The 32 bytes that name this run, whatever amendments have changed since."""
        return self.amends or digest("run", self.to_json())

    def amended(self, changes: Mapping[str, Setting]) -> "RunConfig":
        """Return the same run with other settings, such as {"inner.learning_rate": 0.001}.

        Raises ValueError that names the key, what is accepted and the remedy."""
        tables: dict[str, dict[str, Setting]] = {}
        for key, value in changes.items():
            kind_of_setting(key)
            table, _, name = key.partition(".")
            tables.setdefault(table, {})[name] = value
        changed: dict[str, Any] = {
            table: dataclasses.replace(getattr(self, table), **values) for table, values in tables.items()
        }
        return dataclasses.replace(self, **changed, amends=self.run_id)

    @property
    def nominal_tokens(self) -> int:
        """Tokens that one replica trains on in a full round; a packet of so many has weight 1024."""
        return self.inner.steps * self.inner.batch_size * self.data.sequence_length


_TABLES: dict[str, Any] = {
    "model": ModelConfig,
    "data": DataConfig,
    "inner": InnerConfig,
    "compression": CompressionConfig,
    "outer": OuterConfig,
    "rounds": RoundConfig,
}


@cache
def _amendable() -> dict[str, tuple[type, _Between | _OneOf | _Text]]:
    """Type and rule of every setting that an amendment may change, by its key such as "inner.learning_rate"."""
    return {
        f"{table}.{name}": get_args(hint)
        for table in AMENDABLE
        for name, hint in get_type_hints(_TABLES[table], include_extras=True).items()
        if get_origin(hint) is Annotated
    }


def kind_of_setting(key: str) -> type:
    """The type (bool, int, float or str) of a setting such as "inner.learning_rate" that an amendment may change.

    Raises ValueError with the remedy when there is no such setting, or when it cannot change."""
    accepted = _amendable()
    if key not in accepted and key.partition(".")[0] in {"name", *_TABLES} - set(AMENDABLE):
        raise ValueError(
            f"{_shown(key)} is part of what the run is and cannot change; "
            f"only settings of {', '.join(AMENDABLE)} can; start a new run for anything else"
        )
    if key not in accepted:
        near = difflib.get_close_matches(key[:64], accepted, n=1)
        remedy = f'did you mean "{near[0]}"?' if near else 'write it as "table.key", for example "inner.learning_rate"'
        raise ValueError(f"unknown setting {_shown(key)}; {remedy}")
    return accepted[key][0]


def is_setting(key: str, value: Setting) -> bool:
    """Whether an amendment may give this value, in its one form, to the setting of this key."""
    kind, rule = _amendable().get(key, (None, None))
    return rule is not None and type(value) is kind and rule.accepts(value)


def canonical_json(document: Any) -> bytes:
    """Encode by the rule of SPEC 2: sorted keys, no blanks, ASCII, finite numbers."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode(
        "ascii"
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of canonical JSON")


def _table_of(kind: Any, values: Any) -> Any:
    """Make one table from parsed values, refusing unknown keys by name."""
    if not isinstance(values, dict):
        raise ValueError(
            f"{kind.table} = {_shown(values)} is not accepted; expected a table; "
            f"write [{kind.table}] and its keys below it"
        )
    _refuse_unknown(values, [item.name for item in dataclasses.fields(kind)], f" in [{kind.table}]")
    return kind(**values)


def _refuse_unknown(values: dict[str, Any], accepted: list[str], place: str) -> None:
    for key in values:
        if key not in accepted:
            near = difflib.get_close_matches(key[:64], accepted, n=1)
            remedy = f'did you mean "{near[0]}"?' if near else "remove it"
            raise ValueError(f"unknown key {_shown(key)}{place}; accepted keys: {', '.join(accepted)}; {remedy}")


def _run_of(document: Any) -> RunConfig:
    """Make a RunConfig from parsed JSON. Raises ValueError or TypeError."""
    accepted = [item.name for item in dataclasses.fields(RunConfig) if item.name != "amends"]
    if not isinstance(document, dict):
        raise ValueError("a run is a JSON object")
    _refuse_unknown(document, accepted, "")
    missing = [name for name in accepted if name not in document]
    if missing:
        raise ValueError(f"the run has no {missing[0]}")
    values = {name: _table_of(kind, document[name]) for name, kind in _TABLES.items()}
    return RunConfig(
        name=document["name"],
        **values,
        operator=bytes.fromhex(document["operator"]),
        aggregators=tuple(bytes.fromhex(key) for key in document["aggregators"]),
        layout=Layout(tuple(_tensor_of(entry) for entry in document["layout"])),
        genesis_root=bytes.fromhex(document["genesis_root"]),
    )


def _tensor_of(entry: Any) -> TensorSpec:
    name, shape = entry
    if not isinstance(name, str) or not isinstance(shape, list) or not all(type(extent) is int for extent in shape):
        raise ValueError(f"the layout entry {_shown(entry)} is not a name and a shape")
    return TensorSpec(name, tuple(shape))


def parse_settings(toml_text: str) -> RunSettings:
    """Read what an operator wrote. Raises ValueError that names the key, what is accepted and the remedy."""
    try:
        document = tomllib.loads(toml_text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"this is not TOML: {error}; mend the line that it names") from None
    _refuse_unknown(document, ["name", *_TABLES], "")
    if "name" not in document:
        raise ValueError('the key "name" is missing; expected a text; write name = "my-run" at the top')
    return RunSettings(
        document.pop("name"), **{name: _table_of(_TABLES[name], values) for name, values in document.items()}
    )


@dataclass(frozen=True)
class SignedRun:
    """A run with the signature of its operator, as it travels."""

    config: RunConfig
    signature: bytes

    def to_bytes(self) -> bytes:
        """The form of SPEC 2."""
        text = self.config.to_json()
        return _MAGIC + VERSION.to_bytes(2, "little") + len(text).to_bytes(4, "little") + text + self.signature

    @classmethod
    def from_bytes(cls, data: bytes, *, run_id: bytes | None) -> "SignedRun":
        """Read and verify a signed run; with a run_id nothing is parsed before the hash fits.

        Raises ProtocolError: BAD_MAGIC, VERSION, TRUNCATED, TRAILING, TOO_LARGE, OTHER_RUN, BAD_RUN, BAD_KEY or
        BAD_SIGNATURE.
        """
        if data[:4] != _MAGIC:
            raise ProtocolError(Code.BAD_MAGIC, "these bytes are not a signed run")
        if len(data) < _HEAD_BYTES:
            raise ProtocolError(Code.TRUNCATED, "the signed run ends in its head")
        if int.from_bytes(data[4:6], "little") != VERSION:
            raise ProtocolError(
                Code.VERSION, f"the run has version {int.from_bytes(data[4:6], 'little')}, this program reads {VERSION}"
            )
        length = int.from_bytes(data[6:10], "little")
        if length > RUN_BYTES_MAX:
            raise ProtocolError(Code.TOO_LARGE, f"a run has at most {RUN_BYTES_MAX} bytes, this one declares {length}")
        end = _HEAD_BYTES + length + SIGNATURE_BYTES
        if len(data) != end:
            raise ProtocolError(
                Code.TRUNCATED if len(data) < end else Code.TRAILING, f"the signed run has {len(data)} bytes, not {end}"
            )
        text, signature = data[_HEAD_BYTES:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]
        if run_id is not None and digest("run", text) != run_id:
            raise ProtocolError(Code.OTHER_RUN, "these bytes are another run than the one asked for")
        config = RunConfig.from_json(text)
        verify(config.operator, "run", text, signature)
        return cls(config, signature)


def sign_run(config: RunConfig, key: PrivateKey) -> SignedRun:
    """Sign a run with its operator's key."""
    assert key.public == config.operator, "a run is signed by its operator"
    assert not config.amends, "what is signed is the run itself, not what amendments made of it"
    return SignedRun(config, key.sign("run", config.to_json()))
