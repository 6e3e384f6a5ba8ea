import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from peer.cli import main
from peer.data.prepare import prepare
from protocol.run import DataConfig, SignedRun, parse_settings
from tests.peer.swarm import SETTINGS

TEXTS = [f"Speech {number}: the union is strong, and the people are free. " * 5 for number in range(30)]


def files(folder: Path) -> list[str]:
    """Half of the texts as files of their own, half as lines of one packed file."""
    folder.mkdir()
    for number, text in enumerate(TEXTS[:15]):
        (folder / f"a{number:02}.txt").write_text(text)
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS[15:])
    return [str(folder)]


@pytest.mark.parametrize(("options", "vocab_size"), [([], 260), (["--vocabulary", "300"], 300)])
def test_files_become_a_corpus_on_which_a_run_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], vocab_size: int
) -> None:
    out = tmp_path / "speeches"
    sources = files(tmp_path / "text")
    assert main(["corpus", *sources, "--out", str(out), "--validation-fraction", "0.1", *options]) == 0
    said = parse_settings(f'name = "x"\n{capsys.readouterr().out}')
    assert (said.model.vocab_size, said.data.corpus) == (vocab_size, "speeches")

    config = DataConfig(corpus="speeches", tokenizer=said.data.tokenizer, sequence_length=16)
    dataset = prepare(config, tmp_path / "cache", {"speeches": out})
    held = dataset.tokenizer.decode(np.asarray(dataset.validation.tokens)).split("\n\n")
    assert held[:3] == TEXTS[-3:]
    # A peer may also have a copy in its home.
    (tmp_path / "cache").mkdir()
    out.rename(tmp_path / "cache" / "speeches")
    assert prepare(config, tmp_path / "cache", {}).sha256 == dataset.sha256

    settings = SETTINGS.format(rounds=1, steps=1, grace_s=1.0)
    settings = settings.replace("[model]", f"[model]\nvocab_size = {vocab_size}")
    settings = settings.replace("[data]", f'[data]\ncorpus = "speeches"\ntokenizer = "{said.data.tokenizer}"')
    (tmp_path / "RUN.toml").write_text(settings)
    made = ["run", "new", str(tmp_path / "RUN.toml"), "--out", str(tmp_path / "run"), "--data"]
    assert main([*made, str(tmp_path / "cache" / "speeches")]) == 0
    signed = SignedRun.from_bytes((tmp_path / "run" / "run.bin").read_bytes(), run_id=None)
    assert signed.config.data.corpus_sha256 == dataset.sha256


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b'{"text": 1}\n', 'an object with a "text"'),
        ("a.jsonl", b"{", "not JSON"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt.gz", b"no gzip", "cannot be unpacked"),
        ("a.txt", b"one document alone", "at least two documents"),
    ],
    ids=["no-text", "no-json", "no-utf8", "no-gzip", "one-document"],
)
def test_bad_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(data)
    assert main(["corpus", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 1
    assert says in capsys.readouterr().err
