"""Watching a run through the whole platform: executor, Postgres, gateway, HAProxy."""

from __future__ import annotations

import re
import subprocess
import textwrap
import uuid
from pathlib import Path

import httpx

import mlplat
from mlplat.http.live.hub import MAX_STREAMS
from mlplat.pipelines.spec import PipelineSpec
from mlplat.sdk.live import LiveRun
from mlplat.sdk.pipeline_runs import PipelineRunHandle
from tests.platform import ROOT, Platform

CODE = """\
import time
import uuid
from pathlib import Path

def work(go, ctx):
    print("begun")
    ctx.progress(0.5, "half way")
    while not Path(go).exists():
        time.sleep(0.02)
    print("last words")
"""


def _submit(platform: Platform, folder: Path, go: Path) -> PipelineRunHandle:
    module = f"worker_{uuid.uuid4().hex[:8]}"  # two modules of one name in a process would be one another's
    (folder / f"{module}.py").write_text(CODE)
    definition = folder / "live.yaml"
    definition.write_text(
        textwrap.dedent(f"""\
            name: live
            steps:
              work: {{uses: "{module}:work", with: {{go: "{go}"}}}}
              after: {{command: "echo after it", needs: [work]}}
            """)
    )
    return mlplat.submit(definition, url=platform.url)


def test_a_run_is_seen_as_it_happens(platform: Platform, tmp_path: Path) -> None:
    go = tmp_path / "go"
    handle = _submit(platform, tmp_path, go)
    live, told, progress = LiveRun(), "", set()
    for event in handle.events(timeout_s=120):
        live.apply(event)
        if event.kind == "log":
            told += event.data["text"]
        progress |= {entry["progress"]["text"] for entry in live.status["attempts"] if entry["progress"]}
        if "begun" in told and "half way" in progress:  # both are seen while the step runs, which waits for that
            go.touch()
    assert live.status == handle.status()
    assert live.status["state"] == "SUCCEEDED"
    assert "last words" in told
    assert handle.logs("work") == "── work · attempt 1 · SUCCEEDED\nbegun\nlast words\n"


def test_the_command_line_watches_and_follows(platform: Platform, tmp_path: Path) -> None:
    go = tmp_path / "go"
    go.touch()
    handle = _submit(platform, tmp_path, go)
    assert f"{handle.run_id} succeeded" in platform.mlplat("watch", handle.run_id)
    assert "after it" in platform.mlplat("logs", handle.run_id, "--follow", "--step", "after")
    bad = {"name": "bad", "steps": {"bad": {"command": "echo oops; exit 3"}}}
    failing = mlplat.submit(PipelineSpec.model_validate(bad), url=platform.url)
    done = platform.run("watch", failing.run_id)
    assert done.returncode == 1
    assert "bad failed" in done.stdout
    assert f"see: mlplat logs {failing.run_id}" in done.stderr


def test_who_goes_away_leaves_room_for_others(platform: Platform) -> None:
    waiting = PipelineSpec.model_validate({"name": "waits", "steps": {"wait": {"approval": {}}}})
    handle = mlplat.submit(waiting, url=platform.url)
    with httpx.Client(timeout=30, trust_env=False) as client:
        for _ in range(MAX_STREAMS + 20):
            with client.stream("GET", f"{handle.url}/events") as response:
                assert response.status_code == 200, response.read()
                assert next(response.iter_bytes()).startswith(b"retry:")
        assert client.post(f"{handle.url}/cancel", json={"by": "test"}).status_code == 200
    assert handle.wait(60)["state"] == "CANCELLED"


def test_what_the_documentation_shows_works(platform: Platform, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "pipelines-live.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    run_id = platform.python(snippet + "print(handle.run_id)\n").split()[-1]
    curls = [line for line in text.splitlines() if line.startswith("curl")]
    assert len(curls) == 2
    for command in curls:
        done = subprocess.run(
            ["bash", "-ec", f"{command} --fail --silent --show-error"],
            env=platform.environment | {"MLPLAT_URL": platform.url, "RUN": run_id}, capture_output=True, text=True,
            timeout=60, check=True, cwd=tmp_path,
        )  # fmt: skip
        assert "event: end" in done.stdout or "hello\\n" in done.stdout
    for line in re.findall(r"^mlplat ([a-z]+) [^#]*", text, re.MULTILINE):
        help_text = platform.mlplat(line, "--help")
        for option in re.findall(rf"^mlplat {line} .*?(--[a-z]+)", text, re.MULTILINE):
            assert option in help_text
