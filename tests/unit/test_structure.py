"""The building itself: which room may import which, what stays light, what the names are."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import batchinfer

PACKAGE = Path(batchinfer.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

#: Imports go from a higher number to a lower one, or stay inside one room.
LEVELS = {
    "errors": 0,
    "telemetry": 0,
    "pace": 0,
    "records": 1,
    "live_table": 1,
    "run_metrics": 1,
    "tracing": 2,
    "progress": 1,
    "redact": 1,
    "moments": 1,
    "grammar_rules": 2,
    "quality": 1,
    "devices": 1,
    "spec": 2,
    "job_problems": 3,
    "job_file": 3,
    "fingerprint": 3,
    "chaos": 3,
    "storage": 4,
    "models": 5,
    "engine": 5,
    "prompts": 5,
    "detokenise": 5,
    "planner": 6,
    "speeds": 6,
    "audit": 6,
    "report": 6,
    "export": 6,
    "cluster": 7,
    "chaos_run": 8,
    "survey": 8,
    "cli_text": 8,
    "cli": 9,
    "__main__": 10,
    "__init__": 11,
}
#: Pairs of one level where the first may import the second.
NEIGHBOURS = {("job_file", "job_problems"), ("progress", "live_table"), ("quality", "records"), ("engine", "models")}
#: Rooms of one level, or of neighbouring ones, that must not know each other; engine/build.py joins engine and models.
STRANGERS = {
    "engine": {"storage", "models", "prompts", "spec", "job_file", "fingerprint", "progress"},
    "models": {"storage", "engine", "prompts", "spec", "job_file", "fingerprint", "progress"},
    "prompts": {"storage", "engine", "models"},
    "detokenise": {"storage", "engine", "models", "prompts"},
    "planner": {"engine", "models", "prompts", "audit", "report"},
    "audit": {"engine", "models", "prompts", "planner", "report"},
}
#: Who may import a heavy or foreign package.
OWNERS = {
    "ray": (
        "cluster/replica_pool.py",
        "cluster/replica.py",
        "cluster/ray_cluster.py",
        "cluster/metrics_export.py",
        "cluster/submit.py",
    ),
    "fsspec": ("storage/filesystem.py",),
    "torch": ("engine/", "models/", "cluster/replica.py"),
    "triton": ("engine/",),
    "numba": ("engine/cpu_ops.py", "engine/kernels_cpu.py"),
    "llvmlite": ("engine/kernels_cpu.py",),
    "llguidance": ("engine/grammar.py", "grammar_rules.py"),
    "pydantic": ("spec/", "job_file.py", "job_problems.py", "prompts/"),
    "opentelemetry": ("tracing/otel.py",),
    "rich": ("progress.py", "live_table.py", "cli/", "cli_text.py"),
    "click": ("cli/",),
}
BANNED_WORDS = re.compile(r"manager|helper|utils|handler|(^|_)data($|_)|(^|_)info($|_)|^process_")


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that ``path`` imports, at its top or inside a function, type checking left out."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for_types = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(path)}: relative import"
            assert node.module is not None
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "batchinfer"
                else {node.module}
            )
    return found


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_imports_go_one_way(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "batchinfer" or len(parts) == 1 or parts[1] == "__version__":
            continue
        there = parts[1]
        assert there in LEVELS, f"{place(path)} imports {name}, which has no level yet"
        allowed = there == here or LEVELS[there] < LEVELS[here] or (here, there) in NEIGHBOURS
        assert allowed, f"{place(path)} must not import {name}"
        strangers = STRANGERS.get(here, set()) - ({"models"} if place(path) == "engine/build.py" else set())
        assert there not in strangers, f"{place(path)} must not know {name}"


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_heavy_packages_have_few_owners(path: Path) -> None:
    for name in imports(path):
        owners = OWNERS.get(name.split(".")[0])
        if owners is not None:
            assert any(place(path).startswith(owner) for owner in owners), f"{place(path)} must not import {name}"


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) in ("engine", "models")], ids=place)
def test_engine_and_models_need_no_ray_and_no_pydantic(path: Path) -> None:
    allowed = {"torch", "transformers", "triton", "tokenizers", "safetensors", "huggingface_hub", "numpy", "batchinfer"}
    if place(path) == "models/demo.py":
        allowed |= {"gguf", "accelerate"}
    if place(path) == "engine/grammar.py":
        allowed |= {"llguidance"}
    if place(path) in OWNERS["numba"]:
        allowed |= {"numba", "llvmlite"}
    foreign = {name.split(".")[0] for name in imports(path)} - allowed - set(sys.stdlib_module_names)
    assert not foreign


def test_no_import_cycles() -> None:
    names = {"batchinfer." + place(path).removesuffix(".py").replace("/", "."): path for path in MODULES}
    graph = {name: {other for other in imports(path) if other in names} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' > '.join([*trail, name])}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_names_use_the_fields_terms(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    bad = [name for name in [path.stem, *names] if BANNED_WORDS.search(name.lower().strip("_"))]
    assert not bad, f"{place(path)}: {bad}"


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_public_functions_and_modules_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if path.stem != "__init__" or room(path) == "__init__":
        assert ast.get_docstring(tree), place(path)
    missing = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not missing, f"{place(path)}: {missing}"


def test_exported_names_exist_and_are_all() -> None:
    assert sorted(batchinfer.__all__) == sorted(batchinfer._HOMES)
    for name in batchinfer.__all__:
        assert getattr(batchinfer, name) is not None


@pytest.mark.parametrize("command", ["--help", "run --help", "plan --help", "status --help", "verify --help"])
def test_light_commands_import_neither_torch_nor_ray(command: str) -> None:
    code = (
        "import sys\nfrom batchinfer.cli import main\n"
        f"try:\n    main({command.split()!r})\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'pandas'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, batchinfer\n"
        "heavy = {'torch', 'ray', 'transformers', 'pyarrow', 'pydantic', 'fsspec'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
