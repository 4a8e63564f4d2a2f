"""pyproject.toml says what is needed; the pins, the conda environment and the Makefile must say the same."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rattler import MatchSpec

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA_NAMES = {
    "huggingface-hub": "huggingface_hub",
    "torch": "pytorch",
    "matplotlib": "matplotlib-base",
    "seaborn": "seaborn-base",
}


def direct_dependencies() -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]
    found = {str(canonicalize_name(r.name)): r for r in map(Requirement, lines)}
    del found["s3lab"]
    return found


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in found}


def conda() -> tuple[dict[str, str], dict[str, str], list[str]]:
    """The conda packages and the pip ones with their bounds, and pip's other lines."""
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in entries if isinstance(entry, dict))
    specs = [MatchSpec(entry) for entry in entries if isinstance(entry, str)]
    required = [Requirement(line) for line in pip if not line.startswith("-")]
    return (
        {spec.name.normalized: str(spec.version or "") for spec in specs},
        {canonicalize_name(r.name): str(r.specifier) for r in required},
        [line for line in pip if line.startswith("-")],
    )


def test_the_bare_package_needs_torch_and_numpy_only():
    assert {Requirement(line).name for line in PROJECT["dependencies"]} == {"torch", "numpy"}


def test_one_requirement_reads_alike_in_every_extra():
    seen: dict[str, str] = {}
    for line in [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]:
        name = canonicalize_name(Requirement(line).name)
        assert seen.setdefault(name, line) == line


def test_all_is_every_extra():
    (everything,) = EXTRAS["all"]
    assert Requirement(everything).extras == EXTRAS.keys() - {"all"}


def test_every_direct_dependency_is_pinned_within_its_bounds():
    assert pins().keys() == direct_dependencies().keys()
    for name, pin in pins().items():
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert direct_dependencies()[name].specifier.contains(exact.version)


def test_torch_is_pinned_to_no_build():
    assert "+" not in str(pins()["torch"].specifier)


def test_conda_has_the_same_packages_and_bounds():
    packages, by_pip, _ = conda()
    assert packages.pop("python") == PROJECT["requires-python"]
    packages.pop("pip")
    wanted = {name: str(r.specifier) for name, r in direct_dependencies().items()}
    del wanted["triton"]  # comes with pytorch
    given = {CONDA_NAMES.get(name, name): name for name in wanted}
    assert {given.get(name, name): bound for name, bound in packages.items()} | by_pip == wanted


def test_conda_installs_the_package_itself_last():
    assert conda()[2] == ["--editable ."]


def plan(*arguments: str) -> str:
    """What make would do, asked without the settings of a make that runs these tests."""
    clean = {"PATH": os.environ["PATH"]}
    made = subprocess.run(
        ["make", "--dry-run", *arguments], cwd=ROOT, env=clean, capture_output=True, text=True, check=True
    )
    return made.stdout


@pytest.mark.parametrize("target", ["reproduce", "test", "lint"])
def test_make_installs_once_from_the_pins(target):
    steps = plan("--always-make", target)
    assert steps.count("pip install") == 1
    assert "--constraint constraints.txt" in steps


def test_ci_runs_what_make_test_runs():
    (makes,) = [line for line in plan("test").splitlines() if " -m pytest" in line]
    (runs,) = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if " -m pytest" in line]
    assert runs.removeprefix("exec ").removesuffix(' "$@"') == makes.strip()


def test_import_pulls_in_torch_and_numpy_only():
    heavy = "triton matplotlib ipywidgets transformers pandas seaborn papermill lm_eval"
    code = f"import sys, s3lab; print(*(name for name in {heavy.split()!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_what_the_package_imports_is_declared():
    modules = {"yaml": "pyyaml"}
    for path in (ROOT / "s3lab").rglob("*.py"):
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
        outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"s3lab"}
        assert {canonicalize_name(modules.get(name, name)) for name in outside} <= direct_dependencies().keys(), path
