# SPDX-License-Identifier: Apache-2.0
"""Progress of something slow: one live picture in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

LINE_SECONDS = 5.0

Show = Callable[[RenderableType, str], None]
"""Called with what to show now: a picture of it, and one line of text that says the same."""


@contextmanager
def live(console: Console) -> Iterator[Show]:
    """The block calls what it gets as often as it likes. The picture disappears with the block."""
    if console.is_terminal:
        with Live(console=console, transient=True, auto_refresh=False) as picture:
            yield lambda image, line: picture.update(image, refresh=True)
        return
    shown = -LINE_SECONDS

    def show(image: RenderableType, line: str) -> None:
        nonlocal shown
        if time.monotonic() - shown >= LINE_SECONDS:
            shown = time.monotonic()
            text = Text(line)
            text.truncate(console.width, overflow="ellipsis")
            console.print(text)
            console.file.flush()

    yield show
