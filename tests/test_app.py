"""The queue, the interface for programs, forms, uploads and views of `lavie_jax/app`, without Gradio."""

import asyncio
import base64
import concurrent.futures
import dataclasses
import io
import json
import socket
import sys
import threading
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from PIL import Image

from lavie_jax.app import form, generation, server, uploads, views
from lavie_jax.app.api import ROOT, Api
from lavie_jax.app.engine import Engine
from lavie_jax.app.generation import Generation
from lavie_jax.app.jobs import JobQueue, QueueFull, Stopped
from lavie_jax.app.progress import TimeLeft, in_words
from lavie_jax.app.store import CANCELLED, COMPLETED, FAILED, QUEUED, RUNNING, Job, Result, Store
from lavie_jax.data.video_files import read_video, save_as, save_video
from lavie_jax.errors import UserError
from lavie_jax.samples.provenance import read_request
from lavie_jax.samples.signing import Certificate
from lavie_jax.stages.settings import STAGE_INFO
from lavie_jax.weights.safetensors_io import write_safetensors

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), np.uint8)
MARKUP = "<img src=x onerror=alert(1)> {{7*7}} ${alert(2)} \"'`<script>"
MOST = 1 << 20


def until(condition, seconds=20):
    """Waits for a condition, and returns its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)
    return value


class StandIn:
    """Makes a video without a model: `steps` steps, each of which waits for `go`. Some prompts fail."""

    def __init__(self, store, *, most_waiting=10, steps=3, plan=lambda wanted, inputs: ["a note"]):
        self.store, self.steps, self.go, self.made = store, steps, threading.Event(), []
        self.queue = JobQueue(store, plan, self.run, most_waiting=most_waiting)

    def run(self, job):
        for step in range(self.steps):
            job.stage, job.phase, job.share = "base", "denoising", step / self.steps
            while not self.go.wait(0.005):
                self.queue.check(job)
            self.queue.check(job)
        if "impossible" in job.generation["prompt"]:
            raise UserError("This is\n impossible.")
        if "broken" in job.generation["prompt"]:
            raise PermissionError(13, "a secret", str(self.store.folder))
        if "full" in job.generation["prompt"]:
            raise UserError("a secret") from OSError(28, "No space left on device")
        folder = self.store.folder_of(job.id) / "base"
        save_video(FRAMES, folder / "a.mp4", fps=8)
        (folder / "a.json").write_text(json.dumps({"request": {"prompt": job.generation["prompt"]}}))
        job.results = [Result("base", "base/a.mp4", "base/a.json")]
        self.made.append(job.generation["prompt"])


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "out")
    yield store
    store.close()


@pytest.fixture
def desk(store):
    desk = StandIn(store)
    yield desk
    desk.queue.close()


def ask(queue, prompt="a red circle", owner="anna"):
    return queue.submit(owner, lambda inputs: generation.check(Generation(prompt=prompt)))


# ---- the queue ----


def test_jobs_are_made_in_order_and_know_their_place(desk):
    jobs = [ask(desk.queue, f"number {i}") for i in range(4)]
    assert [desk.queue.ahead(job.id) for job in jobs] == [0, 1, 2, 3]
    desk.queue.start()
    until(lambda: jobs[0].status == RUNNING)
    desk.queue.cancel(jobs[2].id)
    assert jobs[2].status == CANCELLED and desk.queue.ahead(jobs[3].id) == 2
    desk.go.set()
    until(lambda: desk.queue.waiting() == 0)
    assert desk.made == ["number 0", "number 1", "number 3"]
    assert [desk.queue.find(job.id).status for job in jobs] == [COMPLETED, COMPLETED, CANCELLED, COMPLETED]
    assert desk.queue.store.ids_of("anna") == [job.id for job in reversed(jobs)]
    assert desk.queue.store.ids_of("bert") == []


def test_a_running_job_is_cancelled_between_two_steps(desk):
    first, second = ask(desk.queue), ask(desk.queue, "another")
    desk.queue.start()
    until(lambda: first.status == RUNNING)
    desk.queue.cancel(first.id)  # while it waits for its first step
    until(lambda: first.status == CANCELLED)
    assert not desk.made
    desk.go.set()
    until(lambda: second.status == COMPLETED)


def test_a_job_that_is_deleted_while_it_finishes_stays_deleted(desk, monkeypatch):
    save, deleting = desk.store.save, []

    def slow(job):
        if job.is_finished:
            deleting.append(threading.Thread(target=desk.queue.delete, args=(job,)))
            deleting[0].start()
            deleting[0].join(0.1)
        save(job)

    job = ask(desk.queue)
    monkeypatch.setattr(desk.store, "save", slow)
    desk.go.set()
    desk.queue.start()
    until(lambda: deleting and desk.queue.waiting() == 0)
    deleting[0].join()
    assert desk.queue.find(job.id) is None and not desk.store.folder_of(job.id).exists()


def test_a_job_that_fails_is_a_sentence_and_the_next_one_runs(desk):
    jobs = [ask(desk.queue, prompt) for prompt in ("impossible", "broken", "possible", "full")]
    desk.go.set()
    desk.queue.start()
    until(lambda: desk.queue.waiting() == 0)
    assert [job.status for job in jobs] == [FAILED, FAILED, COMPLETED, FAILED]
    assert jobs[0].error == "This is impossible."
    assert "log" in jobs[1].error and not jobs[1].error.count("secret") + jobs[1].error.count("/")
    assert jobs[3].error == "The server's disk is full."


def test_the_queue_survives_a_restart(tmp_path):
    store = Store(tmp_path / "out")
    with pytest.raises(UserError, match="in use by another server"):
        Store(tmp_path / "out")
    desk = StandIn(store)
    jobs = [ask(desk.queue, f"number {i}") for i in range(3)]
    desk.queue.start()
    until(lambda: jobs[0].status == RUNNING)
    desk.queue.close()
    store.close()
    (tmp_path / "out" / ("0" * 32)).mkdir()
    (tmp_path / "out" / ("0" * 32) / "job.json").write_text("{")  # of a disk that was full
    store = Store(tmp_path / "out")
    desk = StandIn(store)
    assert [job.id for job in store.unfinished] == [] and desk.queue.waiting() == 3
    assert [desk.queue.find(job.id).status for job in jobs] == [QUEUED] * 3
    desk.go.set()
    desk.queue.start()
    until(lambda: desk.queue.waiting() == 0)
    desk.queue.close()
    store.close()
    assert desk.made == ["number 0", "number 1", "number 2"]


def test_a_queue_that_is_full_refuses_and_keeps_nothing(store):
    desk = StandIn(store, most_waiting=2)
    for _ in range(3):
        ask(desk.queue)
    with pytest.raises(QueueFull, match="2 videos are waiting already"):
        ask(desk.queue)
    wrong = StandIn(store, plan=lambda wanted, inputs: generation.check(dataclasses.replace(wanted, prompt=" ")))
    with pytest.raises(UserError, match="prompt is empty"):
        ask(wrong.queue)
    assert len(list(store.folder.glob("*/job.json"))) == len(list(store.folder.glob("[0-9a-f]*"))) == 3


# ---- the interface for programs ----


def post(api, body, type="application/json"):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return api.answer("POST", f"{ROOT}/generation", {}, type, body)


def test_a_program_submits_waits_and_gets_its_video(desk):
    api = Api(desk.queue, most_upload=MOST)
    answer = post(api, {"prompt": "a  red circle", "seed": 7, "model": "lavie_jax", "steps": 3})
    video = answer.content
    assert answer.status == 202 and video["object"] == "video" and video["status"] == "queued"
    assert (video["prompt"], video["seed"], video["stages"]) == ("a red circle", 7, ["base"])
    address = f"{ROOT}/{video['id']}"
    assert api.answer("GET", f"{address}/content", {}, "").status == 409
    desk.go.set()
    desk.queue.start()
    until(lambda: api.answer("GET", address, {}, "").content["status"] == "completed")
    video = api.answer("GET", address, {}, "").content
    assert video["progress"] == 100 and video["videos"][0]["stage"] == "base" and video["error"] is None
    path, _, query = video["videos"][0]["url"].partition("?")
    found = api.answer("GET", path, dict([query.split("=")]), "")
    assert found.status == 200 and read_video(found.file).shape == FRAMES.shape
    record = api.answer("GET", f"{address}/content", {"variant": "json", "download": "1"}, "")
    assert record.download and json.loads(record.file.read_text())["request"]["prompt"] == "a red circle"
    assert api.answer("GET", f"{address}/content", {"stage": "vsr"}, "").status == 404
    assert api.answer("GET", f"{address}/content", {"file": "/etc/passwd"}, "").status == 400
    assert api.answer("DELETE", address, {}, "").content["deleted"]
    assert api.answer("GET", address, {}, "").status == 404 and not found.file.exists()


BAD_BODIES = [
    (b"{", "is not JSON"),
    ([1], "must be a JSON object"),
    ({}, "prompt is empty"),
    ({"prompt": " "}, "prompt is empty"),
    ({"prompt": 3}, "prompt must be text"),
    ({"prompt": "a" * 5000}, "at most 4000"),
    ({"prompt": "a\ud800"}, "not valid Unicode"),
    ({"prompt": "a", "negative_prompt": "b\0"}, "contains the character NUL"),
    ({"prompt": "a", "sed": 1}, "unknown field 'sed'; did you mean 'seed'"),
    ({"prompt": "a", "base": {"steps": 3}}, "unknown field 'base'"),
    ({"prompt": "a", "seed": -1}, "seed must be a whole number"),
    ({"prompt": "a", "seed": "x"}, "seed must be a whole number"),
    ({"prompt": "a", "model": "sora-2"}, "model must be 'lavie_jax'"),
    ({"prompt": "a", "stages": ["bas"]}, "did you mean 'base'"),
    ({"prompt": "a", "stages": [1]}, "stages must be a list of names"),
    ({"prompt": "a", "stages": ["vsr"]}, "vsr needs a clip"),
    ({"prompt": "a", "steps": 0}, "steps must be at least 1"),
    ({"prompt": "a", "steps": "many"}, "steps takes a whole number"),
    ({"prompt": "a", "vsr": {"steps": 3}}, "vsr, which is not among the stages base"),
    ({"prompt": "a", "stages": ["base", "vsr"], "vsr": {"stps": 3}}, "vsr: unknown setting 'stps'"),
    ({"prompt": "a", "stages": ["base", "vsr"], "vsr": 3}, "vsr must be an object"),
    ({"prompt": "a", "preset": "best"}, "preset: unknown 'best'"),
    ({"prompt": "a", "prompt_syntax": "weigthed"}, "did you mean 'weighted'"),
    ({"prompt": "a", "prompts_at": {"x": "b"}}, "prompts_at must be like"),
    ({"prompts_at": {"9" * 5000: "b"}}, "prompts_at must be like"),
    ({"prompt": "a", "prompts_at": {"0": "b", "8": "c"}}, "give either prompt or prompts_at"),
    ({"prompts_at": {"0": "a | 8: b"}}, "contains |, which divides prompts"),
    ({"prompt": "a", "guidance": 10**400}, "guidance takes a number"),
    ({"prompt": "a", "frames": 10**400}, "frames takes a whole number"),
    ({"prompt": "a", "free_init": 10**6}, "free_init must be from 0 to 100"),
    ({"prompt": "a", "weights_sha256": 5}, "weights_sha256 must be text"),
    ({"prompt": "a", "vsr": {"weights_sha256": "x"}}, "weights_sha256 must be text, of a stage among base"),
    ({"prompt": "a", "input": "/etc/passwd"}, "addresses of files are not read"),
    ({"prompt": "a", "first_frame": "file:///etc/passwd", "stages": ["prediction"]}, "is not base64"),
    ({"prompt": "a", "first_frame": {"path": "/etc/passwd"}, "stages": ["prediction"]}, "must be a file in base64"),
    ({"prompt": "a", "loras": ["a.safetensors"]}, "loras must be a list of objects"),
    ({"prompt": "a", "loras": [{"file": "AAAA", "scale": "big"}]}, "not of a kind|scale of a LoRA"),
    ({"prompt": "a", "embeddings": {"<cat>": "AAAA"}}, "embeddings must be a list of objects"),
    ({"prompt": "a", "embeddings": [{"file": "AAAA", "word": "a cat"}]}, "must be text without spaces"),
    ({"prompt": "a", "embeddings": [{"file": "AAAA"}] * 9}, "at most 8 are allowed"),
    ({"prompt": "a", "embeddings": [{"file": "AAAA"}]}, "embedding is not of a kind that can be read"),
]


@pytest.mark.parametrize("body, message", BAD_BODIES, ids=[message for _, message in BAD_BODIES])
def test_a_bad_request_is_an_error_in_json(body, message, desk):
    body = dict(body) if isinstance(body, dict) else body
    if isinstance(body, dict) and body.get("input"):
        body["stages"] = ["vsr"]
    answer = post(Api(desk.queue, most_upload=MOST), body)
    assert answer.status == 400 and answer.content["error"]["type"] == "invalid_request_error"
    text = answer.content["error"]["message"]
    assert any(part in text for part in message.split("|")) and "\n" not in text
    assert desk.queue.waiting() == 0 and not list(desk.store.folder.glob("[0-9a-f]*"))


def test_other_bad_requests_have_their_status(store):
    desk = StandIn(store, most_waiting=0)
    api = Api(desk.queue, most_upload=100)
    assert post(api, {"prompt": "a"}, "text/plain").status == 415
    big = base64.b64encode(bytes(200)).decode()
    assert "too large" in post(api, {"prompt": "a", "stages": ["vsr"], "input": big}).content["error"]["message"]
    assert post(api, {"prompt": "a"}).status == 202
    full = post(api, {"prompt": "a"})
    assert full.status == 429 and full.content["error"]["code"] == "queue_full" and int(full.headers["Retry-After"]) > 0
    assert api.answer("GET", f"{ROOT}/generation", {}, "").status == 405
    for path in ("", "/", "/x", f"/{'0' * 32}", "/../job.json", f"/{'0' * 32}/../../x", "/.lock", "/.uploads"):
        assert api.answer("GET", ROOT + path, {}, "").status == 404


def test_files_of_a_request_are_stored_under_names_of_ours(tmp_path):
    picture = io.BytesIO()
    Image.fromarray(FRAMES[0]).save(picture, "png")
    text = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    body = {"prompt": "a", "stages": ["prediction"], "first_frame": text, "prediction": {"steps": 3}}
    wanted = generation.from_body(body, tmp_path / "inputs", MOST)
    assert wanted.pictures == {"first": "first_frame.png"} and wanted.settings == {"prediction": {"steps": 3}}
    assert (tmp_path / "inputs/first_frame.png").read_bytes() == picture.getvalue()
    assert Generation.from_json(json.loads(json.dumps(wanted.to_json()))) == wanted


def test_the_request_in_a_samples_json_is_a_request(tmp_path):
    own = {"sampler": "ddim", "steps": 3, "guidance": 4.0, "frames": 4, "height": 16, "width": 24, "fps": 8.0}
    request = {"prompt": "a red circle", "seed": 5, "stages": ["base"], **own, "weights_sha256": "0" * 64}
    wanted = generation.from_body(request, tmp_path, MOST)
    assert wanted.settings == {"base": own} and wanted.weights == {"base": "0" * 64} and wanted.seed == 5
    again, needed = generation.from_request(request | {"known_sha256": {"0": "1"}, "input_sha256": "2"})
    assert again.settings == wanted.settings and again.weights == wanted.weights
    assert needed == ["the clip that it started from", "its first frame"]
    at = {"prompts_at": {"0": "a", "16": "c", "8": "b"}}  # programs write objects in any order
    wanted = generation.from_body(
        request | at | {"prompt": "0: a | 8: b | 16: c", "weights_sha256": None}, tmp_path, MOST
    )
    assert list(wanted.prompts_at.items()) == [(0, "a"), (8, "b"), (16, "c")] and not wanted.weights
    assert generation.from_request(request | at)[0].prompts_at == wanted.prompts_at
    for damaged in ({"stages": ["base", "vsr"]}, {"stages": [{}]}, {"stages": ["base", "vsr"], "vsr": 5}):
        with pytest.raises(UserError):
            generation.from_request(request | damaged)


# ---- uploads ----


@pytest.mark.parametrize("name, kind, content, message", [
    ("list.mp4", uploads.CLIP, b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "not of a kind that can be read: give MP"),
    ("list.mp4", uploads.CLIP, b"ffconcat version 1.0\nfile '/etc/passwd'\n", "not of a kind that can be read"),
    ("a.png", uploads.PICTURE, b"%!PS-Adobe-3.0 EPSF-3.0\n", "not of a kind that can be read: give PNG"),
    ("a.svg", uploads.PICTURE, b"<svg xmlns='x'><script/></svg>", "not of a kind that can be read"),
    ("a.png", uploads.PICTURE, b"", "not of a kind that can be read"),
    ("a.png", uploads.PICTURE, b"\x89PNG\r\n\x1a\n broken", "cannot be read"),
    ("a.safetensors", uploads.LORA, b"hello", "not of a kind that can be read: give .safetensors"),
    ("a.json", uploads.MADE, b"[]", "not of a kind that can be read"),
    ("a.mp4", uploads.CLIP, bytes(4) + b"ftyp" + bytes(MOST), "too large: 1 MiB"),
])  # fmt: skip
def test_files_of_other_kinds_and_sizes_are_refused(name, kind, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        uploads.keep(path, tmp_path / "inputs", "x", kind, MOST)
    assert str(tmp_path) not in str(caught.value) and not (tmp_path / "inputs").exists()


def test_pictures_of_too_many_pixels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_PICTURE_PIXELS", 1e6)
    Image.new("L", (2000, 1000)).save(tmp_path / "large.png")  # a small file
    with pytest.raises(UserError, match="2000x1000 pixels, where at most 1 million"):
        uploads.ending_of(tmp_path / "large.png", uploads.PICTURE, MOST)


def test_only_uploaded_files_are_read(tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"x")
    (tmp_path / "secret").write_bytes(b"x")
    (folder / "link").symlink_to(tmp_path / "secret")
    assert form.uploaded({"path": str(folder / "a.png")}, folder) == (folder / "a.png").resolve()
    assert form.uploaded(None, folder) is None
    for path in ("/etc/passwd", str(folder / "../secret"), str(folder / "link"), str(folder), "a\0b", 3, "missing"):
        with pytest.raises(UserError, match="upload it again"):
            form.uploaded({"path": path}, folder)


# ---- the form ----


def form_values(given=()):
    values = dict.fromkeys(form.PLAIN) | {"prompt": "a red circle", "stages": ["base"], "seed": 3, "preset": "official"}
    settings = [s for stage in STAGE_INFO for s in form.settings_of(stage, {})]
    return values | dict.fromkeys((s.stage, s.name) for s in settings) | dict(given)


def test_the_form_asks_for_what_it_shows(tmp_path):
    folder, inputs = tmp_path / "uploads", tmp_path / "inputs"
    Image.fromarray(FRAMES[0]).save(folder.mkdir() or folder / "a.bmp")
    values = form_values({
        "stages": ["vsr", "prediction"], "first_frame": {"path": str(folder / "a.bmp")}, "lora_scales": "0.5",
        ("base", "steps"): "9", ("prediction", "steps"): "4", ("vsr", "noise_level"): "0",
        ("vsr", "negative_prompt"): "",
        ("prediction", "keep_known_frames"): True, ("prediction", "guidance"): " 2.5 ", ("vsr", "windows"): "blended",
        ("vsr", "steps"): " ",
    })  # fmt: skip
    wanted = form.read(values, folder, inputs, MOST)
    assert wanted.stages == ("prediction", "vsr")  # in the order of the cascade
    assert wanted.settings == {
        "prediction": {"guidance": 2.5, "steps": 4, "keep_known_frames": True},
        "vsr": {"noise_level": 0, "windows": "blended"},
    }
    assert wanted.pictures == {"first": "first_frame.bmp"} and (inputs / "first_frame.bmp").exists()
    settings = [s for stage in STAGE_INFO for s in form.settings_of(stage, {"steps": 20})]
    shown = form.values_of(wanted, {"first_frame": str(folder / "a.bmp")}, settings)
    assert form.read(form_values() | shown, folder, inputs, MOST) == wanted
    precise = dataclasses.replace(wanted, loras=(("a.pt", 1.0), ("b.pt", 0.12345678)))
    assert form.values_of(precise, {}, settings)["lora_scales"] == "1, 0.12345678"
    assert next(s for s in settings if s.name == "steps").default == 20


def test_embeddings_have_the_words_of_the_form_or_of_their_files(tmp_path):
    folder, inputs, width = tmp_path / "uploads", tmp_path / "inputs", tiny.TEXT.hidden_size
    folder.mkdir()
    for name, key in (("a", "<cat>"), ("my dog", "emb_params")):  # the second has no word
        write_safetensors(folder / f"{name}.safetensors", {key: np.ones((2, width), np.float32)}, {})
    files = [{"path": str(folder / "a.safetensors")}, {"path": str(folder / "my dog.safetensors")}]
    wanted = form.read(form_values({"embeddings": files}), folder, inputs, MOST)
    names = ["embedding-0.safetensors", "embedding-1.safetensors"]
    assert wanted.embeddings == tuple(zip(names, ("<cat>", "my-dog"))) and (inputs / names[1]).exists()
    assert Generation.from_json(json.loads(json.dumps(wanted.to_json()))) == wanted
    assert not Generation.from_json({k: v for k, v in wanted.to_json().items() if k != "embeddings"}).embeddings
    given = form_values({"embeddings": files, "embedding_words": "<x>, y"})
    wanted = form.read(given, folder, inputs, MOST)
    assert wanted.embeddings == tuple(zip(names, ("<x>", "y")))
    assert form.values_of(wanted, {}, [])["embedding_words"] == "<x>, y"
    with pytest.raises(UserError, match="1 words are given for 2 embeddings"):
        form.read(given | {"embedding_words": "<x>"}, folder, inputs, MOST)
    write_safetensors(folder / "a.safetensors", {"clip_g": np.ones((1, 4), np.float32)}, {})
    with pytest.raises(UserError, match=r"^embedding-0.safetensors is an embedding for Stable Diffusion XL"):
        form.read(form_values({"embeddings": files}), folder, inputs, MOST)


@pytest.mark.parametrize("given, message", [
    ({"stages": []}, "at least one stage"),
    ({"prompt": "\n"}, "prompt is empty"),
    ({"stages": ["vsr"]}, "needs a clip"),
    ({"prompts_at": "a red circle"}, "is not FRAME: PROMPT"),
    ({"seed": None}, "seed must be"),
    ({"lora_scales": "a"}, "must be numbers"),
    ({("base", "steps"): "2.5"}, "base, steps takes a whole number"),
    ({("base", "steps"): "many"}, "base, steps takes a whole number"),
    ({"first_frame": {"path": "/etc/passwd"}}, "upload it again"),
])  # fmt: skip
def test_a_form_that_cannot_be_is_a_sentence(given, message, tmp_path):
    with pytest.raises(UserError, match=message):
        form.read(form_values(given), tmp_path, tmp_path / "inputs", MOST)


def test_stages_follow_what_was_uploaded():
    every = list(STAGE_INFO)
    assert form.fitting_stages(["base"], pictures=True, clip=False, available=every) == ["prediction"]
    assert form.fitting_stages(["base", "vsr"], pictures=True, clip=False, available=every) == ["prediction", "vsr"]
    assert form.fitting_stages(["base"], pictures=False, clip=True, available=every) == ["vsr"]
    assert form.fitting_stages(["base", "vsr"], pictures=False, clip=True, available=every) == ["vsr"]
    assert form.fitting_stages(["interpolation"], pictures=False, clip=True, available=every) == ["interpolation"]
    assert form.fitting_stages(["base"], pictures=True, clip=False, available=["base"]) == ["base"]


# ---- views ----


class Tags(HTMLParser):
    """Collects what a browser would make of HTML."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text.append(data)


