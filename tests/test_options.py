"""The command line of a run: every field of every config can be set, and mistakes are named."""

import dataclasses
import math
from pathlib import Path

import pytest

from lavie_jax.data.config import DataConfig
from lavie_jax.errors import UserError
from lavie_jax.fields import check_rules, convert, describe, field, parse_text
from lavie_jax.models.unet_config import UNetConfig
from lavie_jax.training import config as run_config
from lavie_jax.training import options
from lavie_jax.weights import load_part

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def overridden(name, text, spec="configs/base.py"):
    config = options.load(spec)
    options.override(config, name, text)
    for part in name.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("data.full_height", "640", 640),  # a field that the config file does not show
        ("data.slowest_fps", "4", 4.0),
        ("data.fps", "None", None),
        ("data.path", "", None),
        ("data.image_path", "None", None),
        ("data.path", "5", "5"),
        ("data.buckets", "((320,512),(512,320))", ((320, 512), (512, 320))),
        ("data.buckets", "[[320, 512]]", ((320, 512),)),
        ("data.video_weights", "((0,(1,0.5)),(100,(0,1)))", ((0, (1.0, 0.5)), (100, (0.0, 1.0)))),
        ("data.videos", "webdataset:a", ("webdataset:a",)),
        ("data.videos", "('webdataset:a', 'tfds:b')", ("webdataset:a", "tfds:b")),
        ("sampling.steps", "20", 20),  # None in the config: the stage's default
        ("sampling.guidance", "5", 5.0),
        ("sampling.steps", "None", None),
        ("unet.num_class_embeds", "1000", 1000),
        ("unet.num_class_embeds", "None", None),
        ("unet.attention_levels", "[true, false, true, true]", (True, False, True, True)),
        ("unet.block_out_channels", "32,64", (32, 64)),
        ("unet.block_out_channels", "32", (32,)),
        ("text_encoder.layer_norm_eps", "1e-6", 1e-6),
        ("steps", "1e3", 1000),
        ("inflate", "TRUE", True),
        ("loss.logit_normal", "", ()),
        ("loss.logit_normal", "(1, 2)", (1.0, 2.0)),
        ("prompts", "", ()),
        ("prompts", "()", ()),
        ("prompts", "a cat, sitting", ("a cat, sitting",)),
        ("prompts", "(a cat) sitting", ("(a cat) sitting",)),
        ("prompts", "7", ("7",)),
        ("prompts", "('a, b', 'c')", ("a, b", "c")),
        ("prompts", '["a, b", "c"]', ("a, b", "c")),
    ],
)
def test_any_field_is_parsed_as_its_declared_type(name, text, value):
    result = overridden(name, text)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("steps", "many", "'steps' takes a whole number, not 'many'"),
        ("steps", "1.5", "'steps' takes a whole number, not 1.5"),
        ("data.fps", "fast", "'data.fps' takes a number or None, not 'fast'"),
        ("data.buckets", "(16,24)", r"'data.buckets' takes a list of \(a whole number, a whole number\)"),
        ("data.buckets", "((16,24,3),)", "'data.buckets' takes a list of"),
        ("data.video_weights", "(1,2)", "'data.video_weights' takes a list of"),
        ("unet.attention_levels", "yes", "takes a list of True or False, not 'yes'"),
        ("inflate", "maybe", "takes True or False, not 'maybe'"),
        ("prompts", "['a' 'b', c]", "takes a list of text"),
        ("data.hight", "3", "did you mean 'height'"),
        ("data.null_caption", "x", "unknown config field"),  # set by the stage
        ("vae.scaling_factor", "1", "unknown config field"),  # measured, or read with the VAE
        ("dta.height", "3", "unknown config group 'dta'; did you mean 'data.height'"),
        ("data", "3", "is a group; set one of data.source"),
    ],
)
def test_mistakes_name_the_field_and_its_type(name, text, message):
    with pytest.raises(UserError, match=message):
        overridden(name, text)


def test_every_field_of_every_group_can_be_set_to_its_own_value():
    for stage in ("vae", "base", "interpolation", "vsr"):
        config = options.new_config(stage)
        config.steps, config.batch = 1, 2
        before = config.to_dict()
        for group, kinds in run_config.field_types(stage).items():
            for name in kinds:
                value = config[group][name] if group else config[name]
                options.override(config, f"{group}.{name}".lstrip("."), str(value))
        assert config.to_dict() == before


