"""Unpickling runs whatever the bytes say: where it is done at all, and which processes have that code."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.platform import ROOT, clean_environment

#: Modules that run what they read.
RUNNING = {
    "pickle", "_pickle", "pickletools", "cloudpickle", "cloudpickle.cloudpickle", "ray.cloudpickle", "dill", "joblib",
    "marshal", "shelve", "jsonpickle", "torch",
}  # fmt: skip
#: Their functions and classes that do, and others' that may.
READING = {"load", "loads", "Unpickler", "open", "read_pickle", "unsafe_load", "full_load", "load_all"}
SAFE_LOADERS = {"SafeLoader", "CSafeLoader", "safe_load"}
#: Who unpickles, all of it called in workers that run a step, or beside a user's code.
ALLOWED = {
    ("mlplat.pipelines.outputs", "load_arguments"),
    ("mlplat.sdk.checkpoints", "load"),
    ("mlplat.steps.functions", "load_function"),
}
#: Who may call those: what workers call, and the SDK in the user's own process.
CALLERS = {"mlplat.steps.calls", "mlplat.sdk.local_run", "mlplat.sdk.plain"}
PURE_SERVERS = ("gateway", "registry_coordinator", "metric_shard")
#: Those whose processes start workers, and what these read of their own: what the executor itself has written.
WITH_WORKERS = {"scheduler": set[tuple[str, str]](), "executor": {("actors.world", "run_light_attempt")}}


def imported(actor: str) -> list[str]:
    """The modules that a process of this actor has."""
    code = f"import sys, actors.{actor}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=clean_environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout.split()


def own(modules: list[str]) -> list[str]:
    """Those of the project."""
    return [name for name in modules if name.partition(".")[0] in {"mlplat", "actors", "cluster"}]


def source_of(module: str) -> ast.Module:
    """A module of the project, parsed."""
    path = ROOT / Path(*module.split("."))
    file = path.with_suffix(".py")
    return ast.parse((file if file.is_file() else path / "__init__.py").read_text())


def readers(module: str) -> Iterator[tuple[str, str]]:
    """Module and function of every place that may run what it reads."""
    yield from _readers(source_of(module), module)


def _readers(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    names = dict(_names(tree))
    for function, call in _calls(tree, "<module>"):
        if _runs_what_it_reads(call, names):
            yield module, function


def _names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What imported names stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (
                    (alias.asname or alias.name.partition(".")[0]),
                    (alias.name if alias.asname else alias.name.partition(".")[0]),
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _calls(node: ast.AST, function: str) -> Iterator[tuple[str, ast.expr]]:
    """What is called or handed on, each with the function around it."""
    for child in ast.iter_child_nodes(node):
        inside = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if isinstance(child, ast.Call | ast.Attribute | ast.Name):
            yield inside, child
        yield from _calls(child, inside)


def _runs_what_it_reads(node: ast.expr, names: dict[str, str]) -> bool:
    if isinstance(node, ast.Call):
        dotted = _dotted(node.func, names)
        unsafe_arrays = any(
            word.arg == "allow_pickle" and not (isinstance(word.value, ast.Constant) and word.value.value is False)
            for word in node.keywords
        )
        loaders = [_dotted(each, names).rpartition(".")[2] for each in (*node.args, *(w.value for w in node.keywords))]
        unsafe_yaml = dotted in {"yaml.load", "yaml.load_all"} and not SAFE_LOADERS & set(loaders)
        return unsafe_arrays or unsafe_yaml
    module, _dot, name = _dotted(node, names).rpartition(".")
    return (module in RUNNING and name in READING) or name in {"read_pickle", "unsafe_load", "full_load"}


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return ""


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\ndef f(b): return pickle.loads(b)",
        "import cloudpickle as cp\ndef f(b): return cp.loads(b)",
        "from pickle import loads as decode\ndef f(b): return decode(b)",
        "from ray import cloudpickle\ndef f(b): return map(cloudpickle.loads, b)",
        "import ray.cloudpickle\ndef f(b): return ray.cloudpickle.loads(b)",
        "import pickle\nclass A:\n    def f(self, b): return pickle.Unpickler(b).load()",
        "import numpy as np\ndef f(b): return np.load(b, allow_pickle=True)",
        "import pandas as pd\ndef f(b): return pd.read_pickle(b)",
        "import joblib\nasync def f(b): return joblib.load(b)",
        "import yaml\ndef f(b): return yaml.load(b, Loader=yaml.UnsafeLoader)",
        "import yaml\ndef f(b): return yaml.unsafe_load(b)",
    ],
)
def test_reading_that_runs_code_is_found(text: str) -> None:
    assert set(_readers(ast.parse(text), "m")) == {("m", "f")}


@pytest.mark.parametrize(
    "text",
    [
        "import json\ndef f(b): return json.loads(b)",
        "import pickle\ndef f(b): return pickle.dumps(b)",
        "import numpy as np\ndef f(b): return np.load(b, allow_pickle=False)",
        "import yaml\ndef f(b): return yaml.load(b, Loader=yaml.CSafeLoader)",
    ],
)
def test_reading_that_runs_nothing_is_not(text: str) -> None:
    assert list(_readers(ast.parse(text), "m")) == []


@pytest.mark.parametrize("actor", PURE_SERVERS)
def test_processes_without_workers_have_no_code_that_unpickles(actor: str) -> None:
    modules = imported(actor)
    assert f"actors.{actor}" in modules
    assert [place for module in own(modules) for place in readers(module)] == []
    assert {"mlflow", "joblib", "dill", "torch", "sklearn"} & set(modules) == set()


@pytest.mark.parametrize("actor", WITH_WORKERS)
def test_processes_that_start_workers_have_only_the_code_that_workers_call(actor: str) -> None:
    modules = own(imported(actor))
    assert {place for module in modules for place in readers(module)} == ALLOWED | WITH_WORKERS[actor]
    assert {"mlflow", "joblib", "dill", "torch", "sklearn"} & set(modules) == set()


def test_nobody_else_unpickles_and_only_those_who_run_steps_call_who_does() -> None:
    files = [path for folder in ("mlplat", "actors", "cluster") for path in (ROOT / folder).rglob("*.py")]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    assert {place for module in modules for place in readers(module)} == ALLOWED.union(*WITH_WORKERS.values())
    unpickling = {f"{module}.{function}" for module, function in ALLOWED if function != "load"}
    unpickling.add("mlplat.sdk.checkpoints.Checkpoints")
    users = {
        module: used
        for module in modules
        if (used := unpickling & {target for _name, target in _names(source_of(module))})
    }
    by_hand = {module for module, used in users.items() if used - {"mlplat.sdk.checkpoints.Checkpoints"}}
    assert by_hand <= CALLERS
    assert set(users) - by_hand <= {"mlplat.sdk.context", "mlplat.execution.attempt", "mlplat.sdk.plain"}
