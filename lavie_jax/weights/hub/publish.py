"""Publishes weights folders on the Hugging Face hub, with a model card."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavie_jax.errors import UserError, user_path
from lavie_jax.models.registry import PARTS
from lavie_jax.results import markdown
from lavie_jax.stages import STAGES
from lavie_jax.text_files import read_json
from lavie_jax.weights.folder import CONTENTS, folder_hash, load_folder, part_dir, read_config, read_part
from lavie_jax.weights.hub.repository import HUB, Location, one_line
from lavie_jax.weights.locations import SOURCES
from lavie_jax.weights.names import is_buffer

CARD = "README.md"
MARK = "<!-- written by lavie_jax: a README.md of your own is kept by later pushes -->"
# Fields of a run's config that the card shows, where the folder is that of a run.
SHOWN = (
    "stage", "steps", "batch", "seed", "regime", "init_from", "ema_decay", "data.source", "data.path", "data.frames",
    "data.images", "data.height", "data.width", "optimizer.learning_rate",
)  # fmt: skip


def push_to_hub(folder: str | os.PathLike, repository: str, *, licence: str, private: bool = False) -> str:
    """Uploads a weights folder, or a cascade of them, in one commit.

        lavie_jax.push_to_hub("runs/cat/weights", "someone/cat", licence="creativeml-openrail-m")

    The repository is created if it does not exist. A model card is written unless the folder or the repository has a
    README.md of the user's.

    Args:
        folder: the folder; parts that it shares with other folders are uploaded with it.
        repository: OWNER/NAME.
        licence: the hub's identifier of the weights' licence, such as `apache-2.0`.
        private: whether a new repository is private.

    Returns:
        The location of the commit, `hub:OWNER/NAME@COMMIT`, for `load` and `--weights`.

    Raises:
        UserError: the folder is not a complete weights folder, there is no login, or the upload fails.
    """
    import huggingface_hub

    folder = user_path(folder)
    place = Location.parse(f"{HUB}{repository.removeprefix(HUB)}")
    if place.path or place.revision:
        raise UserError(f"{repository!r}: give OWNER/NAME, without a path or a revision")
    files = files_of(folder)
    api = huggingface_hub.HfApi()
    with one_line(place):
        api.whoami()  # raises without a login, before anything is made
        api.create_repo(place.repository, private=private, exist_ok=True)
        if (folder / CARD).is_file():
            files[CARD] = folder / CARD
        elif not _has_own_card(api, place.repository):
            files[CARD] = card(folder, place.repository, licence).encode()
        commit = api.create_commit(
            place.repository,
            [huggingface_hub.CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message="Upload weights of lavie_jax",
        )
    return str(Location(place.repository, commit.oid))


def _has_own_card(api: Any, repository: str) -> bool:
    """Whether the repository has a README.md that this module did not write."""
    if not api.file_exists(repository, CARD):
        return False
    return MARK not in Path(api.hf_hub_download(repository, CARD)).read_text(encoding="utf-8")


def stages_in(folder: Path) -> dict[str, Path]:
    """Returns {name in the repository: weights folder} of a weights folder ("") or of a cascade (its stages).

    Raises:
        UserError: there is none, or one is incomplete or damaged.
    """
    found = {stage: folder / stage for stage in STAGES if (folder / stage / "config.json").is_file()}
    if not found or (folder / "config.json").is_file():
        found = {"": folder}
    for path in found.values():
        load_folder(path)
    return found


def files_of(folder: Path) -> dict[str, Path | bytes]:
    """Returns the files to upload, {name in the repository: file or content}; see `stages_in` for errors.

    A part that a stage shares with another one in `folder` stays shared; parts outside are included.
    """
    files: dict[str, Path | bytes] = {}
    for name, path in stages_in(folder).items():
        config = read_config(path)
        inside = {}
        for part in CONTENTS[config["stage"]]:
            where = part_dir(path, part).resolve()
            if where.is_relative_to(folder.resolve()):
                target = where.relative_to(folder.resolve()).as_posix()
                if part in config.get("parts", {}):
                    inside[part] = config["parts"][part]
            else:
                target = f"{name}/{part}".lstrip("/")
            for file in sorted(where.rglob("*")):
                local = file.relative_to(where)
                if file.is_file() and not any(step.startswith(".") for step in local.parts):
                    files[f"{target}/{local.as_posix()}"] = file
        content = {k: v for k, v in read_json(path / "config.json").items() if k != "parts"}
        content |= {"parts": inside} if inside else {}
        files[f"{name}/config.json".lstrip("/")] = (json.dumps(content, indent=2) + "\n").encode()
    return files


def card(folder: Path, repository: str, licence: str) -> str:
    """Returns the model card of a weights folder: how to load it, contents, training and licence."""
    location, stages = f"{HUB}{repository}", stages_in(folder)
    header = ("stage", "parameters", "default clip", "sampling", "SHA-256 of the folder")
    rows = [_row(path) for path in stages.values()]
    return f"""---
