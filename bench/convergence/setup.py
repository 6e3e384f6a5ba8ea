"""What one training of the study is: everything that decides its result, as one small value with a name of its own."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from bench.real_gradients import demo_settings, make_run
from protocol.run import RunConfig

METHODS = ("adamw", "diloco", "demo", "sparseloco")
QUANTIZERS = ("2 bit", "1 bit", "global grid", "fp32")


@dataclass(frozen=True)
class Weather:
    """What befalls the peers. All shares are chances of a peer in a round, drawn from the seed.

    An absent peer trains nothing, for `spell` rounds on end in the mean. A late one trains, and its packet misses the
    round. A partial one sends after a part of its steps that is drawn evenly, from `steps_min` to all but one. A
    forgetful one starts the round with Adam moments of zero, as a peer does whose disk was lost, and with an empty
    residual if `forgets_residual`.
    """

    absent: float = 0.0
    spell: float = 1.0
    late: float = 0.0
    returned: float = 1.0
    """Share of a late packet's values that returns to the residual: all as peers do, or none as in the reference."""
    partial: float = 0.0
    steps_min: int = 1
    forgetful: float = 0.0
    forgets_residual: bool = False

    @property
    def calm(self) -> bool:
        """Nothing befalls anybody."""
        return self == Weather()


@dataclass(frozen=True)
class Setup:
    """One training but for its seed. Losses are in nats a token, sizes in the units of `RunConfig`."""

    method: str = "sparseloco"
    corpus: str = "mixed"
    hidden: int = 128
    intermediate: int = 384
    layers: int = 2
    heads: int = 4
    initializer: float = 0.06
    sequence: int = 64
    batch: int = 4
    peers: int = 4
    rounds: int = 160
    """Rounds if nobody is ever missing; rounds * peers * steps * batch * sequence is the budget of tokens."""
    steps: int = 10
    learning_rate: float = 0.003
    warmup: int = 60
    schedule: str = "cosine"
    outer_rate: float = 1.0
    """Alpha of SparseLoCo, and the outer learning rate of DiLoCo."""
    momentum: float = 0.9
    """Nesterov momentum of DiLoCo's outer step; decay of the decoupled momentum of DeMo."""
    rule: str = "mean_of_senders"
    k: int = 128
    beta: float = 0.95
    quantizer: str = "2 bit"
    error_feedback: bool = True
    ahead: int = 0
    """With overlap: steps of the next round that are done before the update of this one is there."""
    domains: bool = False
    """Each peer trains on one kind of text instead of on all kinds."""
    weather: Weather = Weather()
    until: str = "trained"
    """The run ends when the budget is trained, when so many tokens were accepted, or after as many rounds."""

    def __post_init__(self) -> None:
        assert (
            self.method in METHODS and self.quantizer in QUANTIZERS and self.until in ("trained", "accepted", "rounds")
        )

    @property
    def budget(self) -> int:
        """Tokens that all peers together train on."""
        return self.rounds * self.peers * self.steps * self.batch * self.sequence

    def to_json(self) -> str:
        """All settings, keys in order, so that equal setups have equal texts."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @property
    def key(self) -> str:
        """A short name that only equal setups share."""
        return hashlib.sha256(self.to_json().encode("ascii")).hexdigest()[:16]


def setup_from(document: dict[str, object]) -> Setup:
    """The setup of `Setup.to_json`."""
    weather = document["weather"]
    assert isinstance(weather, dict)
    fields = {name: value for name, value in document.items() if name != "weather"}
    return Setup(**fields, weather=Weather(**weather))  # type: ignore[arg-type]  # JSON of our own


def run_of(setup: Setup) -> RunConfig:
    """The run whose replicas train this setup. The steps of AdamW data-parallel and DeMo are rounds * steps as well."""
    settings = demo_settings()
    settings = dataclasses.replace(
        settings,
        name="convergence",
        model=dataclasses.replace(
            settings.model,
            hidden_size=setup.hidden,
            intermediate_size=setup.intermediate,
            num_hidden_layers=setup.layers,
            num_attention_heads=setup.heads,
            num_key_value_heads=setup.heads,
            initializer_range=setup.initializer,
        ),
        data=dataclasses.replace(settings.data, sequence_length=setup.sequence),
        inner=dataclasses.replace(
            settings.inner,
            steps=setup.steps,
            batch_size=setup.batch,
            learning_rate=setup.learning_rate,
            warmup_steps=setup.warmup,
            schedule=setup.schedule,
        ),
        compression=dataclasses.replace(
            settings.compression, k=setup.k, beta=setup.beta, code_bits=1 if setup.quantizer == "1 bit" else 2
        ),
        outer=dataclasses.replace(
            settings.outer,
            rule=setup.rule,
            alpha=setup.outer_rate if setup.method == "sparseloco" else 1.0,
            rounds=setup.rounds,
        ),
    )
    return make_run(settings)
