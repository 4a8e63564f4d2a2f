"""The run explorer: the tables and figures of run directories, live while a run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pandas as pd
from ipywidgets import HTML, Button, Checkbox, Dropdown, HBox, Image, Layout
from matplotlib.figure import Figure

from s3lab.errors import DataError
from s3lab.lab.draw import plot
from s3lab.lab.explore.shell import WIDE, Explorer, as_still, write_png
from s3lab.markup import table
from s3lab.models.prune.rundir import MANIFEST

_FIGURES = {
    "error of each decoder layer": ("layer", "output_error"),
    "error by depth and type": ("layer", "error_percent"),
    "mean error by type": ("kind", "error_percent"),
    "solver time": ("solved", "cumulative_time_s"),
}


def explore_runs(*folders: str | Path, every_s: float = 2.0) -> RunExplorer:
    """Return a widget over the run directories of `prune_model`, that looks for news every few seconds.

    Raises DataError where a folder holds no run, or two have the same name.
    """
    runs = {_name(Path(folder)): _find(Path(folder)) for folder in folders}
    if not runs or len(runs) < len(folders):
        raise DataError(f"{len(folders)} run directories of {len(runs)} names: give one or more, each of another name")
    return RunExplorer(runs, every_s)


class RunExplorer(Explorer):
    """The controls, tables and figures of `explore_runs`; ``matrices`` and ``layers`` hold a row for each.

    `close` ends its watching.
    """

    def __init__(self, runs: dict[str, Path], every_s: float) -> None:
        super().__init__()
        self.runs, self.every_s = runs, every_s
        self.figure = Dropdown(options=list(_FIGURES), description="figure", style=WIDE)
        self.again, self.live = Button(description="Refresh", icon="refresh"), Checkbox(True, description="live")
        self.summary = HTML()
        self.image = Image(format="png", layout=Layout(max_width="100%"))
        self.children = [HBox([self.figure, self.again, self.live]), self.message, self.summary, self.image]
        self.matrices = self.layers = pd.DataFrame()
        self._seen: list[int] = []
        self._closed = Event()
        self.refresh()
        self.watch(self.figure)
        self.again.on_click(self.refresh)
        Thread(target=self._watch, daemon=True).start()

    def redraw(self) -> None:
        """Read the manifests and draw the chosen figure."""
        self._seen = self._look()
        read = {name: read_run(path) for name, path in self.runs.items()}
        self.matrices, self.layers = (
            pd.concat([tables[i].assign(run=n) for n, tables in read.items()]) for i in (0, 1)
        )
        self.summary.value = table([_summarise(name, *tables) for name, tables in read.items()])
        if self.matrices.empty:
            raise DataError(f"no layer is finished yet in {', '.join(self.runs)}: wait, or look again")
        self.image.value = write_png(draw_run(self.matrices, self.layers, str(self.figure.value)))

    def picture(self) -> dict[str, str]:
        """Return the chosen figure."""
        still = {"text/plain": f"runs {', '.join(self.runs)}"}
        return {**still, **as_still(self.image.value)} if self.image.value else still

    def close(self) -> None:
        """Stop watching, and close the widget."""
        self._closed.set()
        super().close()

    def _look(self) -> list[int]:
        return [(path / MANIFEST).stat().st_mtime_ns for path in self.runs.values()]

    def _watch(self) -> None:
        while not self._closed.wait(self.every_s):
            if self.live.value and self._look() != self._seen:
                self.refresh()


def read_run(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a row for each pruned matrix and each finished decoder layer of a run directory, which is not touched.

    Raises DataError where the manifest is missing or none.
    """
    try:
        records = json.loads((folder / MANIFEST).read_text())["layers"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{str(folder)!r} holds no run: {error}; give a directory that prune_model was given") from None
    matrices = pd.DataFrame([row for record in records for row in record["matrices"]])
    layers = pd.DataFrame([record["layer"] for record in records])
    if not matrices.empty:
        matrices["kind"] = matrices["name"].str.rpartition(".")[2].str.removesuffix("_proj")
        matrices["error_percent"] = 100 * matrices["error"]
        matrices["solved"] = range(1, len(matrices) + 1)
        matrices["cumulative_time_s"] = matrices["time_s"].cumsum()
    return matrices, layers


def draw_run(matrices: pd.DataFrame, layers: pd.DataFrame, figure: str) -> Figure:
    """Draw one of the figures of runs from the tables of `read_run`, with a column ``run``."""
    x, y = _FIGURES[figure]
    if figure == "error of each decoder layer":
        return plot.curves(layers.assign(output_error=100 * layers[y]), x, y, "run", ylabel="decoder output error (%)")
    if figure == "error by depth and type":
        return plot.curves(matrices, x, y, "run", panel="kind", ylabel="error (%)", width=plot.PAGE)
    if figure == "mean error by type":
        groups: Any = matrices.groupby([x, "run"], sort=False)[y]
        means = groups.mean().reset_index()
        return plot.bars(means, x, y, "run", ylabel="mean error (%)")
    return plot.curves(matrices, x, y, "run", xlabel="matrices pruned", ylabel="solver time (s)")


def _summarise(name: str, matrices: pd.DataFrame, layers: pd.DataFrame) -> dict[str, Any]:
    if matrices.empty:
        return {"run": name, "layers": 0, "matrices": 0, "error_percent": None, "time_s": None}
    mean, time_s = matrices["error_percent"].to_numpy().mean(), layers["time_s"].to_numpy()[-1]
    return {
        "run": name,
        "layers": len(layers),
        "matrices": len(matrices),
        "error_percent": float(mean),
        "time_s": float(time_s),
    }


def _find(folder: Path) -> Path:
    """The run directory: the folder, or ``run`` in it."""
    found = next((path for path in (folder, folder / "run") if (path / MANIFEST).is_file()), None)
    if found is None:
        raise DataError(f"{str(folder)!r} holds no run: give a directory that prune_model was given as out")
    return found


def _name(folder: Path) -> str:
    return folder.resolve().parent.name if folder.name == "run" else folder.resolve().name
