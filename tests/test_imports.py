"""The layering of the package, read from its syntax trees: who imports whom, who prints, what is never called."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparsed

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "sparsed").rglob("*.py"))

# layer -> layers it may import; every layer may import itself and config, which imports nothing
ALLOWED = {
    "config": set(),
    "kernels": set(),
    "ranks": set(),
    "schedule": set(),
    "masks": set(),
    "blocks": set(),
    "selection": {"kernels", "blocks"},
    "watching": {"selection", "blocks"},
    "backends": {"kernels", "blocks", "ranks"},
    "kept": {"schedule", "selection", "backends", "blocks", "kernels", "masks", "ranks"},
    "recognition": {"masks"},
    "generation": {"kept", "recognition"},
    "tally": {"schedule"},
    "run": {"schedule", "selection", "backends", "masks", "kept", "generation", "tally", "ranks"},
    "laps": {"run"},
    "seams": {"run"},
    "patch": {"ranks", "run", "schedule", "selection", "backends", "seams"},
    "models": {"kernels", "ranks"},
    "sampling": {"ranks", "patch", "run", "schedule", "selection", "models"},
    "chat": set(),
    "prompts": {"chat"},
    "console": {"models", "ranks"},
    "saving_flags": {"console", "sampling"},
    "report": {"console", "chat"},
    "cli": {"console", "report", "sampling", "patch", "run", "schedule", "watching", "backends", "models", "chat"}
    | {"blocks", "prompts", "saving_flags", "ranks", "laps"},
    "pictures": {"console", "sampling", "patch", "watching", "blocks", "models", "prompts"},
    "evaluation": {"console", "sampling", "run", "watching", "backends", "models", "chat", "prompts", "selection"}
    | {"blocks", "saving_flags", "ranks", "pictures"},
    "__init__": {"sampling", "patch", "selection", "models"},
    "commands": {"cli"},
}
LEAVES = {"config", "models", "chat", "prompts"}  # not even config


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT / "sparsed").parts[0].removesuffix(".py")


def imported_layers(path: Path, node: ast.AST) -> list[str]:
    """The layers of this package that one import statement names; [] for anything else."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        package = ("sparsed", *path.relative_to(ROOT / "sparsed").parts[:-1])
        base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
        module = ".".join(filter(None, (base, node.module)))
        names = [f"{module}.{alias.name}" for alias in node.names] if module == "sparsed" else [module]
    else:
        return []
    return [name.split(".")[1] for name in names if name.startswith("sparsed.")]


def test_there_is_a_package_to_check():
    assert {layer_of(path) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    layer = layer_of(path)
    allowed = ALLOWED[layer] | {layer} | (set() if layer in LEAVES else {"config"})
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for imported in imported_layers(path, node):
            assert imported in allowed, f"line {node.lineno}: {layer} must not import {imported}"
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            lazy = layer != "commands" and [node.lineno for node in ast.walk(function) if imported_layers(path, node)]
            assert not lazy, f"line {lazy[0]}: imports of the package stand at the top of the file"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_calls_that_the_package_does_not_make(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            # tokens squared in time and memory; a device of the caller's choice
            assert name not in {"create_block_mask", "cuda"}, f"line {node.lineno}: {name}()"
            assert name != "print" or layer_of(path) == "console", f"line {node.lineno}: only the console prints"
        assert not isinstance(node, ast.Global), f"line {node.lineno}: global state"


@pytest.mark.parametrize("script", ["dream_generation.py", "llada_generation.py"])
def test_scripts_import_the_commands_only(script):
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert {name for name in imported if name.startswith("sparsed")} == {"sparsed.commands"}


def test_what_the_package_offers_is_imported_when_it_is_used():
    code = "import sys, sparsed; assert 'torch' not in sys.modules; sparsed.sparsify; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert set(sparsed.HOMES) == set(sparsed.__all__) <= set(dir(sparsed))
    for name in sparsed.__all__:
        assert getattr(sparsed, name).__module__.startswith(f"sparsed.{sparsed.HOMES[name]}")
    with pytest.raises(AttributeError, match="has no attribute 'sparsity'"):
        getattr(sparsed, "sparsity")  # noqa: B009


@pytest.mark.parametrize("folder", ["docs/make", "benchmarks", "demo"])
def test_only_the_benchmark_of_the_scripts_own_drawing_imports_them(folder):
    users = [path.name for path in (ROOT / folder).glob("*.py") if "sparsed.cli" in path.read_text(encoding="utf-8")]
    assert users == (["show.py"] if folder == "benchmarks" else [])
