"""How pytest runs: properties repeat, slow and GPU tests are skipped, notebooks run on less, figures/ is left alone."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook
from nbval.plugin import IPyNbCell

# Before anything imports the package: from here on the shapes in its annotations are checked at every call, in the
# modules that have any.  A package stands for all that is in it, so the solvers' is not named.
ROOT = Path(__file__).parent
SHAPED = [path for path in (ROOT / "s3lab").rglob("*.py") if "from s3lab.shapes import" in path.read_text()]
install_import_hook(
    [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SHAPED if path.stem != "__init__"],
    "beartype.beartype",
)

# Every run draws the same examples, and a loaded machine is no reason to fail.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def shapes(request: pytest.FixtureRequest) -> None:
    """Check shapes in every test but those of bad input, which meet the package's own errors, as users do."""
    jaxtyping_config.update("jaxtyping_disable", request.path.stem == "test_bad_input")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    """Set what the kernels of notebooks inherit: no network, and figures of their own, with the tables some read."""
    figures = tempfile.TemporaryDirectory(prefix="s3lab-figures-")
    for table in (config.rootpath / "figures").glob("prune_*.csv"):
        shutil.copy(table, figures.name)
    config.add_cleanup(figures.cleanup)
    # side by side, workers share the cores out: more threads than these would wait for each other
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    torch.set_num_threads(threads)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": f"{threads}"}
    os.environ["S3LAB_FIGURES"] = figures.name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason in the report, what was not asked for or cannot be; give notebooks the test profile."""
    profile = yaml.safe_load((config.rootpath / "notebooks" / "profiles" / "test.yaml").read_text())
    for item in items:
        if isinstance(item, IPyNbCell):
            if item.cell.outputs:
                item.cell.execution_count = 1  # nbval compares no cell without one, and nbstripout leaves none
            if "parameters" in item.cell.metadata.get("tags", []):
                shorter = profile.get(item.path.stem, {})
                item.cell.source += "".join(f"\n{name} = {value!r}" for name, value in shorter.items())
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1800))
            if not config.getoption("--run-slow"):
                item.add_marker(pytest.mark.skip(reason="slow: needs --run-slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device here"))
