"""What a person sees while a script runs: progress bars, lines above them, tables that fit the terminal."""

import logging
import shutil
import sys

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm


def progress_bar(*args, shown: bool = True, **more) -> tqdm:
    """A progress bar of tqdm, where lines and bars go to one terminal. Elsewhere nothing is drawn.

    A file or a pipe would keep every stroke of a bar, and `| tee` would write lines into the bar.
    """
    return tqdm(*args, disable=not (shown and sys.stdout.isatty() and sys.stderr.isatty()), **more)


class AboveBars(logging.StreamHandler):
    """Writes lines above the progress bars instead of through them."""

    def emit(self, record):
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def warn_above_bars() -> None:
    """Python's and the libraries' own warnings are lines like all others."""
    logging.captureWarnings(True)
    logging.basicConfig(handlers=[AboveBars(sys.stderr)], level=logging.WARNING, format="%(message)s")


def show_table(table: Table, markup: bool = False) -> None:
    """Print a table; where the terminal is too narrow for it, each row as a list of `column: value`.

    In a file it is as wide as it needs.

    Args:
        markup: whether brackets are rich's markup, and not text.
    """
    console = Console(markup=markup, highlight=markup, width=10_000)
    natural = console.measure(table).maximum
    terminal = shutil.get_terminal_size((natural, 24)).columns
    console.width = min(natural, terminal)
    if natural <= terminal:
        console.print(table)
        return
    if table.title:
        console.print(table.title, soft_wrap=True)
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        named = zip((column.header for column in table.columns), cells, strict=True)
        first, *others = (cell and ": ".join(filter(None, (name, cell))) for name, cell in named)
        if first:
            console.print(first, style="bold", soft_wrap=True)
        for line in _wrapped(list(filter(None, others)), terminal):
            console.print(line, soft_wrap=True)


def _wrapped(items: list[str], width: int) -> list[str]:
    """Items one after the other in lines of a width; none is broken, so a long one has a line of its own."""
    lines = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 2 <= width:
            lines[-1] += f"; {item}"
        else:
            lines.append(f"  {item}")
    return lines
