"""Published benchmarks: a row for each, with its prompts, the names and layout of its videos, and published values.

Prompt files, data and tools are the benchmarks' own, given by path. Nothing is downloaded.
"""

import csv
import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import UInt8

from lavie_jax.errors import UserError
from lavie_jax.evaluation.clipsim import draw_captions
from lavie_jax.samples.prompts import read_prompts
from lavie_jax.text_files import read_json, read_text

MAX_NAME = 240  # bytes of a file's name, with its ending
CLASSES = 101


class Item(NamedTuple):
    """A video to sample: its prompt, and its path below the folder of videos, without ending."""

    prompt: str
    name: str


class Suite(NamedTuple):
    """A benchmark.

    Attributes:
        about: what it is.
        source: the prompt file or folder that it needs.
        items: (source, seed) -> the videos to sample, in order.
        settings: sampling settings of the published values.
        tool: commands that measure the videos, with {videos} for their folder and {out} for that of the run; empty
            where this library measures, and for VBench (`vbench_commands`).
        published: {measure: value} of LaVie.
        origin: where the published values are from.
    """

    about: str
    source: str
    items: Callable[[Path, int], Iterator[Item]]
    settings: Mapping[str, Any]
    tool: tuple[str, ...]
    published: Mapping[str, float]
    origin: str


def checked(items: Iterator[Item]) -> list[Item]:
    """Returns the items. Raises UserError for names that no file can have, or that two videos share."""
    every = list(items)
    seen = set()
    for item in every:
        parts = item.name.split("/")
        if any(len(p.encode()) > MAX_NAME or p != p.strip() or p[:1] in ("", ".") or "\0" in p for p in parts):
            raise UserError(f"{item.name[:60]!r} of the prompt {item.prompt[:60]!r} cannot name a file of the run")
        if item.name in seen:
            raise UserError(f"the prompt {item.prompt[:60]!r} is there twice, as {item.name[:60]!r}")
        seen.add(item.name)
    if not every:
        raise UserError("the prompt file has no prompts")
    return every


def prompts_hash(items: Sequence[Item]) -> str:
    """Returns a hash of the prompts and the names of their videos."""
    return hashlib.sha256(json.dumps(items).encode()).hexdigest()


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from error
    return [line for line in lines if line]


def _numbered_files(source: Path, what: str) -> list[Path]:
    files = sorted(source.glob("*.txt")) if source.is_dir() else [source]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"{source} is not {what}")
    return files


