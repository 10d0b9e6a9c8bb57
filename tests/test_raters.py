"""The kit for people's judgement: studies, the server, answers that survive, and the report."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from lavie_jax.data.video_files import read_video, save_video
from lavie_jax.errors import UserError
from lavie_jax.evaluation.raters import statistics, videos
from lavie_jax.evaluation.raters.__main__ import main
from lavie_jax.evaluation.raters.answers import FILE, Answers, read
from lavie_jax.evaluation.raters.report import as_json, make_report, markdown
from lavie_jax.evaluation.raters.server import StudyServer
from lavie_jax.evaluation.raters.study import LABELS, METRICS, Design, Study, prepare
from lavie_jax.samples.provenance import describe
from tests.videos import encode, pan

ROOT = Path(__file__).parents[1]
SYSTEMS = ("system-alpha", "system-beta")
PROMPTS = ("a red circle", "<img src=x onerror=alert(1)>", 'a "cat" & a dog')


def write_system(folder, seed, prompts=PROMPTS):
    folder.mkdir(parents=True)
    for i, prompt in enumerate(prompts):
        save_video(pan(seed + i, 6, height=32, width=32), folder / f"{i:04d}.mp4", fps=12)
        (folder / f"{i:04d}.json").write_text(json.dumps({"request": {"prompt": prompt}}))
    return folder


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("systems")
    return {name: write_system(folder / name, 10 * i) for i, name in enumerate(SYSTEMS)}


@pytest.fixture(scope="module")
def study(systems, tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("prepared") / "study", systems, Design(title="A <b>study</b>", controls=2))


def refusal(arguments, capsys):
    """Checks that a command ends with exit code 2 and one line, and returns the line."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(lines) == 1
    return lines[0]


# ---- statistics ----

# Example C of Krippendorff, "Computing Krippendorff's Alpha-Reliability": 4 observers, 12 units; 0 stands for no value.
EXAMPLE = """1 2 3 3 2 1 4 1 2 0 0 0
             1 2 3 3 2 2 4 1 2 5 0 3
             0 3 3 3 2 3 4 2 2 5 1 0
             1 2 3 3 2 4 4 1 2 5 1 0"""


def test_alpha_reproduces_published_examples():
    example = np.array([[int(v) for v in row.split()] for row in EXAMPLE.splitlines()]) - 1
    assert statistics.alpha(example, "nominal").value == pytest.approx(0.743, abs=5e-4)
    assert statistics.alpha(example, "ordinal").value == pytest.approx(0.815, abs=5e-4)
    binary = np.array([[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]])  # example A
    assert statistics.alpha(binary, "nominal").value == pytest.approx(0.095, abs=5e-4)
    words = np.array([[ord(c) - ord("a") for c in row] for row in ("aabbdcccedda", "babbbccceddd")])  # example B
    estimate = statistics.alpha(words, "nominal")
    assert estimate.value == pytest.approx(0.692, abs=5e-4) and estimate.low < estimate.value < estimate.high


def test_alpha_of_no_agreement_of_perfect_agreement_and_of_too_few_answers():
    rng = np.random.default_rng(0)
    assert abs(statistics.alpha(rng.integers(0, 3, (4, 500)), "ordinal").value) < 0.05
    assert statistics.alpha(np.tile(rng.integers(0, 3, 50), (3, 1)), "ordinal").value == 1
    for undefined in (np.zeros((3, 5), int), np.array([[0, -1], [-1, 1]]), np.zeros((0, 0), int)):
        assert np.isnan(statistics.alpha(undefined, "nominal").value)


def test_intervals_cover_the_truth_when_raters_and_items_differ(monkeypatch):
    """Votes of 15 raters about 20 items; an interval that treats votes as independent covers 62 % here."""
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    rng, covered, widths, count = np.random.default_rng(0), 0, [], 150
    for trial in range(count):
        lean = 0.6 + rng.choice([-0.2, 0.2], (15, 1)) + rng.choice([-0.15, 0.15], (1, 20))
        hits = (rng.random((15, 20)) < lean).astype(int)
        estimate = statistics.share(np.ones((15, 20), int), hits, seed=trial)
        covered += estimate.low <= 0.6 <= estimate.high
        widths.append(estimate.high - estimate.low)
    assert 0.9 <= covered / count < 1 and np.mean(widths) < 0.35


