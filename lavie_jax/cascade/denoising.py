"""Denoising: clips go through a sampler's chain window by window, with all windows spread over the devices.

Each network evaluation of a clip predicts every window (`stages.denoiser`), blends the predictions (`windows.py`) and
updates the state of the whole clip (`diffusion/samplers.py`). Clips live on the host, so that device memory depends
neither on a clip's length nor on its number of windows, and so that a clip's state can be saved between evaluations.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from lavie_jax import parallel
from lavie_jax.cascade.layout import ROWS_AXIS, SharedUNet, layout, shares_windows
from lavie_jax.cascade.model import ALL, BATCH, StageModel, one_ahead, per_device
from lavie_jax.diffusion import Sampler
from lavie_jax.diffusion.feature_cache import FeatureCache
from lavie_jax.diffusion.free_init import renoise
from lavie_jax.diffusion.guidance import COMPUTED, NONE, REUSED, Guidance
from lavie_jax.models.free_u import FreeU
from lavie_jax.models.temporal_windows import AttentionWindows
from lavie_jax.program_cache import cached
from lavie_jax.stages.conditioning import Condition, Evaluation, KnownLatents, Prompts, denoiser
from lavie_jax.stages.windows import Window

MAX_BATCHED_PIXELS = 16 * 40 * 64  # latent pixels per device up to which both guidance halves share a UNet call
RENOISE_STREAM = 2**32 - 3  # of the noise of further passes, below those of stages
MAX_UPDATE_PIXELS = 8 * 320 * 512  # latent pixels that a sampler updates at a time
SAVE_EVERY = 5  # evaluations between two saved states, at least

State = dict[str, np.ndarray]


@dataclasses.dataclass(kw_only=True)
class Clip:
    """One sample between noise and latents.

    Attributes:
        text: returns the embedding of a window's prompt, or one for each of its frames.
        null_text: embedding of the negative or empty prompt.
        shape: shape of the latents (T, h, w, C).
        noise: `noise(stream, frames)` is the noise of some frames. Stream 0 is the start, stream i + 1 is fresh noise
            for evaluation i, counted over all passes, and stream RENOISE_STREAM - p that of a new pass p.
        start: latents to which noise is added at the start; None to start from noise.
        concat: condition that is concatenated to the UNet's input channels.
        noise_level: condition of the VSR stage.
        known: frames whose latents are known, and stay as they are.
        state: the sampler's state; None before the start.
        step: number of the next evaluation.
        change: what the text changed in the last prediction for which that was computed, if it is used again.
        deep: features of the UNet's deep layers in each window, by its corner, while they are used again.
        save: called with `step` and `state` at `DenoisingPlan.saves`.
    """

    text: Callable[[Window], Prompts]
    null_text: Prompts
    shape: tuple[int, int, int, int]
    noise: Callable[[int, range], Array]
    start: Float[np.ndarray, "t h w c"] | None = None
    concat: Float[np.ndarray, "t h w k"] | None = None
    noise_level: int | None = None
    known: KnownLatents | None = None
    state: State | None = None
    step: int = 0
    change: Float[np.ndarray, "t h w c"] | None = None
    deep: dict[tuple[int, ...], Float[np.ndarray, "halves t h w c"]] = dataclasses.field(default_factory=dict)
    save: Callable[[int, State], None] = lambda step, state: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoisingPlan:
    """Settings of denoising that all clips share.

    Attributes:
        sampler: the sampler.
        guidance: scale of classifier-free guidance, and how much of it each evaluation computes.
        cache: when the deep layers of the UNet are computed.
        windows: windows that cover a clip.
        rows: number of windows in one UNet call, a multiple of the number of devices.
        image: whether clips are single images, without temporal layers.
        attention_windows: windows of the temporal attention inside the UNet.
        free_u: factors of the inputs of the UNet's up blocks.
        passes: how often clips are denoised, each time but the first from their result, see `free_init.py`.
    """

    sampler: Sampler
    guidance: Guidance
    windows: Sequence[Window]
    rows: int
    image: bool = False
    attention_windows: AttentionWindows | None = None
    cache: FeatureCache = FeatureCache()
    free_u: FreeU | None = None
    passes: int = 1

    @property
    def evaluations(self) -> int:
        """Number of evaluations of a clip."""
        return self.passes * self.sampler.evaluations

    @functools.cached_property
    def guidance_modes(self) -> tuple[str, ...]:
        """What each evaluation computes of the guidance (`Guidance.plan`)."""
        return self.guidance.plan(self.sampler.timesteps)

    @functools.cached_property
    def whole(self) -> tuple[bool, ...]:
        """Whether each evaluation computes the whole UNet (`FeatureCache.plan`)."""
        return self.cache.plan(self.guidance_modes)

    @functools.cached_property
    def saves(self) -> frozenset[int]:
        """The steps at which states are saved, which do not need anything of earlier evaluations but the state."""
        steps, last, each = {self.evaluations}, 0, self.sampler.evaluations
        for step in range(1, self.evaluations):
            alone = self.guidance_modes[step % each] != REUSED and self.whole[step % each]
            if step >= last + SAVE_EVERY and alone:
                steps.add(step)
                last = step
        return frozenset(steps)

    def keeps_change(self, i: int) -> bool:
        """Whether the evaluation after i uses again what guidance changes at i."""
        return self.guidance_modes[i] == COMPUTED and self.guidance_modes[i + 1 : i + 2] == (REUSED,)

    def keeps_deep(self, i: int) -> bool:
        """Whether the evaluation after i uses the deep features of i again."""
        return self.whole[i] and self.whole[i + 1 : i + 2] == (False,)


def denoise(
    model: StageModel, clips: Sequence[Clip], plan: DenoisingPlan, on_window: Callable[[], None] = lambda: None
) -> None:
    """Runs the remaining evaluations of all clips; afterwards `state["x"]` is x0.

    Clips at the earliest step go first.

    Args:
        model: the stage's networks and mesh.
        clips: clips of one shape, updated in place.
        plan: the sampler, the windows and how they are batched.
        on_window: called after each predicted window.
    """
    for clip in clips:
        if clip.state is None:
            clip.state = _started(clip, plan.sampler)
    each = plan.sampler.evaluations
    while unfinished := [clip for clip in clips if clip.step < plan.evaluations]:
        step = min(clip.step for clip in unfinished)
        active = [clip for clip in unfinished if clip.step == step]
        for clip, prediction in zip(active, _predictions(model, active, step % each, plan, on_window)):
            clip.state = _updated(model, clip, prediction, step % each, plan.sampler)
            clip.step += 1
            if plan.whole[step % each + 1 : step % each + 2] != (False,):
                clip.deep.clear()  # of a large clip, they are many times as large as its state
            if clip.step % each == 0 and clip.step < plan.evaluations:
                clip.state = _restarted(clip, clip.step // each, plan.sampler)
            if clip.step in plan.saves:
                clip.save(clip.step, clip.state)


def _started(clip: Clip, sampler: Sampler) -> State:
    """Returns the state before the first evaluation."""

    def start(frames: range) -> dict[str, Array]:
        noise = clip.noise(0, frames)
        state = sampler.init(noise)
        if clip.start is None:
            return state
        return {**state, "x": sampler.add_noise(clip.start[frames.start : frames.stop], noise)}

    return _by_frames(clip, start)


def _restarted(clip: Clip, number: int, sampler: Sampler) -> State:
    """Returns the state before the first evaluation of pass `number`, given the result of the one before."""
    every = range(clip.shape[0])
    first, fresh = (np.asarray(clip.noise(stream, every)) for stream in (0, RENOISE_STREAM - number))
    noise = renoise(clip.state["x"], first, fresh, sampler.schedule)
    return _by_frames(clip, lambda frames: sampler.init(noise[frames.start : frames.stop]))


def _predictions(
    model: StageModel, clips: Sequence[Clip], i: int, plan: DenoisingPlan, on_window: Callable[[], None]
) -> list[Float[np.ndarray, "t h w c"]]:
    """Returns the prediction of evaluation i for each clip, blended over its windows.

    What guidance changes is blended likewise, where a later evaluation uses it. Deep features stay those of a window.
    """
    blended = [np.zeros(clip.shape, np.float32) for clip in clips]
    changes = [np.zeros(clip.shape, np.float32) for clip in clips] if plan.keeps_change(i) else None
    rows = [(number, window) for number in range(len(clips)) for window in plan.windows]
    rows.sort(key=lambda row: row[1].shape, reverse=True)  # windows of one shape share a compiled program
    batches = [
        list(batch)
        for _, same_shape in itertools.groupby(rows, key=lambda row: row[1].shape)
        for batch in _batched(same_shape, plan.rows)
    ]

    def started():
        for batch in batches:
            mesh, count = _layout(model.mesh, [window for _, window in batch], i, plan)
            padded = [*batch, *[batch[-1]] * (count - len(batch))]
            yield batch, _predict_windows(model, [(clips[number], window) for number, window in padded], i, plan, mesh)

    for batch, evaluation in one_ahead(started()):
        if not plan.keeps_deep(i):  # features are large
            evaluation = evaluation._replace(deep=None)
        evaluation = parallel.gather(evaluation)
        for row, ((number, window), prediction) in enumerate(zip(batch, evaluation.prediction)):
            blended[number][window.box] += window.weight * prediction
            if changes is not None:
                changes[number][window.box] += window.weight * evaluation.change[row]
            if evaluation.deep is not None:
                clips[number].deep[window.corner] = evaluation.deep[row]
            on_window()
    for number, clip in enumerate(clips if changes is not None else ()):
        clip.change = changes[number]
    return blended


def _layout(mesh: Mesh, windows: Sequence[Window], i: int, plan: DenoisingPlan) -> tuple[Mesh, int]:
    """Returns the mesh for windows of one shape in evaluation i, and their number with padding."""
    mode = plan.guidance_modes[i]
    return layout(mesh, len(windows), halves=halves(mode), frames=windows[0].shape[0]) or (mesh, plan.rows)


def _predict_windows(
    model: StageModel, rows: Sequence[tuple[Clip, Window]], i: int, plan: DenoisingPlan, mesh: Mesh
) -> Evaluation:
    """Starts the predictions of evaluation i for windows of one shape, without waiting for the devices."""
    # several devices that share a window all get its inputs, which are small
    batch = parallel.replicated(mesh) if shares_windows(mesh) else parallel.batch_sharding(mesh)

    def stacked(rows):
        return parallel.put(np.stack(list(rows)), batch)

    def stacked_prompts(prompts):
        return jax.tree.map(lambda *arrays: stacked(arrays), *prompts)

    texts = _texts(rows)
    inputs = [
        plan.sampler.model_input({name: array[window.box] for name, array in clip.state.items()}, i)
        for clip, window in rows
    ]
    first, mode = rows[0][0], plan.guidance_modes[i]
    condition = Condition()
    if first.concat is not None:
        condition = condition._replace(concat=stacked(clip.concat[window.box] for clip, window in rows))
    if first.noise_level is not None:
        condition = condition._replace(noise_level=stacked(np.int32(clip.noise_level) for clip, _ in rows))
    return predict_rows(
        model.unet_params, stacked(x_t for x_t, _ in inputs), stacked(t[0] for _, t in inputs),  # t is one per frame
        stacked_prompts(text for text, _ in texts), stacked_prompts(null_text for _, null_text in texts), condition,
        stacked(clip.change[window.box] for clip, window in rows) if mode == REUSED else None,
        None if plan.whole[i] else stacked(clip.deep[window.corner][: halves(mode)] for clip, window in rows),
        unet=adapted(model.unet, plan.attention_windows, plan.free_u),
        guidance=1.0 if mode == NONE else float(plan.guidance.scale),
        rescale=float(plan.guidance.rescale), image=plan.image,
        sequential_guidance=sequential_guidance(len(rows), rows[0][1], mesh),
        keep_change=plan.keeps_change(i), mesh=mesh,
        cache_depth=None if plan.cache.every == 1 else plan.cache.depth,
    )  # fmt: skip


def _texts(rows: Sequence[tuple[Clip, Window]]) -> list[tuple[Prompts, Prompts]]:
    """Returns text and null text of windows: one for every frame of each if any of them has several.

    Where their numbers of tokens differ, shorter ones are padded with masked tokens.
    """
    texts = [(clip.text(window), clip.null_text) for clip, window in rows]
    lengths = {prompts.length for pair in texts for prompts in pair}
    if len(lengths) > 1:
        texts = [tuple(prompts.padded(max(lengths)) for prompts in pair) for pair in texts]
    if not any(text.per_frame for text, _ in texts):
        return texts
    lengths = [window.shape[0] for _, window in rows]
    return [
        tuple(prompts if prompts.per_frame else prompts.repeated(length) for prompts in pair)
        for pair, length in zip(texts, lengths)
    ]


def halves(mode: str) -> int:
    """Returns how many halves of guidance an evaluation computes: with the text, and without it."""
    return 2 if mode == COMPUTED else 1


def adapted(unet, windows: AttentionWindows | None, free_u: FreeU | None):
    """Returns the UNet with these windows of its temporal attention, and factors of the inputs of its up blocks."""
    return unet if windows is None and free_u is None else unet.clone(attention_windows=windows, free_u=free_u)


def sequential_guidance(rows: int, window: Window, mesh: Mesh) -> bool:
    """Whether the two guidance halves of `rows` windows take two UNet calls: to save memory, or for one group each."""
    if shares_windows(mesh):
        return mesh.shape[ROWS_AXIS] == rows  # not one group of devices for each half
    return rows // mesh.size * int(np.prod(window.shape)) > MAX_BATCHED_PIXELS


def _updated(
    model: StageModel, clip: Clip, prediction: Float[np.ndarray, "t h w c"], i: int, sampler: Sampler
) -> State:
    """Returns the clip's state after its next evaluation, number i of its pass, which returned `prediction`."""

    def update(frames):
        """Returns the next state of a range of frames."""
        part = slice(frames.start, frames.stop)
        state = {name: array[part] for name, array in clip.state.items()}
        noise = clip.noise(clip.step + 1, frames) if sampler.needs_noise else None
        known = clip.known and KnownLatents(*(array[part] for array in clip.known))
        state, prediction_part, known = jax.device_put((state, prediction[part], known), model.device)
        return _update(state, i, prediction_part, noise, known, sampler=sampler)

    return _by_frames(clip, update)


