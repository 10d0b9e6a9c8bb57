"""Gives the converter's tests a PyTorch, unless that would bring gigabytes of CUDA along.

Run by `make test`. Where pip can have the pinned version as a CPU build (macOS, or a package index that
serves one), it is installed; where every build on offer depends on CUDA packages, nothing is installed and
the tests that need torch are skipped. A torch that is already in the environment is always used. What is
printed says which case it is.
"""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

TORCH = "torch==2.13.0"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--quiet"]
CUDA_ONLY = Path(sys.prefix) / "torch-is-cuda-only"  # remembers that answer; goes with the environment


def planned() -> list[str] | None:
    """Names of the packages that installing torch would bring, or None where pip finds no way."""
    command = [*PIP, "install", "--dry-run", "--report", "-", TORCH]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        return None
    return [package["metadata"]["name"].lower() for package in json.loads(answer.stdout)["install"]]


def why_not() -> str | None:
    """Installs torch and returns None, or returns the reason for not installing it."""
    if CUDA_ONLY.exists():
        return CUDA_ONLY.read_text()
    names = planned()
    if names is None:
        return f"pip finds no {TORCH} for Python {sys.version_info.major}.{sys.version_info.minor}"
    cuda = sum(name.startswith(("nvidia", "cuda")) for name in names)
    if cuda:
        CUDA_ONLY.write_text(f"{TORCH} would bring {cuda} CUDA packages, gigabytes")
        return CUDA_ONLY.read_text()
    if subprocess.run([*PIP, "install", TORCH]).returncode:
        return f"installing {TORCH} failed"
    return None


def main() -> None:
    try:
        print(f"torch {metadata.version('torch')} is installed: the converter's tests run.")
        return
    except metadata.PackageNotFoundError:
        pass
    reason = why_not()
    if reason is None:
        print(f"{TORCH} was installed, a CPU build: the converter's tests run.")
    else:
        print(f"No torch: {reason}. Tests that need it are skipped; to run them, install a CPU build")
        print(f"of torch>=2.4 with {sys.executable} -m pip.")


if __name__ == "__main__":
    main()
