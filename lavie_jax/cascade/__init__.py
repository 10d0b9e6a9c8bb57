"""Text to video through the stages of LaVie (arXiv 2309.15103), for users of the library: `load` and `Cascade`.

    base            prompt                        -> key frames                   sec. 3.1
    interpolation   prompt + key frames           -> 4 (K - 1) + 1 frames         sec. 3.3
    vsr             prompt + low-resolution clip  -> the clip at 4 times the size sec. 3.4

The stages are defined in `lavie_jax/stages/`. This package contains what they share: `running.py` runs a stage for many
samples, `denoising.py` denoises latents in windows, `model.py` holds the networks on the devices.

One stage's weights are on the devices at a time, and all samples go through a stage before the next one begins. A
sample depends on its prompt, seed and settings: noise is keyed by the seed, so that batch and devices change a sample
only within rounding.
"""

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import UInt8

import lavie_jax
from lavie_jax import parallel
from lavie_jax.cascade.dtypes import compute_dtype as compute_dtype
from lavie_jax.cascade.dtypes import without_copies as without_copies
from lavie_jax.cascade.known import check_known, fitting_notes
from lavie_jax.cascade.known import given_frames as given_frames
from lavie_jax.cascade.model import StageModel
from lavie_jax.cascade.personal import Personal
from lavie_jax.cascade.prompts import check_texts as check_texts
from lavie_jax.cascade.prompts import stage_prompts
from lavie_jax.cascade.resolving import no_weights, padding_notes, resolve_settings
from lavie_jax.cascade.running import Progress, Request, Sample, run_stage
from lavie_jax.errors import UserError
from lavie_jax.estimate import sampling_warnings
from lavie_jax.samples.prompt_syntax import CUT, PLAIN, Reading
from lavie_jax.samples.prompts import check_seed
from lavie_jax.samples.safety import SafetyFilter, withheld
from lavie_jax.samples.stage_cache import MemoryCache
from lavie_jax.samples.videos import Videos
from lavie_jax.stages import STAGES
from lavie_jax.stages.clips import ClipInfo
from lavie_jax.stages.settings import MAIN_STAGE, OFFICIAL, STAGE_INFO, Settings, parse_stages
from lavie_jax.stages.stage import Known
from lavie_jax.weights import Weights, load_folder
from lavie_jax.weights.locations import local_folder, record

REPR_FIELDS = ("frames", "height", "width", "fps", "sampler", "steps")
SHIPPED = Path(__file__).parents[1] / "assets"
BY_NAME = ("film", "base-distilled")  # shipped models that are not the default: folders in SHIPPED


# ---- weights ----


def load(
    path: str | os.PathLike | None = None,
    *,
    stages: Sequence[str] | None = None,
    folders: Mapping[str, str | os.PathLike] | None = None,
    dtype: DTypeLike | None = None,
    devices: Sequence[jax.Device] | None = None,
    fsdp: int = 1,
    loras: Iterable[Any] = (),
    embeddings: Iterable[Any] = (),
) -> "Cascade":
    """Loads the stages in a weights folder.

        load("weights", loras=["style.safetensors", ("subject.safetensors", 0.8)], embeddings=["cat.safetensors"])

    Args:
        path: a stage's folder, or a cascade's, with some of `base/ prediction/ interpolation/ vsr/` inside, or
            `hub:OWNER/NAME[@REVISION]` for either on the Hugging Face hub (docs/hub.md), or the name of a shipped model
            (`BY_NAME`). Default, without paths in `folders`: the small cascade that is shipped with the package.
        stages: the stages to load. Default: all in the folder.
        folders: {stage: folder} for stages whose weights are elsewhere.
        dtype: of parameters and computation: "float32", "bfloat16" or "auto", see `dtypes.default_dtype`.
        devices: the devices that share samples and windows. Default: all of this process.
        fsdp: the number of devices that each weight is split over, for models too large for one device.
        loras: LoRA files of Stable Diffusion 1.x, each a path or (path, scale). They are merged, in this order, into
            the stages that take them: not into super-resolution.
        embeddings: textual inversions, each a path or (path, word).

    Raises:
        UserError: a folder is missing, incomplete, damaged or of another stage; the hub cannot be reached, or does not
            have the repository or the revision; a stage has no weights; `fsdp` does
            not divide the devices; the dtype is unknown; a LoRA or embedding belongs to another model.
    """
    _mesh(devices, fsdp)  # raises before anything is read
    personal = Personal.read(loras, embeddings)
    available = stage_folders(path, folders, stages)
    for stage in stages or ():
        if stage not in available:
            raise no_weights(stage, available)
    weights = {stage: load_folder(available[stage], stage=stage) for stage in stages or available}
    weights, notes = personal.apply(weights)
    for line in notes:
        logging.warning("%s", line)
    return Cascade(weights, dtype=dtype, devices=devices, fsdp=fsdp)


