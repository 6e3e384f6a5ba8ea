"""What can go wrong on this machine and on the way to the others, with a stable code and a remedy for each.

`protocol.errors` numbers what foreign bytes can do wrong (1xx-7xx); this module continues with the user's own machine
(8xx) and with reaching others (9xx). The command line prints both kinds the same way, through `render`.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

from protocol.errors import Code, ProtocolError

TEXT_CHARS_MAX = 600  # of one message; a stranger's words do not get to fill the screen


class UserCode(IntEnum):
    """A stable number for each way our own machine or the way to others can fail. Numbers are never reused."""

    # 8xx this machine
    BAD_CONFIG = 801
    BAD_RUN_FILE = 802
    DISK_FULL = 803
    READ_ONLY = 804
    NO_PERMISSION = 805
    NO_SUCH_FILE = 806
    OPEN_KEY = 807
    BAD_KEY_FILE = 808
    HOME_IN_USE = 809
    NEWER_STORE = 810
    DAMAGED_STORE = 811
    NO_DEVICE = 812
    OUT_OF_MEMORY = 813
    NO_CORPUS = 814
    MISSING_PACKAGE = 815
    DISK_ERROR = 816
    PORT_IN_USE = 817
    OTHER_RUN_STORED = 818
    BAD_FILE = 819
    BAD_ARGUMENT = 820
    PROGRAM_DIED = 821
    TOO_SLOW = 822
    # 9xx reaching others
    UNREACHABLE = 901
    UNKNOWN_HOST = 902
    TIMED_OUT = 903
    WRONG_CERTIFICATE = 904
    NO_AGGREGATOR = 905
    CLOCK_WRONG = 906
    CONNECTION_LOST = 907
    NO_DIRECTORY = 908


class UserError(Exception):
    """Something the user can put right. `code` is stable; `message` says what happened; `remedy` says what to do."""

    def __init__(self, code: UserCode, message: str, remedy: str) -> None:
        super().__init__(f"{label(code)}: {message}")
        self.code = code
        self.message = message
        self.remedy = remedy


def label(code: Code | UserCode) -> str:
    """The name of a code as people see it, for example `SL803 disk-full`."""
    return f"SL{code.value} {code.name.lower().replace('_', '-')}"


def printable(text: str) -> str:
    """One line of at most `TEXT_CHARS_MAX` visible characters: foreign words may not steer the terminal."""
    line = re.sub(r"\s+", " ", text).strip()
    line = "".join(character if character.isprintable() else "?" for character in line[: TEXT_CHARS_MAX + 1])
    return line if len(line) <= TEXT_CHARS_MAX else line[:TEXT_CHARS_MAX] + "..."


def render(error: UserError | ProtocolError) -> str:
    """The two lines that the command line prints before it exits with status 1."""
    if isinstance(error, UserError):
        said, remedy = error.message, error.remedy
    else:
        sentence, remedy = explain(error)
        said = f"{sentence} ({error.detail})" if error.detail else sentence
    return f"error {label(error.code)}: {printable(said)}\n  try: {printable(remedy)}"


def from_os_error(error: OSError, path: Path | str) -> UserError:
    """Turn what the operating system said about `path` into a message with a remedy."""
    if str(path).startswith("slp1"):
        return UserError(UserCode.BAD_ARGUMENT, "this command takes a folder, and was given an invite", _FOLDER)
    code, message, remedy = _OS_ERRORS.get(error.errno or 0, _OTHER_OS_ERROR)
    reason = error.strerror or type(error).__name__
    return UserError(code, f"{message.format(path=path)} ({reason})", remedy.format(path=path))


@contextmanager
def os_errors(path: Path | str) -> Iterator[None]:
    """Within this block an OSError about `path` becomes a UserError."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error, path) from error


def explain(error: ProtocolError) -> tuple[str, str]:
    """One sentence on what is wrong with the foreign bytes, and what the user can do about it."""
    return EXPLANATIONS[error.code]


