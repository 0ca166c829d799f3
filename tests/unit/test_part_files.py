"""The files in which downloads put their targets together."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from mlplat.sdk.part_files import part_of


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "model.bin"


def test_what_was_left_is_gone_on_with(target: Path) -> None:
    with part_of(target) as (part, descriptor):
        os.pwrite(descriptor, b"half", 0)
    with part_of(target) as (again, descriptor):
        assert (again, os.pread(descriptor, 10, 0)) == (part, b"half")
        assert part.parent == target.parent


def test_a_part_at_which_somebody_works_is_left_alone(target: Path) -> None:
    with part_of(target) as (part, descriptor):
        os.pwrite(descriptor, b"half", 0)
        with part_of(target) as (other, own):
            assert other != part
            assert os.pread(own, 10, 0) == b""
            os.pwrite(own, b"other", 0)
        assert not other.exists(), "nobody goes on with it"
        assert os.pread(descriptor, 10, 0) == b"half"
    assert [file.name for file in target.parent.iterdir()] == [part.name]


def test_a_part_that_just_became_the_target_is_left_alone(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = fcntl.flock

    def finish_first(descriptor: int, operation: int) -> None:
        part.replace(target)
        lock(descriptor, operation)

    with part_of(target) as (part, descriptor):
        os.pwrite(descriptor, b"whole", 0)
    monkeypatch.setattr(fcntl, "flock", finish_first)
    with part_of(target) as (other, own):
        os.pwrite(own, b"other", 0)
        assert other != part
    assert target.read_bytes() == b"whole"


@pytest.mark.parametrize("name", ["x" * 249, "x" * 250, "x" * 255, "ü" * 127])
def test_long_names_have_parts(tmp_path: Path, name: str) -> None:
    names = set()
    for each in (name, name[:-1] + "y"):
        with part_of(tmp_path / each) as (part, _descriptor):
            names.add(part.name)
            part.replace(tmp_path / each)
    assert len(names) == 2


def test_a_part_has_the_rights_of_any_file(target: Path) -> None:
    made = target.with_name("made")
    made.touch()
    with part_of(target) as (part, _descriptor), part_of(target) as (other, _own):
        assert part.stat().st_mode == other.stat().st_mode == made.stat().st_mode
