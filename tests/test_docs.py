"""What the documents say of commands and files holds."""

import re
import shlex
from pathlib import Path

import pytest

from peer.cli import _parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "deploy" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^ {4}(?:sudo )?sparseloco-peer (.+)$", re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The command lines of a page, without what stands for more and without remarks."""
    return [[word for word in shlex.split(line, comments=True) if word != "..."] for line in COMMAND.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_in_documents_are_those_of_the_command_line(page: Path) -> None:
    for words in commands(page.read_text("utf-8")):
        if "--help" not in words:
            try:
                _parser().parse_args(words)
            except SystemExit:
                pytest.fail(f"{page.name}: sparseloco-peer {' '.join(words)}")


def test_guides_show_commands() -> None:
    shown = {words[0] for page in PAGES for words in commands(page.read_text("utf-8"))}
    assert {"join", "run", "aggregate", "bootstrap", "audit", "status", "mirror", "simulate"} <= shown


def test_the_index_lists_every_decision() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text("utf-8")
    for note in sorted(folder.glob("0*.md")):
        if note.name != "0000-template.md":
            title = note.read_text("utf-8").splitlines()[0].removeprefix("# ")
            assert f"[{title}]({note.name})" in index, f"add {note.name} to docs/decisions/README.md"
