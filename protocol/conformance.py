"""Send every vector to a client over its standard input and output, and say what it gets wrong (README.md).

python -m protocol.conformance [--expected FILE] [--only PREFIX] [--timeout SECONDS] -- CLIENT COMMAND...
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "vectors"
LINE_BYTES_MAX = 4 << 20
_SHOWN_CHARS = 300
_TRIES = 3  # after so many requests without any answer the command itself is wrong


@dataclass(frozen=True)
class Case:
    """A vector as a file holds it, its run put in."""

    file: str
    name: str
    why: str
    request: dict[str, Any]
    expect: dict[str, Any]


def load(folder: Path = FOLDER) -> Iterator[Case]:
    """All vectors, file by file."""
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text("ascii"))
        for vector in document["vectors"]:
            request = vector["request"]
            if "run" in request:
                request = {**request, "run": document["runs"][request["run"]]}
            yield Case(path.name, vector["name"], vector["why"], request, vector["expect"])


class Client:
    """A client as a process, started when it is needed. Whatever it does, the caller gets an answer or a reason."""

    def __init__(self, command: Sequence[str], timeout_s: float) -> None:
        self._command = command
        self._timeout_s = timeout_s
        self._process: asyncio.subprocess.Process | None = None

    async def ask(self, request: dict[str, Any]) -> tuple[Any, str]:
        """Its answer, or None and why there is none. Raises OSError when it cannot be started."""
        if self._process is None:
            # A session of its own, so that the children of a wrapper script end with it.
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LINE_BYTES_MAX,
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(self._timeout_s):
                line = await self._exchange(self._process, json.dumps(request).encode("ascii") + b"\n")
            if line.endswith(b"\n"):
                return json.loads(line), ""
            problem = "the client ended"
        except TimeoutError:
            problem = f"no answer within {self._timeout_s:g} s"
        except ValueError:
            problem = f"the answer is not a line of JSON of at most {LINE_BYTES_MAX} bytes"
        await self.close()
        return None, problem

    async def _exchange(self, process: asyncio.subprocess.Process, line: bytes) -> bytes:
        assert process.stdin is not None and process.stdout is not None
        # A client that has ended takes no more, but what it said before may still be there to read.
        with contextlib.suppress(ConnectionError):
            process.stdin.write(line)
            await process.stdin.drain()
        return await process.stdout.readline()

    async def close(self) -> None:
        """End the process and all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()


def read_expected(path: Path) -> list[str]:
    """The names and prefixes (with * at the end) of the vectors that may fail."""
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [line for line in lines if line]


def _covers(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


async def run(cases: Sequence[Case], command: Sequence[str], expected: Sequence[str], timeout_s: float) -> bool:
    """Put every case to the client and print what came of it. Whether all is as expected."""
    client = Client(command, timeout_s)
    passed: dict[str, int] = {}
    surprises = answers = 0
    try:
        for number, case in enumerate(cases):
            got, problem = await client.ask(case.request)
            answers += not problem
            if number + 1 == _TRIES and not answers:
                print(f"the client never answered ({problem}); is this the command that starts it?", file=sys.stderr)
                return False
            good = not problem and got == case.expect
            passed[case.file] = passed.get(case.file, 0) + good
            if good == any(_covers(pattern, case.name) for pattern in expected):
                surprises += 1
                if good:
                    print(f"PASSES  {case.name}, although it is listed as an expected failure", flush=True)
                else:
                    print(f"FAIL    {case.name}: {case.why}", flush=True)
                    print(
                        f"          wanted {_shown(case.expect)}\n          got    {problem or _shown(got)}", flush=True
                    )
    finally:
        await client.close()
    for file, number in passed.items():
        print(f"{file:<18} {number:4} of {sum(case.file == file for case in cases):4} pass")
    print(f"{sum(passed.values())} of {len(cases)} vectors pass; {surprises} surprises")
    return not surprises


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all is as expected, 1 when not, 2 when there is nothing to run."""
    parser = argparse.ArgumentParser(
        prog="python -m protocol.conformance", description="Test a client against the vectors."
    )
    parser.add_argument("--expected", type=Path, metavar="FILE", help="names of vectors that may fail, one a line")
    parser.add_argument("--only", default="", metavar="PREFIX", help="run the vectors whose name begins so")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="for one answer (10)")
    parser.add_argument("command", nargs="+", help="the client and its arguments, after --")
    options = parser.parse_args(arguments)
    cases = list(load())
    expected = [] if options.expected is None else read_expected(options.expected)
    unknown = [pattern for pattern in expected if not any(_covers(pattern, case.name) for case in cases)]
    if unknown:
        print(f"{options.expected} names no vector with {unknown[0]!r}", file=sys.stderr)
        return 2
    chosen = [case for case in cases if case.name.startswith(options.only)]
    if not chosen:
        print(f"no vector begins with {options.only!r}", file=sys.stderr)
        return 2
    try:
        return 0 if asyncio.run(run(chosen, options.command, expected, options.timeout)) else 1
    except OSError as error:
        print(f"{options.command[0]} does not start: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
