"""Runs golden cases on our models: for each kind, a function from the case to its outputs.

Parameters go through the converter's tables, so that those are tested too.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import unflatten_dict
from jax.typing import ArrayLike

from lavie_jax.diffusion import Schedule, sample
from lavie_jax.diffusion.free_noise import noise_sources
from lavie_jax.diffusion.making import original_sampler
from lavie_jax.errors import UserError, suggest
from lavie_jax.models.clip_text import CLIPText, CLIPTextConfig
from lavie_jax.models.temporal_windows import AttentionWindows
from lavie_jax.models.unet import UNet
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.models.vae import VAE, VAEConfig
from lavie_jax.parity.cases import Arrays, Case
from lavie_jax.stages import STAGES
from lavie_jax.stages.conditioning import Condition, Prompts, denoiser
from lavie_jax.stages.prediction import masked_clip
from lavie_jax.stages.stage import Stage
from lavie_jax.weights.diffusers_configs import clip_text_config, unet_config, vae_config
from lavie_jax.weights.expected import compare
from lavie_jax.weights.names import from_torch, is_buffer


def channels_last(x: np.ndarray) -> jax.Array:
    """Converts videos (b c t h w) and images (b c h w) from PyTorch's layout; text (b l d) is unchanged."""
    pattern = {5: "b c t h w -> b t h w c", 4: "b c h w -> b h w c"}.get(x.ndim)
    return jnp.asarray(rearrange(x, pattern) if pattern else x)


def channels_first(x: jax.Array | np.ndarray) -> np.ndarray:
    """Inverse of `channels_last`."""
    pattern = {5: "b t h w c -> b c t h w", 4: "b h w c -> b c h w"}.get(x.ndim)
    return np.asarray(rearrange(x, pattern) if pattern else x)


def take(case: Case, name: str) -> jax.Array:
    """Returns an input of the case, channels-last."""
    return channels_last(case.input(name))


def load_params(case: Case, part: str, config: UNetConfig | VAEConfig | CLIPTextConfig) -> dict:
    """Generates and converts the parameters of the model that `config` describes, tensor by tensor.

    `part`, one of unet, vae and text_encoder, selects the converter's table.

    Raises:
        UserError: names or shapes differ between the case's parameters and the model's; the first one is reported.
    """

    def shape_only(shape):  # an array without memory of its own
        return np.broadcast_to(np.float32(0), shape)

    converted = {name: from_torch(part, name, shape_only(shape)) for name, shape in case.parameters.items()}
    given = {path: array.shape for path, array in converted.values()}
    if differences := compare(part, config, given):
        raise UserError(f"{len(differences)} parameters do not fit: {differences[0]}")
    params = {}
    for name, shape in case.parameters.items():
        if not is_buffer(name):
            path, value = from_torch(part, name, case.parameter(name, shape))
            params[path] = jnp.asarray(np.ascontiguousarray(value))
    return unflatten_dict(params, sep="/")


def stage_of(case: Case) -> Stage:
    """Returns the stage that a case of a UNet or of its sampling belongs to."""
    name = case.kind.rpartition("_")[0]
    return STAGES[{"seine": "prediction", "freenoise": "base"}.get(name, name)]


def masked(case: Case) -> Condition:
    """Returns the prediction stage's condition."""
    inputs = {"mask": jnp.asarray(case.inputs["mask"]), "masked_latents": take(case, "masked_latents")}
    return STAGES["prediction"].condition(inputs)


def run_text(case: Case) -> Arrays:
    """Runs a text encoder: tokens to hidden states."""
    model = CLIPText(clip_text_config(case.model))
    tokens = jnp.asarray(case.stored["ids"], jnp.int32)
    params = load_params(case, "text_encoder", model.config)
    return {"last_hidden_state": np.asarray(jax.jit(model.apply)({"params": params}, tokens))}


def run_vae(case: Case) -> Arrays:
    """Runs a VAE: an image to its posterior, a latent to its image."""
    model = VAE(vae_config(case.model))
    variables = {"params": load_params(case, "vae", model.config)}
    encode, decode = (jax.jit(partial(model.apply, method=method)) for method in ("encode", "decode"))
    mean, logvar = encode(variables, take(case, "image"))
    decoded = decode(variables, take(case, "latent"))
    outputs = {"mean": mean, "logvar": logvar, "decoded": decoded}
    return {name: channels_first(output) for name, output in outputs.items()}


