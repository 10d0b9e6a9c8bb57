"""The HTTP server of a study: the page, its videos, and an interface in JSON for questions and answers.

    GET  /  /page.js  /page.css  /media/ID.mp4      fixed files; videos by the ids of the study, with byte ranges
    GET  /api/study                                 title, metrics and labels
    POST /api/start     {name, resume}              {token}; 409 if the name is taken and `resume` is not true
    POST /api/question  {token, index?}             the question, by default the first that is not answered
    POST /api/answer    {token, question, answer, seconds}    commits the answer; returns the next question

The requested path is only compared with the names above, never joined to a folder. Texts travel as JSON, and the page
shows them as text, so that prompts cannot contain markup.
"""

import errno
import json
import os
import re
import socket
import sqlite3
import unicodedata
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from absl import logging

from lavie_jax.errors import UserError
from lavie_jax.evaluation.raters.answers import Answers, Rater
from lavie_jax.evaluation.raters.study import LABELS, METRICS, NOT_SHOWN, PROBLEM, Question, Study

PAGE = {"/": "index.html", "/page.js": "page.js", "/page.css": "page.css"}
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8",
         ".css": "text/css; charset=utf-8", ".mp4": "video/mp4", ".webm": "video/webm"}  # fmt: skip
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
MAX_BODY, MAX_NAME, MAX_SECONDS = 16384, 60, 1e6
BLOCK = 1 << 18  # bytes of a video that are sent at once


class Refusal(Exception):
    """A request that is answered with a status and a message."""

    def __init__(self, status: int, message: str, **fields: Any):
        super().__init__(message)
        self.status, self.content = status, {"error": message, **fields}


