"""The page, in Gradio: a form, the job that was asked for last, and one's own videos.

What is made for each job is HTML of `views.py`, and its videos come from the interface for programs. Uploaded files are
read by `form.py` only.
"""

import dataclasses
import hashlib
import secrets
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr

from lavie_jax.app import form, uploads, views
from lavie_jax.app.components import Form, Site
from lavie_jax.app.generation import FRAMES, INPUT, Generation, from_request
from lavie_jax.app.jobs import reason_of
from lavie_jax.app.store import Job
from lavie_jax.errors import UserError
from lavie_jax.fields import MAX_SEED
from lavie_jax.samples.provenance import read_request

OWNER = "lavie_owner"  # the cookie that says which videos are one's own
CARDS = 12  # jobs in the gallery, until more are asked for
CSS = (resources.files(__package__) / "page.css").read_text(encoding="utf-8")
HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1">'
# Buttons inside the gallery are not Gradio's: this passes on which one was pressed.
ON_GALLERY = """element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-action]');
  if (button) trigger('click', {action: button.dataset.action, id: button.dataset.id});
});"""
TO_STATUS = "() => document.getElementById('status').scrollIntoView({block: 'nearest', behavior: 'smooth'})"
TO_FORM = "() => document.getElementById('prompt').scrollIntoView({block: 'nearest', behavior: 'smooth'})"


@dataclasses.dataclass
class View:
    """What one open page shows, so that only changes are sent.

    Attributes:
        job: id of the job that is shown.
        cards: how many jobs the gallery shows.
        shown: {part of the page: what it was made from}.
    """

    job: str | None = None
    cards: int = CARDS
    shown: dict[str, Any] = dataclasses.field(default_factory=dict)


def owner_of(request: gr.Request) -> str:
    """Whose jobs a browser may see: those of its cookie, or of this visit without cookies."""
    key = request.cookies.get(OWNER) or request.session_hash or ""
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def build(site: Site) -> gr.Blocks:
    """Returns the page."""
    return Page(site).blocks