def run_unet(case: Case) -> Arrays:
    """Calls the UNet of the kind's stage once."""
    x = take(case, "sample")
    if "low_res" in case.inputs:
        x = jnp.concatenate([x, take(case, "low_res")], axis=-1)
    if "mask" in case.inputs:
        x = jnp.concatenate([x, masked(case).concat], axis=-1)

    def per_row(name):
        return jnp.broadcast_to(jnp.asarray(case.inputs[name]), x.shape[:1])

    timesteps, level = per_row("timesteps"), per_row("noise_level") if "noise_level" in case.inputs else None
    unet = UNet(unet_config(case.model, stage_of(case)), attention_windows=attention_windows(case))
    variables = {"params": load_params(case, "unet", unet.config)}
    output = jax.jit(unet.apply)(variables, x, timesteps, take(case, "context"), noise_level=level)
    return {"output": channels_first(output)}


def attention_windows(case: Case) -> AttentionWindows | None:
    """Returns the windows of the temporal attention in FreeNoise's cases."""
    sizes = [case.settings.get(name) for name in ("window", "stride")]
    return None if None in sizes else AttentionWindows(*sizes)


def run_trajectory(
    case: Case, samplers: list[str], condition: Condition, null_context: str, init: jax.Array | None = None
) -> Arrays:
    """Returns each sampler's final latents, from the noise `init` (the case's by default), with guidance."""
    stage = stage_of(case)
    unet = UNet(unet_config(case.model, stage), attention_windows=attention_windows(case))
    params = load_params(case, "unet", unet.config)
    text, null_text = Prompts(take(case, "context")), Prompts(take(case, null_context))
    guidance = case.settings["guidance_scale"]

    @jax.jit
    def guided(params, x, t):
        return denoiser(unet, params, text, null_text, condition, guidance=guidance)(x, t).prediction

    def denoise(x, t):  # float timesteps, as Euler needs, for all samplers: one compilation
        return guided(params, x, jnp.asarray(t, jnp.float32))

    def noise_at(i):
        return channels_last(case.draw(f"{case.name}/noise/{i}", case.inputs["init"]))

    latents, init = {}, take(case, "init") if init is None else init
    for name in samplers:
        sampler = original_sampler(name, case.settings["steps"], stage.schedule)
        latents[name] = channels_first(sample(sampler, denoise, init, noise_at))
    return latents


def run_base_sample(case: Case) -> Arrays:
    """Samples the base stage with each sampler for which the case has latents."""
    return run_trajectory(case, sorted(case.stored), STAGES["base"].condition({}), "uncond_context")


def run_freenoise_sample(case: Case) -> Arrays:
    """Samples the base stage with FreeNoise: rescheduled noise, then windowed temporal attention."""
    sources = noise_sources(case.settings["window"], case.settings["shuffles"])
    noise = take(case, "init")[:, sources]
    samplers = sorted(set(case.stored) - {"noise"})
    latents = run_trajectory(case, samplers, STAGES["base"].condition({}), "uncond_context", init=noise)
    return {"noise": channels_first(noise), **latents}


def run_interpolation_sample(case: Case) -> Arrays:
    """Samples the interpolation stage on given key frames, with its default sampler."""
    stage = STAGES["interpolation"]
    condition = stage.condition({"key_latents": take(case, "key_frames")})
    sampler = stage.sampling["sampler"]
    latents = run_trajectory(case, [sampler], condition, "negative_context")
    return {"latents": latents[sampler]}


def run_vsr_sample(case: Case) -> Arrays:
    """Samples the super-resolution stage on given frames, with its default sampler."""
    stage, frames = STAGES["vsr"], take(case, "frames")
    level = jnp.full(frames.shape[0], case.settings["noise_level"], jnp.int32)
    noise = take(case, "low_res_noise")
    condition = stage.condition({"low_res": frames, "low_res_noise": noise, "noise_level": level})
    sampler = stage.sampling["sampler"]
    latents = run_trajectory(case, [sampler], condition, "uncond_context")
    return {"noised_low_res": channels_first(condition.concat), "latents": latents[sampler]}


SEINE_SAMPLERS = {"ddpm": "respaced_ddpm", "ddim": "respaced_ddim"}  # name in the case -> our name


def run_seine_sample(case: Case) -> Arrays:
    """Samples the prediction stage on a given mask and latents with each sampler for which the case has latents."""
    for name in case.stored:
        if name not in SEINE_SAMPLERS:
            raise UserError(f"unknown sampler {name!r}{suggest(name, SEINE_SAMPLERS)}")
    ours = [SEINE_SAMPLERS[name] for name in case.stored]
    return dict(zip(case.stored, run_trajectory(case, ours, masked(case), "negative_context").values()))


