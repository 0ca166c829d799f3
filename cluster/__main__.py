"""``python -P -m cluster up|down|status|env|…``: sets the environment that Ray reads, then runs the command.

The command runs in the state folder, because Ray puts a driver's working directory first on every
worker's path, where a user's file could shadow ours.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pydantic import ValidationError

from cluster.credentials import client_environment, ensure_token
from cluster.disk import plain_disk_errors
from mlplat.errors import PlatformError
from mlplat.settings import Settings

#: Where commands are that have no use for what ``cluster.start_commands`` loads.
MODULES = {
    "status": "cluster.commands",
    "env": "cluster.commands",
    "backup": "cluster.backup_commands",
    "restore": "cluster.backup_commands",
}


def main() -> None:
    """Replaces this process by the command."""
    try:
        settings = Settings()
        with plain_disk_errors(settings.state_dir):
            ensure_token(settings.state_dir)
    except ValidationError as error:
        for item in error.errors():
            name = f"MLPLAT_{'_'.join(str(part) for part in item['loc']).upper()}"
            print(f"mlplat: {name}: {item['msg']}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    except PlatformError as error:
        print(f"mlplat: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    code = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(filter(None, (str(code), os.environ.get("PYTHONPATH", ""))))
    environment = os.environ | {"PYTHONPATH": path}
    if settings.ray_address is None:  # a cluster that somebody else started has its own token
        environment = {key: value for key, value in environment.items() if not key.startswith("RAY_")}
        environment |= client_environment(settings.state_dir)
    os.chdir(settings.state_dir)
    module = MODULES.get("".join(sys.argv[1:2]), "cluster.start_commands")
    os.execve(sys.executable, [sys.executable, "-P", "-m", module, *sys.argv[1:]], environment)  # noqa: S606


if __name__ == "__main__":
    main()
