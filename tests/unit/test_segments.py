"""Growing texts as numbered files."""

from __future__ import annotations

import pytest
from botocore.exceptions import EndpointConnectionError
from hypothesis import given
from hypothesis import strategies as st

from mlplat.artifacts import segments
from mlplat.artifacts.model import ArtifactInfo
from mlplat.artifacts.segments import Place, Shipper, plan_read, segment_name, segment_number
from mlplat.errors import Unavailable


class Text:
    """A source that is filled by hand."""

    def __init__(self) -> None:
        self.waiting = b""

    def peek(self, limit: int) -> bytes:
        return self.waiting[:limit]

    def drop(self, count: int) -> None:
        self.waiting = self.waiting[count:]


class Folder:
    """Keeps files, unless it is away."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.away: Exception | None = None
        self.writes = 0

    def write(self, name: str, body: bytes) -> None:
        if self.away is not None:
            raise self.away
        assert body.startswith(self.files.get(name, b"")), "what is in a segment never changes"
        self.files[name] = body
        self.writes += 1

    @property
    def text(self) -> bytes:
        return b"".join(self.files[name] for name in sorted(self.files))

    @property
    def entries(self) -> list[ArtifactInfo]:
        return [ArtifactInfo(name, False, len(body)) for name, body in self.files.items()]


def shipper(source: Text, folder: Folder, *, max_bytes: int = 10**9, notice: bytes = b"") -> Shipper:
    return Shipper(source, folder.write, 60.0, max_bytes=max_bytes, full_notice=notice)


def test_a_segment_grows_until_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 10)
    source, folder = Text(), Folder()
    ship = shipper(source, folder)
    for part in (b"abc\n", b"defg\n", b"hijk\n", b"l\n"):
        source.waiting += part
        ship.ship()
    assert folder.files == {"000001.log": b"abc\ndefg\nhijk\n", "000002.log": b"l\n"}
    ship.ship()
    assert folder.writes == 4


@pytest.mark.parametrize(
    "away", [Unavailable("away"), OSError("full"), EndpointConnectionError(endpoint_url="http://127.0.0.1:9")]
)
def test_a_store_that_is_away_loses_nothing(away: Exception) -> None:
    source, folder = Text(), Folder()
    ship = shipper(source, folder)
    folder.away = away
    for part in (b"a", b"b"):
        source.waiting += part
        ship.ship()
    folder.away = None
    source.waiting += b"c"
    ship.ship()
    assert folder.text == b"abc"


def test_a_full_log_says_so_and_drops_the_rest() -> None:
    source, folder = Text(), Folder()
    ship = shipper(source, folder, max_bytes=5, notice=b"[full]")
    for part in (b"abc", b"defg", b"hij"):
        source.waiting += part
        ship.ship()
    assert folder.text == b"abcde[full]"
    assert source.waiting == b""


def test_closing_ships_the_rest() -> None:
    source, folder = Text(), Folder()
    ship = shipper(source, folder)
    ship.start()
    source.waiting = b"last words"
    assert ship.close()
    assert folder.text == b"last words"


def test_names() -> None:
    assert segment_name(7) == "000007.log"
    assert segment_number("000007.log") == 7
    assert segment_number("1234567.log") == 1_234_567
    assert [segment_number(name) for name in ("x.log", "7.log", "000007.txt", "000007.log.tmp", "٠٠٠٠٠٧.log")] == [
        None
    ] * 5


@given(st.lists(st.binary(min_size=1, max_size=7), min_size=1, max_size=6), st.integers(1, 5))
def test_reading_on_gives_everything_once(bodies: list[bytes], limit: int) -> None:
    folder = Folder()
    folder.files = {segment_name(number): body for number, body in enumerate(bodies)}
    place, text = Place(), b""
    while plan := list(plan_read(folder.entries, place, limit)):
        assert sum(end - start for _name, start, end in plan) <= limit
        for name, start, end in plan:
            text += folder.files[name][start:end]
            place = Place(segment_number(name) or 0, end)
    assert text == b"".join(bodies)


def test_other_files_and_folders_are_left_out() -> None:
    entries = [ArtifactInfo("notes.txt", False, 5), ArtifactInfo("000001.log", True, None)]
    assert list(plan_read(entries, Place(), 100)) == []
    assert list(plan_read([ArtifactInfo("000001.log", False, 5)], Place(3, 7), 100)) == []
    assert list(plan_read([ArtifactInfo("000003.log", False, 5)], Place(3, 7), 100)) == []