def known_pictures(mode: str, pictures: np.ndarray, frames: int) -> dict[int, np.ndarray]:
    """Returns {frame: picture} of a mode of SEINE: firstN, onelastN, all, or clip_firstN."""
    if mode == "all":
        return {}
    kind = mode.rstrip("0123456789")
    count = int(mode.removeprefix(kind) or 0)
    if kind not in ("first", "onelast", "clip_first") or not 1 <= count <= frames:
        raise UserError(f"unknown mode {mode!r}: firstN, onelastN, clip_firstN or all, with N from 1 to {frames}")
    if kind == "clip_first":
        return dict(enumerate(pictures[:count]))
    last = {frames - 1 - i: pictures[-1] for i in range(count)} if kind == "onelast" else {}
    return last | {i: pictures[0] for i in range(count)}


def run_seine_condition(case: Case) -> Arrays:
    """Makes what the prediction stage's VAE encodes, and its mask at the size of latents, for each mode."""
    pixels = np.floor(np.clip(128 + 64 * case.input("images"), 0, 255)).astype(np.uint8)
    pictures, frames = rearrange(pixels, "n c h w -> n h w c"), int(case.settings["frames"])
    height, width = pictures.shape[1:3]
    out = {}
    for mode in case.settings["modes"]:
        clip, mask = masked_clip(known_pictures(mode, pictures, frames), frames, height, width)
        latents = np.zeros((1, frames, height // 8, width // 8, 4), np.float32)
        condition = STAGES["prediction"].condition({"mask": mask[None], "masked_latents": latents})
        out[f"masked_video_{mode}"] = channels_first(clip[None])
        out[f"mask_{mode}"] = channels_first(condition.concat[..., :1])
    return out


LOOP_SAMPLERS = {  # name in the case -> our name, prediction type
    "ddpm": ("ddpm", "epsilon"),
    "ddim": ("ddim", "epsilon"),
    "euler": ("euler", "epsilon"),
    "interp_ddim": ("respaced_ddim", "epsilon"),
    "vsr_ddim_v": ("ddim", "v_prediction"),
}


def run_sampling_loops(case: Case) -> Arrays:
    """Runs samplers with the exact denoiser of Gaussian data (mean 0.3, variance 0.25) as the model."""
    out = {}
    for key in (k for k in case.stored if not k.endswith("_timesteps")):
        name, _, steps = key.rpartition("_")
        if name not in LOOP_SAMPLERS or not steps.isdecimal():
            raise UserError(f"unknown sampler {name!r} in output {key!r}{suggest(name, LOOP_SAMPLERS)}")
        out[key], out[f"{key}_timesteps"] = run_loop(case, name, int(steps))
    return out


def run_loop(case: Case, name: str, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the final state of one sampler, and the timesteps at which it called its model."""
    sampler_name, prediction = LOOP_SAMPLERS[name]
    schedule = Schedule("linear", 1e-4, 0.02, prediction=prediction)
    timesteps = []

    def denoise(x, t):
        timesteps.append(float(t[0]))
        return gaussian_denoiser(schedule, x, t)

    def draw(what):
        return jnp.asarray(case.draw(f"loop/{name}/{steps}/{what}", case.settings["shape"]))

    sampler = original_sampler(sampler_name, steps, schedule)
    end = sample(sampler, denoise, draw("init"), lambda i: draw(f"noise/{i}"))
    return np.asarray(end), np.asarray(timesteps)


def gaussian_denoiser(schedule: Schedule, x: ArrayLike, t: ArrayLike) -> ArrayLike:
    """Returns the optimal prediction for Gaussian data with mean 0.3 and variance 0.25."""
    a = float(schedule.alphas_cumprod[round(float(t[0]))])
    signal, noise = math.sqrt(a), math.sqrt(1 - a)
    eps = noise * (x - 0.3 * signal) / (0.25 * a + 1 - a)
    return eps if schedule.prediction == "epsilon" else signal * eps - noise * (x - noise * eps) / signal


RUN: dict[str, Callable[[Case], Arrays]] = {
    "clip_text": run_text,
    "vae": run_vae,
    "base_unet": run_unet,
    "interpolation_unet": run_unet,
    "vsr_unet": run_unet,
    "base_sample": run_base_sample,
    "interpolation_sample": run_interpolation_sample,
    "vsr_sample": run_vsr_sample,
    "freenoise_unet": run_unet,
    "freenoise_sample": run_freenoise_sample,
    "sampling_loops": run_sampling_loops,
    "seine_unet": run_unet,
    "seine_sample": run_seine_sample,
    "seine_condition": run_seine_condition,
}
