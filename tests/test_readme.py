"""The README stays true: files that it names exist, options and configs that it shows are real."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PATHS = sorted({*re.findall(r"\]\(([\w/.-]+)\)", README), *re.findall(r"^\| `([\w/.]+)` \|", README, re.MULTILINE)})
COMMANDS = re.findall(r"^python (sample\.py|convert_torch\.py) (.*)$", README, re.MULTILINE)
CONFIGS = sorted(set(re.findall(r"configs/[\w/]+\.py(?::\w+)?", README + (ROOT / "Makefile").read_text())))


@pytest.mark.parametrize("path", PATHS)
def test_named_files_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("script, arguments", COMMANDS)
def test_shown_options_exist(script, arguments):
    source = (ROOT / script).read_text()
    for option in re.findall(r"(--[a-z][a-z-]*)", arguments):
        assert f'"{option}"' in source


@pytest.mark.parametrize("config", CONFIGS)
def test_shown_configs_exist_in_that_mode(config):
    path, _, mode = config.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert module.get_config(mode).steps > 0
