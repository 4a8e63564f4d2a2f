"""What all explorers share: errors told in words under the controls, and a still picture where no widget can live."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from ipywidgets import HTML, VBox, Widget

from s3lab.errors import S3Error
from s3lab.lab.draw import plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE = {"description_width": "5.5em"}


class Explorer(VBox):
    """A widget with a line for messages; subclasses draw in `redraw` and give a still `picture`.

    ``message`` holds what is wrong, in the words of the error, while something is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.message = HTML()
        self.add_class("s3lab-explorer")

    def redraw(self) -> None:
        """Show what the controls ask for; raises an S3Error where they ask for what cannot be."""
        raise NotImplementedError

    def picture(self) -> dict[str, str]:
        """Return what is shown now as a still, by its type."""
        raise NotImplementedError

    def refresh(self, *_: Any) -> None:
        """Redraw, and tell what is wrong if that cannot be."""
        self.attempt(self.redraw)

    def attempt(self, action: Callable[[], object]) -> bool:
        """Do something, and return whether it could be done; what was wrong is told."""
        try:
            action()
        except S3Error as error:
            self.tell(f"{error}")
            return False
        self.tell("")
        return True

    def tell(self, text: str) -> None:
        """Show a message as it is laid out, carets and all; an empty one takes no place."""
        style = "margin:0;white-space:pre-wrap;color:var(--jp-error-color0,#b00)"
        self.message.value = f'<pre role="alert" style="{style}">{escape(text)}</pre>' if text else ""

    def watch(self, *controls: Widget) -> None:
        """Redraw whenever one of the controls changes."""
        for control in controls:
            control.observe(self.refresh, "value")

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return {**(super()._repr_mimebundle_(**kwargs) or {}), **self.picture()}


def write_png(fig: Figure) -> bytes:
    """Return a figure as a PNG for the screen."""
    data = io.BytesIO()
    with plot.style():
        fig.savefig(data, format="png", dpi=130)
    return data.getvalue()


def as_still(png: bytes) -> dict[str, str]:
    """Return a PNG the way notebooks store it."""
    return {"image/png": base64.b64encode(png).decode()}
