"""The pruning explorer: one layer, one spec, one solver after the other, in the background."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pandas as pd
from ipywidgets import HTML, Button, Dropdown, FloatLogSlider, HBox, Image, IntProgress, Layout, Text, VBox

from s3lab.algebra.patterns import parse
from s3lab.errors import DataError, S3Error
from s3lab.lab.draw import plot
from s3lab.lab.draw.portrait import draw_portrait, measure_rows
from s3lab.lab.explore.background import Background
from s3lab.lab.explore.shell import WIDE, Explorer, as_still, write_png
from s3lab.markup import table
from s3lab.solvers import SOLVERS

if TYPE_CHECKING:
    from s3lab.models.measure.layers import Layer as Matrix


def explore_pruning(
    layers: Mapping[str, Matrix] | None = None,
    *,
    layer: str | None = None,
    spec: str = "2:4",
    solver: str = "sparsegpt",
    damp: float = 1e-2,
) -> PruningExplorer:
    """Return a widget that prunes a layer in the background and compares the solvers tried so far.

    ``layers`` are weights with their second moments by name, of `models.layers.layers_of_model`; if None, those of the
    reference model's fourth decoder layer.  Raises DataError where ``layer`` is none of them.
    """
    found = load_layers() if layers is None else dict(layers)
    if layer is not None and layer not in found:
        raise DataError(f"no layer is called {layer!r}: there are {', '.join(found)}")
    return PruningExplorer(found, layer or next(iter(found)), spec, solver, damp)


class PruningExplorer(Explorer):
    """The controls, the table and the pictures of `explore_pruning`; ``table`` holds what was found so far."""

    def __init__(self, layers: Mapping[str, Matrix], layer: str, spec: str, solver: str, damp: float) -> None:
        super().__init__()
        wide = Layout(width="30em")
        self.layers = layers
        self.layer = Dropdown(options=list(layers), value=layer, description="layer", style=WIDE, layout=wide)
        self.spec = Text(spec, description="spec", continuous_update=True, style=WIDE, layout=wide)
        self.solver = Dropdown(options=list(SOLVERS), value=solver, description="solver", style=WIDE)
        self.damp = FloatLogSlider(
            damp, min=-4, max=0, step=0.5, description="damping", style=WIDE, readout_format=".1e"
        )
        self.prune, self.every = (
            Button(description="Prune", icon="play"),
            Button(description="All solvers", icon="forward"),
        )
        self.halt = Button(description="Stop", icon="stop", disabled=True)
        self.progress, self.status = IntProgress(0, max=1), HTML("ready")
        self.figures, self.results = HTML(), Image(format="png", layout=Layout(max_width="100%"))
        self.portrait = Image(format="png", layout=Layout(max_width="100%"))
        self.found: dict[tuple[str, str, str, float], dict[str, Any]] = {}
        self.job: Background | None = None
        self._still: dict[str, str] = {"text/plain": "press Prune"}
        buttons = HBox([self.prune, self.every, self.halt])
        self.children = [
            VBox([self.layer, self.spec, self.message, HBox([self.solver, self.damp])]),
            buttons,
            HBox([self.progress, self.status]),
            self.figures,
            self.results,
            self.portrait,
        ]
        self.prune.on_click(lambda _: self.start(str(self.solver.value)))
        self.every.on_click(lambda _: self.start(*SOLVERS))
        self.halt.on_click(lambda _: self.stop())
        self.spec.observe(lambda _: self.attempt(self._bind), "value")
        self.watch(self.layer)

    @property
    def table(self) -> pd.DataFrame:
        """A row for each result so far, in the order they came in."""
        keys = ("layer", "spec", "solver", "damp", "error_percent", "error_test_percent", "time_s")
        return pd.DataFrame([{key: row[key] for key in keys} for row in self.found.values()], columns=list(keys))

    def start(self, *solvers: str) -> None:
        """Prune the chosen layer by each of the solvers in turn, in the background."""
        if self.job is None and self.attempt(self._bind):
            self.prune.disabled = self.every.disabled = True
            self.halt.disabled = False
            self.progress.value, self.progress.max, self.progress.bar_style = 0, len(solvers), "info"
            self.status.value = f"{solvers[0]} on {self.spec.value} …"
            place, damp = (str(self.layer.value), self.spec.value), self.damp.value

            def take(result: dict[str, Any]) -> None:
                self._take(place, damp, result)
                done = self.progress.value = self.progress.value + 1
                self.status.value = f"{solvers[done]} on {place[1]} …" if done < len(solvers) else "drawing …"

            self.job = Background(self.layers[place[0]], place[1], solvers, damp, take, self._end)

    def stop(self) -> None:
        """Stop at once; what was found before stays."""
        if self.job is not None:
            self.job.stop()

    def wait(self) -> None:
        """Return when the background is at rest."""
        if (job := self.job) is not None:
            job.wait()

    def redraw(self) -> None:
        """Show the results on the chosen layer, and the last one's portrait."""
        rows = [row for row in self.found.values() if row["layer"] == self.layer.value]
        self.figures.value, self.results.value, self.portrait.value = "", b"", b""
        if rows:
            columns = ("spec", "solver", "damp", "error_percent", "error_test_percent", "time_s")
            self.figures.value = table([{key: row[key] for key in columns} for row in rows])
            df = pd.DataFrame(rows).drop_duplicates(["spec", "solver"], keep="last")
            self.results.value = write_png(plot.bars(df, "spec", "error_percent", "solver", ylabel="output error (%)"))
            last, layer = rows[-1], self.layers[str(self.layer.value)]
            error = measure_rows(layer.W, last["weight"], layer.H)
            title = f"{last['solver']} on {last['spec']}: {last['layer']}"
            self.portrait.value = write_png(draw_portrait(layer.W, last["weight"], last["mask"], error, title=title))
            self._still = {**as_still(self.portrait.value), "text/plain": title}

    def picture(self) -> dict[str, str]:
        """Return the portrait of the last result, or what to do to get one."""
        return self._still

    def _bind(self) -> None:
        parse(self.spec.value).bind(tuple(self.layers[str(self.layer.value)].W.shape))

    def _take(self, place: tuple[str, str], damp: float, result: dict[str, Any]) -> None:
        percents = {f"{key}_percent": 100 * result[key] for key in ("error", "error_test")}
        row = {"layer": place[0], "spec": place[1], **result, **percents}
        self.found.pop(key := (*place, result["solver"], damp), None)
        self.found[key] = row
        self.refresh()

    def _end(self, error: S3Error | None) -> None:
        stopped = self.job is not None and self.job.stopped
        self.status.value = "stopped" if stopped else "failed" if error else "done"
        self.progress.bar_style = "warning" if stopped else "danger" if error else "success"
        if error:
            self.tell(f"{error}")
        self.job = None
        self.halt.disabled = True
        self.prune.disabled = self.every.disabled = False


@lru_cache(maxsize=1)
def load_layers() -> dict[str, Matrix]:
    """The matrices of the reference model's fourth decoder layer, with second moments of their inputs."""
    from s3lab.models.measure.layers import layers_of_model
    from s3lab.models.text import corpus
    from s3lab.models.text.reference import load_reference

    model, tokenizer = load_reference()
    calibration, test = (
        corpus.tokens(tokenizer, split, 256, count, 0) for split, count in (("calibration", 64), ("test", 16))
    )
    return {layer.name: layer for layer in layers_of_model(model, calibration, test, "model.layers.3.*")}
