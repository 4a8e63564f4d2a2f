"""The pattern explorer: type a spec, see the weight that it makes, point at its cells."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from ipywidgets import HTML, BoundedIntText, Dropdown, HBox, IntSlider, Layout, Text, ToggleButtons, VBox
from torch import Tensor

from s3lab.algebra.compose import Plus, Then
from s3lab.algebra.coupled import CoupledPartition
from s3lab.algebra.fit import describe, fit
from s3lab.algebra.patterns import PATTERNS, parse
from s3lab.algebra.picture import Cells, draw_cells, find_places
from s3lab.algebra.spec import MATRIX, Pattern, Spec, View
from s3lab.errors import ShapeError, SpecError
from s3lab.lab.explore.bits import STORED, draw_bits
from s3lab.lab.explore.grid import Grid
from s3lab.lab.explore.shell import WIDE, Explorer
from s3lab.solvers.magnitude import Magnitude
from s3lab.solvers.wanda import Wanda
from s3lab.tensors.problem import Problem

if TYPE_CHECKING:
    from s3lab.algebra.partition import Partition
    from s3lab.models.measure.layers import Layer

_DRAWN = 64  # rows and columns of cells that can be told apart
_MOST = 2**16  # weights: as many as 256×256
_LAYER = "model.layers.3.mlp.up_proj"
_VIEWS = {"matrix": "matrix", "the view's order": "view", "storage order": "storage"}


def explore_patterns(
    spec: str = "2:4",
    shape: tuple[int, int] | None = None,
    *,
    scores: str = "random",
    view: str = "matrix",
    seed: int = 0,
) -> PatternExplorer:
    """Return a widget that draws a pattern on a small weight while its text is typed.

    ``shape`` (M, K) is the smallest that fits, if None.  ``scores``, of which the highest are kept, are "random" with
    ``seed``, or the "magnitude" or "wanda" scores in a corner of a layer of the reference model.  ``view`` shows the
    cells as the "matrix", in the "view"'s order, or in "storage" order: scope by scope, block by block.  Under the
    facts a bar tells the bits that the weight takes when it is packed, and what they are spent on.

    >>> explorer = explore_patterns("2:4")
    >>> explorer.spec.value = "2:"
    >>> "^" in explorer.message.value
    True
    """
    return PatternExplorer(spec, shape, scores, view, seed)


class PatternExplorer(Explorer):
    """The controls and the drawing of `explore_patterns`; set a control's ``value`` to use it from code."""

    def __init__(self, spec: str, shape: tuple[int, int] | None, scores: str, view: str, seed: int) -> None:
        super().__init__()
        wide = Layout(width="30em")
        self.names = Dropdown(options=["", *PATTERNS], description="named", style=WIDE, layout=wide)
        self.spec = Text(spec, description="spec", continuous_update=True, style=WIDE, layout=wide)
        M, K = shape or _smallest(spec)
        self.rows = BoundedIntText(M, 1, _MOST, description="rows M", style=WIDE, layout=Layout(width="12em"))
        self.columns = BoundedIntText(K, 1, _MOST, description="inputs K", style=WIDE, layout=Layout(width="12em"))
        self.keep = IntSlider(1, 1, 4, description="keep", style=WIDE, layout=wide)
        self.scores = Dropdown(options=["random", "magnitude", "wanda"], value=scores, description="scores", style=WIDE)
        self.seed = BoundedIntText(seed, 0, 9999, description="seed", style=WIDE, layout=Layout(width="12em"))
        self.view = ToggleButtons(
            options=_VIEWS, value=view, description="shown as", style={**WIDE, "button_width": "11em"}
        )
        self.weight = Dropdown(description="weight", style=WIDE)
        self.stored = Dropdown(options=list(STORED), description="values", style=WIDE)
        self.grid, self.facts, self.bits = Grid(), HTML(), HTML()
        self._shown: tuple[Cells, str, str] | None = None
        self._slides = True
        shape_row, score_row = HBox([self.rows, self.columns]), HBox([self.scores, self.seed])
        texts = [self.names, self.spec, self.message]
        controls = VBox([*texts, shape_row, self.keep, score_row, self.weight, self.facts, self.stored, self.bits])
        self.children = [self.view, HBox([controls, self.grid], layout=Layout(flex_flow="row wrap", grid_gap="1em"))]
        self.refresh()
        self.watch(self.spec, self.rows, self.columns, self.scores, self.seed, self.view, self.weight, self.stored)
        self.names.observe(lambda _: self.attempt(self._take_name), "value")
        self.keep.observe(lambda _: self.attempt(self._take_keep), "value")

    def redraw(self) -> None:
        """Parse, bind, project and draw."""
        pattern, shape = parse(self.spec.value), (self.rows.value, self.columns.value)
        if shape[0] * shape[1] > _MOST:
            raise ShapeError(f"{shape[0]}×{shape[1]} are more than {_MOST} weights: make M or K less")
        bound = pattern.bind({name: shape for name in pattern.names} if pattern.names else shape)
        part, mask, first = self._project(bound)
        offsets, width = _arrange(_view_of(pattern), part, str(self.view.value))
        scope, block = find_places(part, offsets)
        flat = mask.flatten().tolist()
        cells = Cells(width, offsets, scope, [first + b for b in block], [flat[offset] for offset in offsets])
        self.grid.show(cells, shape[1], bound.text)
        more = f"\nthe first {len(offsets)} weights are drawn" if len(offsets) < shape[0] * shape[1] else ""
        self.facts.value = f'<div style="white-space:pre-line;line-height:1.4">{escape(describe(bound) + more)}</div>'
        self.bits.value = draw_bits(bound, str(self.stored.value))
        self._shown = cells, bound.text, describe(bound)
        self._show_keep(pattern, part)

    def picture(self) -> dict[str, str]:
        """Return the drawing as SVG, and the facts as text."""
        if self._shown is None:
            return {"text/plain": "no pattern yet"}
        cells, text, told = self._shown
        return {"image/svg+xml": draw_cells(cells, label=text), "text/plain": told}

    def _project(self, bound: Any) -> tuple[Partition, Tensor, int]:
        """The part that is shown, the mask, and the number of the part's first block."""
        if not isinstance(bound, CoupledPartition):
            self.weight.layout.display = "none"
            return bound.first_part, bound.project(self._score(bound.shape)), 0
        self.weight.layout.display = None
        if self.weight.options != tuple(bound.parts):
            self.weight.options = tuple(bound.parts)
        masks = bound.project({name: self._score(s, i) for i, (name, s) in enumerate(bound.shapes.items())})
        firsts = [sum(group[0][1].B for group in bound.groups[:i]) for i in range(len(bound.groups))]
        shown = self.weight.value if self.weight.value in bound.parts else next(iter(bound.parts))
        (first,) = (n for n, group in zip(firsts, bound.groups, strict=True) if shown in dict(group))
        return bound.parts[shown], masks[shown], first

    def _score(self, shape: tuple[int, int], turn: int = 0) -> Tensor:
        M, K = shape
        if self.scores.value == "random":
            return torch.randn(M, K, generator=torch.Generator().manual_seed(self.seed.value + turn)).abs()
        layer = load_layer(_LAYER)
        if layer.W.shape[0] < M or layer.W.shape[1] < K:
            raise ShapeError(f"{M}×{K} is no corner of {_LAYER} {tuple(layer.W.shape)}: make M or K less")
        solver = Magnitude() if self.scores.value == "magnitude" else Wanda()
        return solver.score(Problem(layer.W[:M, :K], layer.H[:K, :K]))

    def _take_name(self) -> None:
        """Show a named pattern, on the smallest weight that it fits if it does not fit this one."""
        if not (name := self.names.value):
            return
        M, K = _smallest(name)
        with self.hold_trait_notifications():
            self.spec.value = name
        if self.message.value:
            self.rows.value, self.columns.value = M, K
        self.refresh()

    def _show_keep(self, pattern: Pattern, part: Partition) -> None:
        """Let the slider say what the text says, where the text has one budget."""
        self.keep.disabled = not isinstance(pattern, Spec)
        if isinstance(pattern, Spec):
            share = isinstance(pattern.keep, Fraction)
            most = 99 if share else part.B if part.lines is None else part.keep // part.lines
            self._slides = False
            self.keep.max = most
            self.keep.value = round(100 * pattern.keep) if share else pattern.keep
            self.keep.description = "keep %" if share else "keep"
            self._slides = True

    def _take_keep(self) -> None:
        """Write the slider's budget into the text."""
        if self._slides and not self.keep.disabled:
            pattern = parse(self.spec.value)
            assert isinstance(pattern, Spec)
            budget = Fraction(self.keep.value, 100) if isinstance(pattern.keep, Fraction) else self.keep.value
            self.spec.value = str(replace(pattern, scope=replace(pattern.scope, keep=budget)))


