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
    """Print a table; where the terminal is too narrow for it, each row as lines of `column: value`.

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
        first, *others = zip((column.header for column in table.columns), cells, strict=True)
        if first[1]:
            console.print(": ".join(filter(None, first)), style="bold", soft_wrap=True)
        for name, value in others:
            if value:
                console.print(f"  {name}: {value}" if name else f"  {value}", soft_wrap=True)
