"""`inferfleet image` and `inferfleet jobs output` against a live API."""

import base64
import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path

import pytest
from fleet import until
from live_api import LiveApi, running_api
from PIL import Image
from rich.console import Console
from shell import Ran, shell

from inferfleet.workers import cli_http
from inferfleet.workers.cli_painting import TerminalView, half_blocks

COMMAND = [sys.executable, "-m", "inferfleet.workers.cli", "image"]


@pytest.fixture(scope="module")
def shared_api(session_redis) -> Iterator[LiveApi]:
    with running_api(session_redis.url, served=("paper", "flux")) as api:
        yield api


def opened(path: str | Path) -> Image.Image:
    picture = Image.open(path)
    picture.load()
    return picture


def photo(colour: tuple[int, int, int]) -> bytes:
    kept = BytesIO()
    Image.new("RGB", (32, 32), colour).save(kept, format="png")
    return kept.getvalue()


def bodies(api: LiveApi, count: int = 1) -> list[dict]:
    """The bodies of the latest image jobs, newest first."""
    jobs = api.worker.ledger.list("default", model="flux", limit=count).jobs
    key = f"{api.worker.ledger.prefix}job:"
    return [json.loads(api.worker.ledger.redis.hget(key + job.id, "envelope"))["body"] for job in jobs]


# Pictures ------------------------------------------------------------------------------------------------------------


def test_a_picture_is_saved_where_it_was_wanted_by_the_only_image_model(run):
    ran = run("image", "a red circle", "-o", "out.png", "--size", "64x32", "--seed", "7")

    assert ran == Ran(0, "out.png  64x32  seed 7\n", "")
    assert (opened("out.png").size, opened("out.png").getpixel((0, 0))) == ((64, 32), (7, 0, 100))


def test_several_pictures_are_numbered_and_an_unnamed_one_is_named_after_its_job(run, tmp_path):
    several = run("image", "x", "-n", "3", "-o", "out.jpg")
    unnamed = run("image", "x", "--format", "webp")

    assert [line.split()[0] for line in several.out.splitlines()] == ["out-0.jpg", "out-1.jpg", "out-2.jpg"]
    assert opened("out-2.jpg").format == "JPEG"
    name = unnamed.out.split()[0]
    assert re.fullmatch(r"job_[0-9a-f]{32}\.webp", name)
    assert opened(name).format == "WEBP"


def test_every_option_reaches_the_job(run, api, tmp_path):
    (tmp_path / "start.dat").write_bytes(photo((5, 6, 7)))
    ran = run(
        "image", "-", "-m", "flux", "--width", "64", "--height", "48", "-n", "2", "--steps", "6", "--guidance", "2.5",
        "--seed", "9", "--format", "jpeg", "--quality", "80", "--lora", "ink:0.5", "--lora", "wax", "--embed-prompt",
        "--image", "start.dat", "--strength", "0.7", "--preview", "3", "--priority", "-4", "-o", "x.png",
        stdin=" from a pipe\n",
    )  # fmt: skip

    assert ran.code == 0, ran.err
    (body,) = bodies(api)
    assert body.pop("image") == f"data:image/png;base64,{base64.b64encode(photo((5, 6, 7))).decode()}"
    assert body == {
        "model": "flux", "prompt": "from a pipe", "width": 64, "height": 48, "n": 2, "num_inference_steps": 6,
        "guidance_scale": 2.5, "seed": 9, "output_format": "jpeg", "output_compression": 80,
        "loras": [{"name": "ink", "scale": 0.5}, {"name": "wax", "scale": 1.0}], "embed_prompt": True,
        "strength": 0.7, "preview_every": 3, "priority": -4,
    }  # fmt: skip
    # Without a terminal a preview is a line.
    assert ran.err == "preview of picture 0 after step 3\npreview of picture 0 after step 6\n"
    assert opened("x-1.png").format == "JPEG"


def test_as_json_it_is_the_job_with_the_files(run):
    job = run("image", "x", "-o", "out.png", "--json").json

    assert (job["status"], job["outputs"][0]["path"]) == ("completed", "out.png")
    assert job["outputs"][0]["size_bytes"] == Path("out.png").stat().st_size


