"""Whether torch is installed for the converter's tests depends on the dependencies that pip would install."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "torch_for_tests.py"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The script as a module; `installs` lists the pip commands that it would have run."""
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
    assert tool.why_not() is None
    assert tool.installs[0][-2:] == ["install", tool.TORCH]


def test_a_cuda_build_is_not_installed_and_pip_runs_once(tool):
    tool.planned = lambda: ["torch", "nvidia-cublas", "cuda-toolkit"]
    reason = tool.why_not()
    assert "2 CUDA packages" in reason
    tool.planned = lambda: pytest.fail("pip ran again")
    assert tool.why_not() == reason
    assert not tool.installs


def test_pip_runs_again_after_a_failure(tool):
    tool.planned = lambda: None
    assert "pip finds no" in tool.why_not()
    tool.planned = lambda: ["torch"]
    assert tool.why_not() is None