def _smallest(spec: str) -> tuple[int, int]:
    """The shape of the smallest weight that a text fits; one that is any good where it fits none."""
    try:
        bound = fit(parse(spec))
    except SpecError:
        return 8, 16
    return next(iter(bound.shapes.values())) if isinstance(bound, CoupledPartition) else bound.shape


def _view_of(pattern: Pattern) -> View:
    """The view of the part that decides first."""
    match pattern:
        case Spec(view=view):
            return view
        case Then(first=first):
            return first.view
        case Plus(main=main):
            return _view_of(main)
    return MATRIX


def _arrange(view: View, part: Partition, order: str) -> tuple[list[int], int]:
    """The offsets of the cells in the order in which they are drawn, and how many are in a row.

    Of the matrix its upper left corner, of the other orders what comes first, where there is no room for all.
    """
    M, K = part.shape
    width = min(K, _DRAWN)
    if order == "matrix":
        return [m * K + k for m in range(min(M, _DRAWN)) for k in range(width)], width
    offsets = list((part.layout if order == "storage" else view.on(M, K)).offsets())
    if order == "storage" and width >= part.B * part.E:  # whole scopes in a row
        width -= width % (part.B * part.E)
    return offsets[: _DRAWN * width] if M * K > _DRAWN**2 else offsets, width


@lru_cache(maxsize=4)
def load_layer(name: str) -> Layer:
    """A layer of the reference model with the second moments of its inputs on a little text."""
    from s3lab.models.measure.layers import layers_of_model
    from s3lab.models.text import corpus
    from s3lab.models.text.reference import load_reference

    model, tokenizer = load_reference()
    calibration, test = (corpus.tokens(tokenizer, split, 256, 16, 0) for split in ("calibration", "test"))
    (layer,) = layers_of_model(model, calibration, test, name)
    return layer
