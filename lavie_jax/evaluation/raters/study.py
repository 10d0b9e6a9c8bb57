"""A study: its videos, its questions, and the order in which a rater gets them.

A study is a folder with `study.json` and `videos/`, which `prepare` writes and nothing changes. Raters' answers are
added to it by `answers.py`.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from lavie_jax.disk import file_hash, new_folder
from lavie_jax.errors import UserError, check_folder
from lavie_jax.evaluation.raters import videos
from lavie_jax.evaluation.raters.videos import Key
from lavie_jax.text_files import read_json

KIND, FORMAT_VERSION = "raters", 1
MANIFEST, VIDEOS = "study.json", "videos"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of the paper's table 4, as the page asks for it.

    Attributes:
        name: in answers.
        title: the paper's name for it.
        hint: one line for raters.
        optional: a video may not show what is judged.
    """

    name: str
    title: str
    hint: str
    optional: bool = False


# Section 5.4 and table 4 of the paper give the names; it does not print the instructions, so the hints are ours.
METRICS = (
    Metric("motion_smoothness", "Motion smoothness", "Does everything move without jumps and flicker?"),
    Metric("motion_reasonableness", "Motion reasonableness", "Does it move as it would in reality?"),
    Metric("subject_consistency", "Subject consistency", "Does the subject stay the same from start to end?"),
    Metric("background_consistency", "Background consistency", "Does the background stay the same?"),
    Metric("face_body_hand_quality", "Face, body and hand quality", "Are they drawn well?", optional=True),
)
LABELS = ("bad", "normal", "good")
NOT_SHOWN = "not shown"  # for an optional metric
PROBLEM = "problem"  # instead of an answer


@dataclasses.dataclass(frozen=True)
class Video:
    """A video of a study.

    Attributes:
        id: a token that does not reveal the system.
        file: path relative to the study's folder.
        sha256: of that file.
        system, prompt, sample: where it came from.
        source, source_sha256: the name and hash of the original file.
        damaged: whether it is a damaged copy, for a control.
    """

    id: str
    file: str
    sha256: str
    system: str
    prompt: str
    sample: int
    source: str
    source_sha256: str
    damaged: bool = False


@dataclasses.dataclass(frozen=True)
class Question:
    """A question: which of two videos is better, or the metrics of one.

    Attributes:
        id: a token that reveals nothing.
        prompt: shown to the rater.
        videos: ids of the videos. For a pair in the order of the systems; for a pair that is a control, the damaged
            copy is the second.
        control: whether the right answer is known.
    """

    id: str
    prompt: str
    videos: tuple[str, ...]
    control: bool = False

    @property
    def is_pair(self) -> bool:
        """Whether two videos are compared."""
        return len(self.videos) == 2


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question as one rater gets it: `videos` in the order on the page."""

    question: Question
    videos: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Design:
    """What is asked.

    Attributes:
        title: heading of the page.
        seed: of all that is drawn.
        pairs_per_rater: how many pairs a rater compares; None for all.
        singles_per_rater: likewise for single videos.
        controls: how many pairs, and how many single videos, with known answers each rater gets in addition.
    """

    title: str = "Video study"
    seed: int = 0
    pairs_per_rater: int | None = None
    singles_per_rater: int | None = None
    controls: int = 4


@dataclasses.dataclass(frozen=True)
class Study:
    """A prepared study."""

    folder: Path
    design: Design
    systems: tuple[str, ...]
    videos: Mapping[str, Video]
    questions: Mapping[str, Question]
    id: str

    @classmethod
    def load(cls, folder: Path) -> "Study":
        """Loads a study and checks its videos.

        Raises:
            UserError: there is none, or it or its videos are not those that were prepared.
        """
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{os.fspath(folder)!r} is not a study: it has no {MANIFEST}; make one with prepare")
        content = read_json(folder / MANIFEST)
        if content.get("kind") != KIND or content.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{folder / MANIFEST} is not a study of format version {FORMAT_VERSION}")
        if content.get("id") != _fingerprint(content):
            raise UserError(
                f"{folder / MANIFEST} was changed after it was prepared: restore it, or prepare a new study"
            )
        study = cls(
            folder=folder,
            design=Design(**content["design"]),
            systems=tuple(content["systems"]),
            videos={row["id"]: Video(**row) for row in content["videos"]},
            questions={row["id"]: Question(**{**row, "videos": tuple(row["videos"])}) for row in content["questions"]},
            id=content["id"],
        )
        for video in study.videos.values():
            path = folder / video.file
            if not path.is_file():
                raise UserError(f"{path} of the study is missing: restore it, or prepare a new study")
            if file_hash(path) != video.sha256:
                raise UserError(f"{path} was changed after the study was prepared: restore it, or prepare a new study")
        return study

    def questions_for(self, rater: int) -> list[Asked]:
        """Returns the questions of the rater with this number, from 1, in order: first pairs, then single videos.

        A rater's share of the questions continues where that of the rater before ended, so that all questions get
        equally many answers. Order and sides depend on the seed and the number only. Each side shows the first system
        equally often.
        """
        rng = np.random.default_rng([self.design.seed, rater])
        asked = []
        for pairs, count in ((True, self.design.pairs_per_rater), (False, self.design.singles_per_rater)):
            of_kind = [question for question in self.questions.values() if question.is_pair == pairs]
            share = _share([question for question in of_kind if not question.control], count, rater)
            chosen = share + ([question for question in of_kind if question.control] if share else [])
            sides = rng.permutation(np.arange(len(chosen)) + rng.integers(2)) % 2
            order = rng.permutation(len(chosen))
            asked += [
                Asked(chosen[i], chosen[i].videos[::-1] if pairs and sides[i] else chosen[i].videos) for i in order
            ]
        return asked


def _share(questions: Sequence[Question], count: int | None, rater: int) -> list[Question]:
    if count is None or count >= len(questions):
        return list(questions)
    start = (rater - 1) * count
    return [questions[(start + i) % len(questions)] for i in range(count)]


def _fingerprint(content: Mapping[str, Any]) -> str:
    """The hash of a manifest without its id, by which answers know their study."""
    text = json.dumps({name: value for name, value in content.items() if name != "id"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- prepare ----


def prepare(
    out: Path, systems: Mapping[str, Path], design: Design, *, prompts: int | None = None, common_prompts: bool = False
) -> Study:
    """Writes a study that compares `systems`, {name: folder of its videos}, into the new folder `out`.

    Args:
        prompts: how many prompts to draw; None for all.
        common_prompts: leave out videos that not all systems have, instead of refusing them.

    Raises:
        UserError: `out` is not empty, or the videos cannot be compared.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {os.fspath(out)!r} exists and is not empty: a study is never overwritten")
    check_folder(out, f"--out {os.fspath(out)!r}")
    found = {name: videos.find(folder, name) for name, folder in systems.items()}
    keys = _drawn(_common(found, common_prompts), prompts, design.seed)
    try:
        with new_folder(out.absolute()) as part:
            (part / VIDEOS).mkdir()
            manifest = _write(part, found, keys, design)
            text = json.dumps(manifest | {"id": _fingerprint(manifest)}, indent=2, ensure_ascii=False) + "\n"
            (part / MANIFEST).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {os.fspath(out)!r} cannot be written: {error.strerror or error}") from error
    return Study.load(out)