def job_of(**fields):
    given = Generation(prompt=MARKUP, stages=("base", "vsr")).to_json()
    return Job(id="0" * 32, owner="anna", generation=given, created=0.0, notes=[MARKUP]) if not fields else (
        dataclasses.replace(job_of(), **fields)
    )  # fmt: skip


def test_prompts_show_as_text():
    results = [Result("base", "base/a.mp4", "base/a.json"), Result("vsr", "vsr/a.gif", "vsr/a.json")]
    for job in (job_of(), job_of(status=FAILED, error=MARKUP), job_of(status=RUNNING, stage="vsr", share=0.5),
                job_of(status=COMPLETED, results=results)):  # fmt: skip
        made = [
            views.status(job, 2),
            views.progress(job),
            views.notes(job),
            views.results(job),
            views.gallery([(job, 1)]),
        ]
        parsed = Tags()
        parsed.feed("".join(made))
        assert not parsed.tags & {"script"} and not any(name.startswith("on") for name in parsed.attributes)
        assert ("img" in parsed.tags) == (job.status == COMPLETED)  # the GIF
        assert MARKUP in "".join(parsed.text)
        assert not any(mark in "".join(made) for mark in ("{{", "${", "`", "<script"))


def test_the_state_of_a_job_is_a_sentence():
    stopping = job_of(status=RUNNING, stage="vsr")
    stopping.stop.set()
    said = [
        views.sentence(stopping, 0),
        views.sentence(None, 0), views.sentence(job_of(), 0), views.sentence(job_of(), 1), views.sentence(job_of(), 5),
        views.sentence(job_of(status=RUNNING), 0), views.sentence(job_of(status=RUNNING, stage="vsr"), 0),
        views.sentence(job_of(status=CANCELLED), 0), views.sentence(job_of(status=COMPLETED), 0),
    ]  # fmt: skip
    assert len(set(said)) == len(said) and all(text.endswith(".") for text in said)
    assert "being cancelled" in said[0] and "1 video is before yours" in said[3] and "stage 2 of 2" in said[6]
    assert 'role="alert"' in views.status(job_of(status=FAILED, error="No."), 0)


