"""How the code of steps reaches the workers.

A function of an installed package travels as its name. A function of a notebook, a script or a file
beside the pipeline travels by value: pickled with the modules of its folder, stored under its digest.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.spec import PipelineSpec

_INSTALLED = tuple(
    Path(path).resolve() for name, path in sysconfig.get_paths().items() if name in {"purelib", "platlib", "stdlib"}
)

#: Stores bytes on the platform and returns their SHA-256.
StoreBlob = Callable[[bytes], str]


def uses_of(function: Callable[..., Any], store_blob: StoreBlob) -> str:
    """The ``uses`` of a function: its name, or a pickle of it that ``store_blob`` has kept."""
    module = sys.modules.get(function.__module__)
    if module is not None and _is_installed(module) and "<" not in function.__qualname__:
        return f"{function.__module__}:{function.__qualname__}"
    with _by_value(_neighbours(module)):
        body = cloudpickle.dumps(function)
    return f"pickle:{store_blob(body)}:{function.__module__}.{function.__qualname__}"


def ship_local_code(spec: PipelineSpec, folder: Path, store_blob: StoreBlob) -> PipelineSpec:
    """The spec with every function of a module in ``folder`` replaced by its pickle.

    Raises:
        InvalidPipeline: a module in the folder, or a function of it, cannot be imported.
    """
    local = [step.uses for step in spec.steps.values() if step.uses is not None and _is_local(step.uses, folder)]
    if not local:
        return spec
    with _import_path(folder):
        shipped = {uses: uses_of(_import(uses), store_blob) for uses in dict.fromkeys(local)}
    steps = {
        name: step.model_copy(update={"uses": shipped.get(step.uses or "", step.uses)})
        for name, step in spec.steps.items()
    }
    return spec.model_copy(update={"steps": steps})


def load_module(file: Path) -> ModuleType:
    """Runs a Python file as a module, with its folder importable.

    Raises:
        InvalidPipeline: it cannot be imported.
    """
    file = file.resolve()
    name = f"mlplat_user_{file.stem}"  # never the name of a module that others import
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InvalidPipeline(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    with _import_path(file.parent):
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # the user's file may raise anything
            del sys.modules[name]
            raise InvalidPipeline(f"{file}: cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _is_local(uses: str, folder: Path) -> bool:
    top = uses.partition(":")[0].partition(".")[0]
    return uses.count(":") == 1 and ((folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file())


def _import(uses: str) -> Callable[..., Any]:
    module_name, _colon, qualified = uses.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
        for part in qualified.split("."):
            target = getattr(target, part)
    except Exception as error:  # importing runs the user's own code
        raise InvalidPipeline(f"{uses}: cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(target):
        raise InvalidPipeline(f"{uses}: is a {type(target).__name__}, not a function")
    function: Callable[..., Any] = getattr(target, "function", target)
    return function


def _is_installed(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    if module.__name__ == "__main__" or file is None:
        return False
    path = Path(file).resolve()
    return module.__name__.partition(".")[0] == "mlplat" or any(path.is_relative_to(root) for root in _INSTALLED)


def _neighbours(module: ModuleType | None) -> list[ModuleType]:
    """Loaded modules that live in or below the module's folder: none of them is on the workers."""
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return []
    folder = Path(file).resolve().parent
    found = []
    for other in list(sys.modules.values()):
        other_file = getattr(other, "__file__", None)
        if other_file and Path(other_file).resolve().is_relative_to(folder) and not _is_installed(other):
            found.append(other)
    return found


@contextmanager
def _by_value(modules: list[ModuleType]) -> Iterator[None]:
    registered = [module for module in modules if module.__name__ != "__main__"]
    for module in registered:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


@contextmanager
def _import_path(folder: Path) -> Iterator[None]:
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
