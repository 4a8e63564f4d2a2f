"""The explorers in a real browser: JupyterLab on this machine alone, driven as a person would."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TOKEN = "s3lab"
WAIT_MS = 120_000
OPEN = """async (path) => {
    const app = window.jupyterapp;
    await app.restored;
    const panel = await app.commands.execute("docmanager:open", {path, factory: "Notebook"});
    await panel.context.ready;
    await panel.sessionContext.ready;
    await panel.sessionContext.session.kernel.info;
    await app.commands.execute("notebook:run-all-cells");
}"""
THEME = "(name) => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="browser: no Chromium here, apt-get install chromium"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a JupyterLab of its own, on copies of the notebooks."""
    folder = tmp_path_factory.mktemp("jupyter")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    write_runs(folder)
    quiet = folder / "settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kinds = ("CONFIG", "DATA", "RUNTIME")
    variables = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in kinds}
    variables |= {
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "spaces"),
    }
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    options += [f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder / 'notebooks'}"]
    options += ["--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env={**os.environ, **variables}, stdout=log, stderr=log
        )
        address = f"http://127.0.0.1:{port}"
        try:
            wait_until_answered(f"{address}/api/status?token={TOKEN}", process)
            yield address
        finally:
            process.terminate()
            process.wait()


def wait_until_answered(address: str, process: subprocess.Popen) -> None:
    for _ in range(600):
        assert process.poll() is None, "JupyterLab ended by itself"
        try:
            urllib.request.urlopen(address, timeout=10).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("JupyterLab does not answer")


def write_runs(folder: Path) -> None:
    """Two runs as `prune_model` leaves them, and a notebook that looks at them."""
    import pandas as pd

    for name in ("sparsegpt", "sobs"):
        tables = [pd.read_csv(ROOT / "figures" / f"prune_{name}_{what}.csv") for what in ("matrices", "layers")]
        matrices, layers = (json.loads(table.to_json(orient="records")) for table in tables)
        records = [{"matrices": [m for m in matrices if m["layer"] == x["layer"]], "layer": x} for x in layers]
        (folder / name).mkdir()
        (folder / name / "manifest.json").write_text(json.dumps({"layers": records}))
    folders = ", ".join(repr(str(folder / name)) for name in ("sparsegpt", "sobs"))
    code = f"from s3lab.lab.explore import explore_runs\nexplore_runs({folders})"
    kernel = {"name": "python3", "display_name": "Python 3"}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "notebooks" / "runs.ipynb")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="browser: no playwright here, pip install playwright")
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def lab(browser, server):
    """What opens a notebook, runs all of it, and returns the page and the first explorer on it."""
    context = browser.new_context(viewport={"width": 1500, "height": 2600})
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)

    def run(name: str):
        page.goto(f"{server}/lab?token={TOKEN}&reset")
        page.wait_for_function("() => window.jupyterapp !== undefined")
        page.evaluate(OPEN, f"{name}.ipynb")
        explorer = page.locator(".s3lab-explorer").first
        explorer.wait_for()
        return page, explorer

    yield run
    context.close()


def take_screenshots(page, explorer, name: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("S3LAB_SCREENSHOTS") or tmp_path)
    for theme in ("Light", "Dark"):
        page.evaluate(THEME, f"JupyterLab {theme}")
        page.mouse.move(5, 5)
        page.wait_for_timeout(1500)  # the theme's style sheet is loaded and fades in
        explorer.screenshot(path=folder / f"{name}_{theme.lower()}.png")


def test_without_the_token_nobody_gets_in(server):
    with pytest.raises(OSError, match="403"):
        urllib.request.urlopen(f"{server}/api/kernels", timeout=30)


def test_a_pattern_is_typed_and_drawn_and_what_is_wrong_is_told(lab, tmp_path):
    page, explorer = lab("08_explore_patterns")
    from playwright.sync_api import expect

    field, drawing = explorer.locator("input[type=text]").first, explorer.locator(".s3lab-grid svg")
    alarm, told = explorer.get_by_role("alert"), explorer.locator(".s3lab-told")
    field.fill("2:4@1x2")
    expect(drawing).to_have_attribute("aria-label", "2:4@1x2")
    field.fill("2:4@")
    expect(alarm).to_contain_text("^")
    expect(drawing).to_have_attribute("aria-label", "2:4@1x2")
    field.fill("coupled-2:4")
    expect(alarm).to_have_count(0)
    explorer.locator(".noUi-handle, .ui-slider-handle, [role=slider]").first.press("ArrowRight")
    expect(field).to_have_value("(M,K/16,8,2):(K,16,1,8) / (1,1,1,2) / (1,1,4,1) keep 3")
    grid = explorer.locator(".s3lab-grid")
    grid.press("ArrowRight")
    grid.press("ArrowRight")
    expect(told).to_contain_text("row 0, column 1: offset 1, block 1 of scope 0")
    expect(explorer.locator(".s3lab-together")).to_have_count(1)
    take_screenshots(page, explorer, "patterns", tmp_path)
    grid.press("Escape")
    drawing.hover(position={"x": 30, "y": 12})
    expect(told).to_contain_text("row 0")


def test_a_prune_is_stopped(lab, tmp_path):
    page, explorer = lab("09_explore_pruning")
    from playwright.sync_api import expect

    stop = explorer.get_by_role("button", name="Stop")
    expect(stop).to_be_disabled()
    take_screenshots(page, explorer, "pruning", tmp_path)
    explorer.get_by_role("button", name="All solvers").click()
    expect(stop).to_be_enabled()
    stop.click()
    expect(explorer).to_contain_text("stopped")
    expect(stop).to_be_disabled()


def test_runs_are_looked_at(lab, tmp_path):
    page, explorer = lab("runs")
    from playwright.sync_api import expect

    expect(explorer).to_contain_text("sparsegpt")
    explorer.locator("select").first.select_option("error by depth and type")
    expect(explorer.locator("img")).to_be_visible()
    page.wait_for_timeout(1500)  # the figure is drawn in the kernel
    take_screenshots(page, explorer, "runs", tmp_path)