def words_of(name: str) -> str:
    """Returns the words of a class name: "ApplyEyeMakeup" -> "apply eye makeup", "YoYo" -> "yo yo"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name).replace("_", " ").lower()


def ucf101(source: Path, seed: int) -> Iterator[Item]:
    """Yields 100 videos of each class. `source` is classInd.txt ("1 Archery") or a folder with class folders."""
    if source.is_dir():
        classes = sorted(folder.name for folder in source.iterdir() if folder.is_dir() and folder.name[0] != ".")
    else:
        classes = [line.split()[-1] for line in _lines(source)]
    for name in classes:
        yield from (Item(words_of(name), f"{name}/{index:03d}") for index in range(100))


def msrvtt(source: Path, seed: int) -> Iterator[Item]:
    """Yields one video for each test video of MSR-VTT, with one of its captions, drawn by the seed.

    `source` is MSR-VTT's JSON with "videos" and "sentences", or {video: caption or list of captions}.
    """
    content = read_json(source)
    captions: dict[str, list[str]] = {}
    try:
        if isinstance(content.get("sentences"), list):
            splits = {row["video_id"]: row.get("split", "test") for row in content.get("videos", ())}
            for row in content["sentences"]:
                if splits.get(row["video_id"], "test") == "test":
                    captions.setdefault(row["video_id"], []).append(row["caption"])
        else:
            captions = {name: [own] if isinstance(own, str) else own for name, own in content.items()}
        right = all(
            isinstance(name, str)
            and isinstance(own, list)
            and own
            and all(isinstance(x, str) and x.strip() for x in own)
            for name, own in captions.items()
        )
    except (KeyError, TypeError, AttributeError):
        right = False
    if not right:
        raise UserError(f"{source} must be MSR-VTT's file, or have a caption, or a list of captions, for each video")
    if not captions:
        raise UserError(f"{source} has no video of the split test")
    drawn = draw_captions(captions, seed)
    yield from (Item(text, name) for name, text in drawn.items())


VIDEOS_A_PROMPT = 5
MORE_VIDEOS = {"temporal_flickering": 25}  # because its tool leaves out videos that move


def vbench(source: Path, seed: int) -> Iterator[Item]:
    """Yields 5 videos of each prompt, 25 for temporal flickering, as "DIMENSION/PROMPT-INDEX".

    `source` is VBench's prompts_per_dimension, or one prompt file, whose videos share a folder.
    """
    files = _numbered_files(source, "VBench's folder prompts_per_dimension or a prompt file")
    if source.is_dir():
        others = [file.name for file in files if file.stem not in VBENCH_FOLDERS.values()]
        if len(others) == len(files):
            raise UserError(f"{source} has no prompt file of a dimension, such as color.txt")
        if others:  # some versions have all prompts once more in all_dimension.txt
            logging.warning("left out, not of a dimension: %s", ", ".join(others))
        files = [file for file in files if file.name not in others]
    for file in files:
        count = MORE_VIDEOS.get(file.stem, VIDEOS_A_PROMPT)
        for prompt in dict.fromkeys(_lines(file)):
            if "/" in prompt:
                raise UserError(f"{file}: VBench names videos by their prompts, and {prompt!r} has a slash")
            yield from (Item(prompt, f"{file.stem}/{prompt}-{index}") for index in range(count))


def evalcrafter(source: Path, seed: int) -> Iterator[Item]:
    """Yields one video a prompt of prompt700.txt, as 0000, 0001, ..."""
    yield from (Item(prompt, f"{index:04d}") for index, prompt in enumerate(_lines(source)))


def t2v_compbench(source: Path, seed: int) -> Iterator[Item]:
    """Yields one video a prompt of each category, as "consistent_attr/0001"; `source` is its folder of prompts."""
    for file in _numbered_files(source, "T2V-CompBench's folder of prompts"):
        category = re.sub(r"^\d+_", "", file.stem)
        yield from (Item(prompt, f"{category}/{i:04d}") for i, prompt in enumerate(_lines(file), start=1))


def videophy(source: Path, seed: int) -> Iterator[Item]:
    """Yields one video for each caption: of a .csv with a column `caption`, as VideoPhy's, or of a .txt."""
    if source.suffix.lower() != ".csv":
        yield from (Item(prompt.text, f"{i:04d}") for i, prompt in enumerate(read_prompts(source)))
        return
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            captions = [(row.get("caption") or "").strip() for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{source} cannot be read as a table: {error}") from error
    captions = list(dict.fromkeys(text for text in captions if text))
    if not captions:
        raise UserError(f"{source} has no column `caption`")
    yield from (Item(text, f"{i:04d}") for i, text in enumerate(captions))


PAPER_SIZE = {"frames": 16, "height": 320, "width": 512, "fps": 8.0}
SUITES = {
    "ucf101": Suite(
        "zero-shot FVD on UCF-101: class names as prompts, 100 videos of each of 101 classes",
        "--classes", ucf101, PAPER_SIZE, (), {"fvd": 526.30}, "LaVie",
    ),
    "msrvtt": Suite(
        "CLIPSIM on the test captions of MSR-VTT, one caption a video",
        "--captions", msrvtt, PAPER_SIZE, (), {"clipsim": 0.2949}, "LaVie",
    ),
    "vbench": Suite(
        "VBench (arXiv 2311.17982): 16 dimensions, measured by its own tool",
        "--prompts", vbench, {**PAPER_SIZE, "height": 512}, (),
        {"quality": 78.78, "semantic": 70.31, "total": 77.08}, "LaVie, at 512x512",
    ),
    "evalcrafter": Suite(
        "EvalCrafter (arXiv 2310.11440): 700 prompts, measured by its own tool",
        "--prompts", evalcrafter, PAPER_SIZE, ("copy {videos} to EvalCrafter/videos, and follow its README",), {}, "",
    ),
    "t2v-compbench": Suite(
        "T2V-CompBench (arXiv 2407.14505): seven categories, measured by its own tools",
        "--prompts", t2v_compbench, PAPER_SIZE,
        ("follow its README, which has a command for each category, such as: "
         "python llava/eval/eval_consistent_attr.py --video-path {videos}/consistent_attr ...",), {}, "",
    ),
    "videophy": Suite(
        "VideoPhy (arXiv 2406.03520): physical commonsense, measured by its own tool",
        "--prompts", videophy, PAPER_SIZE,
        ("mkdir -p {out}/results; python utils/prepare_data.py --input_csv {out}/videos.csv "
         "--output_folder {out}/results",),
        {"SA=1, PC=1 (people)": 15.7, "SA=1 (people)": 48.7, "PC=1 (people)": 28.0}, "VideoPhy's README",
    ),
}  # fmt: skip

# ---- VBench's own arithmetic ----

# {dimension: (lowest, highest, weight)}, of VBench's scripts/constant.py.
QUALITY = {
    "subject_consistency": (0.1462, 1.0, 1.0), "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0), "motion_smoothness": (0.706, 0.9975, 1.0),
    "aesthetic_quality": (0.0, 1.0, 1.0), "imaging_quality": (0.0, 1.0, 1.0), "dynamic_degree": (0.0, 1.0, 0.5),
}  # fmt: skip
SEMANTIC = {
    "object_class": (0.0, 1.0, 1.0), "multiple_objects": (0.0, 1.0, 1.0), "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0), "spatial_relationship": (0.0, 1.0, 1.0), "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0), "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}  # fmt: skip
QUALITY_WEIGHT = 4  # of the total; semantic has weight 1
# {dimension: prompt file, and so folder, of its videos}: five dimensions have no prompts of their own.
VBENCH_FOLDERS = {name: name for name in QUALITY | SEMANTIC} | {
    "background_consistency": "scene", "aesthetic_quality": "overall_consistency",
    "imaging_quality": "overall_consistency", "motion_smoothness": "subject_consistency",
    "dynamic_degree": "subject_consistency",
}  # fmt: skip
VBENCH_ANY_PROMPT = (
    *("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree"),
    *("aesthetic_quality", "imaging_quality"),
)


def vbench_commands(folders: Iterable[str], videos: Path, out: Path, measured: Iterable[str] = ()) -> list[str]:
    """Returns the commands of VBench's tool for the dimensions that can be measured.

    Args:
        folders: names of the folders of videos.
        videos: the folder that they are in.
        out: folder of the run.
        measured: dimensions whose results are there.
    """
    at, results = shlex.quote(str(videos.resolve())), shlex.quote(str(out.resolve() / "results"))
    folders, custom, lines = list(folders), "", []
    todo = {name: folder for name, folder in VBENCH_FOLDERS.items() if folder in folders}
    if folders == ["all_dimension"]:
        todo = dict.fromkeys(VBENCH_FOLDERS, "all_dimension")
    elif not todo:  # prompts that are not VBench's
        todo, custom = dict.fromkeys(VBENCH_ANY_PROMPT, folders[0]), " --mode=custom_input"
    todo = {name: folder for name, folder in todo.items() if name not in measured}
    if (flickering := todo.pop("temporal_flickering", None)) is not None:
        static = shlex.quote(str(out.resolve() / "static"))
        lines.append(
            f"python static_filter.py --videos_path {at}/{flickering} --result_path {static} && vbench evaluate "
            f"--dimension temporal_flickering --videos_path {static}/filtered_videos --output_path {results}"
        )
    if todo:
        pairs = " ".join(f"{name}:{shlex.quote(folder)}" for name, folder in todo.items())
        lines.append(
            f'for x in {pairs}; do vbench evaluate --dimension "${{x%%:*}}" --videos_path {at}/"${{x#*:}}" '
            f"--output_path {results}{custom}; done"
        )
    return lines


def temporal_flickering(clip: UInt8[np.ndarray, "t h w 3"]) -> float:
    """Returns VBench's value: 1 - the mean absolute difference of consecutive frames / 255. It needs no network."""
    if len(clip) < 2:
        raise UserError("temporal flickering needs at least 2 frames")
    changes = np.diff(clip.astype(np.float32), axis=0)
    return float(1 - np.abs(changes).mean((1, 2, 3)).mean() / 255)


def read_vbench_results(folder: Path) -> dict[str, float]:
    """Returns {dimension: value, from 0 to 1} of the *_eval_results.json files that VBench's tool wrote."""
    files = sorted(folder.rglob("*_eval_results.json"))
    if not files:
        raise UserError(f"{folder} has no *_eval_results.json: run VBench's tool first, with --output_path {folder}")
    values: dict[str, float] = {}
    for file in files:
        for name, result in read_json(file).items():
            if name not in QUALITY | SEMANTIC:
                continue
            value = result[0] if isinstance(result, list) and result else None
            if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1:
                raise UserError(f"{file}: the result of {name} is not VBench's [value from 0 to 1, videos]")
            if name in values:
                raise UserError(f"{folder} has {name} in several files: keep one")
            values[name] = float(value)
    return values


def vbench_scores(values: Mapping[str, float]) -> dict[str, float]:
    """Returns quality, semantic and total score in percent, as far as all of their dimensions are there."""
    scores = {}
    for name, group in (("quality", QUALITY), ("semantic", SEMANTIC)):
        if group.keys() <= values.keys():
            parts = [weight * (values[d] - low) / (high - low) for d, (low, high, weight) in group.items()]
            scores[name] = 100 * sum(parts) / sum(weight for *_, weight in group.values())
    if len(scores) == 2:
        scores["total"] = (QUALITY_WEIGHT * scores["quality"] + scores["semantic"]) / (QUALITY_WEIGHT + 1)
    return scores
