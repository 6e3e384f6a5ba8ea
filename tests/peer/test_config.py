import ast
import dataclasses
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import peer.config
import peer.limits
from peer.config import PeerConfig, parse_config, read_config
from peer.errors import UserCode, UserError
from peer.limits import Limits

HERE = Path("/somewhere")


def test_no_file_is_needed_and_an_empty_one_changes_nothing() -> None:
    assert parse_config("", HERE) == PeerConfig()
    assert PeerConfig().home == Path.home() / ".sparseloco-peer"


def test_every_setting_can_be_read() -> None:
    text = """
        home = "peers/one"
        device = "cpu"
        dtype = "float32"
        threads = 1
        micro_batch = 4
        log_json = true
        serve = "peer.example.org:7710"
        tracker = "wandb:curves"
        [limits]
        schedule = "mon-fri 19:00-08:00, sat-sun"
        idle_minutes = 5
        on_mains = true
        exclusive_apps = ["game", "obs"]
        share = 0.5
        temperature_max = 80
        up_mbit = 2.5
        down_mbit = 20
        mb_a_day = 500
        disk_mb = 3000
        [data_paths]
        mine = "/data/mine"
        near = "near"
        own = "~/own"
    """
    config = parse_config(text, HERE)
    paths = {"mine": Path("/data/mine"), "near": HERE / "near", "own": Path.home() / "own"}
    limits = Limits("mon-fri 19:00-08:00, sat-sun", 5, True, ("game", "obs"), 0.5, 80, 2.5, 20, 500, 3000)
    here = HERE / "peers" / "one"
    address, tracker = "peer.example.org:7710", "wandb:curves"
    assert config == PeerConfig(here, "cpu", "float32", 1, 4, paths, True, address, limits, tracker)
    assert set(limits.in_force()) == {limit.name for limit in dataclasses.fields(Limits)}
    differs = [
        setting.name for setting in dataclasses.fields(config) if getattr(config, setting.name) in ("auto", 0, "")
    ]
    assert differs == [], "this test sets every field"


@pytest.mark.parametrize(("module", "name"), [(peer.config, "PeerConfig"), (peer.limits, "Limits")])
def test_every_setting_is_explained_below_it(module: ModuleType, name: str) -> None:
    tree = ast.parse(inspect.getsource(module))
    table = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    for statement, following in zip(table.body, table.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign):
            assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant), statement.lineno


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("divice = 'cpu'", "no setting 'divice'", "did you mean device?"),
        ("learning_rate = 1", "no setting 'learning_rate'", "the settings are home, device"),
        ("device = 'gpu'", "device = 'gpu'", "auto, cpu, cuda, mps"),
        ("device = 1", "device = 1", "auto, cpu, cuda, mps"),
        ("dtype = 'fp8'", "dtype = 'fp8'", "bfloat16"),
        ("threads = -1", "threads = -1", "from 0 to 1024"),
        ("threads = true", "threads = True", "from 0 to 1024"),
        ("micro_batch = 1.5", "micro_batch = 1.5", "whole number"),
        ("log_json = 1", "log_json = 1", "true or false"),
        ('serve = "here"', "serve = 'here'", "peer.example.org:7710"),
        ("home = 3", "home = 3", "in quotes"),
        ("data_paths = 'x'", "data_paths = 'x'", "a table"),
        ("[data_paths]\nx = 1", "data_paths", "a table"),
        ("limits = 3", "limits = 3", "a table"),
        ("[limits]\nshare = 0", "share = 0", "from 0.1 to 1"),
        ("[limits]\nup_mbit = 0.1", "up_mbit = 0.1", "0 or a number from 0.5"),
        ("[limits]\nup_mbit = true", "up_mbit = True", "number"),
        ("[limits]\ndisk_mb = nan", "disk_mb = nan", "number"),
        ("[limits]\non_mains = 1", "on_mains = 1", "true or false"),
        ("[limits]\nexclusive_apps = 'game'", "exclusive_apps = 'game'", "a list of names"),
        ("[limits]\nexclusive_apps = [1]", "exclusive_apps", "a list of names"),
        ("[limits]\nschedule = 'at night'", "schedule = 'at night'", "22:00-07:00"),
        ("[limits]\nuploads = 1", "no limit 'uploads'", "the limits are schedule"),
        ("[limits]\nup_mbits = 1", "no limit 'up_mbits'", "did you mean up_mbit?"),
        ("device = ", "not TOML", "line"),
    ],
)
def test_a_mistake_names_the_key_and_the_remedy(text: str, message: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(text, HERE)
    assert caught.value.code is UserCode.BAD_CONFIG
    assert message in caught.value.message
    assert remedy in caught.value.remedy


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "peer.toml"
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert caught.value.code is UserCode.NO_SUCH_FILE
    for content in (b"threads = -1", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_config(path)
        assert caught.value.code is UserCode.BAD_CONFIG
        assert str(path) in caught.value.message
    path.write_text("home = 'here'")
    assert read_config(path).home == tmp_path / "here"
