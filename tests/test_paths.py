"""`~` in every path of a user: flags of all commands, fields of all configs, and arguments of the library."""

import argparse
import contextlib
import importlib
import os
import pwd
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import lavie_jax
from lavie_jax import parallel
from lavie_jax.data import video_files
from lavie_jax.data.config import DataConfig
from lavie_jax.data.latents import open_set
from lavie_jax.data.pipeline import open_examples
from lavie_jax.data.tokens import load_tokenizer
from lavie_jax.errors import Parser, UserError, user_location, user_path
from lavie_jax.evaluation.__main__ import COMMANDS as EVALUATION
from lavie_jax.fields import rule_of, settable
from lavie_jax.stages.settings import STAGE_INFO
from lavie_jax.training import options
from lavie_jax.training.config import VAE_STAGE, defaults, group_classes, run_class
from lavie_jax.weights import folder_hash, load_folder, load_part

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "sample": [],
    "convert_torch": [],
    "lavie_jax.curation.__main__": [],
    "lavie_jax.evaluation.cascade": [],
    "lavie_jax.evaluation.moving_shapes": [],
    "lavie_jax.evaluation.noise_levels": [],
    "lavie_jax.parity.__main__": [],
    "lavie_jax.planner.__main__": [],
    "lavie_jax.training.divergence": [],
}
SCRIPTS = sorted(
    path for folder in ("benchmarks", "tools") for path in (ROOT / folder).glob("*.py")
    if re.search(r"Parser\(", path.read_text()) and "type=Path" in path.read_text()
)  # fmt: skip
# Flags whose help or placeholder has one of these take paths; `KIND:PATH` and such are text.
WORDS = re.compile(r"\b(folder|file|FILE|DIR|FOLDER|PATH|WEIGHTS|TABLE|CHECKOUT|PYTHON|ORIGINAL)\b")
NOT_PATHS = ("--part", "--program", "--format", "--no-contact-sheet", "--overwrite", "--latent-sizes", "--latent-fps",
             "--code", "--case", "--stage", "--min-aesthetic")  # fmt: skip


class Stop(Exception):
    """Raised instead of parsing."""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def no_home(monkeypatch):
    """A user without HOME and without an entry in the user database, as in many containers."""

    def unknown(*_):
        raise KeyError("unknown user")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)


def actions(monkeypatch, run) -> list[tuple[argparse.ArgumentParser, argparse.Action]]:
    """All (parser, argument) of the first command line that `run` parses, those of its subcommands included."""
    parsers = []

    def record(self, *args, **kwargs):
        parsers.append(self)
        raise Stop

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", record)
    monkeypatch.setattr(sys, "argv", ["command"])
    with contextlib.suppress(Stop):
        run()
    found = []
    while parsers:
        parser = parsers.pop()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            else:
                found.append((parser, action))
    assert found
    return found


def check_flags(found, home):
    paths = 0
    for parser, action in found:
        name = (action.option_strings or [action.dest])[0]
        if action.type in (Path, user_location):
            paths += 1
            assert str(parser._get_value(action, "~/x")) == f"{home}/x", name
        elif action.nargs != 0 and name not in NOT_PATHS:
            assert not WORDS.search(f"{action.metavar} {action.help}") or action.type in (int, float), name
    assert paths


@pytest.mark.parametrize("module", COMMANDS)
def test_every_flag_of_a_command_that_takes_a_path_expands_the_home_folder(module, home, monkeypatch):
    command = importlib.import_module(module)
    check_flags(actions(monkeypatch, lambda: command.main(["--weights"])), home)


@pytest.mark.parametrize("name", EVALUATION)
def test_every_flag_of_a_metric_that_takes_a_path_expands_the_home_folder(name, home):
    parser = EVALUATION[name][0](name)
    check_flags([(parser, action) for action in parser._actions if action.dest != "help"], home)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_flag_of_a_script_that_takes_a_path_expands_the_home_folder(path, home, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), str(path.parent), *sys.path])
    script = runpy.run_path(str(path))
    check_flags(actions(monkeypatch, script["main"]), home)


def test_the_home_folder_in_locations_with_a_kind(home):
    assert user_location("webdataset:~/a/*.tar") == f"webdataset:{home}/a/*.tar"
    assert user_location("~/a:b") == f"{home}/a:b"
    for text in ("a~b", "module:function", "gs://bucket/a", "folder:data//x", "random", ""):
        assert user_location(text) == text


def path_fields() -> set[str]:
    found = set()
    for stage in (VAE_STAGE, *STAGE_INFO):
        for group, cls in {"": run_class(stage), **group_classes(stage)}.items():
            for name, declared in settable(cls).items():
                if rule_of(declared).path:
                    found.add(f"{group}.{name}".lstrip("."))
                else:
                    assert not re.search(r"folder to|folder with|PATH|location of", rule_of(declared).help), name
    return found