class StudyServer(ThreadingHTTPServer):
    """Serves one study, with a thread for each connection."""

    daemon_threads = True
    request_queue_size = 64  # connections that wait to be accepted

    def __init__(self, study: Study, answers: Answers, *, host: str, port: int):
        """Binds the address; `serve_forever` serves. Port 0 takes a free one.

        Raises:
            UserError: the address is in use or not of this machine.
        """
        self.study, self.answers = study, answers
        page = resources.files(__package__) / "page"
        self.page = {path: (page / name).read_bytes() for path, name in PAGE.items()}
        self.media = {f"/media/{Path(v.file).name}": study.folder / v.file for v in study.videos.values()}
        self.urls = {v.id: f"/media/{Path(v.file).name}" for v in study.videos.values()}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            hint = "in use: end the other program, or choose another --port" if in_use else f"not usable: {error}"
            raise UserError(f"{host} port {port} is {hint}") from error

    def server_bind(self) -> None:
        """Binds without the reverse lookup of the host's name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Logs what went wrong in a thread. Connections that browsers close early are usual."""
        logging.debug("connection of %s", client_address, exc_info=True)

    # ---- the interface ----

    def description(self) -> dict[str, Any]:
        """What the page needs before it knows the rater."""
        metrics = [
            {
                "name": m.name,
                "title": m.title,
                "hint": m.hint,
                "labels": [*LABELS, *([NOT_SHOWN] if m.optional else [])],
            }
            for m in METRICS
        ]
        asked = self.study.questions_for(1)
        kinds = {"pairs": any(a.question.is_pair for a in asked), "singles": not all(a.question.is_pair for a in asked)}
        return {"study": self.study.id, "title": self.study.design.title, "metrics": metrics, **kinds}

    def start(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Adds a rater, or finds the one of this name if `resume` is true."""
        name = body.get("name")
        if not isinstance(name, str) or not 0 < len(name.strip()) <= MAX_NAME:
            raise Refusal(400, f"Enter a name of 1 to {MAX_NAME} characters.")
        # The report prints names: control characters could rewrite what a terminal shows.
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in "".join(name.split())):
            raise Refusal(400, "Enter a name without control characters.")
        rater = self.answers.find(name)
        if rater is None:
            rater = self.answers.add_rater(name) or self.answers.find(name)
        elif body.get("resume") is not True:
            done, total = len(self.answers.of(rater)), len(self.study.questions_for(rater.number))
            raise Refusal(409, "This name is taken.", done=done, total=total)
        return {"token": rater.token}

    def question(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the question at `index`, or the first that the rater has not answered."""
        return self._question(self._rater(body), body.get("index"))

    def _question(self, rater: Rater, index: Any) -> dict[str, Any]:
        asked, answered = self.study.questions_for(rater.number), self.answers.of(rater)
        progress = {"name": rater.name, "total": len(asked), "done": len(answered)}
        if index is None:
            index = next((i for i, a in enumerate(asked) if a.question.id not in answered), None)
            if index is None:
                return progress | {"finished": True}
        if not isinstance(index, int) or not 0 <= index < len(asked):
            raise Refusal(400, "There is no such question.")
        question = asked[index].question
        shown = [{"id": id, "url": self.urls[id]} for id in asked[index].videos]
        kind = "pair" if question.is_pair else "single"
        return progress | {"index": index, "question": question.id, "kind": kind, "prompt": question.prompt,
                           "videos": shown, "answer": answered.get(question.id)}  # fmt: skip

    def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Commits an answer and returns the next question."""
        rater = self._rater(body)
        asked = {a.question.id: a for a in self.study.questions_for(rater.number)}
        id, seconds = body.get("question"), body.get("seconds")
        if not isinstance(id, str) or id not in asked:
            raise Refusal(400, "This question is not one of yours.")
        if not isinstance(seconds, (int, float)) or not 0 <= seconds <= MAX_SECONDS:
            raise Refusal(400, "The time taken is not a number of seconds.")
        if not _is_answer(body.get("answer"), asked[id].question):
            raise Refusal(400, "This is not an answer to the question.")
        try:
            self.answers.append(rater, id, asked[id].videos, body["answer"], float(seconds))
        except sqlite3.Error as error:
            logging.error("an answer of %s could not be saved: %s", rater.name, error)
            raise Refusal(503, "The answer could not be saved.") from error
        return self._question(rater, None)

    def _rater(self, body: Mapping[str, Any]) -> Rater:
        token = body.get("token")
        rater = self.answers.by_token(token) if isinstance(token, str) and token.isascii() else None
        if rater is None:
            raise Refusal(403, "This rater is unknown.")
        return rater


def _is_answer(answer: Any, question: Question) -> bool:
    if not isinstance(answer, dict):
        return False
    if set(answer) == {PROBLEM}:
        return isinstance(answer[PROBLEM], str) and len(answer[PROBLEM]) <= 200
    if question.is_pair:
        return set(answer) == {"better"} and answer["better"] in question.videos
    return set(answer) == {m.name for m in METRICS} and all(
        answer[m.name] in LABELS or (m.optional and answer[m.name] == NOT_SHOWN) for m in METRICS
    )


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: StudyServer  # ty: ignore[incompatible-mutable-override]
    protocol_version = "HTTP/1.1"  # keeps connections open
    timeout = 60  # seconds until an idle connection is closed
    server_version, sys_version = "raters", ""

    def do_GET(self) -> None:
        """Serves the page, a video, or the description of the study."""
        path = urlsplit(self.path).path
        if path in PAGE:
            self._send(200, self.server.page[path], TYPES[Path(PAGE[path]).suffix])
        elif path in self.server.media:
            self._send_video(self.server.media[path])
        elif path == "/api/study":
            self._send_json(200, self.server.description())
        elif path == "/favicon.ico":
            self._send(204, b"", "")
        else:
            self._send_json(404, {"error": "There is nothing here."})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Serves the interface in JSON."""
        methods = {"/api/start": self.server.start, "/api/question": self.server.question,
                   "/api/answer": self.server.answer}  # fmt: skip
        try:
            body = self._read_body()
            method = methods.get(self.path)
            if method is None:
                raise Refusal(404, "There is nothing here.")
            self._send_json(200, method(body))
        except Refusal as refusal:
            self._send_json(refusal.status, refusal.content)

    def _read_body(self) -> Mapping[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            self.close_connection = True  # the body stays unread
            raise Refusal(413, f"The request must have at most {MAX_BODY} bytes.")
        content = self.rfile.read(int(length))
        # Other sites' pages cannot send this type without asking first, which this server does not allow.
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "The request must be application/json.")
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise Refusal(400, "The request must be a JSON object.")
        return body

    def _send_json(self, status: int, content: Mapping[str, Any]) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, content: bytes, type: str, **headers: str) -> None:
        self._head(status, type, len(content), {"Cache-Control": "no-store", **headers})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _head(self, status: int, type: str, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name, value)
        if type:
            self.send_header("Content-Type", type)
        if status != 204:
            self.send_header("Content-Length", str(length))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _send_video(self, path: Path) -> None:
        """Sends a video, or the range of bytes that is asked for: Safari plays nothing without."""
        try:
            file = path.open("rb")
        except OSError:
            return self._send_json(404, {"error": "The video is missing."})
        with file:
            size = os.fstat(file.fileno()).st_size
            headers = {"Accept-Ranges": "bytes", "Cache-Control": "private, max-age=86400"}
            status, first, last = 200, 0, size - 1
            if asked := _byte_range(self.headers.get("Range", ""), size):
                status, (first, last) = 206, asked
                if first > last:
                    return self._send(416, b"", "", **{"Content-Range": f"bytes */{size}"})
                headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            self._head(status, TYPES[path.suffix], last - first + 1, headers)
            if self.command == "HEAD":
                return
            file.seek(first)
            left = last - first + 1
            while left > 0 and (block := file.read(min(BLOCK, left))):
                self.wfile.write(block)
                left -= len(block)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs a request, with the control characters of its line escaped."""
        logging.debug("%s %s", self.address_string(), (format % args).encode("unicode_escape").decode())


def _byte_range(header: str, size: int) -> tuple[int, int] | None:
    """(first, last) byte of a Range header; first > last if there are no such bytes; None if it has no single range."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip())
    if not match or match[1] == match[2] == "":
        return None
    if not match[1]:  # the last bytes
        return (max(0, size - int(match[2])), size - 1) if int(match[2]) else (1, 0)
    first, last = int(match[1]), min(int(match[2] or size - 1), size - 1)
    if match[2] and int(match[2]) < first:
        return None  # not a valid range, which is to be ignored
    return (first, last) if first < size else (1, 0)
