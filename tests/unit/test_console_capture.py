"""What a process prints, seen on its way: streams, file descriptors, several runs."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest

from mlplat.sdk.capture.console import Console, Waiting, recording_name
from mlplat.sdk.capture.tee import StreamTee


class Stream(io.StringIO):
    """A stream whose methods can be replaced, as those of real ones can."""


@contextmanager
def streams() -> Iterator[tuple[Stream, Stream]]:
    """stdout and stderr. No fixture: pytest has replaced them again by the time the test runs."""
    out, err = Stream(), Stream()
    with redirect_stdout(out), redirect_stderr(err):
        yield out, err
    assert "write" not in vars(out)
    assert "write" not in vars(err)


def taken(waiting: Waiting) -> str:
    body = waiting.peek(10**9)
    waiting.drop(len(body))
    return body.decode()


def test_a_stream_is_seen_and_restored() -> None:
    stream, seen = Stream(), list[str]()
    tee = StreamTee(stream, seen.append)
    print("a", 1, file=stream)
    stream.writelines(["b\n", "c\n"])
    tee.close()
    print("after", file=stream)
    assert stream.getvalue() == "a 1\nb\nc\nafter\n"
    assert "".join(seen) == "a 1\nb\nc\n"


def test_a_sink_that_fails_does_not_show() -> None:
    stream = Stream()

    def sink(_text: str) -> None:
        raise ZeroDivisionError

    tee = StreamTee(stream, sink)
    print("a", file=stream)
    tee.close()
    assert stream.getvalue() == "a\n"


def test_wrappers_of_others_survive_in_any_order() -> None:
    stream, first, second = Stream(), list[str](), list[str]()
    one = StreamTee(stream, first.append)
    two = StreamTee(stream, second.append)
    one.close()
    stream.write("x")
    two.close()
    stream.write("y")
    assert (first, second, stream.getvalue()) == ([], ["x"], "xy")


def test_a_run_has_what_is_printed_while_it_is_open() -> None:
    with streams() as (out, err):
        console, waiting = Console(), Waiting()
        print("before")
        console.open(waiting)
        print("out")
        print("err", file=sys.stderr)
        print("unfinished", end="")
        console.close(waiting)
        print(" after")
        assert taken(waiting) == "out\nerr\nunfinished"
        assert out.getvalue() == "before\nout\nunfinished after\n"
        assert err.getvalue() == "err\n"


def test_an_outer_run_has_the_whole_and_an_inner_one_its_part() -> None:
    with streams():
        console, outer, inner = Console(), Waiting(), Waiting()
        console.open(outer)
        print("1")
        console.open(inner)
        print("2")
        console.close(inner)
        print("3")
        console.close(outer)
        assert taken(outer) == "1\n2\n3\n"
        assert taken(inner) == "2\n"


def test_logging_that_took_the_stream_earlier_is_seen() -> None:
    with streams():
        logger, handler = logging.getLogger("tests.console"), logging.StreamHandler()
        logger.addHandler(handler)
        console, waiting = Console(), Waiting()
        console.open(waiting)
        logger.warning("careful")
        console.close(waiting)
        logger.removeHandler(handler)
        assert taken(waiting) == "careful\n"


def test_bars_on_stderr_do_not_mix_with_lines_on_stdout() -> None:
    with streams():
        console, waiting = Console(), Waiting()
        console.open(waiting)
        for percent in range(0, 101, 10):
            sys.stderr.write(f"\r{percent}%")
            if percent == 50:
                print("halfway")
        sys.stderr.write("\n")
        console.close(waiting)
        assert taken(waiting) == "halfway\n100%\n"


def test_an_unfinished_line_of_the_other_stream_is_ended_first() -> None:
    with streams():
        console, waiting = Console(), Waiting()
        console.open(waiting)
        sys.stderr.write("50%")
        console.collect(everything=True)
        print("line")
        console.close(waiting)
        assert taken(waiting) == "50%\nline\n"


def test_one_object_for_both_streams_is_seen_once() -> None:
    with streams() as (out, _err), redirect_stderr(out):
        console, waiting = Console(), Waiting()
        console.open(waiting)
        print("once")
        print("twice", file=sys.stderr)
        console.close(waiting)
        assert taken(waiting) == "once\ntwice\n"


def test_missing_and_odd_streams_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        __slots__ = ()

        def write(self, _text: str) -> int:
            return 0

    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", Odd())
    console, waiting = Console(), Waiting()
    console.open(waiting)
    sys.stderr.write("x")
    console.close(waiting)
    assert taken(waiting) == ""


def test_what_does_not_fit_is_counted() -> None:
    waiting = Waiting(limit=10)
    waiting.add("12345\n")
    waiting.add("x" * 30)
    waiting.add("y" * 5)
    assert taken(waiting) == "12345\n"
    assert taken(waiting) == "\n[mlplat: 35 bytes left out: printed faster than they could be sent]\n"
    assert taken(waiting) == ""
    waiting.add("z" * 11)
    waiting.add("ok\n")
    assert taken(waiting) == "\n[mlplat: 11 bytes left out: printed faster than they could be sent]\nok\n"


def test_a_forked_child_changes_nothing() -> None:
    program = (
        "import os, sys\n"
        "from mlplat.sdk.capture.console import Console, Waiting\n"
        "console, waiting = Console(), Waiting()\n"
        "console.open(waiting)\n"
        "console._lock.acquire()\n"  # as if another thread held it while this one forks
        "child = os.fork()\n"
        "if child == 0:\n"
        "    print('child')\n"
        "    sys.stdout.flush()\n"
        "    os._exit(0)\n"
        "console._lock.release()\n"
        "os.waitpid(child, 0)\n"
        "print('parent')\n"
        "console.close(waiting)\n"
        "print(waiting.peek(100))\n"
    )
    assert run(program) == ("child\nparent\nb'parent\\n'\n", "")


def test_descriptors_catch_children_and_c_code() -> None:
    program = (
        "import os, subprocess, sys\n"
        "from mlplat.sdk.capture.console import Console, Waiting\n"
        "console, waiting = Console(), Waiting()\n"
        "console.open(waiting, descriptors=True)\n"
        "print('python', flush=True)\n"
        "subprocess.run(['echo', 'a child'])\n"
        "os.write(2, b'raw\\n')\n"
        "console.close(waiting)\n"
        "print('after', flush=True)\n"
        "print(sorted(waiting.peek(1000).decode().split('\\n')), file=sys.stderr)\n"
    )
    assert run(program) == ("python\na child\nafter\n", "raw\n['', 'a child', 'python', 'raw']\n")


def test_descriptors_that_come_later_see_nothing_twice() -> None:
    program = (
        "import sys\n"
        "from mlplat.sdk.capture.console import Console, Waiting\n"
        "console, outer, inner = Console(), Waiting(), Waiting()\n"
        "console.open(outer)\n"
        "print('1', flush=True)\n"
        "console.open(inner, descriptors=True)\n"
        "print('2', flush=True)\n"
        "console.close(inner)\n"
        "print('3', flush=True)\n"
        "console.close(outer)\n"
        "print(outer.peek(1000), sorted(inner.peek(1000).split()), file=sys.stderr)\n"
    )
    assert run(program) == ("1\n2\n3\n", "b'1\\n2\\n3\\n' [b'2']\n")


def run(program: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True)
    return done.stdout, done.stderr


def test_a_recordings_name_is_a_path() -> None:
    assert f"-{os.getpid()}-" in recording_name()
    assert "/" not in recording_name()
