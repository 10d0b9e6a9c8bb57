"""The interface for programs: requests and answers in JSON, in the shape of OpenAI's interface for videos.

    POST   /api/v1/videos/generation      the fields of `generation.py` -> 202, a video object with its id
    GET    /api/v1/videos/ID              the video object: status, progress, place in the queue, files
    GET    /api/v1/videos/ID/content      the video; ?stage=base that of a stage, ?variant=json how it was made
    DELETE /api/v1/videos/ID              cancels a job that is not finished, deletes one that is

Errors are `{"error": {"message", "type", "param", "code"}}`. This module is independent of the server: `answer` maps a
request to an answer.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from lavie_jax.app import generation
from lavie_jax.app.jobs import JobQueue, QueueFull
from lavie_jax.app.store import COMPLETED, FAILED, QUEUED, Job, Result
from lavie_jax.disk import is_full
from lavie_jax.errors import UserError

ROOT = "/api/v1/videos"
TYPES = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png", ".json": "application/json"}
RETRY_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer of the server: JSON, or a file.

    Attributes:
        status: HTTP status.
        content: JSON values; None for a file.
        file: the file.
        download: whether browsers are to save the file instead of showing it.
        headers: further HTTP headers.
    """

    status: int
    content: Mapping[str, Any] | None = None
    file: Path | None = None
    download: bool = False
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


def error(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    """Returns an error in OpenAI's format."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return Answer(status, {"error": {"message": message, "type": kind, "param": None, "code": code}}, headers=headers)


def url_of(job: Job, result: Result, **query: str) -> str:
    """The address of a result, relative to the server."""
    more = "".join(f"&{name}={value}" for name, value in query.items())
    return f"{ROOT}/{job.id}/content?stage={result.stage}{more}"


def video_object(job: Job, ahead: int) -> dict[str, Any]:
    """Describes a job; `ahead` jobs are before it in the queue."""
    wanted = job.generation
    return {
        "id": job.id,
        "object": "video",
        "model": generation.MODEL,
        "status": job.status,
        "progress": 100 if job.status == COMPLETED else int(100 * job.share),
        "queue_position": ahead if job.status == QUEUED else None,
        "stage": job.stage,
        "seconds_left": None if job.seconds_left is None else round(job.seconds_left, 1),
        "created_at": int(job.created),
        "started_at": job.started and int(job.started),
        "completed_at": job.finished and int(job.finished),
        "prompt": wanted["prompt"],
        "seed": wanted["seed"],
        "stages": list(wanted["stages"]),
        "notes": list(job.notes),
        "error": {"code": FAILED, "message": job.error} if job.error else None,
        "videos": [
            {"stage": result.stage, "url": url_of(job, result), "json_url": url_of(job, result, variant="json")}
            for result in job.results
        ],
    }


class Api:
    """Answers requests with the jobs of a queue; `most_upload` is the size of the largest file, in bytes."""

    def __init__(self, queue: JobQueue, *, most_upload: int):
        self.queue, self.most_upload = queue, most_upload

    def answer(self, method: str, path: str, query: Mapping[str, str], content_type: str, body: bytes = b"") -> Answer:
        """Returns the answer to one request; `path` begins with ROOT."""
        try:
            if path == f"{ROOT}/generation":
                return self._submit(content_type, body) if method == "POST" else _not_allowed("POST")
            match = re.fullmatch(rf"{ROOT}/([0-9a-f]{{32}})(/content)?", path)
            job = self.queue.find(match[1]) if match else None
            if job is None:
                return error(404, "There is no such video.", "not_found")
            if match[2]:
                return self._content(job, query) if method in ("GET", "HEAD") else _not_allowed("GET, HEAD")
            if method == "DELETE":
                return self._delete(job)
            return self._status(200, job) if method in ("GET", "HEAD") else _not_allowed("GET, HEAD, DELETE")
        except QueueFull as full:
            return error(429, str(full), "queue_full", **{"Retry-After": str(RETRY_SECONDS)})
        except UserError as wrong:
            return error(400, " ".join(str(wrong).split()))
        except OSError as failed:
            if not is_full(failed):
                raise
            logging.error("the disk is full: %s", failed)
            return error(507, "The server's disk is full.", "disk_full")

    def _status(self, status: int, job: Job) -> Answer:
        return Answer(status, video_object(job, self.queue.ahead(job.id)))

    def _submit(self, content_type: str, body: bytes) -> Answer:
        # Pages of other sites cannot send this type without asking first, which this server does not allow.
        if content_type.partition(";")[0].strip().lower() != "application/json":
            return error(415, "The request must have the type application/json.")
        try:
            content = json.loads(body)
        except (ValueError, RecursionError) as wrong:
            return error(400, f"The request is not JSON: {wrong}")
        if not isinstance(content, dict):
            return error(400, 'The request must be a JSON object like {"prompt": "a red circle moving left"}.')
        job = self.queue.submit("", lambda inputs: generation.from_body(content, inputs, self.most_upload))
        return self._status(202, job)

    def _content(self, job: Job, query: Mapping[str, str]) -> Answer:
        unknown = [name for name in query if name not in ("stage", "variant", "download")]
        variant = query.get("variant", "video")
        if unknown or variant not in ("video", "json"):
            return error(400, "Allowed are stage=NAME, variant=video or variant=json, and download=1.")
        stage = query.get("stage")
        result = job.result(stage)
        # Without a stage, the video is that of the last one, which must be there.
        if result is None or (stage is None and job.status != COMPLETED):
            return error(409 if not job.is_finished else 404, f"This video does not exist: the job is {job.status}.")
        file = self.queue.store.path_of(job, result.video if variant == "video" else result.json)
        if not file.is_file():
            return error(404, "The file was deleted.", "not_found")
        return Answer(200, file=file, download="download" in query)

    def _delete(self, job: Job) -> Answer:
        if not job.is_finished:
            self.queue.cancel(job.id)
            return self._status(202, job)
        self.queue.delete(job)
        return Answer(200, {"id": job.id, "object": "video.deleted", "deleted": True})


def _not_allowed(methods: str) -> Answer:
    return error(405, f"Allowed are {methods}.", **{"Allow": methods})
