"""The house rules as a test: who may import whom, what is pure, how long a function is, what never appears.

`findings` is a function over a source tree, so that the rules themselves are tested on small trees with one sin each.
"""

import ast
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_FOLDERS = ("protocol", "peer", "tests", "bench")
GENERATED = ("peer/net/pb/",)
FUNCTION_LINES_MAX = 70

# What protocol/ may use besides the standard library.
PROTOCOL_PACKAGES = {"numpy", "msgpack", "cryptography", "zstandard"}
# The world: a clock, chance, the system, the network. Pure rooms see none of it.
WORLD = {
    "asyncio",
    "time",
    "random",
    "os",
    "socket",
    "grpc",
    "hivemind",
    "threading",
    "subprocess",
    "requests",
    "secrets",
}
# From the longest prefix to the shortest: a room, and which rooms and packages it must not import. A room is a folder
# or a module; `programs` are the modules directly in peer/ that are none of the small shared ones.
SHARED = {"peer.errors", "peer.journal", "peer.store", "peer.telemetry", "peer.config", "peer.limits"}
SHARED |= {"peer.schedule", "peer.trackers"}
FORBIDDEN: dict[str, set[str]] = {
    "protocol": {"peer", "bench", "tests", *WORLD},
    "protocol.conformance": {"peer", "bench", "tests"},  # a command line that runs somebody's client
    "peer.core": {"peer", "bench", "tests", *WORLD},
    "peer.data": {"peer", "bench", "tests", "asyncio", "grpc", "hivemind", "socket"},
    "peer.net": {"peer", "bench", "tests", "torch", "safetensors", "matplotlib"},
    "peer.sim": {"peer", "bench", "tests", *WORLD} - {"random"},  # chance comes from a seed
    "peer": {"bench", "tests"},
}
# What a room may take from peer although `peer` is forbidden to it.
ALLOWED: dict[str, set[str]] = {
    "peer.core": {"peer.core"},
    "peer.data": {"peer.data", "peer.errors", "peer.store"},
    "peer.net": {"peer.net", "peer.errors"},
    "peer.sim": {"peer.sim", "peer.core", "peer.merge"},
}
# hivemind is optional at run time and lives behind one door.
HIVEMIND_DOORS = {"peer.net.directory", "peer.net.hivemind_directory"}

NEVER_IMPORTED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NEVER_CALLED = {"eval", "exec", "torch.load", "os.getenv", "np.load", "numpy.load"}
NEVER_NAMED = {"utils", "util", "helpers", "misc", "common"}
# A silenced check says which and why, for example: "noqa: S104  peers dial in from anywhere".
_SILENCED = re.compile(
    r"#\s*(noqa|type:\s*ignore|mypy:|ruff:|fmt:|pragma:)"
    r"(?P<rules>:\s*[A-Z]+[0-9]+(,\s*[A-Z]+[0-9]+)*|\[[a-z-]+(,\s*[a-z-]+)*\])?"
    r"(?P<reason>\s+(#\s*)?\S+\s+\S+.*)?"
)
# Objects that stand in for somebody else's and must take whatever that takes.
STAND_INS = {("peer.net.hivemind_directory", "create_subprocess_exec")}


def findings(root: Path) -> list[str]:
    """Every breach of the house rules in the tree, as `path:line: what`."""
    found = []
    for folder in SOURCE_FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if not name.startswith(GENERATED):
                text = path.read_text("utf-8")
                module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
                tree = ast.parse(text, name)
                checks = [_imports(module, tree, path.name == "__init__.py"), _size(module, tree), _silenced(text)]
                checks += [_names(module), _never(module, tree)]
                found += [f"{name}:{line}: {what}" for check in checks for line, what in check]
    return found


