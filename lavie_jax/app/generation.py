"""What a person asks for, from the page or as JSON, checked as far as is possible without the weights.

The fields of the JSON are those of a sample's JSON file and of a call of `Cascade`: `prompt`, `seed`, `stages`, the
settings of the base stage by name, and those of another stage as an object under its name. Thus the `request` of a
sample that was made from text alone is a valid request.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavie_jax.app import uploads
from lavie_jax.errors import UserError, suggest
from lavie_jax.fields import is_finite
from lavie_jax.samples.again import settings_of
from lavie_jax.samples.pictures import PICTURES
from lavie_jax.samples.prompt_syntax import CUT, PLAIN, Reading
from lavie_jax.samples.prompts import check_prompts_at, check_seed, check_unicode, one_line, prompts_at_of_json
from lavie_jax.stages.settings import MAIN_STAGE, OFFICIAL, PRESETS, STAGE_INFO, parse_stages

MODEL = "lavie_jax"  # the only value of the field `model`, which other servers have
WEIGHTS = "weights_sha256"  # of a stage; with it, other weights are refused
INPUT = "input"
FRAMES = {name: f"{name}_frame" for name in PICTURES}  # {picture: its field}
READING = ("prompt_syntax", "long_prompts")  # fields of `Reading`
FIELDS = (
    "prompt", "prompts_at", "stages", "seed", "preset", *READING, "model", *FRAMES.values(), INPUT, "loras",
    "embeddings", WEIGHTS,
)  # fmt: skip
MAX_PROMPT, MAX_LORAS, MAX_EMBEDDINGS, MAX_WORD = 4000, 8, 8, 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """A video to make. Files are named relative to the folder of uploaded files.

    Attributes:
        prompt: the prompt; of prompts over time, all in one line.
        prompts_at: prompts over time, {frame: prompt}.
        stages: the stages to run, in order.
        seed: from 0 to 2^32 - 1.
        preset: one of `PRESETS`.
        prompt_syntax: see `Reading`.
        long_prompts: see `Reading`.
        settings: {stage: settings}, without those that are left to the weights folder and the preset.
        weights: {stage: SHA-256 that its weights must have}.
        pictures: {one of `PICTURES`: file}.
        clip: file of the clip that the first stage starts from.
        loras: (file, scale).
        embeddings: (file, word for it in prompts); None for the file's own word.
    """

    prompt: str
    prompts_at: Mapping[int, str] | None = None
    stages: tuple[str, ...] = (MAIN_STAGE,)
    seed: int = 0
    preset: str = OFFICIAL
    prompt_syntax: str = PLAIN
    long_prompts: str = CUT
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pictures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    clip: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    embeddings: tuple[tuple[str, str | None], ...] = ()

    @property
    def reading(self) -> Reading:
        """How prompts are read. Raises UserError for an unknown value."""
        return Reading(self.prompt_syntax, self.long_prompts)

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values, for the job's file."""
        content = dataclasses.asdict(self)
        if self.prompts_at is not None:
            content["prompts_at"] = {str(frame): text for frame, text in self.prompts_at.items()}
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Generation":
        """Returns what `to_json` stored."""
        at = content["prompts_at"]
        return cls(
            **content
            | {
                "stages": tuple(content["stages"]),
                "loras": tuple((file, scale) for file, scale in content["loras"]),
                "embeddings": tuple((file, word) for file, word in content.get("embeddings", ())),
                "prompts_at": None if at is None else {int(frame): text for frame, text in at.items()},
            }
        )