def test_an_interval_needs_two_raters_and_two_items():
    assert np.isnan(statistics.share(np.ones((1, 9), int), np.ones((1, 9), int)).low)
    assert statistics.share(np.ones((2, 2), int), np.eye(2, dtype=int)).low == 0


# ---- studies ----


def test_a_study_depends_on_its_seed_and_never_shows_the_system(systems, study, tmp_path):
    again = prepare(tmp_path / "again", systems, study.design)
    other = prepare(tmp_path / "other", systems, Design(seed=1, controls=2))
    assert again.id == study.id != other.id and list(again.videos) == list(study.videos)
    assert len(study.videos) == 6 + 2 and len(study.questions) == 3 + 6 + 2 + 2
    for video in study.videos.values():
        content = (study.folder / video.file).read_bytes()
        assert video.system not in video.file and not any(name.encode() in content for name in SYSTEMS)


def test_copies_keep_every_frame_and_lose_metadata_and_sound(tmp_path):
    frames = pan(3, 12, height=32, width=48)
    encode(tmp_path / "a.mp4", frames, 12, sound=True)
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "named.mp4"), "w") as named:
        named.metadata["comment"] = "made by system-alpha"
        stream = named.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                named.mux(packet)
    for name in ("a", "named"):
        path = videos.copy(tmp_path / f"{name}.mp4", tmp_path, f"copy-{name}")
        np.testing.assert_array_equal(read_video(path), read_video(tmp_path / f"{name}.mp4"))
        with av.open(str(path)) as container:
            assert len(container.streams) == 1 and "comment" not in container.metadata


def test_copies_of_samples_do_not_contain_how_they_were_made(tmp_path):
    request = {"prompt": "a red circle", "weights_sha256": "secret"}
    path = save_video(pan(0, 6, height=32, width=32), tmp_path / "a.mp4", fps=8, metadata=describe(request))
    assert b"secret" in path.read_bytes()
    content = videos.copy(path, tmp_path, "copy").read_bytes()
    assert b"secret" not in content and b"lavie" not in content and b"circle" not in content


def test_damaged_copies_are_coarse_and_jump():
    frames = pan(0, 8, height=33, width=48, speed=0)
    result = videos.damaged(frames, seed=0)
    assert result.shape == (8, 32, 48, 3)
    errors = np.abs(result.astype(float) - frames[:, :32]).mean(axis=(1, 2, 3))
    assert errors.min() > 15 and np.abs(np.diff(result.astype(float), axis=0)).mean() > 15