license: {licence}
library_name: lavie_jax
pipeline_tag: text-to-video
tags:
- lavie
- jax
- flax
---
{MARK}

# {repository.rpartition("/")[2]}

Weights of [LaVie](https://arxiv.org/abs/2309.15103) for lavie_jax, its implementation in JAX: text to video.

## Use

With lavie_jax installed:

```
lavie-sample --weights {location} --stages {",".join(row[0] for row in rows)} --prompt "a prompt"
```

```python
import lavie_jax

cascade = lavie_jax.load("{location}")
video = cascade("a prompt", stages="{",".join(row[0] for row in rows)}", seed=0)  # uint8 (1, T, H, W, 3)
lavie_jax.save_video(video, "out.mp4", fps=8)
```

`{location}@COMMIT` selects a commit. Samples record the commit and the SHA-256 below.

## Contents

{markdown(header, rows)}

## Training

{_training(folder, stages)}

## Limits and licence

The licence is {licence}, as stated by who published the weights; weights made from others keep the terms of those.
Nothing filters prompts or results. Videos carry metadata that says that they are generated.
"""


def _row(path: Path) -> tuple[str, ...]:
    """The row of a weights folder in the card's table."""
    weights = load_folder(path, params=False)
    counts = []
    for part in PARTS:
        if getattr(weights, part) is not None:
            tensors = read_part(path, part)[1]
            total = sum(math.prod(t.shape) for name, t in tensors.items() if not is_buffer(name))
            kinds = ", ".join(sorted({t.dtype.name for t in tensors.values()}))
            counts.append(f"{part} {total / 1e6:.2f} M ({kinds})")
    own = weights.sampling
    clip = (
        f"{own['frames']} x {own['height']} x {own['width']}, {own['fps']:g} fps"
        if {"frames", "fps"} <= {*own}
        else "-"
    )
    words = [f"{name} {own[name]}" for name in ("sampler", "steps", "guidance") if name in own]
    return weights.stage, "; ".join(counts), clip or "-", ", ".join(words) or "-", f"`{folder_hash(path)}`"


def _training(folder: Path, stages: Mapping[str, Path]) -> str:
    """Returns what is known of the training: the record beside the folder of a run, or the files of a conversion."""
    metadata = sorted(
        folder.parent.glob("checkpoints/[0-9]*/meta/metadata"), key=lambda file: int(file.parents[1].name)
    )
    if metadata and "" in stages:
        return _run(read_json(metadata[-1]), folder.parent / "metrics.jsonl")
    converted = [
        f"* {name or read_config(path)['stage']}: converted from {' and '.join(f'`{text}`' for text in made.values())}"
        for name, path in stages.items()
        if (path / SOURCES).is_file() and (made := read_json(path / SOURCES))
    ]
    return "\n".join(converted) or "Not recorded in the folder that was published."


def _run(meta: Mapping[str, Any], metrics: Path) -> str:
    """Returns fields of a run's config, and its last held-out losses."""
    rows = [("step", f"{meta['step']}")]
    for field in SHOWN:
        value: Any = meta["config"]
        for name in field.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value not in (None, "", ()):
            rows.append((f"`{field}`", f"{value}"))
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    measured = {name: (line["step"], value) for line in lines for name, value in line.items() if "held_out/" in name}
    rows += [(name, f"{value:.4g} at step {step}") for name, (step, value) in measured.items()]
    text = "Trained with lavie_jax; losses are of its EMA on held-out batches with fixed noise."
    return f"{text}\n\n{markdown(('field', 'value'), rows)}"
