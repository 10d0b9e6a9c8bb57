"""Runs one stage for many samples: prepare, denoise, decode, finish. Resumes the work of an interrupted run.

Segments of a long video are generated one after the other, each from the frames of the one before, as they are stored
in the cache. Memory therefore holds the latents of one segment.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm.auto import tqdm

from lavie_jax.cascade.denoising import Clip, DenoisingPlan, denoise
from lavie_jax.cascade.model import StageModel
from lavie_jax.cascade.prompts import Parts, prompt_of
from lavie_jax.diffusion import make_sampler
from lavie_jax.errors import UserError
from lavie_jax.samples.prompt_syntax import AS_IS, Reading
from lavie_jax.samples.prompts import check_prompts_at, check_unicode, check_within, one_line
from lavie_jax.samples.stage_cache import MemoryCache, segment_name
from lavie_jax.stages.conditioning import Prompts, travel_weights
from lavie_jax.stages.settings import Settings
from lavie_jax.stages.stage import Known, Segment, Stage, feature_cache_of, guidance_of
from lavie_jax.stages.windows import Window

ONLY = Segment()  # the segment of a stage that has one


class Progress(NamedTuple):
    """How far a stage has come.

    Attributes:
        stage: name of the stage.
        phase: "denoising" or "decoding".
        done: finished steps, windows or frames of the phase.
        total: all of them.
    """

    stage: str
    phase: str
    done: int
    total: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A sample to generate.

    Attributes:
        prompt: the prompt; for a stage with segments, prompts that are separated by "|".
        seed: from 0 to 2^32 - 1.
        negative_prompt: replaces the setting of the main stage.
        known: pictures of any size that are given as frames of the clip, by their index.
        prompts_at: prompts over time, {frame of the first stage's output: prompt}, which `prompt` has in one line.
        reading: how all prompts are read.
    """

    prompt: str
    seed: int
    negative_prompt: str | None = None
    known: Known = dataclasses.field(default_factory=dict)
    prompts_at: Mapping[int, str] | None = None
    reading: Reading = AS_IS

    @classmethod
    def make(cls, prompt: str | None, prompts_at: Any, frames: int, **fields: Any) -> "Request":
        """Returns a request with a prompt or prompts over time.

        Raises:
            UserError: a clip of `frames` is too short, or a prompt is not text.
        """
        if (negative := fields.get("negative_prompt")) is not None:
            check_unicode(negative, "negative_prompt")
        if prompt is not None:
            check_unicode(prompt, "prompt")
            return cls(prompt=prompt, **fields)
        prompts_at = check_prompts_at(prompts_at)
        check_within(prompts_at, frames)
        return cls(prompt=one_line(prompts_at), prompts_at=prompts_at, **fields)

    @classmethod
    def stored(cls, request: Mapping[str, Any], **fields: Any) -> "Request":
        """Returns the request that is stored with a sample (`samples.outputs.make_request`)."""
        at = request.get("prompts_at")
        return cls(
            prompt=request["prompt"],
            seed=request["seed"],
            negative_prompt=request.get("negative_prompt"),
            prompts_at=None if at is None else {int(frame): text for frame, text in at.items()},
            reading=Reading.stored(request),
            **fields,
        )


@dataclasses.dataclass(eq=False)
class Sample:
    """One sample in progress.

    Attributes:
        request: what is requested.
        cache: stores the stages' frames and states.
        clip: the user's clip to start from, if any.
        frames: number of frames of the first stage's output.
        previous: the stage whose output the next one starts from; None for the user's clip.
        needed: whether the current stage has to be run for it.
        prompts: the prompts of the current stage's output (`stage_prompts`); None if it has only the request's.
    """

    request: Request
    cache: MemoryCache
    clip: UInt8[np.ndarray, "t h w 3"] | None
    frames: int
    previous: str | None = None
    needed: bool = True
    prompts: Parts | None = None

    @property
    def source(self) -> UInt8[np.ndarray, "t h w 3"] | None:
        """The frames that the next stage starts from. They are reopened on each access, to keep few files open."""
        return self.clip if self.previous is None else self.cache.get(self.previous)