def check(wanted: Generation) -> Generation:
    """Returns it with texts in their final form. Raises UserError for anything that needs no weights to be found."""
    prompt = " ".join(wanted.prompt.split())
    if wanted.prompts_at is not None:
        at = check_prompts_at(wanted.prompts_at, "prompts_at")
        wanted, prompt = dataclasses.replace(wanted, prompts_at=at), one_line(at)
    if not prompt:
        raise UserError("The prompt is empty: describe the video in a few words.")
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"The prompt has {len(prompt)} characters, where at most {MAX_PROMPT} are allowed.")
    check_unicode(prompt, "prompt")
    seed = check_seed(wanted.seed)
    stages = parse_stages(wanted.stages, own_clip=wanted.clip is not None)
    if wanted.preset not in PRESETS:
        raise UserError(f"preset: unknown {wanted.preset!r}{suggest(str(wanted.preset), PRESETS)}")
    Reading(wanted.prompt_syntax, wanted.long_prompts)  # raises for unknown values
    if len(wanted.loras) > MAX_LORAS:
        raise UserError(f"{len(wanted.loras)} LoRA files are given, where at most {MAX_LORAS} are allowed.")
    if len(wanted.embeddings) > MAX_EMBEDDINGS:
        raise UserError(f"{len(wanted.embeddings)} embeddings are given, where at most {MAX_EMBEDDINGS} are allowed.")
    for stage, values in wanted.settings.items():
        if values and stage not in stages:
            name = next(iter(values))
            raise UserError(f"{name} is given for {stage}, which is not among the stages {','.join(stages)}")
        names = STAGE_INFO[stage].settings.__dataclass_fields__
        for name, value in values.items():
            if name not in names:
                raise UserError(f"{stage}: unknown setting {name!r}{suggest(str(name), names)}")
            if isinstance(value, str):
                check_unicode(value, name)
                if len(value) > MAX_PROMPT:
                    raise UserError(f"{name} has {len(value)} characters, where at most {MAX_PROMPT} are allowed.")
        try:
            STAGE_INFO[stage].settings.check(values)
        except UserError as error:
            raise STAGE_INFO[stage].located(error) from None
    return dataclasses.replace(wanted, prompt=prompt, seed=seed, stages=stages)


def from_body(body: Mapping[str, Any], inputs: Path, most: int) -> Generation:
    """Parses the JSON of a request, and writes the files in it to the folder `inputs`.

    Args:
        body: the parsed JSON.
        inputs: the folder for files; made if there are any.
        most: the largest file, in bytes.

    Raises:
        UserError: a field is unknown, of the wrong type or out of range.
    """
    main = set(STAGE_INFO[MAIN_STAGE].settings.__dataclass_fields__)
    for name in body:
        if name not in FIELDS and name not in main and (name not in STAGE_INFO or name == MAIN_STAGE):
            raise UserError(f"unknown field {name!r}{suggest(str(name), {*FIELDS, *main, *STAGE_INFO} - {MAIN_STAGE})}")
    if body.get("model", MODEL) != MODEL:
        raise UserError(f"model must be {MODEL!r}, not {body['model']!r}")
    for name in ("prompt", "preset", *READING):
        if not isinstance(body.get(name, ""), str):
            raise UserError(f"{name} must be text, not {body[name]!r}")
    stages = body.get("stages", (MAIN_STAGE,))
    if not isinstance(stages, str) and not (
        isinstance(stages, list | tuple) and all(isinstance(s, str) for s in stages)
    ):
        raise UserError(f"stages must be a list of names, not {stages!r}")
    own = {name: value for name, value in body.items() if name in main or name == WEIGHTS}
    groups = {MAIN_STAGE: own, **{name: value for name, value in body.items() if name in STAGE_INFO}}
    for name, values in groups.items():
        if not isinstance(values, Mapping):
            raise UserError(f"{name} must be an object with settings of this stage, not {values!r}")
    stages = parse_stages(stages, own_clip=body.get(INPUT) is not None)
    settings = {
        stage: {name: value for name, value in values.items() if name != WEIGHTS and value is not None}
        for stage, values in groups.items()
    }
    weights = {stage: values[WEIGHTS] for stage, values in groups.items() if values.get(WEIGHTS) is not None}
    for stage, hash in weights.items():
        if stage not in stages or not isinstance(hash, str):
            raise UserError(f"{WEIGHTS} must be text, of a stage among {','.join(stages)}; given {hash!r} of {stage}")
    wanted = Generation(
        prompt=body.get("prompt", ""),
        prompts_at=None if body.get("prompts_at") is None else prompts_at_of_json(body["prompts_at"]),
        stages=stages,
        seed=check_seed(body.get("seed", 0)),
        preset=body.get("preset", OFFICIAL),
        **{name: body[name] for name in READING if name in body},
        settings={stage: values for stage, values in settings.items() if values},
        weights=weights,
        clip=None if body.get(INPUT) is None else INPUT,
    )
    given, wanted = " ".join(wanted.prompt.split()), check(wanted)
    if given not in ("", wanted.prompt):  # the request of a sample has both
        raise UserError(f"give either prompt or prompts_at; the prompt {given!r} is not that of prompts_at")
    return _with_files(wanted, body, inputs, most)


