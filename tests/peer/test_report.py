import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from peer.errors import UserCode, UserError
from peer.report import Curve, Summary, loss_figure, png_bytes, size_text, summary_json, summary_table, write_report

ROOT = "ab" * 32
SUMMARY = Summary(
    initial_val_loss=5.551,
    final_val_loss=2.25,
    final_perplexity=9.4877,
    final_bits_per_byte=3.2461,
    solo_val_loss=2.5,
    rounds=30,
    peers=4,
    tokens=1_234_567,
    parameters=900_000,
    bytes_up_per_peer_round=51_234.5,
    bytes_down_per_peer_round=120_000.0,
    update_bytes_per_round=81_000.0,
    bundle_bytes_per_round=99_500.0,
    rounds_by_bundle=3,
    bits_per_value=9.61,
    inner_time_share=0.873,
    state_roots_equal=True,
    state_root=ROOT,
    wall_s=183.4,
    kernels="C++ (AVX2)",
)
CURVES = [
    Curve("swarm of 4", [0, 1000, 2000, 3000], [5.55, 3.9, 2.8, 2.25]),
    Curve("one peer alone", [0, 1500, 3000], [5.55, 3.6, 2.5]),
]


def shown(summary: Summary, roots: dict[str, str]) -> str:
    console = Console(width=100, record=True, file=sys.stderr)
    console.print(summary_table(summary, roots))
    return console.export_text()


def test_summary_json_has_the_agreed_keys() -> None:
    agreed = (
        "initial_val_loss final_val_loss final_perplexity final_bits_per_byte solo_val_loss rounds peers tokens "
        "parameters bytes_up_per_peer_round bytes_down_per_peer_round update_bytes_per_round bundle_bytes_per_round "
        "rounds_by_bundle bits_per_value "
        "inner_time_share state_roots_equal state_root wall_s kernels"
    )
    assert list(json.loads(summary_json(SUMMARY))) == agreed.split()
    assert Summary(**json.loads(summary_json(SUMMARY))) == SUMMARY


def test_a_loss_that_is_no_number_is_not_written_as_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        summary_json(dataclasses.replace(SUMMARY, final_val_loss=float("nan")))


def test_the_table_tells_losses_traffic_and_roots() -> None:
    text = shown(SUMMARY, {"aggregator": ROOT, "peer-1": ROOT})
    for words in (
        "5.551",
        "2.250 (3.301 better)",
        "is 0.250 better",
        "perplexity 9.49, 3.246 bits a byte",
        "1,234,567",
        "900,000",
        "51.2 kB",
        "120 kB",
        "9.61",
        "81 kB, 99.5 kB (smaller in 3 rounds)",
        "C++ (AVX2)",
    ):
        assert words in text
    assert "87 %" in text and "3:03" in text
    assert text.count(ROOT[:16]) == 2
    assert "equal, bit for bit" in text and "differs" not in text


def test_the_table_admits_defeat() -> None:
    assert "the swarm is 0.050 worse" in shown(dataclasses.replace(SUMMARY, solo_val_loss=2.2), {})


def test_the_table_points_at_the_root_that_differs() -> None:
    other = "cd" * 32
    text = shown(dataclasses.replace(SUMMARY, state_roots_equal=False), {"aggregator": ROOT, "peer-1": other})
    line = next(line for line in text.splitlines() if other[:16] in line)
    assert "differs" in line and "NOT equal" in text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (51_234.5, "51.2 kB"),
        (1.5e6, "1.5 MB"),
        (19e9, "19 GB"),
        (5e12, "5,000 GB"),
    ],
)
def test_sizes_read_well(size: float, text: str) -> None:
    assert size_text(size) == text


def test_the_figure_shows_every_curve_point_for_point() -> None:
    figure = loss_figure(CURVES, "The demo")
    (axes,) = figure.axes
    lines = {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.lines}
    for curve in CURVES:
        assert lines[curve.label].tolist() == [list(p) for p in zip(curve.tokens_per_peer, curve.val_loss, strict=True)]
    assert {text.get_text() for text in axes.texts} == {"2.250", "2.500"}
    legend = axes.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == [curve.label for curve in CURVES]
    assert axes.get_title() == "The demo" and axes.get_xlabel() == "tokens per peer"


@pytest.mark.parametrize("curves", [[], [Curve("empty", [], [])], [Curve("one point", [0], [5.5])], CURVES])
def test_any_number_of_points_can_be_drawn(curves: list[Curve], tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    path.write_bytes(png_bytes(loss_figure(curves, "x")))
    image = imread(path)
    assert image.shape[:2] == (600, 960)
    assert image.min() < 0.5 < image.max(), "something is drawn"


def test_drawing_touches_no_global_state_of_matplotlib() -> None:
    code = "import sys, peer.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_the_report_is_four_files(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    write_report(folder, SUMMARY, CURVES, "The demo", "Fellow citizens\n")
    assert sorted(path.name for path in folder.iterdir()) == ["curves.json", "loss.png", "sample.txt", "summary.json"]
    assert (folder / "sample.txt").read_text() == "Fellow citizens\n"
    assert json.loads((folder / "curves.json").read_text())[1]["val_loss"] == [5.55, 3.6, 2.5]


def test_a_report_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        write_report(tmp_path / "file" / "report", SUMMARY, CURVES, "x", "")
    assert caught.value.code is UserCode.NO_SUCH_FILE