def test_time_left_weights_stages_by_their_work():
    rates = {}
    left = TimeLeft({"base": 10.0, "vsr": 30.0}, rates)
    left.update("base", 0, 5, 100.0)  # compiles for 50 s
    assert left.share == 0 and left.seconds is None
    left.update("base", 1, 5, 150.0)
    assert left.seconds is None
    left.update("base", 2, 5, 151.0)  # a second per step, of 2 FLOPs each
    assert left.share == pytest.approx(0.1) and left.seconds == pytest.approx(3 + 15)
    left.update("base", 5, 5, 154.0)
    assert left.share == pytest.approx(0.25)
    left.update("vsr", 0, 2, 160.0)
    left.update("vsr", 1, 2, 170.0)
    left.update("vsr", 2, 2, 190.0)  # slower than the first stage
    assert left.share == 1 and left.seconds == 0
    again = TimeLeft({"base": 10.0, "vsr": 30.0}, rates)
    again.update("base", 0, 5, 0.0)
    assert again.seconds == pytest.approx(5 + 40)
    assert [in_words(s) for s in (None, 0.2, 42, 130, 4000)] == [
        "", "less than a second left", "about 42 s left", "about 2 min 10 s left", "about 1 h 6 min left",
    ]  # fmt: skip


# ---- the server ----