def test_an_existing_file_is_replaced_through_links_with_its_mode_and_nothing_is_left_beside_it(run, tmp_path):
    (tmp_path / "real.png").write_bytes(b"old")
    (tmp_path / "real.png").chmod(0o640)
    (tmp_path / "link.png").symlink_to("real.png")

    run("image", "x", "-o", "link.png")

    assert (tmp_path / "link.png").is_symlink()
    assert opened("real.png").format == "PNG"
    assert stat.S_IMODE((tmp_path / "real.png").stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.png", "real.png"]


def test_a_damaged_download_is_told_and_leaves_the_old_file_alone(run, tmp_path, monkeypatch):
    (tmp_path / "out.png").write_bytes(b"old")
    monkeypatch.setattr(cli_http.ApiClient, "read", lambda client, path: b"something else")

    ran = run("image", "x", "-o", "out.png")

    assert (ran.code, "damaged_download" in ran.err) == (1, True)
    assert (tmp_path / "out.png").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_dash_sends_the_picture_itself_to_a_pipe(run):
    done = subprocess.run([*COMMAND, "x", "-o", "-"], capture_output=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, b"")
    assert opened(BytesIO(done.stdout)).size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("image", "x", "-o", "nowhere/out.png"), 2, ["no folder", "nowhere"]),
        (("image", "x", "-o", "."), 2, ["is a folder"]),
        (("image", "x", "-o", "out.gif"), 2, [".gif", "--format"]),
        (("image", "x", "-o", "-", "-n", "2"), 2, ["2 pictures"]),
        (("image", "x", "-o", "-", "--json"), 2, ["one stream"]),
        (("image", "x", "-o", "a.png", "--no-wait"), 2, ["jobs output"]),
        (("image", "x", "--strength", "0.5"), 2, ["--image"]),
        (("image", "x", "--image", "absent.png"), 2, ["absent.png"]),
        (("image", "x", "--image", "data"), 2, ["data"]),
        (("image", "x", "--steps", "0"), 2, ["steps"]),
        (("image", "x", "--width", "17", "--height", "64"), 1, ["width", "16"]),
        (("image", "x", "--size", "12x12x"), 1, ["size", "WIDTHxHEIGHT"]),
        (("image", "x", "--lora", "oil"), 1, ["'oil'", "'ink', 'wax'"]),
        (("image", "x", "--guidance", "nan"), 2, ["guidance"]),
        (("image", ""), 1, ["prompt"]),
        (("image", "x", "-m", "paper"), 1, ["/v1/chat/completions"]),
        (("image", "x", "-m", "nobody"), 4, ["nobody", "inferfleet models"]),
        (("image", "fail nan_logits"), 5, ["nan_logits"]),
        (("chat", "say hi", "-m", "flux"), 1, ["/v1/images/generations"]),
        (("jobs", "output", "job_" + "0" * 32), 4, ["no job with this id"]),
    ],
)
def test_an_error_says_what_why_and_what_to_try_without_a_trace(run, tmp_path, arguments, code, words):
    (tmp_path / "data").write_text("no picture")
    ran = run(*arguments)

    assert ran.code == code, ran.err
    assert all(word in re.sub(r"[\s│]+", " ", ran.err) for word in words), ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_failed_job_as_json_is_the_job_and_its_exit_code(run):
    ran = run("image", "fail engine_error", "--json")

    assert (ran.code, ran.json["status"], ran.json["error"]["code"]) == (5, "failed", "engine_error")


# Models --------------------------------------------------------------------------------------------------------------


def test_chat_and_image_each_choose_among_their_own_kind(run, api):
    assert run("chat", "say hi").out == "hi\n"
    assert re.search(r"flux +ready +flux +- +image", run("models").out)

    api.worker.ledger.put_card("flux2", {"id": "flux2", "kind": "image", "state": "ready"}, "hand", 600)
    try:
        ran = run("image", "x")
        assert run("chat", "say hi").out == "hi\n"
    finally:
        api.worker.ledger.put_card("flux2", {}, "hand", 0)
    assert ran.code == 1
    assert "several image models are served, choose one with --model: flux, flux2" in ran.err


def test_without_a_model_of_its_kind_it_says_what_there_is(session_redis, monkeypatch, capsys, tmp_path):
    with running_api(session_redis.url) as api:
        ran = shell(api, monkeypatch, capsys, tmp_path)("image", "x")

    assert (ran.code, "no image model is served beside paper (text)" in ran.err) == (4, True)


# Jobs ----------------------------------------------------------------------------------------------------------------