def test_a_config_file_needs_to_show_only_its_differences(tmp_path):
    file = tmp_path / "short.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(mode=''):\n"
        "    return ConfigDict({'stage': 'vae', 'steps': 3, 'batch': 2, 'vae': {'block_out_channels': [8, 8]}})\n"
    )
    config = options.load(str(file))
    assert config.vae.block_out_channels == (8, 8) and config.optimizer.learning_rate == 1e-4
    assert DataConfig(**config.data) == DataConfig() and config.mesh.data == -1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('no luck')", "bad.py fails with RuntimeError: no luck"),
        ("def f(:", "bad.py fails with SyntaxError"),
        ("x = 1", "defines no get_config"),
        ("def get_config(mode): return 3", "returns a ConfigDict, not 3"),
        ("def get_config(mode): return C(steps=3)", "does not set `stage`"),
        ("def get_config(mode): return C(stage='vae', steps=3)", "does not set 'batch'"),
        ("def get_config(mode): return C(stage='bas')", "unknown stage 'bas'; did you mean 'base'"),
        ("def get_config(mode): return C(stage='base', stepz=3)", "unknown config field 'stepz'; did you mean 'steps'"),
        ("def get_config(mode): return C(stage='base', data=C(hight=3))", "'data.hight'; did you mean 'height'"),
        ("def get_config(mode): return C(stage='base', steps='3')", "'steps' takes a whole number, not '3'"),
        ("def get_config(mode): return C(stage='base', data=3)", "'data' is a group of fields, not 3"),
    ],
)
def test_a_bad_config_file_is_one_line(body, message, tmp_path):
    (tmp_path / "bad.py").write_text(
        f"import ml_collections\ndef C(**fields): return ml_collections.ConfigDict(fields)\n{body}\n"
    )
    with pytest.raises(UserError, match=message):
        options.load(f"{tmp_path}/bad.py")


def test_missing_files_and_unknown_modes_are_refused():
    with pytest.raises(UserError, match="nowhere.py does not exist"):
        options.load("configs/nowhere.py")
    with pytest.raises(UserError, match="base.py:tinny: unknown config mode 'tinny'; did you mean 'tiny'"):
        options.load("configs/base.py:tinny")


def test_networks_can_come_from_the_folder_that_a_run_starts_from():
    words = [f"--config.{name}=None" for name in ("unet", "text_encoder", "vae")]
    words += ["--config=configs/moving_shapes/base.py", "--workdir=w", "--config.init_from=lavie_jax/assets/base"]
    config = options.parse(words).config
    for name in ("unet", "text_encoder", "vae"):
        actual = load_part("lavie_jax/assets/base", name, params=False).config.to_dict()
        assert all(list(v) == actual[k] if isinstance(v, tuple) else v == actual[k] for k, v in config[name].items())
    assert config.unet.block_out_channels == (32, 64, 96)  # not those of the config file
    with pytest.raises(UserError, match="set init_from"):
        options.parse([*words[:-1], "--config.init_from="])
    with pytest.raises(UserError, match="inflate=True changes"):
        options.parse([*words, "--config.inflate=True"])
    with pytest.raises(UserError, match="unet is None"):
        options.parse([*words, "--config.unet.in_channels=4"])


def test_recorded_configs_of_older_versions_are_completed():
    old = {"stage": "base", "unet": {"in_channels": 4}, "data": {"stills": ["a:b"], "clip_stills": 0.5}, "seed": 1}
    new = run_config.complete(old)
    assert new["unet"] == dataclasses.asdict(UNetConfig()) and new["seed"] == 1 and "vae" not in new
    assert new["data"]["image_parts"] == ["a:b"] and new["data"]["images_from_clips"] == 0.5
    assert run_config.complete({"seed": 3}) == {"seed": 3}


def test_the_help_lists_every_field_with_its_value():
    text = options.help_text(["--config", "configs/vsr.py", "--help"])
    for line in (
        "stage = 'vsr'",
        "data.handheld = 0.25 (a number)",
        "sampling.noise_level = None (a whole number or None)",
    ):
        assert f"  {line}" in text
    assert "fraction of the clips that are images under a moving camera" in text
    for name in options.fields(options.load("configs/vsr.py")):
        assert f"  {name} = " in text
    assert "  steps (a whole number)" in options.help_text()


def test_rules_of_fields():
    @dataclasses.dataclass
    class Example:
        rate: float = field("help", default=0.5, low=0, below=1)
        size: int | None = field("help", default=None, low=1, high=8)
        kind: str = field("help", default="a", choices=("a", "b"))

    check_rules(Example, dataclasses.asdict(Example()))
    for values, message in (
        ({"rate": 1.0}, "'x.rate' must be at least 0 and below 1, not 1.0"),
        ({"rate": math.nan}, "'x.rate' must be"),
        ({"size": 9}, "'x.size' must be from 1 to 8, not 9"),
        ({"kind": "c"}, "'x.kind': unknown value 'c'. Allowed: a, b"),
    ):
        with pytest.raises(UserError, match=message):
            check_rules(Example, values, "config field 'x.{}'")


def test_values_of_files_are_converted_by_type():
    assert convert("f", [[1, [2, 3]]], tuple[tuple[int, tuple[float, ...]], ...]) == ((1, (2.0, 3.0)),)
    assert convert("f", None, int | None) is None and convert("f", 2.0, int) == 2
    assert parse_text("f", "0x", str) == "0x" and describe(tuple[int, ...] | None) == "a list of whole numbers or None"
    for value, kind in ((True, int), (1, bool), ("1", float), (None, int), ((1,), tuple[int, int])):
        with pytest.raises(UserError, match="f takes"):
            convert("f", value, kind)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_of_training_have_the_range_of_seeds_of_sampling(seed):
    values = run_config.defaults("base") | {"steps": 1, "batch": 1}
    run_config.check_values(values | {"seed": 2**32 - 1})
    with pytest.raises(UserError, match=f"'seed' must be from 0 to 4294967295, not {seed}"):
        run_config.check_values(values | {"seed": seed})
