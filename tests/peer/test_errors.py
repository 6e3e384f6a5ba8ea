import errno
from pathlib import Path

import pytest

from peer.errors import EXPLANATIONS, UserCode, UserError, explain, from_os_error, os_errors, printable, render
from protocol.errors import Code, ProtocolError


def test_every_protocol_code_has_a_sentence_and_a_remedy() -> None:
    assert set(EXPLANATIONS) == set(Code)
    for code in Code:
        sentence, remedy = explain(ProtocolError(code, "x"))
        for words in (sentence, remedy):
            assert len(words) > 15
            assert words == printable(words)
            assert not words.endswith(".")


def test_codes_of_both_kinds_never_meet() -> None:
    assert not {code.value for code in Code} & {code.value for code in UserCode}
    assert all(800 <= code < 1000 for code in UserCode)


def test_render_names_code_reason_and_remedy() -> None:
    assert render(UserError(UserCode.DISK_FULL, "no room", "free some")) == (
        "error SL803 disk-full: no room\n  try: free some"
    )
    lines = render(ProtocolError(Code.BAD_INVITE, "checksum")).split("\n")
    assert lines[0] == "error SL203 bad-invite: the invite cannot be read (checksum)"
    assert lines[1].startswith("  try: ask the run's operator")


def test_a_stranger_cannot_steer_the_terminal_or_fill_it() -> None:
    evil = "\x1b[2Jgone\nerror SL000 forged: \u202ereversed \x07" + "a" * 10_000
    text = render(ProtocolError(Code.BAD_MESSAGE, evil))
    assert text.count("\n") == 1
    assert "\x1b" not in text and "\u202e" not in text and "\x07" not in text
    assert len(text) < 1000


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, UserCode.DISK_FULL),
        (errno.EDQUOT, UserCode.DISK_FULL),
        (errno.EROFS, UserCode.READ_ONLY),
        (errno.EACCES, UserCode.NO_PERMISSION),
        (errno.ENOENT, UserCode.NO_SUCH_FILE),
        (errno.EIO, UserCode.DISK_ERROR),
    ],
)
def test_operating_system_errors_get_a_code(number: int, code: UserCode) -> None:
    error = from_os_error(OSError(number, "said the system"), Path("/some/where"))
    assert error.code is code
    assert "/some/where" in error.message and "said the system" in error.message
    assert len(error.remedy) > 15


def test_a_full_device_is_a_disk_full() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(UserError) as caught, os_errors("/dev/full"):
        Path("/dev/full").write_bytes(b"x")
    assert caught.value.code is UserCode.DISK_FULL


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(UserError) as caught, os_errors(missing):
        missing.read_bytes()
    assert caught.value.code is UserCode.NO_SUCH_FILE
    assert str(missing) in caught.value.message