def test_a_port_in_use_and_a_missing_address_are_one_line():
    with server.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1 port {port} is in use: .* --port"):
            server.listen("127.0.0.1", port)
    with pytest.raises(UserError, match="not usable"):
        server.listen("192.0.2.1", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))


def test_ctrl_c_ends_the_queue_without_a_traceback(desk, monkeypatch):
    class Server:
        """Ends as uvicorn does."""

        def __init__(self, config):
            pass

        def run(self, sockets):
            ask(desk.queue)
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "uvicorn", SimpleNamespace(Server=Server, Config=lambda *_, **__: None))
    with server.listen("127.0.0.1", 0) as listening:
        server.serve(lambda scope, receive, send: None, listening, desk.queue, on_start=lambda: None)
    assert not desk.queue._thread.is_alive() and desk.queue.waiting() == 1


@pytest.mark.parametrize(
    "length, parts, status", [(None, 3, 200), (None, 50, 413), ("30", 3, 200), ("5368709120", 0, 413)]
)
def test_a_body_is_read_up_to_the_limit_only(length, parts, status):
    """Sends `parts` of 10 bytes to an application behind a limit of 100."""
    sent, taken = [], []

    async def app(scope, receive, send):
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            pass
        if message["type"] == "http.request":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    async def receive():
        taken.append(1)
        return {"type": "http.request", "body": bytes(10), "more_body": len(taken) < parts}

    async def send(message):
        sent.append(message)

    headers = [(b"content-length", length.encode())] if length else [(b"transfer-encoding", b"chunked")]
    scope = {"type": "http", "path": "/", "headers": headers}
    asyncio.run(server.Guard(app, most_body=100, cookie="own")(scope, receive, send))
    start, body = sent
    found = dict(start["headers"])
    assert start["status"] == status and len(taken) <= 11
    assert (found.get(b"connection") == b"close") == (status == 413)
    assert status == 200 or "too large" in json.loads(body["body"])["error"]["message"]
    assert status == 413 or (b"own=" in found[b"set-cookie"] and b"HttpOnly" in found[b"set-cookie"])