def _common(found: Mapping[str, Mapping[Key, Path]], common_prompts: bool) -> list[Key]:
    """The videos that all systems have."""
    common = set.intersection(*(set(of_system) for of_system in found.values()))
    if not common:
        examples = "; ".join(f"{name}: {min(of_system)[0]!r}" for name, of_system in found.items())
        raise UserError(f"the systems have no prompt in common, so their videos cannot be compared ({examples})")
    for name, of_system in found.items():
        if (more := sorted(set(of_system) - common)) and not common_prompts:
            prompt, sample = more[0]
            raise UserError(
                f"{len(more)} of the {len(of_system)} videos of {name!r} are not made by every system, such as video "
                f"{sample + 1} of the prompt {prompt!r}: make them, or leave them out with --common-prompts"
            )
    return sorted(common)


def _drawn(keys: Sequence[Key], prompts: int | None, seed: int) -> list[Key]:
    names = sorted({prompt for prompt, _ in keys})
    if prompts is None:
        return list(keys)
    if prompts > len(names):
        raise UserError(f"--prompts {prompts}: the systems have only {len(names)} prompts in common")
    chosen = {names[i] for i in np.random.default_rng([seed, 0]).permutation(len(names))[:prompts]}
    return [key for key in keys if key[0] in chosen]


def _write(part: Path, found: Mapping[str, Mapping[Key, Path]], keys: Sequence[Key], design: Design) -> dict[str, Any]:
    """Copies the videos, makes the damaged ones, and returns the manifest."""
    rng = np.random.default_rng([design.seed, 0, 0])
    stored: list[Video] = []

    def add(path: Path, source: Path, system: str, key: Key, damaged: bool) -> Video:
        fields = {"system": system, "prompt": key[0], "sample": key[1], "source": source.name, "damaged": damaged}
        hashes = {"sha256": file_hash(path), "source_sha256": file_hash(source)}
        stored.append(Video(id=path.stem, file=f"{VIDEOS}/{path.name}", **hashes, **fields))
        return stored[-1]

    by_key: dict[Key, list[Video]] = {}
    for key in tqdm(keys, desc="copying videos", unit="prompt"):
        copies = [
            add(videos.copy(source, part / VIDEOS, _token(rng)), source, system, key, False)
            for system, source in ((system, of_system[key]) for system, of_system in found.items())
        ]
        for first, second in itertools.combinations(copies, 2):
            if first.sha256 == second.sha256:
                raise UserError(
                    f"the videos of {first.system!r} and {second.system!r} for the prompt {key[0]!r} are the same file"
                )
        by_key[key] = copies
    pairs = [pair for copies in by_key.values() for pair in itertools.combinations(copies, 2)]
    singles = [(video,) for copies in by_key.values() for video in copies]
    controls: list[tuple[Video, ...]] = []
    chosen = rng.permutation(len(singles))[: design.controls]
    for (intact,) in tqdm([singles[i] for i in chosen], desc="making controls", unit="video"):
        path, key = part / VIDEOS / f"{_token(rng)}.mp4", (intact.prompt, intact.sample)
        videos.write_damaged(part / intact.file, path, seed=int(rng.integers(2**31)))
        copy = add(path, found[intact.system][key], intact.system, key, True)
        controls += [(intact, copy), (copy,)]
    rows = [
        {"id": _token(rng), "prompt": of[0].prompt, "videos": [video.id for video in of], "control": control}
        for control, group in ((False, pairs + singles), (True, controls))
        for of in group
    ]
    return {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "design": dataclasses.asdict(design),
        "systems": list(found),
        "videos": [dataclasses.asdict(video) for video in stored],
        "questions": [rows[i] for i in rng.permutation(len(rows))],
    }


def _token(rng: np.random.Generator) -> str:
    return rng.bytes(6).hex()
