"""The shape of the package: imports point down, heavy libraries have one door, files and functions stay small."""

import ast
from pathlib import Path

import pytest

from lowrank_rlhf.cli import STAGES

PACKAGE = Path(__file__).parent.parent / "lowrank_rlhf"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}

# From the top down; what stands on one line may import each other.
LAYERS = [
    {"launch"},
    {"cli"},
    {"doctor", "bench", "arena", "remote", "export", "pipeline", "config_pipeline", "pipeline_report", "plan"},
    {"stages"},
    {"evaluation"},
    {"sampling", "score_file"},
    {"rewards"},
    {"rollout", "scoring", "rollout_samples"},
    {"samples"},
    {"resumable", "callbacks"},
    {"runs"},
    {"checkpoints", "plots", "tracking", "cards", "adapters"},
    {"snippets"},
    {"backbone"},
    {"data"},
    {"logps", "losses", "advantages", "kl", "shaping"},
    {"logps_cpu"},
    {"products"},
    {"panel"},
    {"stability"},
    {"loader", "phases", "progress", "stability_rules", "http_json", "pipeline_recipes"},
    {"out_of_memory"},
    {"memory", "processes", "quiet"},
    {"config", "config_grpo", "config_pipeline", "config_preference"},
    {"errors", ""},  # "" is the package itself: its version
]
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}
PURE = ["logps", "logps_cpu", "losses", "advantages", "kl", "products"]

MAX_FILE, MAX_FUNCTION = 300, 50
LONGER_FILES: dict[str, int] = {}


def imports(name):
    """(module, line) of every import in a file, also those inside functions; `from a import b` counts as a and a.b."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports here are absolute"
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def own_imports(name):
    """(dotted path inside the package, line); a name that is no module belongs to the module before it."""
    for module, line in imports(name):
        head, _, inside = module.partition(".")
        is_module = f"{inside.replace('.', '/')}.py" in FILES or f"{inside.replace('.', '/')}/__init__.py" in FILES
        if head == "lowrank_rlhf" and is_module:
            yield inside, line


def unit(name):
    """The layer's name for a file or dotted path: its first part, "" for the package itself."""
    return name.removesuffix("__init__.py").removesuffix(".py").replace("/", ".").split(".")[0]


def test_every_module_has_a_layer():
    assert {unit(name) for name in FILES} <= set(RANK)
    assert len(FILES) > 20


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    upward = [f"line {line}: {target}" for target, line in own_imports(name) if RANK[unit(target)] < RANK[unit(name)]]
    assert upward == []


def test_the_walk_sees_imports_inside_functions():
    assert {"doctor", "runs"} <= {target for target, _ in own_imports("cli.py")}


def test_no_stage_imports_another_stage():
    for stage in STAGES:
        others = {f"stages.{other}" for other in STAGES if other != stage}
        assert {target for target, _ in own_imports(f"stages/{stage}.py")}.isdisjoint(others)


@pytest.mark.parametrize("library", ["peft", "bitsandbytes"])
def test_only_the_backbone_imports(library):
    importers = {name for name in FILES for module, _ in imports(name) if module.split(".")[0] == library}
    assert importers
    assert {unit(name) for name in importers} == {"backbone"}


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_nothing_of_ours_but_pure_ones_and_no_model_code(module):
    name = f"{module}.py"
    assert {target for target, _ in own_imports(name)} <= set(PURE)
    libraries = {"math", "typing", "torch", "trl", "collections", "contextlib", "lowrank_rlhf"}
    assert {module.split(".")[0] for module, _ in imports(name)} <= libraries
    assert {module for module, _ in imports(name) if module.startswith("trl.")} <= {
        "trl.kernels",
        "trl.kernels.ChunkedLogProbFunction",
    }


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_small(name):
    lines = FILES[name].read_text(encoding="utf-8").count("\n")
    assert lines <= LONGER_FILES.get(name, MAX_FILE)
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= MAX_FUNCTION}
    assert long == {}


def test_exceptions_to_the_file_limit_are_still_needed():
    for name in LONGER_FILES:
        assert FILES[name].read_text(encoding="utf-8").count("\n") > MAX_FILE


def test_no_grab_bags():
    names = {part for name in FILES for part in name.removesuffix(".py").split("/")}
    assert names.isdisjoint({"utils", "util", "helpers", "common", "misc", "experimental"})
