"""Presets: bundles of settings that save work, from the stage or from the weights folder."""

import dataclasses
import json

import pytest

import sample
from lavie_jax import cascade
from lavie_jax.diffusion import make_sampler
from lavie_jax.diffusion.guidance import COMPUTED
from lavie_jax.errors import UserError
from lavie_jax.stages import STAGES
from lavie_jax.stages.clips import ClipInfo
from lavie_jax.stages.settings import PRESETS, STAGE_INFO
from lavie_jax.stages.stage import guidance_of
from lavie_jax.weights import folder_hash, load_folder
from tests.tiny import make_base


@pytest.fixture(scope="module")
def weights():
    return {"base": load_folder(cascade.SHIPPED / "base", params=False)}


def resolved(weights, preset, **given):
    return cascade.resolve_settings(weights, ["base"], {"base": given}, preset=preset)["base"]


def test_every_stage_has_settings_that_are_allowed_for_each_preset():
    for name, stage in STAGES.items():
        assert set(stage.presets) == set(PRESETS[1:]), name
        for values in stage.presets.values():
            assert set(values) <= {field.name for field in dataclasses.fields(STAGE_INFO[name].settings)}
            STAGE_INFO[name].settings.make(stage.sampling, values)


def test_presets_of_the_shipped_models_never_take_more_work_than_their_own_settings():
    for name, stage in STAGES.items():
        shipped = load_folder(cascade.SHIPPED / name, params=False)
        work = []
        for preset in PRESETS:
            clip = stage.default_clip(shipped) if STAGE_INFO[name].consumes else None
            one = cascade.resolve_settings({name: shipped}, [name], {}, clip, preset)[name]
            timesteps = make_sampler(one.sampler, one.steps, shipped.schedule, one.spacing).timesteps
            work.append(sum(2 if mode == COMPUTED else 1 for mode in guidance_of(one).plan(timesteps)))
        assert work == sorted(work, reverse=True), name


def test_settings_that_are_given_come_before_a_preset_and_a_preset_before_the_folder(weights, caplog):
    folder = dataclasses.replace(weights["base"], presets={"fast": {"steps": 3, "guidance_every": 2}})
    official = resolved({"base": folder}, "official")
    assert official == resolved(weights, "official") and official.steps != 3
    fast = resolved({"base": folder}, "fast", steps=7, sampler=None)
    assert fast == dataclasses.replace(official, steps=7, guidance_every=2)
    # the folder has presets, but not this one
    with caplog.at_level("WARNING"):
        assert resolved({"base": folder}, "balanced") == official
    assert "has no preset balanced, only fast" in caplog.text
    folder = dataclasses.replace(weights["base"], presets={"fast": {"stpes": 3}})
    with pytest.raises(UserError, match="preset fast of .*base: sampling settings: unknown 'stpes'; did you mean"):
        resolved({"base": folder}, "fast")


def test_the_presets_of_a_stage_are_not_used_where_they_would_take_more_work(weights, caplog):
    """The models of film need one step, and have no presets of their own."""
    clip = ClipInfo(frames=3, height=64, width=64, fps=24)
    film = {name: load_folder(cascade.SHIPPED / "film" / name, params=False) for name in ("interpolation", "vsr")}
    for name, own in film.items():
        official, fast = (
            cascade.resolve_settings({name: own}, [name], {}, clip, preset)[name] for preset in ("official", "fast")
        )
        assert fast == official and f"stage {name}: the preset fast takes more work than" in caplog.text
    released = {"vsr": dataclasses.replace(film["vsr"], sampling=dict(STAGES["vsr"].sampling))}
    given = {"vsr": {"noise_level": 0}}
    fast = cascade.resolve_settings(released, ["vsr"], given, clip, "fast")["vsr"]
    assert (fast.sampler, fast.steps, fast.guidance_low) == ("dpm++2m", 8, 200)
    # few steps that only the sampler of the preset can do
    base = dataclasses.replace(weights["base"], presets={})
    assert resolved({"base": base}, "balanced", steps=1).sampler == "dpm++2m"


def test_given_settings_that_others_make_useless_are_warned_of(weights, caplog):
    resolved(weights, "fast", guidance=1.0, guidance_every=2, guidance_low=0, cache_depth=2)
    assert "guidance_every: without effect, as guidance is 1" in caplog.text
    assert "cache_depth: without effect, as cache_every is 1" in caplog.text


@pytest.mark.parametrize("more, warned", [({}, True), ({"segments": 2}, False)])
def test_known_frames_need_something_to_continue(more, warned, caplog):
    weights = {"prediction": load_folder(cascade.SHIPPED / "prediction", params=False)}
    cascade.resolve_settings(weights, ["prediction"], {"prediction": {"known_frames": 3, **more}})
    assert ("known_frames: without effect" in caplog.text) is warned


def test_a_preset_that_does_not_exist_and_guidance_that_is_never_applied_are_refused(weights, capsys):
    with pytest.raises(UserError, match="preset: unknown 'fats'"):
        resolved(weights, "fats")
    with pytest.raises(UserError, match="guidance_low must be at most guidance_high = 300, not 400"):
        resolved(weights, "official", guidance_low=400, guidance_high=300)
    with pytest.raises(UserError, match="contain none of the sampler's timesteps"):
        resolved(weights, "official", guidance_low=998)
    assert sample.main(["--prompt", "a red circle", "--preset", "fats"]) == 2
    assert "fats" in capsys.readouterr().err


def test_the_hash_of_a_folder_is_the_one_before_it_had_presets(tmp_path):
    """Samples that were made with the weights are recognised by it."""
    assert folder_hash(cascade.SHIPPED / "base").startswith("b780ae604e77")
    folder = make_base(tmp_path / "base")
    before, config = folder_hash(folder), json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"presets": {"fast": {"steps": 2}}}))
    assert folder_hash(folder) == before and load_folder(folder, params=False).presets["fast"] == {"steps": 2}


def test_the_distilled_model_is_found_by_name_and_differs_from_its_teacher_in_guidance_alone(weights):
    folders, shipped = cascade.stage_folders("base-distilled"), cascade.stage_folders()
    assert list(folders) == ["base"] and list(shipped) == list(STAGES)
    assert cascade.stage_folders(folders={"base": "base-distilled"}) == shipped | folders
    own = {"base": "base-distilled", "vsr": shipped["vsr"]}  # a path: only what is given
    assert cascade.stage_folders(folders=own) == folders | {"vsr": shipped["vsr"]}
    student, teacher = load_folder(folders["base"], params=False), weights["base"]
    assert student.sampling == dict(teacher.sampling) | {"guidance": 1.0} and student.presets == teacher.presets
    assert student.unet.config == teacher.unet.config
    assert cascade.stage_folders("base-distilled", stages=("base",)) == folders