def run_stage(
    model: StageModel,
    settings: Settings,
    samples: Sequence[Sample],
    batch_size: int | None,
    progress: bool,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[UInt8[np.ndarray, "t H W 3"]]:
    """Yields the stage's frames of every sample, in order, each as soon as it is in its cache.

    `on_progress` is called before the first step, after each one and after each piece of decoded frames. What it
    raises ends the stage.
    """
    stage, devices = model.stage, model.mesh.size
    rows = devices
    if stage.batched:
        rows = min(math.ceil(n / devices) * devices for n in (batch_size or devices, len(samples)))
    sampler = make_sampler(settings.sampler, settings.steps, model.weights.schedule, settings.spacing)
    plan = DenoisingPlan(
        sampler=sampler.tail(settings.first_step),
        guidance=guidance_of(settings),
        cache=feature_cache_of(settings),
        windows=stage.windows(stage.latent_shape(model.weights, settings), settings),
        rows=rows,
        image=stage.is_image(settings),
        attention_windows=stage.attention_windows(settings),
        free_u=stage.free_u(settings),
        passes=stage.passes(settings),
    )
    segments = stage.segments(settings)
    count, group_size = len(plan.windows), max(1, rows // len(plan.windows))
    each = plan.evaluations * count  # steps or windows of a segment
    bar = tqdm(
        total=len(samples) * len(segments) * each, unit="step" if count == 1 else "window",
        desc=f"{stage.name}: compiling", disable=not progress,
    )  # fmt: skip

    done = 0  # the bar does not count while it is disabled

    def advance(steps: int = 1):
        nonlocal done
        done += steps
        bar.update(steps)
        on_progress(Progress(stage.name, "denoising", done, len(samples) * len(segments) * each))

    def on_window():
        bar.set_description(f"{stage.name}: denoising", refresh=False)
        advance()

    with bar:
        for start in range(0, len(samples), group_size):
            group = samples[start : start + group_size]
            for segment in segments:
                name = _cache_name(stage, settings, segment)
                unfinished = [sample for sample in group if sample.cache.get(name) is None]
                advance(each * (len(group) - len(unfinished)))
                with _memory_advice(stage):
                    clips = _prepared(model, settings, unfinished, segment)
                    advance(count * sum(clip.step for clip in clips))
                    denoise(model, clips, plan, on_window)
                latents = {sample: clip.state["x"] for sample, clip in zip(unfinished, clips)}
                for sample in group:
                    with _memory_advice(stage):
                        if sample in latents:
                            _decode(model, settings, latents.pop(sample), sample, segment, progress, on_progress)
                    if segment == segments[-1]:
                        yield _joined(stage, settings, sample)


def _cache_name(stage: Stage, settings: Settings, segment: Segment) -> str:
    """The name under which a cache holds a segment: the stage's if it is the whole output."""
    first, *others = stage.segments(settings)
    return segment_name(stage.name, segment.index) if others or first.repeated else stage.name


def _prepared(model: StageModel, settings: Settings, samples: Sequence[Sample], segment: Segment = ONLY) -> list[Clip]:
    """Returns the samples' clips, restored to the step at which an interrupted run stopped."""
    stage, clips = model.stage, []
    shape = stage.latent_shape(model.weights, settings)
    name, first = _cache_name(stage, settings, segment), segment.index * shape[0]
    for sample in samples:
        seed = sample.request.seed
        text, null_text = _encoded_prompts(model, settings, sample, segment)
        frames = _segment_input(stage, settings, sample, segment)
        concat, noise_level = stage.prepare(model, settings, seed, frames)

        def noise(stream: int, frames: range, seed: int = seed):
            frames = range(first + frames.start, first + frames.stop)
            return stage.noise(model, settings, seed, stream, frames, shape)

        clip = Clip(
            text=text, null_text=null_text, shape=shape, noise=noise, concat=concat, noise_level=noise_level,
            start=stage.start(model, settings, frames), known=stage.known_latents(settings, concat),
            save=functools.partial(sample.cache.save_state, name),
        )  # fmt: skip
        if saved := sample.cache.load_state(name):
            clip.step, clip.state = saved
        clips.append(clip)
    return clips


def _encoded_prompts(
    model: StageModel, settings: Settings, sample: Sample, segment: Segment
) -> tuple[Callable[[Window], Prompts], Prompts]:
    """Returns the embeddings of a segment's prompt, as a function of its window, and of the negative prompt."""
    reading, own = sample.request.reading, sample.request.negative_prompt
    negative = own if model.stage.info.main and own is not None else settings.negative_prompt
    parts = sample.prompts or [(sample.request.prompt, 1)]
    texts = list(dict.fromkeys(text for text, _ in parts))
    read = {text: reading.parse(text, settings.prompt_suffix) for text in texts}
    (null_text,) = model.encode_prompts([reading.parse(negative)], several=reading.chunked)
    if (at := sample.request.prompts_at) is not None and len(at) > 1:
        by_text = dict(zip(texts, model.encode_prompts(list(read.values()), several=reading.chunked)))
        several = jax.tree.map(lambda *x: np.stack(x), *(by_text[text] for text in at.values()))
        weights = travel_weights(list(at), sample.frames, settings.frames)
        return lambda window: several.mixed(weights[window.box[0]]), null_text
    by_text = {text: model.encode_prompts([own], several=reading.chunked)[0] for text, own in read.items()}

    def text(window: Window) -> Prompts:
        frames = window.spans[0]
        new = range(segment.start + max(frames.start, segment.repeated), segment.start + frames.stop)
        return by_text[prompt_of(new, settings.output_frames, parts)]

    return text, null_text


def _segment_input(stage: Stage, settings: Settings, sample: Sample, segment: Segment) -> Any:
    """Returns what a segment starts from, given the segment before, which is in the cache."""
    segments, before = stage.segments(settings), sample.source
    if (number := segments.index(segment)) > 0:
        before = sample.cache.get(_cache_name(stage, settings, segments[number - 1]))
    return stage.segment_input(settings, segment, before, sample.request.known)


def _decode(
    model: StageModel,
    settings: Settings,
    latents: np.ndarray,
    sample: Sample,
    segment: Segment,
    progress: bool,
    on_progress: Callable[[Progress], None],
) -> None:
    """Decodes the frames of a segment into the sample's cache."""
    stage = model.stage
    source = _segment_input(stage, settings, sample, segment)

    def pieces() -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """Yields the decoded frames, a few at a time."""
        start = 0
        with tqdm(
            total=len(latents), unit="frame", desc=f"{stage.name}: decoding", leave=False, disable=not progress
        ) as bar:
            for frames in model.decode(latents):
                yield stage.finish(frames, start, settings, source)
                start += len(frames)
                bar.update(len(frames))
                on_progress(Progress(stage.name, "decoding", start, len(latents)))

    shape = (settings.frames, settings.height, settings.width, 3)
    sample.cache.put(_cache_name(stage, settings, segment), shape, pieces())


def _joined(stage: Stage, settings: Settings, sample: Sample) -> UInt8[np.ndarray, "t H W 3"]:
    """Returns the stage's output, in which frames that a segment repeats are left out."""
    if (frames := sample.cache.get(stage.name)) is not None:
        return frames
    segments = stage.segments(settings)

    def pieces() -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
        """Yields the frames of each segment that the one before does not have."""
        if segments[0].repeated:
            yield sample.source
        for segment in segments:
            yield sample.cache.get(_cache_name(stage, settings, segment))[segment.repeated :]

    return sample.cache.put(stage.name, (settings.output_frames, settings.height, settings.width, 3), pieces())


@contextlib.contextmanager
def _memory_advice(stage: Stage):
    """Turns device out-of-memory errors into a UserError with advice."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the device has too little memory for the stage {stage.name}: use {stage.memory_advice}"
        ) from error
