"""Cells of a weight that can be pointed at: by mouse, by touch, and by the arrow keys."""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets

from s3lab.algebra.picture import Cells, draw_cells

_HERE = Path(__file__).parent


class Grid(anywidget.AnyWidget):
    """The drawing of some cells; ``picked`` is the place of the chosen one among them, -1 for none.

    Pointing at a cell lights up the cells of its block and of its scope, and names its row, column, offset, block and
    scope below the drawing.
    """

    _esm = _HERE / "grid.js"
    _css = _HERE / "grid.css"
    svg = traitlets.Unicode().tag(sync=True)
    cells = traitlets.Dict().tag(sync=True)
    picked = traitlets.Int(-1).tag(sync=True)

    def show(self, cells: Cells, columns: int, label: str) -> None:
        """Draw cells of a weight with that many columns; what was picked is let go."""
        told = {"scope": cells.scope, "block": cells.block, "offset": cells.offset}
        with self.hold_sync():
            self.picked = -1
            self.cells = {
                **{key: list(values) for key, values in told.items()},
                "width": cells.width,
                "columns": columns,
            }
            self.svg = draw_cells(cells, label=label, first=False)
