"""fsspec's own tests of filesystems, on the artifacts of a run."""

from __future__ import annotations

import pytest
from fsspec.tests.abstract import (
    AbstractCopyTests,
    AbstractFixtures,
    AbstractGetTests,
    AbstractOpenTests,
    AbstractPipeTests,
    AbstractPutTests,
)

from mlplat.sdk.filesystem import ArtifactFileSystem


class _Artifacts(AbstractFixtures):  # type: ignore[misc]  # fsspec has no types
    @pytest.fixture
    def fs(self, artifacts: ArtifactFileSystem) -> ArtifactFileSystem:
        return artifacts

    @pytest.fixture
    def fs_path(self, run_root: str) -> str:
        return f"{run_root}/tests"


class TestCopy(AbstractCopyTests, _Artifacts):  # type: ignore[misc]
    pass


class TestGet(AbstractGetTests, _Artifacts):  # type: ignore[misc]
    pass


class TestPut(AbstractPutTests, _Artifacts):  # type: ignore[misc]
    pass


class TestOpen(AbstractOpenTests, _Artifacts):  # type: ignore[misc]
    pass


class TestPipe(AbstractPipeTests, _Artifacts):  # type: ignore[misc]
    pass
