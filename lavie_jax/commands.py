"""The commands that an installation provides: `lavie-sample`, `lavie-train`, `lavie-convert` and `lavie-app`.

They run the scripts at the top of the repository, unchanged. Wheels contain copies of these and of `configs/` in
`lavie_jax/scripts/` (`setup.py`).
"""

import importlib.util
import runpy
import sys
from pathlib import Path

from lavie_jax.errors import UserError, one_line_errors

PACKAGE = Path(__file__).parent


def scripts() -> Path:
    """Returns the folder with the scripts and `configs/`: the repository, or in an installed wheel its copy."""
    packaged = PACKAGE / "scripts"
    return packaged if packaged.is_dir() else PACKAGE.parent


def config_file(name: str) -> Path | None:
    """Returns one of the configs that come with the scripts, such as `configs/base.py`, or None.

    Configs import each other as `configs`, which is therefore made importable.
    """
    path = scripts() / name
    if not name.startswith("configs/") or not path.is_file():
        return None
    if importlib.util.find_spec("configs") is None:
        sys.path.insert(0, str(scripts()))
    return path


def sample() -> None:
    """Runs sample.py."""
    _run("sample.py")


def train() -> None:
    """Runs train.py."""
    _run("train.py")


def convert() -> None:
    """Runs convert_torch.py."""
    _run("convert_torch.py")


def app() -> None:
    """Runs `python -m lavie_jax.app`."""
    with one_line_errors():
        if importlib.util.find_spec("gradio") is None:
            raise UserError("lavie-app needs Gradio: pip install 'lavie_jax[app]'")
    runpy.run_module("lavie_jax.app", run_name="__main__", alter_sys=True)


def _run(name: str) -> None:
    """Runs a script as Python would: as the main module, with its folder on the path."""
    sys.path.insert(0, str(scripts()))
    runpy.run_path(str(scripts() / name), run_name="__main__")
