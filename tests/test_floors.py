"""The house: a floor imports only from those below it, a solver from no other, and a file has one concept."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "s3lab"
GROUND = {"errors", "files", "folder", "version", "wildcards", "markup", "shapes"}
FLOORS = ("algebra", "tensors", "solvers", "packing", "training", "models", "lab")
GROUPS = {
    "models": ("text", "structure", "prune", "search", "correct", "inputs", "measure", "storage", "recover"),
    "lab": ("draw", "run", "study", "explore"),
}
MOST_FILES = 18  # of one folder
FILES = sorted(PACKAGE.rglob("*.py"))
SHARED_BY_SOLVERS = {"base", "refit", "elimination", "fields", "kernels"}
LIGHT = {"torch", "numpy", "s3lab"}


def imported(path: Path, top_level_only: bool = False, typing_too: bool = False) -> set[str]:
    """Dotted names of the modules that a file imports, those for type checkers on request."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for line in test.body
        for node in ast.walk(line)
    }
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if id(node) in typing_only and not typing_too:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def home(path: Path) -> str:
    """The floor of a file, or its own name on the ground floor."""
    return path.relative_to(PACKAGE).parts[0]


def each(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", files, ids=lambda path: str(path.relative_to(PACKAGE)))


@each([path for path in FILES if home(path) in FLOORS])
def test_a_floor_imports_only_from_below(path):
    allowed = GROUND | set(FLOORS[: FLOORS.index(home(path)) + 1])
    # the package as a whole is everything, up to the top floor
    inside = {f"{name}.lab".split(".")[1] for name in imported(path) if name.split(".")[0] == "s3lab"}
    assert inside - {"__version__"} <= allowed


@each(FILES)
def test_a_file_is_short_but_for_its_docstrings(path):
    source = path.read_text()
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [ast.get_docstring(n) or "" for n in ast.walk(ast.parse(source)) if isinstance(n, owners)]
    assert len(source.splitlines()) - sum(len(text.splitlines()) for text in docstrings) <= 300


@each([path for path in FILES if home(path) != "lab" and not path.stem.endswith("_triton")])
def test_outside_the_lab_only_light_packages_are_imported_at_once(path):
    outside = {name.split(".")[0] for name in imported(path, top_level_only=True)}
    assert outside - set(sys.stdlib_module_names) <= LIGHT


def test_the_algebra_knows_no_tensor_library():
    for path in FILES:
        if home(path) == "algebra":
            assert {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) <= {"s3lab"}


@each([path for path in FILES if home(path) in GROUPS])
def test_a_group_imports_only_from_those_before_it(path):
    floor, *below = path.relative_to(PACKAGE).with_suffix("").parts
    groups = GROUPS[floor]
    if below[0] in groups:
        allowed = set(groups[: groups.index(below[0]) + 1])
        inside = {name.split(".")[2] for name in imported(path) if name.startswith(f"s3lab.{floor}.")}
        assert inside <= allowed


def test_no_files_import_each_other_in_a_circle_not_even_for_their_types():
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        names = imported(path, typing_too=True)
        graph[module] = {found for found in modules if found != module and (found in names or below(found, names))}
    TopologicalSorter(graph).prepare()  # raises CycleError, naming the files


def below(module: str, names: set[str]) -> bool:
    """Whether a name is of this module: ``s3lab.algebra.text.parse`` is of ``s3lab.algebra.text``."""
    return any(name.rpartition(".")[0] == module for name in names)


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda path: path.name)
def test_a_folder_says_what_it_is_for_and_is_no_crowd(folder):
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert len(list(folder.glob("*.py"))) <= MOST_FILES


def test_solvers_never_import_each_other():
    for path in (PACKAGE / "solvers").glob("*.py"):
        inside = {name.split(".")[2] for name in imported(path) if name.startswith("s3lab.solvers.")}
        if path.stem not in {"__init__", *SHARED_BY_SOLVERS}:
            assert inside <= SHARED_BY_SOLVERS, f"{path.name} imports {inside}"


def test_packing_knows_no_solver():
    for path in (PACKAGE / "packing").glob("*.py"):
        assert not any(name.startswith("s3lab.solvers") for name in imported(path)), path


def test_no_solver_names_a_pattern_and_no_pattern_a_solver():
    solvers = {path.stem for path in (PACKAGE / "solvers").glob("*.py")} - {"__init__", *SHARED_BY_SOLVERS}
    for path in (PACKAGE / "solvers").glob("[!_]*.py"):
        assert not any(name.startswith("s3lab.algebra.patterns") for name in imported(path))
    for path in (PACKAGE / "algebra").glob("*.py"):
        assert not solvers & {part for name in imported(path) for part in name.split(".")}


def test_nothing_is_evaluated_pickled_or_swallowed():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, path
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None and ast.unparse(node.type) not in {
                    "Exception",
                    "BaseException",
                }, path
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "pickle" not in ast.unparse(node), path