class Page:
    """The components of the page and what they do.

    Attributes:
        blocks: the page.
        form: the components of the form.
    """

    def __init__(self, site: Site):
        self.site, self.queue = site, site.queue
        with gr.Blocks(
            title="LaVie: text to video", analytics_enabled=False, delete_cache=(3600, 86400)
        ) as self.blocks:
            self.view = gr.State(None)  # a `View` after the page has loaded
            gr.HTML(f"<header><h1>LaVie: text to video</h1><p>{views.escape(site.about)}</p></header>")
            with gr.Row(equal_height=False):
                with gr.Column(scale=5, min_width=300):
                    self.form = Form(site)
                with gr.Column(scale=6, min_width=300):
                    self._show_job()
            gr.HTML('<h2 id="own">Your videos</h2>')
            self.gallery = gr.HTML(views.gallery([]), js_on_load=ON_GALLERY, elem_id="gallery")
            self.more = gr.Button("Show more", visible=False, elem_id="more")
            self.timer = gr.Timer(1.0)
            self._events()

    def _show_job(self) -> None:
        self.status = gr.HTML(views.status(None, 0), elem_id="status")
        self.progress = gr.HTML("", elem_id="progress")
        self.notes = gr.HTML("", elem_id="notes")
        self.results = gr.HTML("", elem_id="results")

    def _events(self) -> None:
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        fields, note, cancel = self.form.fields, self.form.note, self.form.cancel
        inputs = list(fields.values())
        shown = [self.view, self.status, self.progress, self.notes, self.results, self.gallery, self.more, cancel]
        refresh: dict[str, Any] = {"inputs": [self.view], "outputs": shown, **private}
        filled = [note, self.form.new_seed, *inputs]

        # The fields go to `form.read` as the browser sends them, files included.
        made = self.form.make.click(
            self.on_make, [self.form.new_seed, *inputs], [note, fields["seed"]],
            preprocess=False, concurrency_limit=8, trigger_mode="once", **private,
        )  # fmt: skip
        made.then(self.on_refresh_newest, **refresh, queue=False).then(None, js=TO_STATUS, **private)
        cancel.click(self.on_cancel, [self.view], None, queue=False, **private).then(
            self.on_refresh, **refresh, queue=False
        )
        self.form.dice.click(
            lambda: (secrets.randbelow(MAX_SEED + 1), False),
            None,
            [fields["seed"], self.form.new_seed],
            queue=False,
            **private,
        )
        pressed = self.gallery.click(self.on_gallery, [self.view], [self.view, *filled], queue=False, **private)
        pressed.then(self.on_refresh, **refresh, queue=False)
        self.more.click(self.on_more, [self.view], [self.view], queue=False, **private).then(
            self.on_refresh, **refresh, queue=False
        )
        self.form.made.upload(self.on_made, [self.form.made], filled, preprocess=False, queue=False, **private)
        chosen = [fields[name] for name in ("stages", *FRAMES.values(), INPUT)]
        for name in (*FRAMES.values(), INPUT):
            fields[name].upload(
                self.on_upload, chosen, [fields["stages"], note], preprocess=False, queue=False, **private
            )
        self.timer.tick(self.on_refresh, **refresh, queue=False)
        self.blocks.load(self.on_load, **refresh, queue=False)

    # ---- what they do ----

    def on_make(self, request: gr.Request, new_seed: Any, *values: Any) -> tuple[Any, Any]:
        """Adds a job."""
        fields = dict(zip(self.form.fields, values))
        seed = secrets.randbelow(MAX_SEED + 1) if new_seed else fields["seed"]
        fields["seed"] = seed
        most, folder = self.site.most_upload, self.site.uploads
        try:
            self.queue.submit(owner_of(request), lambda inputs: form.read(fields, folder, inputs, most))
        except Exception as error:
            return views.alert(reason_of(error)), gr.skip()
        return "", seed

    def on_load(self, request: gr.Request, view: View | None) -> list[Any]:
        """Shows the newest job, also after the page was left."""
        return self.on_refresh_newest(request, None)

    def on_refresh_newest(self, request: gr.Request, view: View | None) -> list[Any]:
        """Shows the newest job."""
        newest = next(iter(self.queue.store.ids_of(owner_of(request))), None)
        return self.on_refresh(request, dataclasses.replace(view or View(), job=newest))

    def on_refresh(self, request: gr.Request, view: View | None) -> list[Any]:
        """Returns the parts of the page that have changed."""
        view, owner = view or View(), owner_of(request)
        ids = self.queue.store.ids_of(owner)
        job = self._own(view.job, owner)
        jobs = [(one, self.queue.ahead(one.id)) for id in ids[: view.cards] if (one := self.queue.find(id)) is not None]
        ahead = self.queue.ahead(job.id) if job else 0
        state = job and (job.id, job.status, job.stage, job.stop.is_set(), ahead)
        parts = {
            "status": (state, lambda: views.status(job, ahead)),
            "progress": (views.progress(job), lambda: views.progress(job)),
            "notes": (job and tuple(job.notes), lambda: views.notes(job)),
            "results": (job and (job.id, len(job.results)), lambda: views.results(job)),
            "gallery": (
                [(one.id, one.status, before, len(one.results)) for one, before in jobs],
                lambda: views.gallery(jobs),
            ),
            "more": (len(ids) > view.cards, lambda: gr.Button(visible=len(ids) > view.cards)),
            "cancel": (job is not None and not job.is_finished,
                       lambda: gr.Button(interactive=job is not None and not job.is_finished)),
        }  # fmt: skip
        updates = [
            make() if view.shown.get(name, "") != made_from else gr.skip() for name, (made_from, make) in parts.items()
        ]
        return [dataclasses.replace(view, shown={name: made_from for name, (made_from, _) in parts.items()}), *updates]

    def on_cancel(self, request: gr.Request, view: View | None) -> None:
        """Cancels the job that is shown."""
        if view and (job := self._own(view.job, owner_of(request))) is not None:
            self.queue.cancel(job.id)

    def on_more(self, view: View | None) -> View:
        """Shows more jobs in the gallery."""
        view = view or View()
        return dataclasses.replace(view, cards=view.cards + CARDS)

    def on_gallery(self, request: gr.Request, event: gr.EventData, view: View | None) -> list[Any]:
        """Does what a button of the gallery says."""
        data = event._data if isinstance(event._data, Mapping) else {}
        job = self._own(str(data.get("id")), owner_of(request))
        view = view or View()
        nothing = [view, *[gr.skip()] * (len(self.form.fields) + 2)]
        if job is None:
            return nothing
        match data.get("action"):
            case "again":
                return [view, *self._filled(Generation.from_json(job.generation), self._files(job), [])]
            case "clip" if (last := job.result()) is not None:
                file = self._copied(self.queue.store.path_of(job, last.video))
                stages = form.fitting_stages((), pictures=False, clip=True, available=list(self.site.stages))
                values = {INPUT: file, "stages": stages, "prompt": job.generation["prompt"]}
                values |= dict.fromkeys(FRAMES.values())  # which the stages may not take
                note = f"The form has the video as its clip, and the stages {', '.join(stages)}: press Make the video."
                return [view, _status(note), gr.skip(), *(values.get(name, gr.skip()) for name in self.form.fields)]
            case "cancel":
                self.queue.cancel(job.id)
            case "delete" if job.is_finished:
                self.queue.delete(job)
                view = dataclasses.replace(view, job=None if view.job == job.id else view.job)
                return [view, *nothing[1:]]
        return nothing

    def on_made(self, file: Any) -> list[Any]:
        """Fills the form from the file of a video."""
        nothing = [gr.skip()] * (len(self.form.fields) + 1)
        try:
            path = form.uploaded(file, self.site.uploads)
            if path is None:
                return [gr.skip(), *nothing]
            ending = uploads.ending_of(path, uploads.MADE, self.site.most_upload)
            if path.suffix.lower() != ending:
                path = Path(shutil.copyfile(path, path.with_suffix(ending)))
            wanted, needed = from_request(read_request(path))
            return self._filled(wanted, {}, needed)
        except (UserError, OSError) as error:
            message = " ".join(str(error).split()).replace(str(self.site.uploads), "")
            return [views.alert(message), *nothing]

    def on_upload(self, stages: Any, *files: Any) -> tuple[Any, Any]:
        """Chooses stages that can start from what was uploaded."""
        *pictures, clip = files
        fitting = form.fitting_stages(
            stages or (), pictures=any(pictures), clip=bool(clip), available=list(self.site.stages)
        )
        if fitting == list(stages or ()):
            return gr.skip(), gr.skip()
        return fitting, _status(f"The stages are now {', '.join(fitting)}, which can start from this file.")

    def _own(self, id: str | None, owner: str) -> Job | None:
        """Returns a job if it belongs to the owner."""
        job = self.queue.find(id) if id else None
        return job if job is not None and job.owner == owner else None

    def _files(self, job: Job) -> dict[str, Any]:
        """Copies the files that a job was made from to where the form can use them, by field."""
        wanted, folder = Generation.from_json(job.generation), self.queue.store.folder_of(job.id) / "inputs"
        files: dict[str, Any] = {FRAMES[name]: self._copied(folder / file) for name, file in wanted.pictures.items()}
        if wanted.clip is not None:
            files[INPUT] = self._copied(folder / wanted.clip)
        if wanted.loras:
            files["loras"] = [self._copied(folder / file) for file, _ in wanted.loras]
        if wanted.embeddings:
            files["embeddings"] = [self._copied(folder / file) for file, _ in wanted.embeddings]
        return files

    def _copied(self, path: Path) -> str:
        folder = self.site.uploads / secrets.token_hex(16)
        folder.mkdir(parents=True)
        return str(shutil.copyfile(path, folder / path.name))

    def _filled(self, wanted: Generation, files: Mapping[str, Any], needed: list[str]) -> list[Any]:
        """Returns the note, the box for new seeds, and the fields of the form for what was asked for."""
        values = form.values_of(wanted, files, self.form.settings)
        missing = [stage for stage in wanted.stages if stage not in self.site.stages]
        values["stages"] = [stage for stage in wanted.stages if stage in self.site.stages]
        hashes = self.site.hashes()
        other = [stage for stage, hash in wanted.weights.items() if stage in hashes and hashes[stage] != hash]
        note = "The form has the settings of this video: press Make the video."
        if needed:
            note += f" Give also {' and '.join(needed)}."
        if missing:
            note += f" There are no weights here for {', '.join(missing)}."
        if other:
            note += f" It was made with other weights of {', '.join(other)}, so that the new video will differ."
        return [_status(note), False, *(values.get(name) for name in self.form.fields)]


def _status(text: str) -> str:
    return f'<p class="status" role="status">{views.escape(text)}</p>'