_FOLDER = "name the folder of the run; `sparseloco-peer mirror INVITE --home COPY` makes one out of an invite"
_FULL = (
    UserCode.DISK_FULL,
    "there is no room left to write {path}",
    "free some space, or name a folder on another disk with --home; the same command then continues where it stopped",
)
_OS_ERRORS: dict[int, tuple[UserCode, str, str]] = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EROFS: (
        UserCode.READ_ONLY,
        "{path} lies on a file system that can only be read",
        "name a folder that you may write to with --home (or --out for a new run)",
    ),
    errno.EACCES: (
        UserCode.NO_PERMISSION,
        "this user may not use {path}",
        "give this user the right to read and write {path}, or name another folder with --home (or --out)",
    ),
    errno.EPERM: (
        UserCode.NO_PERMISSION,
        "this user may not change {path}",
        "run as the user who owns {path}, or name another folder with --home (or --out)",
    ),
    errno.ENOENT: (
        UserCode.NO_SUCH_FILE,
        "{path} does not exist",
        "check the spelling; a relative path starts at the folder in which the command runs",
    ),
    errno.ENOTDIR: (
        UserCode.NO_SUCH_FILE,
        "a part of {path} is a file where a folder is needed",
        "name another folder, or move that file away",
    ),
    errno.EISDIR: (
        UserCode.NO_SUCH_FILE,
        "{path} is a folder where a file is needed",
        "name the file inside it",
    ),
    errno.EEXIST: (
        UserCode.NO_SUCH_FILE,
        "{path} exists already",
        "name another folder, or move it away",
    ),
    errno.ENAMETOOLONG: (
        UserCode.NO_SUCH_FILE,
        "the path is too long for this file system",
        "name a folder nearer to the root with --home (or --out)",
    ),
    errno.EMFILE: (
        UserCode.DISK_ERROR,
        "too many files are open to open {path}",
        "raise the limit with `ulimit -n 4096` in this shell and start again",
    ),
}
_OTHER_OS_ERROR = (
    UserCode.DISK_ERROR,
    "the operating system could not handle {path}",
    "check the disk (dmesg, smartctl) and its mount, or name a folder on another disk with --home",
)

_TRY_ELSEWHERE = "nothing to do here: it was refused and costs nobody anything; if it recurs, tell the run's operator"
_NEW_VERSION = "install the newest sparseloco-peer on both sides"
_RESEND = "nothing to do if it happens once; if it recurs, check memory and disk of the sending machine and update it"
_REFETCH = "start the same command again; what was damaged is fetched anew, from another source where there is one"
_ASK_INVITE = "ask the run's operator for the invite again and copy it whole: it is one word that starts with slp1"
_TELL_OPERATOR = "tell the run's operator, with this line: the aggregator does not keep to the protocol"