# ---- the models ----


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for stage in ("base", "vsr"):
        tiny.make_stage(folder / stage, stage)
    return folder


def test_a_video_is_made_stopped_between_steps_resumed_and_made_again(weights, store, tmp_path):
    engine = Engine(store, weights=weights, most_pixels=1e5)
    steps = []

    def run(job):
        def check(job):
            steps.append(job.share)
            if stop and job.share >= stop[0]:
                raise Stopped
            queue.check(job)

        engine.run(job, check)

    stop = [1.0]  # the last prediction is made, but not used
    queue = JobQueue(store, lambda wanted, inputs: engine.plan(wanted, inputs).notes, run, most_waiting=5)
    wanted = Generation(prompt="a red cat", seed=3, settings={"base": {"steps": 6}})
    first = queue.submit("anna", lambda inputs: wanted)
    assert any("cat" in note for note in first.notes)
    queue.start()
    queue._thread.join()  # a server that ends
    assert first.status == RUNNING and not first.results and steps[0] == 0 and steps[-1] == 1

    stop.clear()
    steps.clear()
    queue = JobQueue(store, queue._plan, run, most_waiting=5)
    queue._live[first.id] = first
    first.status = QUEUED
    cancelled = queue.submit("anna", lambda inputs: wanted)
    cancelled.stop.set()
    queue.start()
    until(lambda: queue.waiting() == 0)
    assert first.status == COMPLETED and cancelled.status == CANCELLED and not cancelled.results
    assert sorted({round(6 * share) for share in steps}) == [0, 5, 6]  # 0 while the models load
    (result,) = first.results
    path = store.path_of(first, result.video)
    assert read_video(path).shape == (4, 16, 24, 3) and not (store.folder_of(first.id) / "stages").exists()
    model = engine._cascade[1].model("base")

    again, needed = generation.from_request(read_request(path))
    second = queue.submit("bert", lambda inputs: again)
    until(lambda: queue.waiting() == 0)
    queue.close()
    assert not needed and second.error is None
    assert store.path_of(second, second.results[0].video).read_bytes() == path.read_bytes()
    assert engine._cascade[1].model("base") is model  # the weights stayed on the device


