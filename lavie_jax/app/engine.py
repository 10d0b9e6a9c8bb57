"""The models of the server: they make the videos of one job at a time, and stay on the device between jobs."""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8

from lavie_jax import cascade
from lavie_jax.app import generation
from lavie_jax.app.generation import Generation
from lavie_jax.app.jobs import Stopped
from lavie_jax.app.progress import TimeLeft
from lavie_jax.app.store import Job, Result, Store
from lavie_jax.cascade.personal import Personal
from lavie_jax.cascade.running import Progress, Request
from lavie_jax.data.tokens import known_words, load_tokenizer
from lavie_jax.data.video_files import read_clip
from lavie_jax.disk import file_hash
from lavie_jax.errors import UserError
from lavie_jax.estimate import sampling_flops, sampling_warnings
from lavie_jax.parallel import keep_compiled_programs, local_devices, split_cpu
from lavie_jax.program_cache import free_programs
from lavie_jax.samples.outputs import Output, make_request, up_to
from lavie_jax.samples.pictures import by_frame, read_pictures
from lavie_jax.samples.safety import SafetyFilter, withheld
from lavie_jax.samples.signing import Certificate
from lavie_jax.samples.stage_cache import StageCache
from lavie_jax.stages.clips import ClipInfo, free_memory
from lavie_jax.stages.settings import AUTO, STAGE_INFO, Settings
from lavie_jax.stages.stage import Known
from lavie_jax.weights import Weights, folder_hash, load_folder

