"""One widget for everything that is clicked: it shows HTML, and an element with ``data-key`` sends its key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import traitlets

_HERE = Path(__file__).parent


class Clickable(anywidget.AnyWidget):
    """HTML with parts that can be clicked (or reached by Tab and pressed by Enter).

    Traits:
        html: what is shown. Whatever comes from a file or a user must have been escaped.
        currents: keys of the elements to be marked; where none of the new ones can be seen, the first is scrolled into view
            inside its ``data-scroll`` element.
    """

    _esm = _HERE / "clickable.js"
    _css = _HERE / "clickable.css"
    html = traitlets.Unicode("").tag(sync=True)
    currents = traitlets.List(traitlets.Unicode()).tag(sync=True)

    def __init__(self, on_click: Callable[[str], None] | None = None, **traits: Any) -> None:
        super().__init__(**traits)
        self._callback = on_click if on_click is not None else lambda key: None
        self.on_msg(self._on_message)

    def _on_message(self, widget: Any, content: Any, buffers: Any) -> None:
        if isinstance(content, dict) and isinstance(content.get("key"), str):
            self.click(content["key"])

    def click(self, key: str) -> None:
        """What a click on the element with this key does."""
        self._callback(key)


__all__ = ["Clickable"]
