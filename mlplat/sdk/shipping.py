"""How the code of steps reaches the workers.

A function of an installed package travels as its name. A function of a notebook, a script or a file
beside the pipeline travels by value: pickled with the modules of its folder, stored under its digest.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from mlplat.errors import InvalidInput, InvalidPipeline
from mlplat.pipelines.dag import Path as Where
from mlplat.pipelines.spec import Env, PipelineSpec, Step
from mlplat.sdk.folders import zip_folder
from mlplat.steps.failures import user_line
from mlplat.steps.functions import import_function

_INSTALLED = tuple(
    Path(path).resolve() for name, path in sysconfig.get_paths().items() if name in {"purelib", "platlib", "stdlib"}
)

_DIGEST = re.compile("[0-9a-f]{64}")
#: Stores bytes on the platform and returns their SHA-256.
StoreBlob = Callable[[bytes], str]


class Shipper:
    """Brings code and files to where steps run: each of them once, and then by its digest."""

    def __init__(self, store_blob: StoreBlob) -> None:
        self._store_blob = store_blob
        self._named: dict[str, str] = {}
        #: By identity; the function is kept so that no other gets it.
        self._functions: dict[int, tuple[Callable[..., Any], str]] = {}

    def function(self, function: Callable[..., Any]) -> str:
        """The ``uses`` of a function: its name, or that of its stored pickle.

        Raises:
            InvalidPipeline: it cannot be pickled.
        """
        if id(function) not in self._functions:
            self._functions[id(function)] = function, self._uses(function)
        return self._functions[id(function)][1]

    def _uses(self, function: Callable[..., Any]) -> str:
        module = sys.modules.get(function.__module__)
        name = f"{function.__module__}.{function.__qualname__}"
        if module is not None and _is_installed(module) and "<" not in function.__qualname__:
            return f"{function.__module__}:{function.__qualname__}"
        with _by_value(_neighbours(module)):
            try:
                body = cloudpickle.dumps(function)
            except Exception as error:  # what the function refers to may raise anything
                raise InvalidPipeline(f"{name}: cannot be sent to where steps run: {error}") from error
        return f"pickle:{self._store_blob(body)}:{name.replace(' ', '')}"

    def named_function(self, uses: str, folder: Path) -> str:
        """The ``uses`` of a function of a module in ``folder``.

        Raises:
            InvalidPipeline: the module or the function cannot be imported.
        """
        if uses not in self._named:
            with import_path(folder):
                self._named[uses] = self.function(_import(uses, folder))
        return self._named[uses]

    def notebook(self, path: Path) -> str:
        """``blob:<digest>:<name>`` of a stored notebook.

        Raises:
            InvalidPipeline: there is none.
        """
        try:
            body = path.read_bytes()
            nodes = json.loads(body).get("cells")
        except OSError as error:
            raise InvalidPipeline(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, AttributeError) as error:
            raise InvalidPipeline(f"{path}: not a notebook") from error
        if not isinstance(nodes, list):
            raise InvalidPipeline(f"{path}: not a notebook")
        return f"blob:{self._store_blob(body)}:{path.name}"

    def working_dir(self, folder: Path) -> str:
        """The digest of a stored folder.

        Raises:
            InvalidPipeline: there is none, or it is too large.
        """
        return self._store_blob(zip_folder(folder))


def ship(spec: PipelineSpec, folders: Mapping[Where, Path], shipper: Shipper) -> PipelineSpec:
    """The spec with everything that lies beside it sent: functions, notebooks and working folders.

    Args:
        folders: where the files of the definition lie, see ``LoadedPipeline``.

    Raises:
        InvalidPipeline: something cannot be read or imported; ``path: reason``.
    """
    return _Shipment(folders, shipper).pipeline(spec, ())


class _Shipment:
    def __init__(self, folders: Mapping[Where, Path], shipper: Shipper) -> None:
        self._folders = folders
        self._shipper = shipper

    def pipeline(self, spec: PipelineSpec, where: Where) -> PipelineSpec:
        folder = self._folder(where)
        sections = {
            section: {name: self._step(step, folder, (*where, key, name)) for name, step in steps.items()}
            for section, key, steps in (("steps", "steps", spec.steps), ("finally_", "finally", spec.finally_))
        }
        env = self._env(spec.env, folder, where)
        return PipelineSpec.model_validate(spec.model_copy(update={**sections, "env": env}).to_json())

    def _step(self, step: Step, folder: Path, where: Where) -> Step:
        env = self._env(step.env, folder, where)
        changed: dict[str, Any] = {"env": env}
        with _at(where):
            if step.uses is not None and _is_local(step.uses, folder):
                changed["uses"] = self._shipper.named_function(step.uses, folder)
            elif step.notebook is not None and not step.notebook.startswith("blob:"):
                changed["notebook"] = self._shipper.notebook(folder / step.notebook)
        if step.pipeline is not None:
            changed["pipeline"] = self.pipeline(step.pipeline, (*where, "pipeline"))
        return step.model_copy(update=changed)

    def _env(self, env: Env, folder: Path, where: Where) -> Env:
        if env.working_dir is None or _DIGEST.fullmatch(env.working_dir):
            return env
        with _at((*where, "env", "working_dir")):
            return env.model_copy(update={"working_dir": self._shipper.working_dir(folder / env.working_dir)})

    def _folder(self, where: Where) -> Path:
        """Of the innermost file that the part is in."""
        while where and where not in self._folders:
            where = where[:-1]
        return self._folders[where]


@contextmanager
def _at(where: Where) -> Iterator[None]:
    """A problem in the block is told with its place."""
    try:
        yield
    except InvalidPipeline as error:
        raise InvalidPipeline(f"{'.'.join(map(str, where))}: {error.message}") from error


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
    with import_path(file.parent):
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # the user's file may raise anything
            del sys.modules[name]
            source, line = user_line(error) or (file, 1)
            raise InvalidPipeline(f"{source}:{line}: cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _is_local(uses: str, folder: Path) -> bool:
    top = uses.partition(":")[0].partition(".")[0]
    return uses.count(":") == 1 and ((folder / f"{top}.py").is_file() or (folder / top / "__init__.py").is_file())


def _import(uses: str, folder: Path) -> Callable[..., Any]:
    try:
        function = import_function(uses)
    except InvalidInput as error:
        raise InvalidPipeline(error.message) from error
    top = uses.partition(":")[0].partition(".")[0]
    found = getattr(sys.modules.get(top), "__file__", None)
    if found is not None and not Path(found).resolve().is_relative_to(folder.resolve()):
        raise InvalidPipeline(f"{uses}: another module {top!r} is in the way: {found}; rename one of them")
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
def import_path(folder: Path) -> Iterator[None]:
    """Modules in the folder can be imported in the block."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