def imported(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, relative imports resolved, lazy ones included."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def within(name: str, prefix: str) -> bool:
    """Whether a dotted name is the prefix or lies inside it."""
    return name == prefix or name.startswith(prefix + ".")


def _imports(module: str, tree: ast.Module, is_package: bool) -> Iterator[tuple[int, str]]:
    room = max((room for room in FORBIDDEN if within(module, room)), key=len, default="")
    for line, name in imported(tree, module, is_package):
        top = name.split(".")[0]
        allowed = any(within(name, permitted) for permitted in ALLOWED.get(room, ()))
        if not allowed and any(within(name, sin) for sin in FORBIDDEN.get(room, ())):
            yield line, f"{room} must not import {name}"
        if room == "protocol" and top not in {*sys.stdlib_module_names, "protocol", *PROTOCOL_PACKAGES}:
            yield line, f"protocol must not import {name}: it uses numpy, msgpack, cryptography and zstandard alone"
        if top == "hivemind" and module.startswith("peer") and module not in HIVEMIND_DOORS:
            yield line, "hivemind lives behind peer.net.directory alone"
        if module in SHARED and within(name, "peer") and not any(within(name, shared) for shared in SHARED):
            yield line, f"{module} is used by everybody and must not import {name}"
        from_outside = not any(within(module, room) for room in ("peer.cli", "peer.commands", "tests"))
        if from_outside and any(within(name, room) for room in ("peer.cli", "peer.commands")):
            yield line, f"the command line imports the programs, so {module} must not import {name}"
        if top in NEVER_IMPORTED:
            yield line, f"{top} is never imported: it runs what strangers send"


def _size(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield node.lineno, f"{node.name} has {lines} lines; at most {FUNCTION_LINES_MAX} are allowed"
            # In a test, `**fields` for dataclasses.replace hides nothing that a reader needs.
            if (module, node.name) not in STAND_INS and not within(module, "tests"):
                yield from _passes_through(node)


def _passes_through(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[int, str]]:
    """Taking **options only to hand them on hides from the reader what a function accepts."""
    taken = node.args.kwarg
    # With P.kwargs the type checker knows what is accepted.
    if taken is None or (taken.annotation is not None and ast.unparse(taken.annotation).endswith(".kwargs")):
        return
    unpacked = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.keyword) and inner.arg is None]
    if any(isinstance(value, ast.Name) and value.id == taken.arg for value in unpacked):
        yield node.lineno, f"{node.name} passes **{taken.arg} through; name what it takes"


def _silenced(text: str) -> Iterator[tuple[int, str]]:
    reasoned: dict[int, str] = {}  # line -> the rules that it silences with a reason
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        match = _SILENCED.match(token.string) if token.type == tokenize.COMMENT else None
        if match:
            line, rules = token.start[0], match["rules"] or ""
            # The same exception on the next line shares the reason.
            if rules and (match["reason"] or reasoned.get(line - 1) == rules):
                reasoned[line] = rules
            else:
                yield line, f"`{token.string}` needs the rule that it silences and the reason"


def _names(module: str) -> Iterator[tuple[int, str]]:
    for part in module.split("."):
        if part.strip("_") in NEVER_NAMED:
            yield 1, f"a module called {part} says nothing; name it after what it holds"