def test_the_prompt_comes_from_json_text_or_name(tmp_path):
    for name in ("a.mp4", "b.mp4", "a red circle-0.mp4", "a red circle-1.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "a.json").write_text('{"request": {"prompt": "of the  json"}}')
    (tmp_path / "b.txt").write_text("of the text\n")
    assert sorted(videos.find(tmp_path, "x")) == [
        ("a red circle", 0), ("a red circle", 1), ("of the json", 0), ("of the text", 0)
    ]  # fmt: skip


def test_raters_get_equal_shares_in_their_own_order_with_balanced_sides(systems, tmp_path):
    prompts = [f"prompt {i}" for i in range(4)]
    more = {name: write_system(tmp_path / name, 50 * i, prompts) for i, name in enumerate(SYSTEMS)}
    study = prepare(tmp_path / "study", more, Design(pairs_per_rater=2, singles_per_rater=3, controls=2))
    asked = {rater: study.questions_for(rater) for rater in range(1, 9)}
    assert asked[3] == study.questions_for(3) and asked[3] != asked[4]
    counts = Counter(a.question.id for of_rater in asked.values() for a in of_rater)
    for question in study.questions.values():  # 8 raters with 2 of 4 pairs and 3 of 8 single videos
        assert counts[question.id] == (8 if question.control else 4 if question.is_pair else 3)
    for of_rater in asked.values():
        pairs = [a for a in of_rater if a.question.is_pair]
        assert of_rater[: len(pairs)] == pairs and len(of_rater) == 2 + 3 + 2 + 2
        assert sum(a.videos == a.question.videos for a in pairs) == 2  # each side shows the first system twice
    positions = {[a.question.control for a in of_rater].index(True) for of_rater in asked.values()}
    assert len(positions) > 1


def test_what_cannot_be_a_study_is_refused(systems, study, tmp_path, capsys):
    alpha, beta = (f"{name}={folder}" for name, folder in systems.items())

    def prepare_line(*arguments):
        return refusal(["prepare", "--out", tmp_path / "out", *arguments], capsys)

    (tmp_path / "empty").mkdir()
    other = write_system(tmp_path / "other", 30, ["another prompt", PROMPTS[0]])
    alone = write_system(tmp_path / "alone", 30, ["nothing in common"])
    (tmp_path / "old").mkdir()
    encode(tmp_path / "old" / "a.mp4", pan(0, 6), 12, codec="mpeg4")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").write_bytes(b"no video")
    assert "give NAME=FOLDER" in prepare_line("--system", "folder")
    assert "is not a folder" in prepare_line("--system", f"a={tmp_path / 'none'}")
    assert "has no videos" in prepare_line("--system", f"a={tmp_path / 'empty'}")
    assert "no prompt in common" in prepare_line("--system", alpha, "--system", f"b={alone}")
    assert "--common-prompts" in prepare_line("--system", alpha, "--system", f"b={other}")
    assert "same file" in prepare_line("--system", alpha, "--system", f"b={systems[SYSTEMS[0]]}")
    assert "given twice" in prepare_line("--system", alpha, "--system", alpha)
    assert "browsers do not play" in prepare_line("--system", f"a={tmp_path / 'old'}")
    assert "cannot read the video" in prepare_line("--system", f"a={tmp_path / 'broken'}")
    assert "only 3 prompts" in prepare_line("--system", alpha, "--prompts", "4")
    assert "at least 0" in prepare_line("--system", alpha, "--controls", "-1")
    assert "no questions" in prepare_line("--system", alpha, "--singles-per-rater", "0")
    assert not list(tmp_path.glob("*out*"))  # nothing half made is left
    assert "never overwritten" in refusal(["prepare", "--out", study.folder, "--system", beta], capsys)
    main(["prepare", "--out", str(tmp_path / "out"), "--system", alpha, "--system", f"b={other}", "--common-prompts"])
    assert {video.prompt for video in Study.load(tmp_path / "out").videos.values()} == {PROMPTS[0]}


def test_changes_of_a_study_are_noticed(systems, tmp_path, capsys):
    study = prepare(tmp_path / "study", systems, Design(controls=0))
    first, second = (study.folder / video.file for video in list(study.videos.values())[:2])
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert f"{first} was changed" in refusal(["serve", study.folder], capsys)
    first.unlink()
    assert f"{first} of the study is missing" in refusal(["report", study.folder], capsys)
    first.write_bytes(content)
    manifest = study.folder / "study.json"
    manifest.write_text(manifest.read_text().replace(PROMPTS[0], "another"))
    assert "was changed after it was prepared" in refusal(["serve", study.folder], capsys)
    assert "is not a study" in refusal(["serve", tmp_path], capsys)


# ---- the server ----


class Client:
    """Requests to a server, over one connection."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)

    def get(self, path, method="GET", **headers):
        self.connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        response = self.connection.getresponse()
        return response, response.read()

    def post(self, path, body, type="application/json"):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.connection.request("POST", path, content, {"Content-Type": type})
        response = self.connection.getresponse()
        return response.status, json.loads(response.read())

    def join(self, name, **more):
        status, content = self.post("/api/start", {"name": name, **more})
        assert status == 200
        return content["token"]


@contextlib.contextmanager
def served(study, path):
    """A server in a thread, and a client."""
    answers = Answers(path, study.id)
    server = StudyServer(study, answers, host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    client = Client(server.server_port)
    try:
        yield client
    finally:
        client.connection.close()
        server.shutdown()
        thread.join()
        server.server_close()
        answers.close()


def any_answer(question, choice=0):
    if question["kind"] == "pair":
        return {"better": question["videos"][choice]["id"]}
    return {metric.name: LABELS[choice] for metric in METRICS}


def test_only_files_of_the_study_are_served_and_nothing_tells_the_system(study, tmp_path):
    with served(study, tmp_path / FILE) as client:
        page, text = client.get("/")
        assert page.status == 200 and "script-src 'self'" in page.headers["Content-Security-Policy"]
        assert client.get("/page.js")[0].status == client.get("/page.css")[0].status == 200
        name = Path(next(iter(study.videos.values())).file).name
        for path in (
            "/study.json", f"/{FILE}", "/media/../study.json", "/media/%2e%2e/study.json", "/media/", "/videos/" + name,
            "//etc/passwd", "/../../../../etc/passwd", f"/media/{name}/../../study.json", "/page.js/../index.html",
        ):  # fmt: skip
            response, content = client.get(path)
            assert response.status == 404 and content == b'{"error": "There is nothing here."}', path
        token, seen = client.join("anna"), [text, client.get("/api/study")[1]]
        for index in range(len(study.questions_for(1))):
            question = client.post("/api/question", {"token": token, "index": index})[1]
            seen.append(json.dumps(question).encode())
            seen += [str(client.get(video["url"])[0].headers).encode() for video in question["videos"]]
        assert not any(re.search(rb"alpha|beta|system|damaged|control\b", content) for content in seen)


def test_parts_of_a_video_are_served(study, tmp_path):
    video = next(iter(study.videos.values()))
    content, url = (study.folder / video.file).read_bytes(), f"/media/{Path(video.file).name}"
    size = len(content)
    with served(study, tmp_path / FILE) as client:
        response, body = client.get(url)
        assert (response.status, body, response.headers["Content-Type"]) == (200, content, "video/mp4")
        assert response.headers["Accept-Ranges"] == "bytes"
        for asked, part in {
            "bytes=0-1": content[:2], "bytes=100-": content[100:], "bytes=-50": content[-50:],
            f"bytes=10-{size + 9}": content[10:], f"bytes=-{size + 9}": content,
        }.items():  # fmt: skip
            response, body = client.get(url, Range=asked)
            first = content.index(part) if len(part) > 2 else 0
            assert response.status == 206 and body == part
            assert response.headers["Content-Range"] == f"bytes {first}-{first + len(part) - 1}/{size}"
        response, body = client.get(url, Range=f"bytes={size}-")
        assert response.status == 416 and response.headers["Content-Range"] == f"bytes */{size}"
        for ignored in ("bytes=5-2", "bytes=0-1,4-5", "lines=1-2", "bytes=-"):
            assert client.get(url, Range=ignored)[0].status == 200
        response, body = client.get(url, method="HEAD", Range="bytes=0-9")
        assert response.status == 206 and response.headers["Content-Length"] == "10" and body == b""


def test_a_rater_resumes_goes_back_and_changes_an_answer(study, tmp_path):
    with served(study, tmp_path / FILE) as client:
        token = client.join("  Anna  B ")
        status, content = client.post("/api/start", {"name": "ANNA b"})
        assert (status, content["done"], content["total"]) == (409, 0, len(study.questions_for(1)))
        first = client.post("/api/question", {"token": token})[1]
        body = {"token": token, "question": first["question"], "seconds": 2.5}
        status, second = client.post("/api/answer", body | {"answer": any_answer(first)})
        assert (status, second["index"], second["done"]) == (200, 1, 1)
        assert client.join("anna B", resume=True) == token
        back = client.post("/api/question", {"token": token, "index": 0})[1]
        assert back["answer"] == any_answer(first) and back["videos"] == first["videos"]
        assert client.post("/api/answer", body | {"answer": any_answer(first, 1)})[1]["index"] == 1
        client.post("/api/answer", body | {"question": second["question"], "answer": {"problem": "does not play"}})
    stored = {answer.question: answer for answer in read(tmp_path / FILE, study.id)}
    assert stored[first["question"]].answer == any_answer(first, 1) and len(stored) == 2
    report = make_report(study, list(stored.values()))
    assert report["raters"]["Anna B"]["problems"] == 1


def test_requests_that_make_no_sense_are_refused(study, tmp_path):
    with served(study, tmp_path / FILE) as client:
        token = client.join("anna")
        question = client.post("/api/question", {"token": token})[1]
        good = {"token": token, "question": question["question"], "answer": any_answer(question), "seconds": 1}
        for status, path, body in (
            (400, "/api/start", {"name": "  "}), (400, "/api/start", {"name": "x" * 61}), (400, "/api/start", {}),
            (400, "/api/start", {"name": "a\x1b[2J"}), (400, "/api/start", {"name": "\ud800"}),
            (403, "/api/question", {"token": "\ud800"}),
            (403, "/api/question", {"token": "x"}), (403, "/api/question", {"token": None}),
            (400, "/api/question", {"token": token, "index": 99}),
            (400, "/api/question", {"token": token, "index": "1"}),
            (400, "/api/answer", good | {"question": "x"}), (400, "/api/answer", good | {"seconds": float("nan")}),
            (400, "/api/answer", good | {"answer": {"better": "x"}}), (400, "/api/answer", good | {"answer": "A"}),
            (400, "/api/answer", good | {"answer": {"problem": "x" * 201}}), (400, "/api/answer", b"[1]"),
            (400, "/api/answer", b"{"), (404, "/api/other", {}),
        ):  # fmt: skip
            assert client.post(path, body)[0] == status, (path, body)
        assert client.post("/api/answer", good, type="text/plain")[0] == 415
        assert client.post("/api/answer", b" " * 20000)[0] == 413
        client.connection.close()
        assert client.post("/api/answer", good)[0] == 200
    assert len(read(tmp_path / FILE, study.id)) == 1


def test_raters_in_parallel_lose_nothing(study, tmp_path):
    with served(study, tmp_path / FILE) as client:

        def take_part(name):
            own = Client(client.connection.port)
            token = own.join(name)
            question = own.post("/api/question", {"token": token})[1]
            while "finished" not in question:
                body = {"token": token, "question": question["question"], "answer": any_answer(question), "seconds": 1}
                question = own.post("/api/answer", body)[1]
            own.connection.close()

        threads = [threading.Thread(target=take_part, args=(f"rater {i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    counts = Counter(answer.rater for answer in read(tmp_path / FILE, study.id))
    assert counts == {f"rater {i}": len(study.questions) for i in range(4)}


@contextlib.contextmanager
def serving_process(folder):
    """`serve` in a process of its own, and a client."""
    command = [sys.executable, "-m", "lavie_jax.evaluation.raters", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        address = re.search(r"http://127.0.0.1:(\d+)/", process.stdout.readline())
        client = Client(int(address[1]))
        yield process, client
        client.connection.close()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_killed_server_loses_no_answer(systems, tmp_path):
    study = prepare(tmp_path / "study", systems, Design(controls=0))
    with serving_process(study.folder) as (process, client):
        token = client.join("anna")
        question = client.post("/api/question", {"token": token})[1]
        for _ in range(4):
            body = {"token": token, "question": question["question"], "answer": any_answer(question), "seconds": 1}
            question = client.post("/api/answer", body)[1]
        os.kill(process.pid, signal.SIGKILL)
    assert len(read(study.folder / FILE, study.id)) == 4
    with served(study, study.folder / FILE) as client:
        assert client.post("/api/question", {"token": token})[1] == question and question["done"] == 4


def test_a_port_in_use_and_wrong_answer_files_are_refused(study, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in refusal(["serve", study.folder, "--port", taken.getsockname()[1]], capsys)
    assert "not usable" in refusal(["serve", study.folder, "--host", "192.0.2.1"], capsys)
    assert "not usable" in refusal(["serve", study.folder, "--port", "70000"], capsys)
    Answers(tmp_path / "other.sqlite", "another id").close()
    line = refusal(["report", study.folder, "--answers", tmp_path / "other.sqlite"], capsys)
    assert "belongs to another study: another id" in line
    with pytest.raises(UserError, match="belongs to another study"):
        Answers(tmp_path / "other.sqlite", study.id)
    (tmp_path / "text.sqlite").write_text("no database" * 100)
    assert "cannot be read" in refusal(["report", study.folder, "--answers", tmp_path / "text.sqlite"], capsys)
    assert "nobody has answered" in refusal(["report", study.folder, "--answers", tmp_path / "none.sqlite"], capsys)
    taken = Answers(tmp_path / "a.sqlite", study.id)
    taken.add_rater("anna")
    taken.close()
    (tmp_path / "copy.sqlite").write_bytes((tmp_path / "a.sqlite").read_bytes())
    twice = ["--answers", tmp_path / "a.sqlite", "--answers", tmp_path / "copy.sqlite"]
    assert "--seed must be at least 0" in refusal(["report", study.folder, "--seed", "-1"], capsys)
    assert "would count twice" in refusal(["report", study.folder, *twice], capsys)
    Answers(tmp_path / "empty.sqlite", study.id).close()
    assert "nobody has answered" in refusal(["report", study.folder, "--answers", tmp_path / "empty.sqlite"], capsys)


def test_a_full_disk_is_reported_and_the_answer_can_be_sent_again(study, tmp_path):
    with served(study, tmp_path / FILE) as client:
        token = client.join("anna")
        question = client.post("/api/question", {"token": token})[1]
        body = {"token": token, "question": question["question"], "answer": any_answer(question), "seconds": 1}
        blocker = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        blocker.execute("CREATE TRIGGER full BEFORE INSERT ON answers BEGIN SELECT RAISE(FAIL, 'disk is full'); END")
        status, content = client.post("/api/answer", body)
        assert status == 503 and content["error"] == "The answer could not be saved."
        blocker.execute("DROP TRIGGER full")
        blocker.close()
        assert client.post("/api/answer", body)[0] == 200


# ---- the report ----


def simulate(study, path, raters, prefer, seed=0):
    """Answers of raters who prefer the first system with probability `prefer`, and of one who clicks blindly."""
    rng, answers = np.random.default_rng(seed), Answers(path, study.id)
    for number in range(raters + 1):
        blind = number == raters
        rater = answers.add_rater("blind" if blind else f"rater {number}")
        for asked in study.questions_for(rater.number):
            first = study.videos[asked.question.videos[0]]
            if asked.question.is_pair:
                better = rng.random() < (0 if blind else 1 if asked.question.control else prefer)
                answer = {"better": asked.question.videos[0 if better else 1]}
            else:
                weights = [0.1, 0.2, 0.7] if first.system == SYSTEMS[0] and not first.damaged else [0.6, 0.3, 0.1]
                drawn = rng.choice(3, len(METRICS), p=[0, 0, 1] if blind else [1, 0, 0] if first.damaged else weights)
                answer = {metric.name: LABELS[i] for metric, i in zip(METRICS, drawn)}
                if METRICS[-1].optional and asked.question.prompt == PROMPTS[0]:
                    answer[METRICS[-1].name] = "not shown"
            answers.append(rater, asked.question.id, asked.videos, answer, 3.0)
    answers.close()


def test_the_report_finds_the_preference_and_leaves_out_who_fails_the_controls(study, tmp_path, capsys):
    simulate(study, tmp_path / FILE, 12, prefer=0.85)
    arguments = ["report", str(study.folder), "--answers", str(tmp_path / FILE), "--json", str(tmp_path / "r.json")]
    main(arguments)
    text, report = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    (pair,) = report["tables"]["preference"].values()
    assert pair["votes"] == 36 and pair["share"]["low"] > 0.5 and abs(pair["share"]["value"] - 0.85) < 0.15
    assert report["raters"]["blind"]["fails"] and "blind (0 of 4)" in text and report["tables"]["raters"] == 12
    with_blind = report["tables_with_failed_raters"]["preference"][f"{SYSTEMS[0]} > {SYSTEMS[1]}"]
    assert with_blind["votes"] == 39 and with_blind["share"]["value"] < pair["share"]["value"]
    smooth = report["tables"]["metrics"]["motion_smoothness"]
    good, bad = (smooth["systems"][system]["good"] for system in SYSTEMS)
    assert good["low"] > bad["high"] and smooth["alpha"]["value"] > 0.1
    for row in report["tables"]["metrics"].values():
        for system in SYSTEMS:
            assert sum(row["systems"][system][label]["value"] for label in LABELS) == pytest.approx(1)
    face = report["tables"]["metrics"]["face_body_hand_quality"]
    assert face["not_shown"] == 12 * 2 and sum(cell["votes"] for cell in face["systems"].values()) == 12 * 4
    assert text.count("Motion smoothness") == 1 and f"{pair['share']['value'] * 100:.1f}" in text
    main(arguments)  # a report may replace a report
    (tmp_path / "r.json").write_text("{}")
    assert "not a result of this command" in refusal(arguments, capsys)


def test_answer_files_of_one_study_are_joined(study, tmp_path, capsys):
    for number in range(2):
        simulate(study, tmp_path / f"{number}.sqlite", 1, prefer=1, seed=number)
    main(
        ["report", str(study.folder), "--answers", str(tmp_path / "0.sqlite"), "--answers", str(tmp_path / "1.sqlite")]
    )
    assert {"rater 0 (1)", "rater 0 (2)"} <= set(re.findall(r"rater 0 \(\d\)", capsys.readouterr().out))


def test_one_rater_gets_no_interval(study, tmp_path):
    simulate(study, tmp_path / FILE, 1, prefer=1)
    report = as_json(make_report(study, read(tmp_path / FILE, study.id)))
    (pair,) = report["tables"]["preference"].values()
    assert pair["share"] == {"value": 1.0, "low": None, "high": None} and pair["alpha"]["value"] is None
    assert "100.0 %" in markdown(make_report(study, read(tmp_path / FILE, study.id)))
