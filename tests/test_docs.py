"""Files, commands, flags, fields and configs in the documentation exist."""

import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")])
TEXTS = {page.relative_to(ROOT): page.read_text() for page in PAGES}
ALL = "\n".join(TEXTS.values())
LINKS = sorted({(page, link) for page, text in TEXTS.items() for link in re.findall(r"\]\((?!http)([^)\s]+)\)", text)})
FOLDERS = "benchmarks|configs|docs|lavie_jax|notebooks|tests|tools"
# Paths in backticks below a folder of the repository, but not examples such as those of recipes.
NAMED = sorted(
    set(re.findall(rf"`((?:{FOLDERS})/[\w/.-]*)(?::\w+)?`", ALL)) - {"configs/refine.py", "lavie_jax/stages/refine.py"}
)
COMMANDS = sorted(
    {
        command.strip()
        for text in (*TEXTS.values(), (ROOT / "Makefile").read_text())
        for command in re.findall(
            r"(?:python|PY\)) ((?:-m lavie_jax\S*|(?:sample|train|convert_torch|benchmarks/\w+)\.py).*)",
            re.sub(r"\s*\\\n\s*", " ", text),
        )
    }
)
CONFIGS = sorted(set(re.findall(r"configs/[\w/]+\.py(?::\w+)?", " ".join(COMMANDS))))
TARGETS = sorted(set(re.findall(r"`make ([a-z-]+)", ALL)))


def anchors(page: Path) -> set[str]:
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def split_command(command: str) -> tuple[str, list[str]]:
    """(script or module, its long options with their values) of a command line, without what follows -- or prose."""
    command = re.split(r"[`#>;]| -- ", command)[0]
    module = re.match(r"-m ([\w.]+)", command)
    script = module[1] if module else re.match(r"[\w/]+\.py", command)[0]
    return script, re.findall(r"(--[a-z][\w.-]*(?:=\S+)?)", command)


@functools.cache
def source(script: str) -> str:
    """The text of a script, or of the files that `python -m` runs."""
    if script.endswith(".py"):
        return (ROOT / script).read_text()
    path = ROOT / script.replace(".", "/")
    return (path / "__main__.py").read_text() if path.is_dir() else path.with_suffix(".py").read_text()


@functools.cache
def help_text(script: str) -> str:
    """What a command prints with --help."""
    command = [script] if script.endswith(".py") else ["-m", script]
    return subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True).stdout


@functools.cache
def config_fields(path: str) -> set[str]:
    """The dotted names of all fields that the command line can set for a config file."""
    from lavie_jax.training import options

    fields, groups = set(), [("", options.load(str(ROOT / path)).to_dict())]
    for prefix, group in groups:
        fields |= {prefix + name for name in group}
        groups += [(f"{prefix}{name}.", value) for name, value in group.items() if isinstance(value, dict)]
    return fields


@pytest.mark.parametrize("page, link", LINKS, ids=str)
def test_links_lead_somewhere(page, link):
    path, _, anchor = link.partition("#")
    target = (ROOT / page.parent / path).resolve() if path else ROOT / page
    assert target.exists()
    assert not anchor or anchor in anchors(target)


@pytest.mark.parametrize("path", NAMED)
def test_named_files_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:80])
def test_shown_options_exist(command):
    script, options = split_command(command)
    config = re.search(r"--config (\S+)", command)
    for option in options:
        name, _, _ = option.partition("=")
        if name.startswith("--config."):
            fields = config_fields(config[1] if config else "configs/base.py")
            assert name.removeprefix("--config.") in fields
        elif f'"{name}"' not in source(script):
            assert re.search(rf"{re.escape(name)}(?![\w-])", help_text(script)), f"{script} has no {name}"


@pytest.mark.parametrize("config", CONFIGS)
def test_shown_configs_exist_in_that_mode(config):
    path, _, mode = config.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert module.get_config(mode).steps > 0


def test_shown_make_targets_exist():
    assert set(TARGETS) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_gallery_is_the_output_of_its_script():
    from tools import make_gallery

    assert make_gallery.PAGE.read_text(encoding="utf-8") == make_gallery.page(), "run python -m tools.make_gallery"
    for clip in make_gallery.CLIPS:
        assert (ROOT / f"docs/images/gallery-{clip.name}.gif").stat().st_size < 700_000


def test_the_fast_tests_exist():
    (names,) = re.findall(r"^FAST := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name in names.replace("\\\n", " ").split():
        assert (ROOT / f"tests/test_{name}.py").exists()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
