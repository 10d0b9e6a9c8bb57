"""The form of the page, without its components: values as Gradio sends them, and back."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavie_jax.app import uploads
from lavie_jax.app.generation import (
    FRAMES,
    INPUT,
    MAX_EMBEDDINGS,
    MAX_WORD,
    READING,
    Generation,
    check,
    check_scale,
    check_word,
    own_stages,
)
from lavie_jax.errors import UserError
from lavie_jax.fields import parse_text, rule_of, short, types_of, without_none
from lavie_jax.samples.pictures import PICTURES
from lavie_jax.samples.prompts import check_seed, one_line, parse_prompts_at
from lavie_jax.stages.settings import MAIN_STAGE, OFFICIAL, STAGE_INFO
from lavie_jax.weights.embeddings import read_embedding

PLAIN = (
    "prompt", "stages", "seed", "preset", "prompts_at", *READING, *FRAMES.values(), INPUT, "loras", "lora_scales",
    "embeddings", "embedding_words",
)  # fmt: skip
SHOWN = ("steps", "guidance", "negative_prompt")  # settings of the main stage that are not folded away


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting of a stage, as a field of the form.

    Attributes:
        stage: the stage.
        name: of the setting.
        kind: int, float, str or bool.
        choices: all values allowed; () if there are others.
        help: what it does.
        default: of the weights folder; None if there is none.
    """

    stage: str
    name: str
    kind: type
    choices: tuple[str, ...]
    help: str
    default: Any

    @property
    def label(self) -> str:
        """The name in words."""
        return self.name.replace("_", " ").capitalize()


def settings_of(stage: str, defaults: Mapping[str, Any]) -> list[Setting]:
    """Returns the settings of a stage that a person can set; `defaults` are its weights folder's."""
    declared = {field.name: field for field in dataclasses.fields(STAGE_INFO[stage].settings)}
    found = []
    for name, _, kind, _, help in STAGE_INFO[stage].flags():
        default = defaults.get(name, declared[name].default)
        default = None if default is dataclasses.MISSING else default
        found.append(Setting(stage, name, kind, rule_of(declared[name]).choices, _sentence(help), default))
    return found


def _sentence(help: str) -> str:
    return help[:1].upper() + help[1:]


def read(values: Mapping[str, Any], folder: Path, inputs: Path, most: int) -> Generation:
    """Returns what the form asks for, and copies its files to `inputs`.

    Args:
        values: {field of `PLAIN`, or (stage, setting): value as the browser sent it}.
        folder: where uploaded files are.
        inputs: the folder of the job's files.
        most: the largest file, in bytes.

    Raises:
        UserError: a value is impossible.
    """
    stages = own_stages(values["stages"] or ())
    if not stages:
        raise UserError("Choose at least one stage.")
    settings: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    for key, value in values.items():
        if isinstance(key, tuple) and key[0] in settings and value is not None and value is not False:
            if (given := _typed(*key, value)) is not None:
                settings[key[0]][key[1]] = given
    at = (values["prompts_at"] or "").strip()
    files = {name: uploaded(values[field], folder) for name, field in FRAMES.items()}
    clip = uploaded(values[INPUT], folder)
    wanted = check(
        Generation(
            prompt=str(values["prompt"] or ""), prompts_at=parse_prompts_at(at) if at else None, stages=stages,
            seed=check_seed(values["seed"]), preset=values["preset"] or OFFICIAL,
            settings={stage: given for stage, given in settings.items() if given}, clip=clip and INPUT,
            **{name: values[name] for name in READING if values[name]},
        )
    )  # fmt: skip
    loras = [path for file in values["loras"] or () if (path := uploaded(file, folder)) is not None]
    scales = parse_scales(values["lora_scales"] or "", len(loras))
    kept = [uploads.keep(path, inputs, f"lora-{i}", uploads.LORA, most).name for i, path in enumerate(loras)]
    embeddings = _embeddings(values, folder, inputs, most)
    return dataclasses.replace(
        wanted,
        embeddings=embeddings,
        pictures={
            name: uploads.keep(path, inputs, FRAMES[name], uploads.PICTURE, most).name
            for name, path in files.items()
            if path is not None
        },
        clip=None if clip is None else uploads.keep(clip, inputs, INPUT, uploads.CLIP, most).name,
        loras=tuple(zip(kept, scales)),
    )


