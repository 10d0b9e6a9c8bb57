"""Torch is installed for the converter's tests only if pip would not install CUDA packages with it."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "torch_for_tests.py"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Returns the script as a module whose `installs` records pip commands instead of running them."""
    spec = importlib.util.spec_from_file_location("torch_for_tests", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.installs = []

    def run(command, **options):
        module.installs.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(module.subprocess, "run", run)
    module.CUDA_ONLY = tmp_path / "torch-is-cuda-only"
    return module


def test_a_cpu_build_is_installed(tool):
    tool.planned = lambda: ["torch", "sympy", "filelock"]
    assert tool.install() is None
    assert tool.installs[0][-2:] == ["install", tool.TORCH]


def test_a_cuda_build_is_not_installed_and_pip_is_asked_once(tool):
    tool.planned = lambda: ["torch", "nvidia-cublas", "cuda-toolkit"]
    reason = tool.install()
    assert "2 CUDA packages" in reason
    tool.planned = lambda: pytest.fail("asked again")
    assert tool.install() == reason
    assert not tool.installs


def test_if_pip_fails_it_is_asked_again(tool):
    tool.planned = lambda: None
    assert "pip cannot find" in tool.install()
    tool.planned = lambda: ["torch"]
    assert tool.install() is None
