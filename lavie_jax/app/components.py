"""The components of the form, in Gradio. `form.py` reads their values."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lavie_jax.app import form
from lavie_jax.app.form import SHOWN, Setting
from lavie_jax.app.generation import FRAMES, INPUT
from lavie_jax.app.jobs import JobQueue
from lavie_jax.fields import MAX_SEED
from lavie_jax.samples.prompt_syntax import LONG_PROMPTS, SYNTAXES
from lavie_jax.stages.settings import MAIN_STAGE, OFFICIAL, PRESETS, STAGE_INFO

READINGS = (
    ("prompt_syntax", SYNTAXES, "weighted gives brackets their meaning: (word:1.3), [word]"),
    ("long_prompts", LONG_PROMPTS, "what becomes of words beyond the text encoder's window"),
)


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


class Form:
    """The form, at the place of the page where it is made.

    Attributes:
        settings: the settings of all stages.
        fields: {field: its component}, as in `form.read`.
        make: the button that adds the job.
        cancel: the button that cancels the job that is shown.
        note: errors and notes.
        dice: the button for a random seed.
        new_seed: whether each video has a new seed.
        made: the file of a video to make again.
    """

    def __init__(self, site: Site):
        self.site = site
        self.settings = [s for stage, defaults in site.stages.items() for s in form.settings_of(stage, defaults)]
        self.fields: dict[Any, gr.components.Component] = {}
        self._request()
        self._buttons()
        self._main_settings()
        self._files()
        self._all_settings()
        with gr.Accordion("Make a video again from its file", open=False, elem_id="again"):
            self.made = gr.File(
                label="MP4, GIF, PNG or JSON file of a video that was made here or by sample.py", elem_id="made",
                file_types=[".mp4", ".gif", ".png", ".json"], height=110,
            )  # fmt: skip

    def _request(self) -> None:
        """The prompt and the stages."""
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

    def _buttons(self) -> None:
        """What starts and ends a job, and what is said to it."""
        with gr.Row():
            self.make = gr.Button("Make the video", variant="primary", elem_id="make", scale=3, min_width=160)
            self.cancel = gr.Button(
                "Cancel", variant="stop", interactive=False, elem_id="cancel", scale=1, min_width=100
            )
        self.note = gr.HTML("", elem_id="note")

    def _main_settings(self) -> None:
        """The seed, the preset, and the settings of the main stage that are not folded away."""
        fields = self.fields
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

    def _files(self) -> None:
        """Pictures, clip, LoRA files and embeddings."""
        fields = self.fields
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

    def _all_settings(self) -> None:
        """How prompts are read, and every setting of every stage."""
        fields = self.fields
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