def test_what_the_operator_chooses_holds_for_every_video(weights, store, monkeypatch, tmp_path):
    signed = []
    monkeypatch.setattr(Certificate, "sign", lambda self, path: signed.append(path.suffix))
    certificate = Certificate("chain", "key")
    seen = []

    def unsafe(video):
        seen.append(video)
        return bool(video.any())

    engine = Engine(store, weights=weights, certificate=certificate, unsafe=unsafe)
    plan, busy = engine._plan, []

    def alone(wanted, inputs):
        busy.append(1)
        time.sleep(0.02)
        assert len(busy) == 1  # plans that hold a clip do not add up
        busy.pop()
        return plan(wanted, inputs)

    monkeypatch.setattr(engine, "_plan", alone)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: engine.plan(Generation(prompt="a"), tmp_path), range(3)))
    queue = JobQueue(
        store, lambda wanted, inputs: engine.plan(wanted, inputs).notes, lambda job: engine.run(job, queue.check),
        most_waiting=5,
    )  # fmt: skip

    def wanted(inputs):
        inputs.mkdir()
        vectors = np.ones((2, tiny.TEXT.hidden_size), np.float32)
        write_safetensors(inputs / "embedding-0.safetensors", {"<cat>": vectors}, {})
        return Generation(
            prompt="a red <cat>", settings={"base": {"steps": 2}}, embeddings=(("embedding-0.safetensors", None),)
        )

    job = queue.submit("anna", wanted)
    earlier = store.folder_of(job.id) / "stages/0000-a-red-cat-0"  # by a server with other weights
    earlier.mkdir(parents=True)
    (earlier / "base.json").write_text('{"prompt": "a red <cat>", "stages": ["base"]}')
    np.save(earlier / "base.npy", np.full((4, 16, 24, 3), 255, np.uint8))
    queue.start()
    until(lambda: queue.waiting() == 0, 120)
    queue.close()
    assert job.status == COMPLETED and signed == [".mp4"] and seen[0].min() < 255
    assert job.notes == ["The safety filter withholds the video of base: its frames are black."]
    assert not read_video(store.path_of(job, job.results[0].video)).any()
    sidecar = json.loads(store.path_of(job, job.results[0].json).read_text())
    assert sidecar["made_with"]["withheld"] is True and sidecar["request"]["embeddings"][0]["word"] == "<cat>"