def _mesh(devices: Sequence[jax.Device] | None, fsdp: int) -> Mesh:
    return parallel.make_mesh(fsdp=fsdp, devices=parallel.local_devices() if devices is None else devices)


def stage_folders(
    path: str | os.PathLike | None = None,
    folders: Mapping[str, str | os.PathLike] | None = None,
    stages: Sequence[str] | None = None,
) -> dict[str, Path]:
    """Returns {stage: folder} of a weights folder, overridden by `folders`; see `load`.

    If `stages` contains one stage, the folder of a single stage is assumed to be of that stage; loading checks it.
    Shipped models are found by name. If `folders` names shipped models only, the other stages are shipped models too.
    """
    if path is None and all(_by_name(folder) != folder for folder in (folders or {}).values()):
        path = SHIPPED
    available = {}
    if path is not None:
        path = local_folder(_by_name(path), stages)
        available = {stage: path / stage for stage in STAGES if (path / stage / "config.json").exists()}
        if path == SHIPPED and not available:
            raise UserError(f"no model is shipped in {path}: give a weights folder with --weights")
        if (path / "config.json").exists() or not available:
            stage = stages[0] if stages and len(stages) == 1 else load_folder(path, params=False).stage
            if stage not in STAGES:
                raise UserError(f"{path} contains a {stage}, not a stage that makes videos ({', '.join(STAGES)})")
            available = {stage: path}
    available |= {stage: local_folder(_by_name(folder), (stage,)) for stage, folder in (folders or {}).items()}
    return {stage: available[stage] for stage in STAGES if stage in available}


def _by_name(path: str | os.PathLike) -> str | os.PathLike:
    """Returns the folder of a shipped model that is given by its name, and other paths as they are."""
    return SHIPPED / path if os.fspath(path) in BY_NAME and not os.path.lexists(path) else path


def stage_folder(path: str | os.PathLike | None, stage: str) -> Path:
    """Returns a stage's folder, inside `path` or among the shipped models. Raises UserError if there is none."""
    available = stage_folders(path, stages=(stage,))
    if stage not in available:
        raise no_weights(stage, available)
    return available[stage]