def _with_files(wanted: Generation, body: Mapping[str, Any], inputs: Path, most: int) -> Generation:
    """Writes the files of a body, which is otherwise checked."""

    def write(name: str, content: Any, kind: str) -> str:
        data = uploads.decode(content, name, most)
        inputs.mkdir(parents=True, exist_ok=True)
        raw = inputs / f"{name}.part"
        raw.write_bytes(data)
        return raw.rename(raw.with_suffix(uploads.ending_of(raw, kind, most))).name

    pictures = {
        name: write(field, body[field], uploads.PICTURE)
        for name, field in FRAMES.items()
        if body.get(field) is not None
    }
    clip = None if body.get(INPUT) is None else write(INPUT, body[INPUT], uploads.CLIP)
    loras = tuple(
        (write(f"lora-{number}", one.get("file"), uploads.LORA), check_scale(one.get("scale", 1.0)))
        for number, one in enumerate(_objects(body, "loras", {"scale": "1"}, "LoRA files", MAX_LORAS))
    )
    embeddings = []
    for number, one in enumerate(_objects(body, "embeddings", {"word": '"<cat>"'}, "embeddings", MAX_EMBEDDINGS)):
        word = check_word(one.get("word"))
        embeddings.append((write(f"embedding-{number}", one.get("file"), uploads.EMBEDDING), word))
    return dataclasses.replace(wanted, pictures=pictures, clip=clip, loras=loras, embeddings=tuple(embeddings))


def _objects(
    body: Mapping[str, Any], field: str, example: Mapping[str, str], what: str, most: int
) -> list[Mapping[str, Any]]:
    """Returns the objects of a list of files, each with "file" and the key of `example`, whose value is JSON."""
    given = body.get(field) or []
    ((key, value),) = example.items()
    if not isinstance(given, list) or not all(isinstance(one, Mapping) and set(one) <= {"file", key} for one in given):
        raise UserError(f'{field} must be a list of objects like {{"file": "data:;base64,...", "{key}": {value}}}')
    if len(given) > most:
        raise UserError(f"{len(given)} {what} are given, where at most {most} are allowed.")
    return given


def check_word(word: Any) -> str | None:
    """Returns the word of an embedding, None for its own. Raises UserError unless it is one word."""
    if word is None or word == "":
        return None
    if not isinstance(word, str) or word.split() != [word] or len(word) > MAX_WORD:
        raise UserError(
            f"the word of an embedding must be text without spaces, like <cat>, not {str(word)[:MAX_WORD]!r}"
        )
    check_unicode(word, "the word of an embedding")
    return word


def check_scale(scale: Any) -> float:
    """Returns the scale of a LoRA. Raises UserError unless it is a number."""
    if not is_finite(scale):
        raise UserError(f"the scale of a LoRA must be a finite number, not {scale!r}")
    return float(scale)


def from_request(request: Mapping[str, Any]) -> tuple[Generation, list[str]]:
    """Returns how to make a sample again (`samples.provenance.read_request`), and the files that have to be given.

    Raises:
        UserError: it was made by stages that do not exist here.
    """
    settings = settings_of(request)
    needed = []
    if request.get("input_sha256"):
        needed.append("the clip that it started from")
    known = request.get("known_sha256") or {}
    if known:
        first = ["its first frame"] if "0" in known else []
        needed += first + ["its last frame"] * (len(known) > len(first))
    if request.get("loras"):
        needed.append("its LoRA files")
    if request.get("embeddings"):
        needed.append("its embeddings")
    at = request.get("prompts_at")
    groups = {stage: request if STAGE_INFO[stage].main else request[stage] for stage in settings}
    wanted = Generation(
        prompt=request["prompt"],
        prompts_at=None if at is None else prompts_at_of_json(at),
        stages=tuple(settings),
        seed=check_seed(request.get("seed")),
        **dataclasses.asdict(Reading.stored(request)),
        settings=settings,
        weights={stage: str(own[WEIGHTS]) for stage, own in groups.items() if isinstance(own.get(WEIGHTS), str)},
    )
    return wanted, needed


def own_stages(stages: Sequence[str]) -> tuple[str, ...]:
    """Returns stages in the order of the cascade, however they were chosen."""
    return tuple(stage for stage in STAGE_INFO if stage in stages)