@pytest.mark.parametrize("fields, clip, message", [
    ({"settings": {"base": {"frames": 300}}}, None, "300 frames of 16x24 are .* million pixels"),
    ({"settings": {"base": {"height": 17}}}, None, "height: 17 is not a multiple"),
    ({"stages": ("base", "vsr"), "settings": {"base": {"frames": 10**15}}}, None, "million pixels|memory"),
    ({"stages": ("base", "interpolation")}, None, "interpolation has no weights"),
    ({"weights": {"base": "0" * 64}}, None, "other weights of the stage base"),
    ({"prompt": "((([]", "prompt_syntax": "weighted"}, None, "brackets"),
    ({"prompts_at": {0: "a", 9: "b"}}, None, "frame 9 is beyond the clip"),
    ({"stages": ("vsr",), "settings": {"vsr": {"window_frames": 1, "overlap_frames": 3}}}, 1, "overlap_frames must be"),
    ({"stages": ("vsr",)}, 40, "million pixels|memory"),
    ({"stages": ("prediction",), "pictures": {"first": "first_frame.png"}}, None, "image 'first_frame.png'"),
    ({"embeddings": (("cat.safetensors", None),)}, None, "^cat.safetensors .* encoder of the weights of base"),
])  # fmt: skip
def test_what_the_weights_cannot_make_is_refused_before_it_waits(fields, clip, message, weights, store, tmp_path):
    engine = Engine(store, weights=weights, most_pixels=1e5)
    if clip:
        save_as(np.zeros((clip, 16, 24, 3), np.uint8), tmp_path / "input", "npz", fps=8)
        fields = fields | {"clip": "input.npz"}
    picture = io.BytesIO()
    Image.fromarray(FRAMES[0]).save(picture, "png")
    (tmp_path / "first_frame.png").write_bytes(picture.getvalue()[:200])
    write_safetensors(tmp_path / "cat.safetensors", {"<cat>": np.ones((1, 5), np.float32)}, {})
    with pytest.raises(UserError, match=message) as caught:
        engine.plan(Generation(**{"prompt": "a red circle", **fields}), tmp_path)
    assert str(tmp_path) not in str(caught.value) and str(weights) not in str(caught.value)
