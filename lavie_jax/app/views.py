"""The parts of the page that are made for each job, as HTML. All text of users is escaped here."""

import html
from collections.abc import Sequence
from typing import Any

from lavie_jax.app.api import url_of
from lavie_jax.app.progress import in_words
from lavie_jax.app.store import CANCELLED, COMPLETED, FAILED, QUEUED, RUNNING, Job, Result
from lavie_jax.stages.settings import STAGE_INFO

# Gradio fills templates in, so that what looks like a placeholder must not reach it either.
_PLACEHOLDERS = {ord(character): f"&#{ord(character)};" for character in "${}`\\"}
_STATES = {QUEUED: "waiting", RUNNING: "being made", COMPLETED: "ready", FAILED: "failed", CANCELLED: "cancelled"}


def escape(text: Any) -> str:
    """Returns text that shows as it is, inside an element or a quoted attribute."""
    return html.escape(str(text)).translate(_PLACEHOLDERS)


def sentence(job: Job | None, ahead: int) -> str:
    """One sentence about a job, which changes only when there is something new: screen readers read it out."""
    if job is None:
        return "Describe a video, and press Make the video."
    if job.status == QUEUED:
        if not ahead:
            return "Your video is next."
        return "1 video is before yours." if ahead == 1 else f"{ahead} videos are before yours."
    if job.status == RUNNING:
        if job.stop.is_set():
            return "The video is being cancelled: what has begun, such as a step, is finished first."
        if job.stage is None:
            return "The models are being loaded."
        stages = list(job.generation["stages"])
        number = f" (stage {stages.index(job.stage) + 1} of {len(stages)})" if len(stages) > 1 else ""
        return f"Your video is being made: {job.stage}{number}."
    if job.status == FAILED:
        return f"The video could not be made. {job.error}"
    if job.status == CANCELLED:
        return "The video was cancelled. Nothing is being made for you now."
    return "Your video is ready."


def status(job: Job | None, ahead: int) -> str:
    """The sentence on a job, as an alert if something went wrong."""
    if job is not None and job.status == FAILED:
        return alert(sentence(job, ahead))
    return f'<p class="status">{escape(sentence(job, ahead))}</p>'


def alert(message: str) -> str:
    """A sentence on what went wrong."""
    return f'<p class="problem" role="alert"><strong>Problem:</strong> {escape(message)}</p>'


def progress(job: Job | None) -> str:
    """The progress bar with the time left, for a job that is running."""
    if job is None or job.status != RUNNING:
        return ""
    percent = round(100 * job.share)
    waits = job.stage is None or not job.share
    bar = f'<progress max="100" {"" if waits else f"value={percent}"} aria-label="Progress"></progress>'
    words = [] if waits else [f"{percent} %"]
    words += [job.phase] if job.phase else []
    words += [text] if (text := in_words(job.seconds_left)) else []
    return f'<div class="progress">{bar}<span>{escape(", ".join(words))}</span></div>'


def notes(job: Job | None) -> str:
    """Warnings about a job."""
    lines = "".join(f"<li>{escape(note)}</li>" for note in (job.notes if job else ()))
    return f'<ul class="notes" aria-label="Notes">{lines}</ul>' if lines else ""


def player(job: Job, result: Result, *, autoplay: bool) -> str:
    """A video, which plays in a loop, or a picture."""
    source, text = url_of(job, result), escape(f"{job.generation['prompt']} ({result.stage})")
    if not result.video.endswith(".mp4"):
        return f'<img src="{source}" alt="{text}">'
    how = "autoplay" if autoplay else 'preload="metadata"'
    return f'<video src="{source}" aria-label="{text}" controls loop muted playsinline {how}></video>'


def downloads(job: Job, result: Result) -> str:
    """Links that save a video and its JSON file."""
    ending = result.video.rpartition(".")[2].upper()
    video, record = (url_of(job, result, **more, download="1") for more in ({}, {"variant": "json"}))
    links = [
        f'<a href="{url}" download aria-label="Download the {kind} of {escape(result.stage)}">{kind}</a>'
        for kind, url in ((ending, video), ("JSON", record))
    ]
    return f'<span class="files">{"".join(links)}</span>'


def results(job: Job | None) -> str:
    """The videos of a job's stages, the newest first and large."""
    if job is None or not job.results:
        return ""
    shown = [
        f'<figure class="result">{player(job, result, autoplay=True)}<figcaption><span>{escape(result.stage)}: '
        f"{escape(STAGE_INFO[result.stage].produces)}</span>{downloads(job, result)}</figcaption></figure>"
        for result in reversed(job.results)
    ]
    return f'<div class="results">{"".join(shown)}</div>'


def _button(action: str, job: Job, text: str) -> str:
    label = escape(f"{text}: {job.generation['prompt']}")
    return f'<button type="button" data-action="{action}" data-id="{job.id}" aria-label="{label}">{text}</button>'


def card(job: Job, ahead: int) -> str:
    """A job in the gallery."""
    wanted, last = job.generation, job.result()
    if last is not None:
        picture = player(job, last, autoplay=False)
    else:
        picture = f'<div class="empty">{escape(_STATES[job.status])}</div>'
    state = _STATES[job.status] if job.status != QUEUED or not ahead else f"{ahead} before it"
    about = escape(f"{state} · seed {wanted['seed']} · {', '.join(wanted['stages'])}")
    buttons = [_button("again", job, "Make again")]
    buttons += [_button("clip", job, "Use as clip")] if last and last.video.endswith(".mp4") else []
    buttons.append(_button("delete", job, "Delete") if job.is_finished else _button("cancel", job, "Cancel"))
    problem = f'<p class="problem">{escape(job.error)}</p>' if job.error else ""
    files = downloads(job, last) if last else ""
    return (
        f'<li class="card">{picture}<p class="prompt">{escape(wanted["prompt"])}</p><p class="about">{about}</p>'
        f'{problem}<div class="actions">{"".join(buttons)}{files}</div></li>'
    )


def gallery(jobs: Sequence[tuple[Job, int]]) -> str:
    """One's own jobs, newest first, each with the number of jobs before it."""
    if not jobs:
        return '<p class="status">Your videos appear here. They belong to this browser.</p>'
    return f'<ul class="cards">{"".join(card(job, ahead) for job, ahead in jobs)}</ul>'
