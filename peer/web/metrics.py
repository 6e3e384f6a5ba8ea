"""The figures of docs/metrics.md in Prometheus' text format."""

from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from peer.web.board import ALARMS, Live, View, alarms, newest_loss, paused, with_bits

Reading = tuple[View, Live, int, int]  # and the time in ms since 1970, and bytes free on the disk


class Figures(Collector):
    """Prometheus' view of the newest reading; there are no figures before the first."""

    def __init__(self, read: Callable[[], Reading | None]) -> None:
        self._read = read
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """The whole page, UTF-8."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are known when there is a reading."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Each figure that has a value."""
        reading = self._read()
        if reading is not None:
            view, live, now_ms, disk_free = reading
            for name, help_text, value in (*_of_run(view, live), *_of_rounds(view, live), *_of_learning(view, live)):
                if value is not None:
                    yield GaugeMetricFamily(f"sparseloco_{name}", help_text, value=float(value))
            yield GaugeMetricFamily("sparseloco_disk_free_bytes", "Free on the disk of the ledger.", value=disk_free)
            yield from _labelled(view, live, now_ms)


Figure = tuple[str, str, float | None]


def _of_run(view: View, live: Live) -> list[Figure]:
    settings = view.settings
    return [
        ("parameters", "Values in the model.", view.run.layout.size),
        ("run_rounds", "Rounds after which the run is complete.", settings.outer.rounds),
        ("run_complete", "1 when the last round has closed.", view.complete),
        ("run_paused", "1 while the operator holds the run.", paused(view, live)),
        ("quorum", "Packets that a round needs.", settings.rounds.quorum),
        ("round_deadline_seconds", "How long a round may last.", settings.rounds.deadline_s),
        ("leading", "1 where this program opens the rounds.", live.leading),
        ("epoch", "Takeovers so far.", view.head.epoch),
        ("packet_bytes_max", "What a packet may have at most.", view.packet_bytes_max),
        ("download_bytes_max", "What an update may have at most.", view.download_bytes_max),
    ]


def _of_rounds(view: View, live: Live) -> list[Figure]:
    last = view.rounds[-1] if view.rounds else None
    leading = live.leading
    return [
        ("round", "The newest round that has closed.", view.head.round),
        ("round_closed_timestamp_seconds", "When it closed.", view.head.closed_ms / 1000),
        ("round_seconds", "How long it lasted.", last.seconds if last else None),
        ("peers_contributing", "Peers whose packets it accepted.", last.accepted if last else None),
        ("packet_bytes", "Its largest accepted packet.", last.packet_bytes if last and last.packet_bytes else None),
        ("download_bytes", "What a peer fetches of it.", last.download_bytes if last and last.download_bytes else None),
        ("peers_connected", "Peers that watch the rounds here.", live.connected if leading else None),
        ("open_round", "The round that is open.", live.open_round if leading else None),
        ("open_round_packets", "Packets of the open round that are stored here.", len(view.open_packets)),
    ]


def _of_learning(view: View, live: Live) -> list[Figure]:
    newest = newest_loss(view, live)
    if newest is None:
        return []
    values = with_bits(newest, live)
    return [
        ("validation_loss_nats", "Newest validation loss, nats a token.", values["loss"]),
        ("validation_perplexity", "e to that loss.", values["perplexity"]),
        ("validation_bits_per_byte", "That loss as bits a byte of text.", values["bits_per_byte"]),
        ("evaluated_round", "The round after which it was measured.", values["round"]),
    ]


def _labelled(view: View, live: Live, now_ms: int) -> Iterator[Metric]:
    run, sums = view.run, view.sums
    info = GaugeMetricFamily("sparseloco_run_info", "Which run this is.", labels=("run", "run_id", "version"))
    info.add_metric((run.name, run.run_id.hex(), version("sparseloco-peer")), 1)
    yield info
    yield _counter("rounds", "Rounds of the ledger.", ("kind", "reason"), sums.rounds.items())
    verdicts = {(name,): sums.verdicts.get(name, 0) for name in ("accepted", "late", "refused")}
    yield _counter("packets", "Packets in the ledger.", ("verdict",), verdicts.items())
    codes = {(f"SL{code}",): count for code, count in sums.codes.items()}
    yield _counter("refused", "Late and refused packets by the number of the error.", ("code",), codes.items())
    yield _counter("tokens", "Tokens behind the accepted packets.", (), [((), sums.tokens)])
    standing = {alarm.name for alarm in alarms(view, live, now_ms)}
    alarm = GaugeMetricFamily("sparseloco_alarm", "1 while the alarm stands.", labels=("alarm",))
    for name in ALARMS:
        alarm.add_metric((name,), name in standing)
    yield alarm


def _counter(
    name: str, help_text: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], int]]
) -> Metric:
    counter = CounterMetricFamily(f"sparseloco_{name}", help_text, labels=labels)
    for key, value in values:
        counter.add_metric(key, value)
    return counter