class Cascade:
    """Generates videos from prompts, or from clips, with the stages whose weights it holds."""

    def __init__(
        self,
        weights: Mapping[str, Weights],
        *,
        dtype: DTypeLike | None = None,
        devices: Sequence[jax.Device] | None = None,
        fsdp: int = 1,
    ):
        """Takes loaded weights, {stage: weights}; `dtype`, `devices` and `fsdp` as in `load`."""
        self.weights = dict(weights)
        self.mesh = _mesh(devices, fsdp)
        self.devices = list(self.mesh.devices.flat)
        self.dtype = compute_dtype(dtype, self.devices, self.weights.values())
        self._model = None

    def __repr__(self) -> str:
        lines = [f"Cascade({len(self.weights)} stages, {self.dtype.name}, {parallel.describe(self.mesh)})"]
        for stage, loaded in self.weights.items():
            own = {name: loaded.sampling.get(name, "?") for name in REPR_FIELDS}
            clip = "{frames} frames of {height}x{width} at {fps} fps, {sampler}, {steps} steps".format(**own)
            lines.append(f"  {stage}: {clip}; {record('weights', loaded.path)['weights']}")
        return "\n".join(lines)

    def model(self, stage: str) -> StageModel:
        """Returns a stage's networks on the devices. They replace the previous stage's: small devices hold only one."""
        if self._model is None or self._model.weights.stage != stage:
            self._model = None
            self._model = StageModel(self.weights[stage], dtype=self.dtype, mesh=self.mesh)
        return self._model

    @property
    def base(self) -> StageModel:
        """The base stage on the devices."""
        return self.model("base")

    def made_with(self) -> dict[str, str]:
        """Library versions, dtype and hardware, for the JSON files of samples."""
        versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
        return {
            "lavie_jax": lavie_jax.__version__,
            "python": platform.python_version(),
            **versions,
            "dtype": self.dtype.name,
            "device": self.devices[0].device_kind,
        }

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompts_at: Mapping[int, str] | Sequence[Mapping[int, str]] | None = None,
        stages: str | Sequence[str] = (MAIN_STAGE,),
        seed: int | Sequence[int] = 0,
        negative_prompt: str | Sequence[str] | None = None,
        clip: UInt8[np.ndarray, "frames h w 3"] | None = None,
        known: Known | None = None,
        preset: str = OFFICIAL,
        prompt_syntax: str = PLAIN,
        long_prompts: str = CUT,
        safety_filter: SafetyFilter | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> UInt8[np.ndarray, "b t H W 3"]:
        """Samples videos, (B, T, H, W, 3) uint8, with the attribute `fps` and the method `save` (`Videos`).

            video = cascade("a red circle moving left", stages="base,vsr", steps=20, vsr={"steps": 10})
            video.save("out.mp4")

        Args:
            prompt: one for all samples, or one for each of B samples; the same holds for `seed` and `negative_prompt`.
            prompts_at: several prompts over time instead of one, `{0: "a red circle", 32: "a blue circle"}`, or a list
                of such; the text changes linearly between these frames of the first stage's clip.
            stages: the stages to run, in order.
            seed: from 0 to 2^32 - 1.
            negative_prompt: for the base stage; other stages take it as a setting.
            clip: the clip that the first stage starts from: one that a later stage than base continues, or that base
                makes anew, given `strength`.
            known: pictures that are frames of the prediction stage's output, {index: uint8 (H, W, 3)}, of any size.
            preset: "official", the weights folders' own settings, or "balanced" or "fast", which save work
                (docs/speed.md). Settings that are given come before those of a preset.
            prompt_syntax: "weighted" reads `(word:1.3)` and `[word]` in prompts, "plain" takes brackets as text.
            long_prompts: "chunk" reads prompts longer than CLIP's window in several windows, "cut" ignores the rest.
            safety_filter: called with each video, uint8 (T, H, W, 3); where it returns True, the frames are black, such
                as `lavie_jax.samples.safety.open_nsfw`.
            batch_size: see `videos`.
            progress: whether to show a progress bar for each stage.
            settings: of the base stage by name (`frames`, `steps`, ...; see `BaseSettings` in `stages/settings.py`), of
                another stage as a mapping under its name. Omitted settings default to the weights folder's
                config.json. `frames=1` makes images by the joint model's image path, without temporal attention.

        Raises:
            UserError: a setting is unknown, out of range or impossible for this model; lists differ in length; stages
                are in an impossible order or without weights.
        """
        stages = parse_stages(stages, own_clip=clip is not None)
        others = {name: values for name, values in settings.items() if name in STAGE_INFO}
        given = others | {MAIN_STAGE: {name: v for name, v in settings.items() if name not in STAGE_INFO}}
        clip_info = None if clip is None else _info_of(clip)
        resolved = resolve_settings(self.weights, stages, given, clip_info, preset)
        if negative_prompt is not None and MAIN_STAGE not in stages:
            raise UserError(
                f"negative_prompt belongs to the stage {MAIN_STAGE}, which is not run; for {stages[0]}: "
                f'{stages[0]}={{"negative_prompt": ...}}'
            )
        if (prompt is None) == (prompts_at is None):
            raise UserError("give either a prompt or prompts_at")
        known, reading = {} if known is None else known, Reading(prompt_syntax, long_prompts)
        check_known(resolved, clip_info, known)
        aligned = _aligned(prompt=prompt, prompts_at=prompts_at, seed=seed, negative_prompt=negative_prompt)
        requests = [
            Request.make(
                text, at, resolved[stages[0]].output_frames, seed=check_seed(number), negative_prompt=other,
                known=known, reading=reading,
            )
            for text, at, number, other in aligned
        ]  # fmt: skip
        for line in self._notes(requests, resolved, clip_info, known, reading):
            logging.warning("%s", line)
        videos = self.videos(requests, resolved, clip=clip, batch_size=batch_size, progress=progress)
        frames = np.stack([withheld(own) if safety_filter and safety_filter(own) else own for own in videos])
        known_rate = clip is None or getattr(clip, "fps", None) is not None
        return Videos.of(frames, resolved[stages[-1]].fps if known_rate else None)

    def _notes(
        self,
        requests: Sequence[Request],
        settings: Mapping[str, Settings],
        clip: ClipInfo | None,
        known: Known,
        reading: Reading,
    ) -> list[str]:
        """Warnings about what will not be as people may expect. Raises UserError for texts that cannot be read."""
        prompts = [stage_prompts(settings, request.prompt, request.prompts_at) for request in requests]
        negatives = [request.negative_prompt for request in requests]
        lines = padding_notes(self.weights, settings, clip) + fitting_notes(settings, clip, known)
        lines += sampling_warnings(self.weights, settings, self.devices[0].platform)
        return lines + check_texts(self.weights, settings, prompts, negatives, reading)

    def videos(
        self,
        requests: Sequence[Request],
        settings: Mapping[str, Settings],
        *,
        clip: UInt8[np.ndarray, "frames h w 3"] | None = None,
        caches: Sequence[MemoryCache] | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> Iterator[UInt8[np.ndarray, "t H W 3"]]:
        """Yields the requested videos in order, as soon as the last stage finishes each.

        Args:
            requests: one for each video.
            settings: {stage: settings} of the stages to run, from `resolve_settings`.
            clip: the clip that the first stage starts from, if it needs one.
            caches: one for each request; they store the stages' outputs, which are not computed again.
            batch_size: how many samples a stage with small clips denoises together, rounded up to a multiple of the
                devices. Default: one per device.
            progress: whether to show a progress bar for each stage.
            on_progress: called with a `Progress` before the first step of a stage, after each one and after each piece
                of decoded frames. What it raises stops the sampling; states that are in the caches remain.
        """
        videos = self._videos(requests, settings, clip, caches, batch_size, progress, on_progress)
        while True:
            with parallel.usual_config():
                video = next(videos, None)
            if video is None:
                return
            yield video

    def _videos(
        self,
        requests: Sequence[Request],
        settings: Mapping[str, Settings],
        clip: UInt8[np.ndarray, "frames h w 3"] | None,
        caches: Sequence[MemoryCache] | None,
        batch_size: int | None,
        progress: bool,
        on_progress: Callable[[Progress], None],
    ) -> Iterator[UInt8[np.ndarray, "t H W 3"]]:
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        samples = [
            Sample(request, cache, clip, next(iter(settings.values())).output_frames)
            for request, cache in zip(requests, caches or [MemoryCache() for _ in requests])
        ]
        prompts = {s: stage_prompts(settings, s.request.prompt, s.request.prompts_at) for s in samples}
        *first, last = settings
        for number, stage in enumerate(first, start=1):
            later = list(settings)[number:]
            for sample in samples:  # the output of a later stage may be cached already
                sample.needed = all(sample.cache.get(name) is None for name in later)
                sample.prompts = prompts[sample][stage]
            finished = self._stage(stage, samples, settings[stage], batch_size, progress, on_progress)
            for sample, _ in zip(samples, finished):
                sample.previous = stage
        for sample in samples:
            sample.needed, sample.prompts = True, prompts[sample][last]
        yield from self._stage(last, samples, settings[last], batch_size, progress, on_progress)

    def _stage(
        self,
        stage: str,
        samples: Sequence[Sample],
        settings: Settings,
        batch_size: int | None,
        progress: bool,
        on_progress: Callable[[Progress], None],
    ) -> Iterator[UInt8[np.ndarray, "t H W 3"] | None]:
        """Yields a stage's output for every sample: cached, or computed now; None if no later stage needs it."""
        missing = [sample for sample in samples if sample.needed and sample.cache.get(stage) is None]
        outputs = iter(())
        if missing:
            outputs = run_stage(self.model(stage), settings, missing, batch_size, progress, on_progress)
        for sample in samples:
            yield next(outputs) if sample in missing else sample.cache.get(stage)


# ---- arguments ----


def _check_clip(clip: np.ndarray) -> None:
    if not hasattr(clip, "dtype"):
        raise UserError(f"clip must be uint8 of shape (frames, H, W, 3), not a {type(clip).__name__}")
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or not clip.size:
        raise UserError(f"clip must be uint8 of shape (frames, H, W, 3), not {clip.dtype} of {clip.shape}")


def _info_of(clip: np.ndarray) -> ClipInfo:
    """Describes the user's clip. Raises UserError if it is not one."""
    _check_clip(clip)
    fps = getattr(clip, "fps", None) or 24  # only the result's own frame rate follows from it
    return ClipInfo(frames=len(clip), height=clip.shape[1], width=clip.shape[2], fps=fps, own=True)


def _aligned(**values: object) -> Iterable[tuple]:
    """Returns one tuple for each sample: the entries of lists, and single values repeated."""
    many = {n: v for n, v in values.items() if isinstance(v, Sequence | np.ndarray) and not isinstance(v, str)}
    lists = {n: list(v) for n, v in many.items()}
    lengths = {n: len(v) for n, v in lists.items()}
    count = max(lengths.values(), default=1)
    if 0 in lengths.values() or any(n != count for n in lengths.values()):
        raise UserError(f"lists must be of equal length, at least 1, not {lengths}")
    return zip(*(lists.get(n, [v] * count) for n, v in values.items()))
