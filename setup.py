"""Copies the scripts and configs into wheels, as lavie_jax/scripts/; pyproject.toml has everything else."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SCRIPTS = ("sample.py", "train.py", "convert_torch.py")


class BuildWithScripts(build_py):
    """Adds the scripts, which `lavie_jax/commands.py` runs, to what is built."""

    def run(self):
        super().run()
        if self.editable_mode:  # the repository has them
            return
        target = Path(self.build_lib) / "lavie_jax" / "scripts"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree("configs", target / "configs", ignore=shutil.ignore_patterns("__pycache__"))
        for name in SCRIPTS:
            shutil.copy(name, target)


setup(cmdclass={"build_py": BuildWithScripts})