def _never(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    is_test = within(module, "tests")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            # SPEC.md's own Python blocks are executed by the tests, from the repository and from nowhere else.
            if called in NEVER_CALLED and not (is_test and called == "exec"):
                yield node.lineno, f"{called} is never called"
        # To set a default for somebody else's library is not to be configured by the environment.
        elif isinstance(node, ast.Attribute) and not is_test and node.attr != "setdefault":
            if ast.unparse(node.value) in ("os.environ", "os.environb"):
                yield node.lineno, "the environment is no configuration; use RunConfig, PeerConfig or an option"
        elif isinstance(node, ast.Subscript) and not is_test and ast.unparse(node.value) == "os.environ":
            yield node.lineno, "the environment is no configuration; use RunConfig, PeerConfig or an option"


def test_the_house_is_tidy() -> None:
    found = findings(ROOT)
    assert not found, "\n" + "\n".join(found)


SINS = {
    "peer/core/model.py: import grpc": "peer.core must not import grpc",
    "peer/core/a.py: def f() -> None:\n    from time import time": "peer.core must not import time.time",
    "peer/core/b.py: from peer.net import link": "peer.core must not import peer.net.link",
    "peer/core/c.py: from ..store import Home": "peer.core must not import peer.store.Home",
    "peer/core/__init__.py: from .. import net": "peer.core must not import peer.net",
    "protocol/a.py: import torch": "protocol must not import torch",
    "protocol/b.py: import asyncio": "protocol must not import asyncio",
    "protocol/c.py: import os.path": "protocol must not import os.path",
    "protocol/d.py: from peer import errors": "protocol must not import peer.errors",
    "peer/net/link.py: import torch.nn": "peer.net must not import torch.nn",
    "peer/net/a.py: from peer.core import model": "peer.net must not import peer.core.model",
    "peer/net/b.py: import hivemind": "hivemind lives behind",
    "peer/client.py: import hivemind.dht": "hivemind lives behind",
    "peer/sim/a.py: from peer.net import link": "peer.sim must not import peer.net.link",
    "peer/sim/b.py: import time": "peer.sim must not import time",
    "peer/sim/c.py: from peer.store import Home": "peer.sim must not import peer.store.Home",
    "peer/data/a.py: from peer.core import model": "peer.data must not import peer.core.model",
    "peer/store.py: from peer import client": "must not import peer.client",
    "peer/client.py: from peer.cli import main": "must not import peer.cli.main",
    "peer/d.py: import bench.codec": "peer must not import bench.codec",
    "peer/e.py: import pickle": "pickle is never imported",
    "peer/f.py: import torch\ntorch.load('x')": "torch.load is never called",
    "peer/g.py: eval('1')": "eval is never called",
    "peer/h.py: import os\nos.environ['X']": "the environment is no configuration",
    "peer/h2.py: import os\nos.environ.get('X')": "the environment is no configuration",
    "peer/i.py: import os\nos.getenv('X')": "os.getenv is never called",
    "peer/utils.py: pass": "a module called utils",
    "peer/helpers/a.py: pass": "a module called helpers",
    "peer/j.py: def f(**options: int) -> None:\n    g(**options)": "f passes **options through",
    "peer/k.py: x = 1  # noqa": "needs the rule",
    "peer/l.py: x = 1  # noqa: S104": "needs the rule",
    "peer/m.py: x = 1  # type: ignore": "needs the rule",
    "peer/n.py: x = 1  # type: ignore[attr-defined]": "needs the rule",
    "peer/n2.py: x = 1  # noqa: S104  all hosts\ny = 1  # noqa: S105": "`# noqa: S105` needs",
    "peer/n3.py: # mypy: ignore-errors": "needs the rule",
    "tests/o.py: def f() -> None:\n" + "    pass\n" * 70: "f has 71 lines",
    "bench/p.py: import marshal": "marshal is never imported",
}

VIRTUES = [
    "protocol/a.py: import hashlib, numpy, msgpack, zstandard\nfrom protocol.errors import Code",
    "peer/core/a.py: import torch\nfrom peer.core.flat import Flat\nfrom protocol.layout import Layout",
    "peer/net/directory.py: import hivemind",
    "peer/net/a.py: from peer.errors import UserError\nfrom . import link",
    "peer/data/a.py: from peer.store import replacing",
    "peer/sim/a.py: import random\nfrom peer.core import codec\nfrom peer.merge import accepted\nfrom . import clock",
    "peer/client.py: import asyncio\nfrom peer.core import replica\nfrom peer.net import link",
    "peer/net/pb/swarm_pb2_grpc.py: import torch  # noqa",
    "peer/b.py: def f(**fields: int) -> dict[str, int]:\n    return fields",
    "peer/c.py: x = 1  # noqa: S104  peers dial in from anywhere",
    "peer/d.py: x = 1  # type: ignore[attr-defined]  # the stubs of grpc lack it",
    "peer/e.py: x = 1  # noqa: S104  peers dial in from anywhere\ny = 1  # noqa: S104",
    "peer/f.py: import os\nos.environ.setdefault('GRPC_VERBOSITY', 'NONE')",
    "peer/g.py: def f(*args: P.args, **kwargs: P.kwargs) -> None:\n    g(*args, **kwargs)",
    "tests/c.py: def f(**fields: int) -> None:\n    g(**fields)",
    "tests/b.py: import os\nos.environ['X'] = '1'",
    "tests/a.py: def f() -> None:\n" + "    pass\n" * 69,
]


def plant(root: Path, case: str) -> None:
    """Write one file into a tree; a case is `path: source`."""
    name, _, source = case.partition(": ")
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source) + "\n")


@pytest.mark.parametrize("case", SINS)
def test_each_sin_is_found(tmp_path: Path, case: str) -> None:
    plant(tmp_path, case)
    found = findings(tmp_path)
    assert len(found) == 1 or "import" in case, found
    assert any(SINS[case] in finding and finding.startswith(case.partition(": ")[0]) for finding in found), found


@pytest.mark.parametrize("case", VIRTUES)
def test_what_is_allowed_is_not_reported(tmp_path: Path, case: str) -> None:
    plant(tmp_path, case)
    assert findings(tmp_path) == []
