"""Installs PyTorch for the converter's tests, unless that would install gigabytes of CUDA packages.

    python tools/torch_for_tests.py         # run by `make test`

A torch that is already in the environment is used as it is. Otherwise the pinned version is installed if pip offers a
CPU build of it (on macOS, or from an index of CPU builds). If every build depends on CUDA packages, nothing is
installed and the tests that need torch are skipped. Prints which case applies.
"""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

TORCH = "torch==2.13.0"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--quiet"]
CUDA_ONLY = Path(sys.prefix) / "torch-is-cuda-only"  # remembers the answer for this environment


def planned() -> list[str] | None:
    """Returns the packages that pip would install with torch, or None if it cannot install torch."""
    command = [*PIP, "install", "--dry-run", "--report", "-", TORCH]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        return None
    return [package["metadata"]["name"].lower() for package in json.loads(answer.stdout)["install"]]


def install() -> str | None:
    """Installs torch and returns None, or returns the reason for not installing it."""
    if CUDA_ONLY.exists():
        return CUDA_ONLY.read_text()
    names = planned()
    if names is None:
        return f"pip cannot find {TORCH} for Python {sys.version_info.major}.{sys.version_info.minor}"
    cuda = sum(name.startswith(("nvidia", "cuda")) for name in names)
    if cuda:
        CUDA_ONLY.write_text(f"{TORCH} would install {cuda} CUDA packages, gigabytes")
        return CUDA_ONLY.read_text()
    if subprocess.run([*PIP, "install", TORCH]).returncode:
        return f"installing {TORCH} failed"
    return None


def main() -> None:
    """Installs PyTorch, unless it is installed or would bring CUDA packages."""
    try:
        print(f"torch {metadata.version('torch')} is installed: the converter's tests run.")
        return
    except metadata.PackageNotFoundError:
        pass
    reason = install()
    if reason is None:
        print(f"A CPU build of {TORCH} was installed: the converter's tests run.")
    else:
        print(f"torch is not installed: {reason}. Tests that need it are skipped. To run them, install")
        print(f"a CPU build of torch>=2.6 with {sys.executable} -m pip.")


if __name__ == "__main__":
    main()
