"""The page, in Gradio: a form, the job that was asked for last, and one's own videos.

What is made for each job is HTML of `views.py`, and its videos come from the interface for programs. Uploaded files are
read by `form.py` only.
"""

import dataclasses
import hashlib
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr
from absl import logging

from lavie_jax.app import form, uploads, views
from lavie_jax.app.form import SHOWN, Setting
from lavie_jax.app.generation import FRAMES, INPUT, Generation, from_request
from lavie_jax.app.jobs import JobQueue
from lavie_jax.app.store import Job
from lavie_jax.errors import UserError
from lavie_jax.fields import MAX_SEED
from lavie_jax.samples.prompt_syntax import LONG_PROMPTS, SYNTAXES
from lavie_jax.samples.provenance import read_request
from lavie_jax.stages.settings import MAIN_STAGE, OFFICIAL, PRESETS, STAGE_INFO

OWNER = "lavie_owner"  # the cookie that says which videos are one's own
CARDS = 12  # jobs in the gallery, until more are asked for
READINGS = (
    ("prompt_syntax", SYNTAXES, "weighted gives brackets their meaning: (word:1.3), [word]"),
    ("long_prompts", LONG_PROMPTS, "what becomes of words beyond the text encoder's window"),
)
BROKEN = "Something went wrong on the server. Its log has the details."
CSS = (resources.files(__package__) / "page.css").read_text(encoding="utf-8")
HEAD = '<meta name="viewport" content="width=device-width, initial-scale=1">'
# Buttons inside the gallery are not Gradio's: this passes on which one was pressed.
ON_GALLERY = """element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-action]');
  if (button) trigger('click', {action: button.dataset.action, id: button.dataset.id});
});"""
TO_STATUS = "() => document.getElementById('status').scrollIntoView({block: 'nearest', behavior: 'smooth'})"
TO_FORM = "() => document.getElementById('prompt').scrollIntoView({block: 'nearest', behavior: 'smooth'})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """What the page needs to know of the server.

    Attributes:
        queue: the jobs.
        stages: {stage that has weights: default settings of its weights folder}.
        hashes: returns {stage: SHA-256 of its weights}.
        examples: example prompts.
        about: a sentence on the models.
        uploads: the folder in which Gradio keeps uploaded files.
        most_upload: the largest file, in bytes.
    """

    queue: JobQueue
    stages: Mapping[str, Mapping[str, Any]]
    hashes: Callable[[], Mapping[str, str]]
    examples: Sequence[str]
    about: str
    uploads: Path
    most_upload: int


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
        fields: {field of the form: its component}, as in `form.read`.
    """

    def __init__(self, site: Site):
        self.site, self.queue = site, site.queue
        self.settings = [s for stage, defaults in site.stages.items() for s in form.settings_of(stage, defaults)]
        self.fields: dict[Any, gr.components.Component] = {}
        with gr.Blocks(
            title="LaVie: text to video", analytics_enabled=False, delete_cache=(3600, 86400)
        ) as self.blocks:
            self.view = gr.State(None)  # a `View` after the page has loaded
            gr.HTML(f"<header><h1>LaVie: text to video</h1><p>{views.escape(site.about)}</p></header>")
            with gr.Row(equal_height=False):
                with gr.Column(scale=5, min_width=300):
                    self._form()
                with gr.Column(scale=6, min_width=300):
                    self._job()
            gr.HTML('<h2 id="own">Your videos</h2>')
            self.gallery = gr.HTML(views.gallery([]), js_on_load=ON_GALLERY, elem_id="gallery")
            self.more = gr.Button("Show more", visible=False, elem_id="more")
            self.timer = gr.Timer(1.0)
            self._events()

    # ---- components ----

    def _form(self) -> None:
        fields = self.fields
        fields["prompt"] = gr.Textbox(
            label="Prompt", lines=2, max_lines=8, max_length=4000, elem_id="prompt",
            placeholder="What the video shows, in a sentence",
        )  # fmt: skip
        gr.Examples([[text] for text in self.site.examples], [fields["prompt"]], label="Examples", elem_id="examples")
        choices = [(f"{stage}: {STAGE_INFO[stage].summary}", stage) for stage in self.site.stages]
        fields["stages"] = gr.CheckboxGroup(
            choices, value=[c[1] for c in choices if c[1] == MAIN_STAGE], label="Stages", elem_id="stages",
            info="They run in this order, each on the video of the one before.",
        )  # fmt: skip
        with gr.Row():
            self.make = gr.Button("Make the video", variant="primary", elem_id="make", scale=3, min_width=160)
            self.cancel = gr.Button(
                "Cancel", variant="stop", interactive=False, elem_id="cancel", scale=1, min_width=100
            )
        self.note = gr.HTML("", elem_id="note")
        with gr.Row(elem_classes="seed"):
            fields["seed"] = gr.Number(
                0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed", scale=2, min_width=150
            )
            self.dice = gr.Button("Random", elem_id="dice", scale=0, min_width=120)
            self.new_seed = gr.Checkbox(
                True, label="New for each video", elem_id="new-seed", scale=1, min_width=120, container=False
            )
        main = {s.name: s for s in self.settings if s.stage == MAIN_STAGE}
        fields["preset"] = gr.Radio(
            list(PRESETS), value=OFFICIAL, label="Preset", elem_id="preset",
            info="balanced and fast take fewer and cheaper steps.",
        )  # fmt: skip
        if main:
            with gr.Row():
                for name in SHOWN:
                    self._setting(main[name])
        with gr.Accordion("Pictures and clip to start from", open=False, elem_id="pictures"):
            with gr.Row():
                for name, field in FRAMES.items():
                    fields[field] = gr.Image(
                        label=f"{name.capitalize()} frame", type="filepath", image_mode=None, height=180,
                        sources=["upload", "clipboard"], elem_id=field.replace("_", "-"), min_width=130,
                    )  # fmt: skip
            fields[INPUT] = gr.File(label="Clip to continue, smooth or enlarge", elem_id="clip", height=110)
        with gr.Accordion("LoRA files and new words", open=False):
            fields["loras"] = gr.File(
                label="LoRA files of Stable Diffusion 1.x", file_count="multiple", elem_id="loras", height=110,
                file_types=[".safetensors", ".pt", ".bin"],
            )  # fmt: skip
            fields["lora_scales"] = gr.Textbox(
                "", label="Scales", placeholder="1", info="One for all, or one for each: 0.8, 1"
            )
            fields["embeddings"] = gr.File(
                label="Textual inversions of Stable Diffusion 1.x", file_count="multiple", elem_id="embeddings",
                height=110, file_types=[".safetensors", ".pt", ".bin"],
            )  # fmt: skip
            fields["embedding_words"] = gr.Textbox(
                "", label="Words for them in prompts", placeholder="those of the files", max_length=1000,
                elem_id="embedding-words", info="One for each: <cat>, <dog>",
            )  # fmt: skip
        with gr.Accordion("All settings", open=False, elem_id="all-settings"):
            fields["prompts_at"] = gr.Textbox(
                "", label="Prompts over time, instead of the prompt", placeholder="0: a red circle | 8: a blue circle"
            )
            with gr.Row():
                for name, allowed, info in READINGS:
                    fields[name] = gr.Radio(
                        list(allowed), value=allowed[0], label=name.replace("_", " ").capitalize(), info=info,
                        elem_id=name.replace("_", "-"), min_width=130,
                    )  # fmt: skip
            with gr.Tabs():
                for stage in self.site.stages:
                    with gr.Tab(stage):
                        for setting in self.settings:
                            if setting.stage == stage and (stage, setting.name) not in fields:
                                self._setting(setting)
        with gr.Accordion("Make a video again from its file", open=False, elem_id="again"):
            self.made = gr.File(
                label="MP4, GIF, PNG or JSON file of a video that was made here or by sample.py", elem_id="made",
                file_types=[".mp4", ".gif", ".png", ".json"], height=110,
            )  # fmt: skip

    def _setting(self, setting: Setting) -> None:
        id = f"{setting.stage}-{setting.name}".replace("_", "-")
        default = "" if setting.default is None or setting.default is False else f"{setting.default}"
        common: dict[str, Any] = {"label": setting.label, "elem_id": id, "min_width": 120}
        if (setting.stage, setting.name) not in [(MAIN_STAGE, name) for name in SHOWN]:
            common["info"] = setting.help
        if setting.kind is bool:
            field = gr.Checkbox(False, **common)
        elif setting.choices:
            field = gr.Dropdown([("default", ""), *((c, c) for c in setting.choices)], value="", **common)
        else:
            field = gr.Textbox("", placeholder=default, max_length=4000, **common)
        self.fields[setting.stage, setting.name] = field

    def _job(self) -> None:
        self.status = gr.HTML(views.status(None, 0), elem_id="status")
        self.progress = gr.HTML("", elem_id="progress")
        self.notes = gr.HTML("", elem_id="notes")
        self.results = gr.HTML("", elem_id="results")

    def _events(self) -> None:
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        inputs = list(self.fields.values())
        shown = [self.view, self.status, self.progress, self.notes, self.results, self.gallery, self.more, self.cancel]
        refresh: dict[str, Any] = {"inputs": [self.view], "outputs": shown, **private}
        filled = [self.note, self.new_seed, *inputs]

        # The fields go to `form.read` as the browser sends them, files included.
        made = self.make.click(
            self.on_make, [self.new_seed, *inputs], [self.note, self.fields["seed"]],
            preprocess=False, concurrency_limit=8, trigger_mode="once", **private,
        )  # fmt: skip
        made.then(self.on_refresh_newest, **refresh, queue=False).then(None, js=TO_STATUS, **private)
        self.cancel.click(self.on_cancel, [self.view], None, queue=False, **private).then(
            self.on_refresh, **refresh, queue=False
        )
        self.dice.click(
            lambda: (secrets.randbelow(MAX_SEED + 1), False),
            None,
            [self.fields["seed"], self.new_seed],
            queue=False,
            **private,
        )
        pressed = self.gallery.click(self.on_gallery, [self.view], [self.view, *filled], queue=False, **private)
        pressed.then(self.on_refresh, **refresh, queue=False)
        self.more.click(self.on_more, [self.view], [self.view], queue=False, **private).then(
            self.on_refresh, **refresh, queue=False
        )
        self.made.upload(self.on_made, [self.made], filled, preprocess=False, queue=False, **private)
        chosen = [self.fields[name] for name in ("stages", *FRAMES.values(), INPUT)]
        for name in (*FRAMES.values(), INPUT):
            self.fields[name].upload(
                self.on_upload, chosen, [self.fields["stages"], self.note], preprocess=False, queue=False, **private
            )
        self.timer.tick(self.on_refresh, **refresh, queue=False)
        self.blocks.load(self.on_load, **refresh, queue=False)

    # ---- what they do ----

    def on_make(self, request: gr.Request, new_seed: Any, *values: Any) -> tuple[Any, Any]:
        """Adds a job."""
        fields = dict(zip(self.fields, values))
        seed = secrets.randbelow(MAX_SEED + 1) if new_seed else fields["seed"]
        fields["seed"] = seed
        most, folder = self.site.most_upload, self.site.uploads
        try:
            self.queue.submit(owner_of(request), lambda inputs: form.read(fields, folder, inputs, most))
        except (UserError, OSError) as error:
            return views.alert(" ".join(str(error).split())), gr.skip()
        except Exception:
            logging.exception("a request failed")
            return views.alert(BROKEN), gr.skip()
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
        state = job and (job.id, job.status, job.stage, ahead)
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
        nothing = [view, *[gr.skip()] * (len(self.fields) + 2)]
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
                return [view, _status(note), gr.skip(), *(values.get(name, gr.skip()) for name in self.fields)]
            case "cancel":
                self.queue.cancel(job.id)
            case "delete" if job.is_finished:
                self.queue.delete(job)
                view = dataclasses.replace(view, job=None if view.job == job.id else view.job)
                return [view, *nothing[1:]]
        return nothing

    def on_made(self, file: Any) -> list[Any]:
        """Fills the form from the file of a video."""
        nothing = [gr.skip()] * (len(self.fields) + 1)
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
        values = form.values_of(wanted, files, self.settings)
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
        return [_status(note), False, *(values.get(name) for name in self.fields)]


def _status(text: str) -> str:
    return f'<p class="status" role="status">{views.escape(text)}</p>'