def _embeddings(values: Mapping[str, Any], folder: Path, inputs: Path, most: int) -> tuple[tuple[str, str | None], ...]:
    """Copies the embeddings, and returns (file, word) of each."""
    given = [path for file in values["embeddings"] or () if (path := uploaded(file, folder)) is not None]
    words = [check_word(word) for word in re.split(r"[\s,;]+", (values["embedding_words"] or "").strip()) if word]
    if len(words) not in (0, len(given)):
        raise UserError(f"{len(words)} words are given for {len(given)} embeddings: give one for each, or none.")
    if len(given) > MAX_EMBEDDINGS:
        raise UserError(f"{len(given)} embeddings are given, where at most {MAX_EMBEDDINGS} are allowed.")
    kept = []
    for number, path in enumerate(given):
        copy = uploads.keep(path, inputs, f"embedding-{number}", uploads.EMBEDDING, most)
        kept.append((copy.name, words[number] if words else _word_of(copy, path.stem)))
    return tuple(kept)


def _word_of(copy: Path, name: str) -> str:
    """The word of an embedding; `name` is that of the uploaded file, which stands for a word where it has none."""
    try:
        word = read_embedding(copy).word
    except UserError as error:
        raise UserError(str(error).replace(f"{copy.parent}/", "")) from None
    return re.sub(r"\s+", "-", name)[:MAX_WORD] if word == copy.stem else word


def _typed(stage: str, name: str, value: Any) -> Any:
    """Returns the value of a field, None for an empty one."""
    kind, _ = without_none(types_of(STAGE_INFO[stage].settings)[name])
    if not isinstance(value, str):
        return value
    text = value.strip() if kind is not str else value
    return parse_text(f"{stage}, {name.replace('_', ' ')}", text, kind) if text else None


def uploaded(file: Any, folder: Path) -> Path | None:
    """Returns the path of an uploaded file as the browser names it. Raises UserError for any other file."""
    if not file:
        return None
    path = file.get("path") if isinstance(file, Mapping) else file
    if isinstance(path, str) and "\0" not in path:
        whole = Path(path).resolve()
        if whole.is_relative_to(folder.resolve()) and whole.is_file():
            return whole
    raise UserError("The uploaded file is not here anymore: upload it again.")


def parse_scales(text: str, count: int) -> list[float]:
    """Parses the scales of LoRA files, "0.8, 1"; one holds for all, and none means 1. Raises UserError."""
    try:
        scales = [float(part) for part in re.split(r"[\s,;]+", text.strip()) if part]
    except ValueError:
        raise UserError(f"The scales of LoRA files must be numbers like 0.8, 1; given {text!r}") from None
    scales = scales or [1.0]
    if len(scales) not in (1, count) and count:
        raise UserError(f"{len(scales)} scales are given for {count} LoRA files: give one, or one for each.")
    return [check_scale(scale) for scale in (scales * count if len(scales) == 1 else scales)][:count]


def values_of(wanted: Generation, files: Mapping[str, Any], settings: Sequence[Setting]) -> dict[Any, Any]:
    """Returns the values of the form for what was asked for; `files` are those that can be given again, by field."""
    given = {(one.stage, one.name): wanted.settings.get(one.stage, {}).get(one.name) for one in settings}
    for one in settings:  # an unchecked box is False, and an empty field has no text
        value = given[one.stage, one.name]
        given[one.stage, one.name] = bool(value) if one.kind is bool else "" if value is None else str(value)
    return given | {
        "prompt": "" if wanted.prompts_at else wanted.prompt,
        "stages": list(wanted.stages),
        "seed": wanted.seed,
        "preset": wanted.preset,
        **{name: getattr(wanted, name) for name in READING},
        "prompts_at": one_line(wanted.prompts_at) if wanted.prompts_at else "",
        **{FRAMES[name]: files.get(FRAMES[name]) for name in PICTURES},
        INPUT: files.get(INPUT),
        "loras": files.get("loras"),
        "lora_scales": ", ".join(short(scale) for _, scale in wanted.loras),
        "embeddings": files.get("embeddings"),
        "embedding_words": ", ".join(word for _, word in wanted.embeddings if word),
    }


def fitting_stages(stages: Sequence[str], *, pictures: bool, clip: bool, available: Sequence[str]) -> list[str]:
    """Returns stages that can start from what was uploaded: those that are chosen, if they can."""
    chosen = own_stages(stages)
    infos = [STAGE_INFO[stage] for stage in chosen]
    if pictures and not any(info.takes_known for info in infos):
        taker = next((stage for stage in available if STAGE_INFO[stage].takes_known), None)
        chosen = own_stages([taker, *(s for s in chosen if s != MAIN_STAGE)]) if taker else chosen
    elif clip and (not infos or not infos[0].consumes):
        last = next((stage for stage in reversed(list(available)) if STAGE_INFO[stage].consumes), None)
        rest = [stage for stage in chosen if STAGE_INFO[stage].consumes]
        chosen = own_stages(rest or [last]) if rest or last else chosen
    return list(chosen)
