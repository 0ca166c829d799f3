"""Where a run ran: the machine, the interpreter and the installed packages."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import psutil

from mlplat.sdk.capture.entry import EntryPoint, command, user
from mlplat.sdk.capture.gpus import gpus
from mlplat.sdk.capture.redact import strip_credentials

#: A package's own file may be anything; what is longer is not one.
MAX_DIRECT_URL = 64 * 1024
_HEADER = re.compile(r"^(Name|Version):[ \t]*(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Package:
    """An installed distribution; ``origin`` is its line in a requirements file when it is not from an index."""

    name: str
    version: str
    origin: str | None = None

    @property
    def requirement(self) -> str:
        """Its line in a requirements file."""
        return self.origin or f"{self.name}=={self.version}"


def installed_packages() -> tuple[Package, ...]:
    """The packages that this process can import, by name."""
    return _packages(tuple(_folders()))


def requirements_file(packages: Iterable[Package]) -> str:
    """A requirements file of exactly these packages."""
    return "".join(f"{package.requirement}\n" for package in packages)


def environment(entry: EntryPoint, folder: Path, packages: Iterable[Package], image: str | None) -> dict[str, Any]:
    """``mlplat/environment.json``. ``memory`` is in bytes; what cannot be found out is None.

    Args:
        entry: what started the code.
        folder: the working directory at the run's start.
        packages: what is installed.
        image: the container's image, where the user said which.
    """
    cuda = {"driver": gpus().cuda_version(), "torch": _torch_cuda()}
    return {
        "format": 1,
        "captured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "host": socket.gethostname(),
        "user": user(),
        "command": command(),
        "entry_point": entry.name,
        "working_directory": str(folder),
        "cpu": {
            "model": _cpu_model(),
            "count": psutil.cpu_count(),
            "physical": psutil.cpu_count(logical=False),
            "usable": len(os.sched_getaffinity(0)),
        },
        "memory": psutil.virtual_memory().total,
        "gpus": gpus().describe(),
        "cuda": cuda if any(cuda.values()) else None,
        "container": _container(image),
        "ray": _ray(),
        "packages": {package.name: package.version for package in packages},
    }


def _folders() -> Iterator[tuple[str, int]]:
    """The import path with the times of its last changes: an installation changes one."""
    for entry in sys.path:
        try:
            yield entry, Path(entry or ".").stat().st_mtime_ns
        except OSError:
            continue


@lru_cache(maxsize=2)
def _packages(folders: tuple[tuple[str, int], ...]) -> tuple[Package, ...]:
    found: dict[str, Package] = {}
    for distribution in distributions(path=[entry for entry, _changed in folders]):
        package = _package(distribution)
        if package is not None:  # the first on the path is the one that is imported
            found.setdefault(re.sub(r"[-_.]+", "-", package.name).lower(), package)
    return tuple(found[name] for name in sorted(found))


def _package(distribution: Distribution) -> Package | None:
    # Without the parser for e-mails, which takes a second for a few hundred packages.
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    header = dict(_HEADER.findall(text.split("\n\n", 1)[0]))
    if not {"Name", "Version"} <= header.keys():
        return None
    return Package(header["Name"], header["Version"], _origin(distribution, header["Name"], header["Version"]))


def _origin(distribution: Distribution, name: str, version: str) -> str | None:
    """From ``direct_url.json`` (PEP 610): a working copy, a version control system, an archive."""
    try:
        direct = json.loads((distribution.read_text("direct_url.json") or "null")[:MAX_DIRECT_URL])
        if direct is None:
            return None
        url = strip_credentials(direct["url"])
        if direct.get("dir_info", {}).get("editable"):
            return f"-e {url}  # {name}=={version}"
        if "vcs_info" in direct:
            return f"{name} @ {direct['vcs_info']['vcs']}+{url}@{direct['vcs_info']['commit_id']}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return f"{name} @ {url}"


def _cpu_model() -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or None


def _container(image: str | None) -> dict[str, str | None] | None:
    """``{runtime, image}``; None outside of containers. Only podman tells its containers their image."""
    podman = Path("/run/.containerenv")
    if podman.is_file():
        found = re.search(r'^image="(.+)"$', podman.read_text(errors="replace"), re.MULTILINE)
        return {"runtime": "podman", "image": image or (found[1] if found else None)}
    if Path("/var/run/secrets/kubernetes.io").is_dir():
        return {"runtime": "kubernetes", "image": image}
    if Path("/.dockerenv").exists():
        return {"runtime": "docker", "image": image}
    return {"runtime": None, "image": image} if image else None


def _ray() -> dict[str, str | None] | None:
    """``{version, node_id, job_id}`` inside Ray, else None. Ray is never imported for this."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return {"version": ray.__version__, "node_id": context.get_node_id(), "job_id": context.get_job_id()}


def _torch_cuda() -> str | None:
    torch: Any = sys.modules.get("torch")
    return getattr(getattr(torch, "version", None), "cuda", None)