def test_a_job_that_nobody_waits_for_is_shown_and_its_pictures_are_fetched_later(run):
    job_id = run("image", "x", "-n", "2", "--no-wait").out.strip()
    waited = run("jobs", "wait", job_id)

    shown = run("jobs", "show", job_id).out
    whole = run("jobs", "output", job_id, "-o", "both.png")
    one = run("jobs", "output", job_id, "--index", "1", "-o", "one.png")

    assert waited.code == 0
    assert re.search(r"picture 1 +64x64 image/png, \d+ bytes, seed 1001, http://.*signature=", shown)
    assert re.search(r"progress +step 8 of 8", shown)
    assert [line.split()[0] for line in whole.out.splitlines()] == ["both-0.png", "both-1.png"]
    assert one.out == "one.png  64x64  seed 1001\n"
    assert Path("one.png").read_bytes() == Path("both-1.png").read_bytes()
    missing = run("jobs", "output", job_id, "--index", "2")
    assert (missing.code, "2 pictures" in missing.err) == (4, True)


def test_a_job_without_pictures_or_without_an_end_has_nothing_to_save(run, api):
    with api.http() as http:
        body = {"model": "paper", "messages": [{"role": "user", "content": "say hi"}]}
        chat = http.post("/v1/jobs", json={"body": body}, headers={"prefer": "wait=20"}).json()["id"]
    api.worker.paused = True
    waiting = run("image", "x", "--no-wait", "--json").json["id"]

    assert "no pictures" in run("jobs", "output", chat).err
    assert "not_terminal" in run("jobs", "output", waiting).err
    assert run("jobs", "cancel", waiting).code == 0
    assert "cancelled" in run("jobs", "output", waiting).err


def test_ctrl_c_cancels_the_job(run, api, tmp_path):
    # Whoever runs the tests may have told them to ignore Ctrl-C; a terminal does not.
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        [*COMMAND, "hold on", "-o", "out.png"], stderr=subprocess.PIPE, text=True, preexec_fn=default
    )
    until(lambda: any(job.state == "in_progress" for job in api.worker.ledger.list("default", model="flux").jobs))
    until(lambda: process.poll() is None and progressed(api))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert (process.returncode, "cancelled the job" in err) == (130, True), err
    assert api.worker.cancel_seen.wait(10)
    assert not (tmp_path / "out.png").exists()


def progressed(api: LiveApi) -> bool:
    (job,) = api.worker.ledger.list("default", model="flux", limit=1).jobs
    return job.progress is not None


# A terminal ----------------------------------------------------------------------------------------------------------


def test_on_a_terminal_there_is_a_bar_and_the_preview_is_drawn(run, api):
    # Given a terminal of colours as stderr and a job that waits until nobody is ahead,
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "100", "LINES": "30"}
    api.worker.paused = True
    process = subprocess.Popen([*COMMAND, "x", "--preview", "2", "-o", "out.png"], stderr=theirs, env=env)
    os.close(theirs)

    # when it waits and is then painted, then it says so.
    seen = read_until(ours, "next")
    api.worker.paused = False
    api.worker.ring("flux", 1)
    seen += read_until(ours, None)

    assert process.wait(60) == 0
    assert "queued" in seen
    assert "▀" in seen
    assert "step 4 of 4" in seen
    os.close(ours)


def read_until(terminal: int, words: str | None) -> str:
    """What a terminal shows up to some words, or to its end."""
    seen = b""
    while words is None or words.encode() not in seen:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # how Linux tells the end of a terminal
            break
        if not piece:
            break
        seen += piece
    return seen.decode(errors="replace")


def test_two_pixels_share_a_cell_one_above_the_other():
    picture = Image.new("RGB", (2, 2))
    picture.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)])
    kept = BytesIO()
    picture.save(kept, format="png")

    text = half_blocks(base64.b64encode(kept.getvalue()).decode(), 2, 10)

    assert text.plain == "▀▀\n"
    styles = [span.style for span in text.spans]
    assert [(style.color.name, style.bgcolor.name) for style in styles] == [
        ("#ff0000", "#0000ff"),
        ("#00ff00", "#090909"),
    ]


@pytest.mark.parametrize("size", [(8, 8), (300, 10), (10, 300)])
def test_a_preview_fits_its_place(size):
    kept = BytesIO()
    Image.new("RGB", size).save(kept, format="png")

    lines = half_blocks(base64.b64encode(kept.getvalue()).decode(), 40, 12).plain.splitlines()

    assert 1 <= len(lines) <= 12
    assert 1 <= len(lines[0]) <= 40


@pytest.mark.parametrize("encoded", ["", "x", base64.b64encode(b"no picture").decode(), photo((1, 2, 3))[:40].hex()])
def test_a_damaged_preview_is_passed_over(encoded):
    console = Console(file=StringIO(), force_terminal=True, width=80, height=24)
    view = TerminalView(console)

    view.preview({"b64_json": encoded})
    view.step(1, 4)
    view.close()

    assert half_blocks(encoded, 10, 10) is None
    assert "▀" not in console.file.getvalue()
