"""Settings of the stages to run, each of which starts from the output of the one before."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging

from lavie_jax.cascade.running import guidance_of
from lavie_jax.diffusion import chain_warning, make_sampler
from lavie_jax.errors import UserError, suggest
from lavie_jax.fields import settable
from lavie_jax.stages import STAGES
from lavie_jax.stages.clips import ClipInfo, padding_note
from lavie_jax.stages.settings import OFFICIAL, PRESETS, STAGE_INFO, Settings
from lavie_jax.weights import Weights


def resolve_settings(
    weights: Mapping[str, Weights],
    stages: Sequence[str],
    given: Mapping[str, Mapping[str, Any]],
    clip: ClipInfo | None = None,
    preset: str = OFFICIAL,
) -> dict[str, Settings]:
    """Returns {stage: settings}; each stage starts from the output of the previous one.

    Args:
        weights: {stage: weights folder}; parameters are not needed.
        stages: the stages to run, in order.
        given: {stage: settings that override the defaults of its weights}.
        clip: the user's clip that the first stage starts from.
        preset: one of `PRESETS`; settings in `given` come before those of a preset.

    Raises:
        UserError: a stage has no weights, the preset does not exist, a setting belongs to a stage that is not run, is
            out of range or impossible for its model, or a clip does not fit into memory.
    """
    for stage, values in given.items():
        if not isinstance(values, Mapping):
            raise UserError(f'settings of {stage} are given by name, {{"steps": 10}}, not {values!r}')
        if stage not in stages and (name := next((n for n, v in values.items() if v is not None), None)):
            raise UserError(f"{name} is given for {stage}, which is not among the stages to run: {','.join(stages)}")
        allowed = settable(STAGE_INFO[stage].settings)
        if name := next((name for name in values if name not in allowed), None):
            raise STAGE_INFO[stage].located(UserError(f"sampling settings: unknown {name!r}{suggest(name, allowed)}"))
    if preset not in PRESETS:
        raise UserError(f"preset: unknown {preset!r}{suggest(preset, PRESETS)}")
    settings = {}
    for stage in stages:
        if stage not in weights:
            raise no_weights(stage, weights)
        bundle = (weights[stage].presets or STAGES[stage].presets).get(preset, {})
        chosen = {name: value for name, value in given.get(stage, {}).items() if value is not None}
        try:
            own = STAGES[stage].resolve(weights[stage], {**bundle, **chosen}, clip)
            sampler = make_sampler(own.sampler, own.steps, weights[stage].schedule, own.spacing)
            guidance_of(own).plan(sampler.tail(own.first_step).timesteps)
            _check_cache_depth(own, weights[stage])
        except UserError as error:
            raise STAGE_INFO[stage].located(error) from None
        if _other_chain(own, weights[stage].sampling) and (warning := chain_warning(sampler)):
            logging.warning("stage %s: %s", stage, warning)
        settings[stage] = own
        clip = _output_of(own)
    return settings


def _check_cache_depth(settings: Settings, weights: Weights) -> None:
    """Raises UserError for a feature cache that would leave nothing of this UNet to be used again."""
    deepest = weights.unet.config.skip_connections - 1
    if settings.cache_every > 1 and settings.cache_depth > deepest:
        raise UserError(f"cache_depth must be from 1 to {deepest} for this model, not {settings.cache_depth}")


def _other_chain(settings: Settings, defaults: Mapping[str, Any]) -> bool:
    """Whether the user chose other timesteps than the weights folder."""
    return any(getattr(settings, name) != defaults.get(name) for name in ("sampler", "steps", "spacing"))


def padding_notes(weights: Mapping[str, Weights], settings: Mapping[str, Settings], clip: ClipInfo | None) -> list[str]:
    """Returns warnings about clips that a stage has to pad."""
    lines = []
    for stage, own in settings.items():
        if clip is not None:
            lines.append(padding_note(stage, clip, STAGES[stage].padding(weights[stage])))
        clip = _output_of(own)
    return [line for line in lines if line]


def _output_of(settings: Settings) -> ClipInfo:
    return ClipInfo(frames=settings.output_frames, height=settings.height, width=settings.width, fps=settings.fps)


def no_weights(stage: str, available: Iterable[str]) -> UserError:
    """The error for a stage without weights, where `available` have some."""
    names = ", ".join(available) or "none"
    return UserError(f"stage {stage} has no weights; available stages: {names}. Give --{stage}-weights")
