"""Where a run ran."""

from __future__ import annotations

import json
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import cast

import pytest

import mlplat
from mlplat.errors import InvalidInput
from mlplat.sdk.capture import entry as entry_module
from mlplat.sdk.capture.entry import EntryPoint, command, entry_point
from mlplat.sdk.capture.environment import Package, environment, installed_packages, requirements_file
from mlplat.sdk.capture.redact import HIDDEN
from mlplat.sdk.checkpoints import Checkpoints
from mlplat.sdk.context import StepContext

ENTRY = EntryPoint("train.py", "LOCAL", Path("/srv"))


def install(folder: Path, name: str, version: str, direct_url: object = None) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nName: in-the-text\n")
    if direct_url is not None:
        (info / "direct_url.json").write_text(direct_url if isinstance(direct_url, str) else json.dumps(direct_url))


def test_the_shape_of_the_environment() -> None:
    facts = environment(ENTRY, Path("/work"), [Package("a", "1"), Package("b", "2")], "registry/image:1")
    again = json.loads(json.dumps(facts))
    assert again == facts
    assert set(facts) == {
        "format", "captured_at", "python", "implementation", "executable", "platform", "machine", "host", "user",
        "command", "entry_point", "working_directory", "cpu", "memory", "gpus", "cuda", "container", "ray", "packages",
    }  # fmt: skip
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["packages"] == {"a": "1", "b": "2"}
    assert facts["working_directory"] == "/work"
    assert facts["cpu"]["count"] >= 1
    assert facts["memory"] > 1_000_000
    assert facts["container"]["image"] == "registry/image:1"
    for gpu in facts["gpus"]:
        assert set(gpu) == {"index", "name", "uuid", "memory_bytes", "driver"}


def test_the_installed_packages_are_those_that_can_be_imported() -> None:
    packages = {package.name.lower().replace("_", "-"): package.version for package in installed_packages()}
    expected = {d.metadata["Name"].lower().replace("_", "-").replace(".", "-"): d.version for d in distributions()}
    assert {name.replace(".", "-"): version for name, version in packages.items()}.keys() == expected.keys()
    assert packages["pyarrow"] == expected["pyarrow"]


def test_a_new_installation_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed_packages() == ()
    install(tmp_path, "new", "1.0")
    assert installed_packages() == (Package("new", "1.0"),)


def test_the_first_on_the_path_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, name, version in (("a", "my_pkg", "2"), ("b", "My.Pkg", "1")):
        install(tmp_path / folder, name, version)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "missing")])
    assert installed_packages() == (Package("my_pkg", "2"),)


@pytest.mark.parametrize(
    ("direct_url", "line"),
    [
        (None, "p==1"),
        ({"url": "file:///src/p", "dir_info": {"editable": True}}, "-e file:///src/p  # p==1"),
        (
            {"url": "https://t:secret@host/p.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "p @ git+https://host/p.git@abc",
        ),
        ({"url": "https://host/p.whl?sig=1", "archive_info": {}}, "p @ https://host/p.whl"),
        ("not json", "p==1"),
        ("[1]", "p==1"),
        ({"vcs_info": {}}, "p==1"),
        ({"url": "https://host/p", "vcs_info": {}}, "p==1"),
    ],
)
def test_where_a_package_came_from(
    direct_url: object, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "p", "1", direct_url)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert requirements_file(installed_packages()) == f"{line}\n"


def test_the_command_line_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "train file.py", "--token", "abc", "--lr=1"])
    assert command() == f"python 'train file.py' --token '{HIDDEN}' --lr=1"
    monkeypatch.setattr(sys, "orig_argv", ["x" * 100_000])
    assert len(command()) < 10_000


def test_a_step_and_a_script_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(script), raising=False)
    assert entry_point() == EntryPoint(str(script), "LOCAL", tmp_path)
    step = StepContext("digits", "r", "train", None, 1, 1, "", cast("Checkpoints", None), print)
    monkeypatch.setattr(entry_module, "current_step", lambda: step)
    assert (entry_point().name, entry_point().kind) == ("digits/train", "JOB")


def test_a_notebook_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shell:
        kernel = object()
        user_ns: dict[str, str] = {}  # noqa: RUF012

    class IPython:
        get_ipython = staticmethod(Shell)

    monkeypatch.setitem(sys.modules, "IPython", IPython)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert (entry_point().name, entry_point().kind) == ("notebook", "NOTEBOOK")
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/me/study.ipynb")
    assert entry_point().name == "/home/me/study.ipynb"
    monkeypatch.setitem(Shell.user_ns, "__vsc_ipynb_file__", "/home/me/code.ipynb")
    assert entry_point().name == "/home/me/code.ipynb"


def test_options_win_over_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mlplat.Capture().settings().capture_console
    assert not mlplat.Capture(console=False).settings().capture_console
    monkeypatch.setenv("MLPLAT_CAPTURE_CONSOLE", "false")
    assert not mlplat.Capture().settings().capture_console
    assert mlplat.Capture(console=True).settings().capture_console
    monkeypatch.setenv("MLPLAT_CAPTURE", "0")
    off = mlplat.Capture(code=True).settings()
    assert off.capture_code
    assert not off.capture_environment
    assert not off.capture_console
    nothing = mlplat.Capture.nothing().settings()
    assert not any(value for name, value in nothing if name.startswith("capture_") and isinstance(value, bool))


def test_a_bad_option_is_refused_by_its_name() -> None:
    with pytest.raises(InvalidInput, match="capture_node"):
        mlplat.Capture(node="a/b").settings()
