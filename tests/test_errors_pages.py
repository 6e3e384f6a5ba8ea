"""Every code that a user can see has a page in docs/errors: what it means, why it happens, what to do, how it looks."""

import re
from pathlib import Path

import pytest

from peer.errors import EXPLANATIONS, UserCode, explain, label, printable
from protocol.errors import Code, ProtocolError

PAGES = Path(__file__).parents[1] / "docs" / "errors"
CODES: dict[int, Code | UserCode] = {code.value: code for kind in (Code, UserCode) for code in kind}
HOW = """
docs/errors/SL{number}.md is missing or lacks a part. Write it like its neighbours, in 8 to 20 lines:

    # {label}

    One sentence that says what is wrong{sentence}.

    ## Why

    When it happens, and what that means.

    ## What to do

    1. The first step, with the command to type.

    ## As printed

        error {label}: the message
          try: the remedy

and add the line `| [SL{number}](SL{number}.md) | {name} | the sentence |` to docs/errors/README.md.
"""
_FORM = re.compile(
    r"# (?P<title>[^\n]+)\n\n(?P<sentence>[^#]+?)\n\n"
    r"## Why\n\n(?P<why>[^#]+?)\n\n"
    r"## What to do\n\n(?P<steps>1\. .+?)\n\n"
    r"## As printed\n\n    error (?P<label>SL\d+ [a-z-]+): (?P<said>[^\n]+)\n      try: (?P<remedy>[^\n]+)\n",
    re.DOTALL,
)
_ROW = re.compile(r"^\| \[SL(\d+)\]\(SL(\d+)\.md\) \| ([a-z-]+) \| (.+) \|$", re.MULTILINE)
_LINK = re.compile(r"\]\((SL\d+\.md)\)")


def how(code: Code | UserCode) -> str:
    """What to tell whoever adds a code without a page."""
    sentence = f', here "{EXPLANATIONS[code][0]}"' if isinstance(code, Code) else ""
    return HOW.format(number=code.value, label=label(code), name=label(code).split()[1], sentence=sentence)


def page(code: Code | UserCode) -> re.Match[str]:
    """The parts of a code's page."""
    path = PAGES / f"SL{code.value}.md"
    parts = _FORM.fullmatch(path.read_text("utf-8")) if path.exists() else None
    assert parts is not None, how(code)
    return parts


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("code", CODES.values(), ids=label)
def test_every_code_has_a_page(code: Code | UserCode) -> None:
    parts = page(code)
    assert parts["title"] == parts["label"] == label(code), how(code)
    assert len(one_line(parts["why"])) > 80, f"say more about why SL{code.value} happens"
    steps = re.findall(r"^(\d+)\. (\S.{10,})", parts["steps"], re.MULTILINE)
    assert [int(number) for number, _ in steps] == list(range(1, len(steps) + 1))
    for shown in (parts["said"], parts["remedy"]):
        assert shown == printable(shown), "this is not how a line is printed"
    if isinstance(code, Code):
        sentence, remedy = explain(ProtocolError(code, ""))
        told = one_line(parts["sentence"])
        assert told.casefold() == f"{sentence}.".casefold(), (
            f"SL{code.value}: peer.errors.EXPLANATIONS says it otherwise"
        )
        assert parts["said"].startswith(f"{sentence} (") and parts["remedy"] == remedy, (
            f"SL{code.value} prints other words"
        )


def test_no_page_is_of_a_code_that_is_gone() -> None:
    known = {f"SL{number}.md" for number in CODES} | {"README.md"}
    assert {path.name for path in PAGES.iterdir()} == known


def test_the_index_names_every_page_with_its_sentence() -> None:
    rows = {int(number): (int(target), name, said) for number, target, name, said in _ROW.findall(_index())}
    for number, code in CODES.items():
        assert rows.get(number) == (number, label(code).split()[1], one_line(page(code)["sentence"])), how(code)
    assert list(rows) == sorted(CODES), "the index is not in the order of the numbers, or names a code that is gone"


def test_pages_link_to_pages_that_are_there() -> None:
    for path in PAGES.iterdir():
        for name in _LINK.findall(path.read_text("utf-8")):
            assert (PAGES / name).exists(), f"{path.name} links to {name}"


def _index() -> str:
    return (PAGES / "README.md").read_text("utf-8")
