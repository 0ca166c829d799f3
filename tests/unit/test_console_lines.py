"""Progress bars as plain lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplat.sdk.capture.lines import CLIMB_LASTS, MAX_LINE, MAX_OPEN_LINES, Lines


def collapsed(*texts: str) -> str:
    lines = Lines()
    for text in texts:
        lines.feed(text)
    lines.rest(everything=True)
    return lines.take()


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a\nb\n"], "a\nb\n"),
        (["a", "b", "\n"], "ab\n"),
        (["no end"], "no end"),
        (["\n\n"], "\n\n"),
        ([" 1%\r 2%\r 3%\n"], " 3%\n"),
        (["\r 1%", "\r 2%", "\r 3%", "\n"], " 3%\n"),
        (["10%\r", "20%\r", "done"], "done"),
        (["windows\r\n", "end\r\n"], "windows\nend\n"),
        (["odd\r\r\n"], "odd\n"),
        (["kept\r"], "kept"),
        (["a long text\rshort\n"], "short\n"),
        (["old\x1b[2K\rnew\n"], "new\n"),
        (["old\r\x1b[Knew\n"], "new\n"),
        (["\x1b[31mred\x1b[0m\n"], "\x1b[31mred\x1b[0m\n"),
        (["before\n", "1\r2\r3\n", "after\n"], "before\n3\nafter\n"),
        (["ä\r→ü\n"], "→ü\n"),
    ],
)
def test_what_was_drawn_over_is_left_out(texts: list[str], expected: str) -> None:
    assert collapsed(*texts) == expected


def test_stacked_bars_leave_their_last_state() -> None:
    drawing = ["outer 0\n"]
    for step in range(1, 50):
        drawing += [f"\rinner {step}", "\x1b[A", f"\router {step}", "\n"]
    assert collapsed(*drawing, "\ndone\n") == "outer 0\nouter 49\ninner 49\ndone\n"


def test_complete_lines_do_not_wait() -> None:
    lines = Lines()
    lines.feed("a\nb")
    assert lines.take() == "a\n"
    lines.rest()
    assert lines.take() == ""


def test_a_line_that_was_shown_unfinished_goes_on() -> None:
    lines = Lines()
    lines.feed("loading ...")
    lines.rest(everything=True)
    assert lines.take() == "loading ..."
    lines.feed(" done\nnext\n")
    assert lines.take() == " done\nnext\n"


def test_a_bar_that_was_shown_unfinished_goes_on_in_a_line_of_its_own() -> None:
    lines = Lines()
    lines.feed("\r10%\r20%")
    lines.rest(everything=True)
    assert lines.take() == "20%"
    lines.feed("\r30%\r40%\n")
    assert lines.take() == "\n40%\n"


def test_lines_that_bars_may_reach_stay_open_for_a_while() -> None:
    lines = Lines()
    lines.feed("one\ntwo\x1b[A\rONE")
    assert lines.take() == "one\n"
    lines.feed("\n")
    for _ in range(CLIMB_LASTS - 1):
        lines.rest()
        assert lines.take() == ""
    lines.rest()
    assert lines.take() == "ONE\n"
    lines.rest(everything=True)
    assert lines.take() == "two"


def test_open_lines_and_long_lines_are_bounded() -> None:
    lines = Lines()
    lines.feed("\x1b[A")
    for number in range(MAX_OPEN_LINES * 3):
        lines.feed(f"{number}\n")
    assert len(lines._open) <= MAX_OPEN_LINES + 1
    lines.feed("x" * (MAX_LINE + 1))
    assert len(lines.take()) > MAX_LINE
    lines.feed("\x1b[999A\rtop\n")
    lines.rest(everything=True)
    assert "top" in lines.take()


@given(st.lists(st.text(alphabet="ab \n", max_size=20), max_size=20), st.integers(0, 3))
def test_plain_text_passes_unchanged_however_it_is_cut(texts: list[str], every: int) -> None:
    lines, out = Lines(), []
    for index, text in enumerate(texts):
        lines.feed(text)
        if every and index % every == 0:
            lines.rest(everything=index % 2 == 0)
        out.append(lines.take())
    lines.rest(everything=True)
    assert "".join(out) + lines.take() == "".join(texts)


@given(
    st.lists(st.sampled_from(["a", "bc", "\n", "\r", "\r\n", "\x1b[A", "\x1b[3A", "\x1b[K", "\x1b[2K"]), max_size=40)
)
def test_any_mixture_ends_with_everything_passed_on(parts: list[str]) -> None:
    lines = Lines()
    for part in parts:
        lines.feed(part)
        lines.rest()
    lines.rest(everything=True)
    text = lines.take()
    assert "\r" not in text
    assert "\x1b[A" not in text
    lines.feed("end\n")
    lines.rest(everything=True)
    assert "end\n" in lines.take()