# One sentence and one remedy for each code; a test checks that none is missing.
EXPLANATIONS: dict[Code, tuple[str, str]] = {
    Code.BAD_KEY: (
        "a public key is not a valid Ed25519 key",
        "whoever made it should make a new one; a peer makes its key by itself in an empty --home",
    ),
    Code.BAD_SIGNATURE: (
        "a signature does not belong to these bytes and this key",
        "check that the invite comes from the run's operator; if it does, somebody changed the bytes on the way",
    ),
    Code.BAD_RUN: ("the description of the run is damaged or made by another version", _NEW_VERSION),
    Code.OTHER_RUN: (
        "these bytes belong to another run",
        "use the invite of the run that you want, and a --home that has not been used for another run's files",
    ),
    Code.BAD_INVITE: ("the invite cannot be read", _ASK_INVITE),
    Code.BAD_AMENDMENT: (
        "the change of the run breaks a rule, or does not follow the changes before it",
        "as its operator, make the change again from the newest state of the run; anybody else may tell the operator",
    ),
    Code.VERSION: (
        "the other side speaks another version of the protocol",
        "install the newest sparseloco-peer on the side that is too old: yours, or the aggregator's by its operator",
    ),
    Code.BAD_MAGIC: (
        "these bytes are not of the kind that they should be",
        "check that you named the right file; `sparseloco-peer inspect FILE` says what a file is",
    ),
    Code.TRUNCATED: ("the bytes end too early", _REFETCH),
    Code.TRAILING: ("there are bytes after the end", _REFETCH),
    Code.RESERVED: ("a field that must be zero is not", _NEW_VERSION),
    Code.WRONG_ROUND: (
        "the packet is for another round",
        "nothing to do: its content goes back into the residual and is sent with a later round",
    ),
    Code.WRONG_BASE: (
        "the packet starts from other parameters than this round does",
        "nothing to do: the peer fetches the current parameters and takes part again",
    ),
    Code.TOO_LARGE: ("something is larger than the run allows", _NEW_VERSION),
    Code.BAD_FRAME: ("a transport frame is malformed", _RESEND),
    Code.BAD_ZSTD: ("compressed bytes do not expand to what they declare", _RESEND),
    Code.BAD_RATIO: ("a chunk's ratio is outside the permitted range", _TRY_ELSEWHERE),
    Code.BAD_BLOCKS: ("the table of gap bytes does not match the gap bytes", _TRY_ELSEWHERE),
    Code.BAD_INDEX: ("an index lies outside its chunk", _TRY_ELSEWHERE),
    Code.BAD_CODE: ("a code is not allowed in its chunk", _TRY_ELSEWHERE),
    Code.BAD_PADDING: ("padding bits are not zero", _TRY_ELSEWHERE),
    Code.BAD_MERKLE: ("a section is not the one that the header names", _RESEND),
    Code.BAD_TOKENS: ("the number of tokens or inner steps is impossible", _TRY_ELSEWHERE),
    Code.DUPLICATE: (
        "this peer has already sent another packet in this round",
        "do not run two peers with the same key: give each its own folder with --home",
    ),
    Code.LATE: (
        "the packet came after the round had closed",
        "nothing is lost: its content is sent with the next round; if it recurs, use a faster device or link",
    ),
    Code.NOT_A_MEMBER: (
        "the packet comes from a key that has not joined",
        "start `sparseloco-peer join` again with the run's invite",
    ),
    Code.NO_QUORUM: (
        "the round ended with too few packets and changed nothing",
        "nothing is lost: the content is sent with the next round; the run needs more peers",
    ),
    Code.BANNED: (
        "the operator of this run has banned the peer that made this packet",
        "ask the operator why, and to unban the peer; `sparseloco-peer run peers` with the run's invite shows the ban",
    ),
    Code.BAD_COUNT: ("a chunk of the update has an impossible number of values", _TELL_OPERATOR),
    Code.BAD_EXPONENT: ("a chunk of the update has an exponent outside the permitted range", _TELL_OPERATOR),
    Code.BAD_VALUE: ("a value of the update is not in its one permitted form", _TELL_OPERATOR),
    Code.WRONG_ROOT: (
        "the parameters after the update are not the ones that the record names",
        "start the same command again: it fetches the parameters anew; if it recurs, test this machine's memory",
    ),
    Code.BAD_RECORD: ("a round record is malformed or wrongly signed", _TELL_OPERATOR),
    Code.BROKEN_CHAIN: ("a round record does not follow from the one before it", _TELL_OPERATOR),
    Code.NOT_AN_AGGREGATOR: (
        "the other side is not one of this run's aggregators",
        "check the address, and that the invite is of this run; an operator may have moved the run to a new invite",
    ),
    Code.BAD_STATE: ("the parameters received are not the ones that the ledger names", _REFETCH),
    Code.BAD_DHT_KEY: ("a record in the directory lies under a wrong key", _TRY_ELSEWHERE),
    Code.BAD_DHT_RECORD: ("a record in the directory is malformed or wrongly signed", _TRY_ELSEWHERE),
    Code.BAD_EXPIRY: (
        "a record in the directory is expired or lives too long",
        "check this machine's clock: it must be right within a few seconds (timedatectl set-ntp true)",
    ),
    Code.BAD_MESSAGE: ("the other side sent a message that makes no sense here", _NEW_VERSION),
    Code.BAD_SESSION: (
        "the aggregator does not know this session (it may have started again)",
        "nothing to do: the peer joins again by itself; if it recurs, start `sparseloco-peer join` again",
    ),
    Code.NOT_FOUND: (
        "the other side does not hold what was asked for",
        "start the same command again: it asks for the newest parameters instead",
    ),
    Code.BUSY: (
        "the aggregator takes no more peers or requests at the moment",
        "wait a minute and start the same command again",
    ),
    Code.WRONG_DIGEST: ("what arrived is not what was asked for", _REFETCH),
}