def _by_frames(clip: Clip, f: Callable[[range], dict[str, Array]]) -> State:
    """Applies `f` to ranges of at most MAX_UPDATE_PIXELS latent pixels, and concatenates the results."""
    count, height, width = clip.shape[:3]
    size = max(1, MAX_UPDATE_PIXELS // (height * width))
    parts = [jax.device_get(f(range(i, min(i + size, count)))) for i in range(0, count, size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _batched(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(itertools.islice(items, size)):
        yield batch


# ---- compiled ----


@cached
@functools.partial(
    jax.jit,
    static_argnames=(
        "unet", "guidance", "rescale", "image", "sequential_guidance", "keep_change", "cache_depth", "mesh",
    ),
)  # fmt: skip
def predict_rows(
    params: dict,
    x_t: Float[Array, "b t h w c"],
    t: Shaped[Array, " b"],
    text: Prompts,
    null_text: Prompts,
    condition: Condition,
    change: Float[Array, "b t h w c"] | None = None,
    deep: Float[Array, "b halves t h_deep w_deep c_deep"] | None = None,
    *,
    unet,
    guidance: float,
    rescale: float,
    image: bool,
    sequential_guidance: bool,
    mesh: Mesh,
    keep_change: bool = False,
    cache_depth: int | None = None,
) -> Evaluation:
    """Returns the guided predictions, and what later evaluations use again; see `denoiser`.

    Each device computes those of its own rows, or its part of one on a mesh of `layout`.
    """

    network = SharedUNet(unet, mesh) if shares_windows(mesh) else unet

    def predict(params, x_t, t, text, null_text, condition, change, deep):
        """Runs on each device, with its rows of the arguments."""
        return denoiser(
            network, params, text, null_text, condition, guidance=guidance, rescale=rescale, image=image,
            sequential_guidance=sequential_guidance, change=change, keep_change=keep_change, deep=deep,
            cache_depth=cache_depth,
        )(x_t, t)  # fmt: skip

    if shares_windows(mesh):
        out = predict(params, x_t, t, text, null_text, condition, change, deep)
        return jax.lax.with_sharding_constraint(out, parallel.replicated(mesh))
    specs = (ALL, *(BATCH,) * 7)
    return per_device(predict, mesh, *specs)(params, x_t, t, text, null_text, condition, change, deep)


@cached
@functools.partial(jax.jit, static_argnames="sampler")
def _update(
    state: dict[str, Array],
    i: Int[Array, ""],
    prediction: Float[Array, "t h w c"],
    noise: Float[Array, "t h w c"] | None,
    known: KnownLatents | None,
    *,
    sampler: Sampler,
) -> dict[str, Array]:
    """The state of frames after evaluation i; each frame is a row of its own to the sampler."""
    if known is not None:
        exact = sampler.prediction_of(state, i, known.latents)
        prediction = jnp.where(rearrange(known.known, "t -> t 1 1 1"), exact, prediction)
    return sampler.update(state, i, prediction, noise)