def test_every_field_of_a_config_that_is_a_path_expands_the_home_folder(home):
    fields = path_fields()
    assert fields == {
        "init_from", "vae_from", "text_from", "data.path", "data.image_path", "data.videos", "data.image_parts",
    }  # fmt: skip
    (home / "config.py").write_text(
        "from lavie_jax.training.options import new_config\n\n"
        "def get_config(mode):\n"
        "    config = new_config('base')\n"
        "    config.steps, config.batch, config.vae_from = 1, 1, '~/vae'\n"
        "    config.data.videos = ('webdataset:~/a', 'moving_shapes')\n"
        "    return config\n"
    )
    config = options.load("~/config.py")
    assert config.vae_from == f"{home}/vae"
    assert config.data.videos == (f"webdataset:{home}/a", "moving_shapes")
    for name in fields:
        kind = type(defaults("base")[name] if "." not in name else defaults("base")["data"][name.partition(".")[2]])
        options.override(config, name, "video_folder:~/x" if kind is tuple else "~/x")
        value = config
        for part in name.split("."):
            value = value[part]
        assert value == ((f"video_folder:{home}/x",) if kind is tuple else f"{home}/x")
    config.vae_from = "random"
    options.override(config, "vae_from", "random")
    assert config.vae_from == "random"


def test_train_takes_the_home_folder_in_its_flags(home):
    (home / "c.py").write_text((ROOT / "configs/moving_shapes/vae.py").read_text())
    assert options.parse(["--config", "~/c.py:tiny", "--workdir=~/run"]).workdir == home / "run"


@pytest.mark.parametrize(
    "call",
    [
        lambda: lavie_jax.load("~/nothing"),
        lambda: lavie_jax.load(folders={"base": "~/nothing"}),
        lambda: load_folder("~/nothing"),
        lambda: load_part("~/nothing", "vae"),
        lambda: folder_hash("~/nothing"),
        lambda: load_tokenizer("~/nothing"),
        lambda: video_files.read_clip("~/nothing"),
        lambda: open_set("~/nothing"),
        lambda: open_examples(DataConfig(source="video_folder", path="~/nothing"), batch_size=1),
        lambda: open_examples(DataConfig(source="webdataset", path="~/nothing"), batch_size=1),
    ],
)
def test_functions_of_the_library_expand_the_home_folder(call, home):
    with pytest.raises(UserError, match=re.escape(str(home / "nothing"))):
        call()


def test_videos_are_saved_in_the_home_folder(home):
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    assert lavie_jax.save_video(frames, "~/a/clip.mp4", fps=8) == home / "a/clip.mp4"
    assert (home / "a/clip.mp4").is_file()
    assert len(video_files.read_clip("~/a/clip.mp4")[0]) == 2


def test_an_unknown_home_folder_is_one_line(no_home):
    with pytest.raises(UserError, match=r"^~/x: the home folder that ~ stands for is unknown; set HOME"):
        user_path("~/x")
    parser = Parser(prog="command")
    parser.add_argument("--out", type=Path)
    with pytest.raises(UserError, match=r"--out: ~/x: the home folder .* is unknown"):
        parser.parse_args(["--out", "~/x"])
    with pytest.raises(UserError, match="is unknown"):
        options.parse(["--config", "~/c.py", "--workdir", "run"])


def test_without_a_home_folder_programs_are_not_kept_but_everything_works(no_home, monkeypatch):
    check_not_kept(monkeypatch)


def test_in_a_home_folder_that_cannot_be_written_programs_are_not_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    check_not_kept(monkeypatch)


def check_not_kept(monkeypatch):
    updates, warnings = {}, []
    monkeypatch.setattr(parallel.logging, "warning", lambda text, *args: warnings.append(text % args))
    monkeypatch.setattr(parallel, "_cache_dir", lambda: None)
    monkeypatch.setattr(parallel.jax.config, "update", lambda name, value: updates.update({name: value}))
    parallel.keep_compiled_programs()
    assert "jax_compilation_cache_dir" not in updates
    (warning,) = warnings
    assert "compiled programs are not kept" in warning and "JAX_COMPILATION_CACHE_DIR" in warning


def test_the_folder_of_compiled_programs_may_start_with_the_home_folder(home, monkeypatch):
    updates = {}
    monkeypatch.setattr(parallel.jax.config, "update", lambda name, value: updates.update({name: value}))
    for given, expected in ((None, home / ".cache/lavie_jax/xla"), ("~/programs", home / "programs")):
        monkeypatch.setattr(parallel, "_cache_dir", lambda given=given: given)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        parallel.keep_compiled_programs()
        assert updates["jax_compilation_cache_dir"] == os.fspath(expected)


def test_stored_programs_come_from_a_folder_of_the_user_alone(tmp_path, monkeypatch):
    """They are pickles."""
    folder, kept, warnings = tmp_path / "programs", [], []
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setattr(parallel, "keep_programs", kept.append)
    monkeypatch.setattr(parallel.logging, "warning", lambda text, *args: warnings.append(text % args))
    parallel._keep_programs_in(tmp_path)
    assert kept == [folder] and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    parallel._keep_programs_in(tmp_path)
    assert kept == [folder] and "others can write to" in warnings[0]