MAX_PROGRAMS = 64  # kinds of videos whose compiled programs are kept in memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A job, checked against the weights.

    Attributes:
        settings: {stage: settings} of the stages to run.
        request: everything that determines the video (`samples.outputs.make_request`).
        frames: those of the clip that the first stage starts from.
        known: given pictures by their frame.
        personal: LoRA files and embeddings.
        notes: warnings.
        flops: {stage: estimated FLOPs}.
    """

    settings: Mapping[str, Settings]
    request: Mapping[str, Any]
    frames: UInt8[np.ndarray, "t h w 3"] | None
    known: Known
    personal: Personal
    notes: list[str]
    flops: Mapping[str, float]


class WatchedCache(StageCache):
    """A cache on disk that reports each stage that is finished."""

    def __init__(self, cache: StageCache, on_stage: Callable[[str, np.ndarray], None]):
        super().__init__(cache.folder, cache.records, keep=False)
        self._on_stage = on_stage

    def put(
        self, stage: str, shape: tuple[int, ...], pieces: Iterable[UInt8[np.ndarray, "n h w 3"]]
    ) -> UInt8[np.ndarray, "t h w 3"]:
        """Writes frames as they arrive; see `StageCache`."""
        frames = super().put(stage, shape, pieces)
        if stage in self.records:  # and not a segment
            self._on_stage(stage, frames)
        return frames


class Engine:
    """Makes videos with the stages of a weights folder.

    Attributes:
        folders: {stage: weights folder}.
        headers: {stage: weights without parameters}.
    """

    def __init__(
        self,
        store: Store,
        *,
        weights: str | Path | None = None,
        folders: Mapping[str, str | Path] | None = None,
        most_pixels: float = float("inf"),
        fsdp: int = 1,
        dtype: str = AUTO,
        certificate: Certificate | None = None,
        unsafe: SafetyFilter | None = None,
    ):
        """Finds devices and weights. Parameters are loaded when they are first needed.

        Args:
            store: where the files of jobs are.
            weights: see `cascade.load`; default: the shipped models.
            folders: {stage: folder} of weights that are elsewhere.
            most_pixels: the most pixels that a video may have, in all frames of its last stage.
            fsdp: number of devices that each weight is split over.
            dtype: see `cascade.load`.
            certificate: signs the videos; None for none.
            unsafe: filter of the video of each stage; frames of those for which it returns True are black.

        Raises:
            UserError: there is no device, or a folder is missing or incomplete.
        """
        keep_compiled_programs()
        split = split_cpu()
        self.devices = local_devices()
        self.store, self.most_pixels, self.fsdp = store, most_pixels, fsdp
        self.certificate, self.unsafe = certificate, unsafe
        self.folders = cascade.stage_folders(weights, folders)
        self.headers = {stage: load_folder(path, stage=stage, params=False) for stage, path in self.folders.items()}
        if split:
            self.devices = cascade.without_copies(self.devices, self.headers.values())
        self.dtype = cascade.compute_dtype(dtype, self.devices, self.headers.values())
        self.rates: dict[str, float] = {}
        self._planning = threading.Lock()  # one clip at a time is in memory, and weights are hashed once
        self._loaded: dict[str, Weights] = {}
        self._cascade: tuple[Any, cascade.Cascade] | None = None  # what is merged into the weights, and the models
        self._programs: set = set()

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """{stage: SHA-256 of its weights}."""
        return {stage: folder_hash(path) for stage, path in self.folders.items()}

    @functools.cached_property
    def words(self) -> list[str]:
        """The vocabulary of small models; [] of models that know every word."""
        header = next(iter(self.headers.values()))
        return list(known_words(load_tokenizer(header.tokenizer_dir, header.new_words)) or ())

    # ---- before a job is accepted ----

    def plan(self, wanted: Generation, inputs: Path) -> Plan:
        """Checks everything that does not need parameters.

        Raises:
            UserError: something is impossible. Neither it nor notes say where files are on this machine.
        """
        try:
            with self._planning:
                plan = self._plan(wanted, inputs)
        except UserError as error:
            raise UserError(self._without_paths(str(error), inputs)) from None
        return dataclasses.replace(plan, notes=[self._without_paths(note, inputs) for note in plan.notes])

    def _without_paths(self, message: str, inputs: Path) -> str:
        message = message.replace(f"{inputs}/", "")
        for stage, folder in self.folders.items():
            message = message.replace(str(folder), f"the weights of {stage}")
        return message

    def _plan(self, wanted: Generation, inputs: Path) -> Plan:
        """See `plan`; `inputs` has the uploaded files."""
        wanted = generation.check(wanted)
        stages, own_clip = wanted.stages, wanted.clip is not None
        pictures = read_pictures(
            {name: inputs / file for name, file in wanted.pictures.items()}, stages, own_clip=own_clip
        )
        personal = Personal.read(
            [(inputs / file, scale) for file, scale in wanted.loras],
            [(inputs / file, word) for file, word in wanted.embeddings],
        )
        available = {stage: self.headers[stage] for stage in stages if stage in self.headers}
        weights, notes = personal.apply(available)
        frames, clip, clip_hash = self._clip(inputs / wanted.clip, notes) if wanted.clip is not None else (None,) * 3
        settings = cascade.resolve_settings(weights, stages, wanted.settings, clip, wanted.preset)
        self._check_size(settings)
        taker = next((own for stage, own in settings.items() if STAGE_INFO[stage].takes_known), None)
        given = by_frame(pictures, taker.output_frames) if taker else {}
        known = {frame: picture.pixels for frame, picture in given.items()}
        cascade.check_known(settings, clip, known)
        prompts = cascade.stage_prompts(settings, wanted.prompt, wanted.prompts_at)
        Request.make(
            None if wanted.prompts_at else wanted.prompt, wanted.prompts_at, settings[stages[0]].output_frames,
            seed=wanted.seed,
        )  # fmt: skip
        hashes = {stage: self.hashes[stage] for stage in settings}
        for stage, hash in wanted.weights.items():
            if stage in hashes and hash != hashes[stage]:
                raise UserError(
                    f"The video was made with other weights of the stage {stage}: it cannot be made again here. Leave "
                    "out weights_sha256 to make a similar one."
                )
        names = {frame: f"The {'first' if frame == 0 else 'last'} frame" for frame in given}
        notes = notes + cascade.padding_notes(weights, settings, clip)
        notes += cascade.fitting_notes(settings, clip, known, names)
        notes += sampling_warnings(weights, settings, self.devices[0].platform)
        notes += cascade.check_texts(weights, settings, [prompts], [None], wanted.reading)
        request = make_request(
            wanted.prompt, wanted.seed, settings, hashes, prompts_at=wanted.prompts_at, clip_hash=clip_hash,
            known_hashes={frame: picture.sha256 for frame, picture in given.items()}, reading=wanted.reading,
        )  # fmt: skip
        return Plan(
            settings=settings, request=request | personal.record(), frames=frames, known=known, personal=personal,
            notes=list(dict.fromkeys(notes)), flops=sampling_flops(weights, settings),
        )  # fmt: skip

    def _clip(self, path: Path, notes: list[str]) -> tuple[np.ndarray, ClipInfo, str]:
        most = min(free_memory() / 4, 3 * self.most_pixels)
        frames, fps = read_clip(path, max_bytes=most, warn=notes.append)
        clip = ClipInfo(frames=len(frames), height=frames.shape[1], width=frames.shape[2], fps=fps, own=True)
        return frames, clip, file_hash(path)

    def _check_size(self, settings: Mapping[str, Settings]) -> None:
        for own in settings.values():
            pixels = own.output_frames * own.height * own.width
            if pixels > self.most_pixels:
                raise UserError(
                    f"{own.output_frames} frames of {own.height}x{own.width} are {pixels / 1e6:.0f} million pixels, "
                    f"where at most {self.most_pixels / 1e6:.0f} million are allowed: make fewer or smaller frames."
                )

    # ---- a job ----

    def run(self, job: Job, check: Callable[[Job], None]) -> None:
        """Makes the video of a job, and updates its progress and its results.

        Args:
            job: the job.
            check: called between steps; what it raises ends the job.

        Raises:
            UserError: the job is impossible.
        """
        folder = self.store.folder_of(job.id)
        job.stage, job.phase = None, "loading"
        plan = self.plan(Generation.from_json(job.generation), folder / "inputs")
        job.notes = list(dict.fromkeys([*plan.notes, *job.notes]))  # a withheld stage was noted before a restart
        check(job)
        pipe = self._models(plan)
        left = TimeLeft(plan.flops, self.rates)

        def on_progress(progress: Progress) -> None:
            """Shows the step in the job; raises `Stopped` if the work is to end."""
            first = job.stage != progress.stage  # the step that follows may compile
            job.stage, job.phase = progress.stage, "preparing" if first else progress.phase
            if progress.phase == "denoising":
                left.update(progress.stage, progress.done, progress.total, time.monotonic())
                job.share, job.seconds_left = left.share, left.seconds
            check(job)

        def on_stage(stage: str, frames: np.ndarray) -> None:
            """Writes the video of a finished stage, uint8 (T, H, W, 3), and adds it to the job."""
            if job.result(stage) is None:
                made_with = pipe.made_with()
                if self.unsafe is not None and self.unsafe(frames):
                    job.notes = [*job.notes, f"The safety filter withholds the video of {stage}: its frames are black."]
                    frames, made_with = withheld(frames), {**made_with, "withheld": True}
                output = _output(folder / stage, up_to(plan.request, stage), frames, self.certificate)
                (video,) = output.write(frames, output.formats, made_with)
                paths = (str(path.relative_to(folder)) for path in (video, output.path("json")))
                job.results = [*job.results, Result(stage, *paths)]
                self.store.save(job)

        whole = Output(folder=folder, index=0, formats=(), request=plan.request)
        cache = WatchedCache(whole.cache(pipe.dtype.name), on_stage)
        try:
            cache.check()
        except UserError as error:  # the server was ended, and started with other weights
            logging.warning("job %s is begun anew: %s", job.id, error)
            cache.remove()
            job.results = []
        request = Request.stored(plan.request, known=plan.known)
        try:
            for _ in pipe.videos([request], plan.settings, clip=plan.frames, caches=[cache], on_progress=on_progress):
                for stage in plan.settings:  # also those that an earlier run finished, but did not store
                    on_stage(stage, cache.get(stage))
        except Stopped:
            if job.stop.is_set():
                cache.remove()
            raise
        cache.remove()

    def _models(self, plan: Plan) -> cascade.Cascade:
        """Returns the models of a job. The same weights stay on the device; others replace them."""
        for stage in plan.settings:
            if stage not in self._loaded:
                self._loaded[stage] = load_folder(self.folders[stage], stage=stage)
        key = plan.personal.record()
        if self._cascade is None or self._cascade[0] != key:
            self._cascade = None  # frees the device first
            self._cascade = key, cascade.Cascade({}, dtype=self.dtype, devices=self.devices, fsdp=self.fsdp)
        pipe = self._cascade[1]
        if not set(plan.settings) <= set(pipe.weights):
            merged, _ = plan.personal.apply({stage: self._loaded[stage] for stage in plan.settings})
            pipe.weights = merged | pipe.weights
        kinds = {s: dataclasses.replace(own, negative_prompt="", prompt_suffix="") for s, own in plan.settings.items()}
        self._programs.add(repr(kinds))
        if len(self._programs) > MAX_PROGRAMS:
            self._programs.clear()
            free_programs()
        return pipe


def _output(folder: Path, request: Mapping[str, Any], frames: np.ndarray, certificate: Certificate | None) -> Output:
    """The files of one stage's video, in a format that browsers show."""
    odd = frames.shape[1] % 2 or frames.shape[2] % 2
    format = "png" if len(frames) == 1 else "gif" if odd else "mp4"
    return Output(folder=folder, index=0, formats=(format,), request=request, certificate=certificate)
