"""Settings of the stages to run, each of which starts from the output of the one before."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging

from lavie_jax.diffusion import chain_warning, make_sampler
from lavie_jax.diffusion.guidance import COMPUTED
from lavie_jax.errors import UserError, suggest
from lavie_jax.fields import settable
from lavie_jax.stages import STAGES
from lavie_jax.stages.clips import ClipInfo, padding_note
from lavie_jax.stages.settings import OFFICIAL, PRESETS, STAGE_INFO, PredictionSettings, Settings
from lavie_jax.stages.stage import check_cache_depth, guidance_of
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
        chosen = {name: value for name, value in given.get(stage, {}).items() if value is not None}
        try:
            bundle = _settings_of(preset, stage, weights[stage], chosen, clip)
            own = STAGES[stage].resolve(weights[stage], {**bundle, **chosen}, clip)
            sampler = make_sampler(own.sampler, own.steps, weights[stage].schedule, own.spacing)
            _passes(own, weights[stage])
            check_cache_depth(own, weights[stage].unet.config)
        except UserError as error:
            raise STAGE_INFO[stage].located(error) from None
        if _other_chain(own, weights[stage].sampling) and (warning := chain_warning(sampler)):
            logging.warning("stage %s: %s", stage, warning)
        for line in _without_effect(chosen, own, clip):
            logging.warning("stage %s: %s", stage, line)
        settings[stage] = own
        clip = _output_of(own)
    return settings


def _settings_of(
    preset: str, stage: str, weights: Weights, chosen: Mapping[str, Any], clip: ClipInfo | None
) -> Mapping[str, Any]:
    """Returns the settings of a preset: the weights folder's, or the stage's where the folder has none.

    Those of the stage are for the released models. Others may need fewer steps than these presets have.
    """
    if preset == OFFICIAL:
        return {}
    if weights.presets:
        bundle = weights.presets.get(preset, {})
        if preset not in weights.presets:
            names = ", ".join(weights.presets)
            logging.warning("stage %s: %s has no preset %s, only %s", stage, weights.path, preset, names)
        try:
            STAGE_INFO[stage].settings.make(weights.sampling, bundle)
        except UserError as error:
            raise UserError(f"preset {preset} of {weights.path}: {error}") from None
        return bundle

    def work(bundle: Mapping[str, Any]) -> int:
        """Passes through the UNet with these settings."""
        return _passes(STAGES[stage].resolve(weights, {**bundle, **chosen}, clip), weights)

    bundle = STAGES[stage].presets.get(preset, {})
    try:
        official = work({})
    except UserError:  # what is given fits the preset alone, or neither
        return bundle
    if work(bundle) <= official:
        return bundle
    logging.warning(
        "stage %s: the preset %s takes more work than the settings of %s, which are used", stage, preset, weights.path
    )
    return {}


def _passes(settings: Settings, weights: Weights) -> int:
    """Returns the number of passes through the UNet: one or two for each evaluation.

    Raises:
        UserError: the sampler cannot do the steps, or guidance is never applied.
    """
    sampler = make_sampler(settings.sampler, settings.steps, weights.schedule, settings.spacing)
    modes = guidance_of(settings).plan(sampler.tail(settings.first_step).timesteps)
    return len(modes) + modes.count(COMPUTED)


def _without_effect(chosen: Mapping[str, Any], settings: Settings, clip: ClipInfo | None) -> list[str]:
    """Returns warnings about given settings that others, or the lack of a clip, make useless."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}

    def changed(*names: str) -> str:
        return ", ".join(name for name in names if name in chosen and chosen[name] != defaults[name])

    of_guidance = changed("guidance_rescale", "guidance_low", "guidance_high", "guidance_every")
    lines = [f"{of_guidance}: without effect, as guidance is 1"] if of_guidance and settings.guidance == 1 else []
    if changed("cache_depth") and settings.cache_every == 1:
        lines.append("cache_depth: without effect, as cache_every is 1")
    alone = isinstance(settings, PredictionSettings) and settings.segments == 1
    if changed("known_frames") and clip is None and alone:
        lines.append("known_frames: without effect, as there is no clip to continue and only one segment")
    return lines


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
