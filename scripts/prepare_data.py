"""Look at a data set before training: layout, bad rows, lengths, groups, and rows as the model sees them.

    python scripts/prepare_data.py --data data/tldr_mini/reward_train.jsonl.gz
    python scripts/prepare_data.py --data my.jsonl --model facebook/opt-125m --output_dir prepared/mine
    python scripts/prepare_data.py --data '{"name": "Anthropic/hh-rlhf", "data_dir": "helpful-base"}'

The set is read by the code that training reads it with. Bad rows are shown and left out. `output_dir` gets

    rows.jsonl            the rows in one layout; the training scripts read the same content from it
    rejected_rows.jsonl   the bad rows: place, reason, and the row
    lengths.png           lengths of prompts and completions, in tokens of the model
    data.json             all figures

Nothing is trained and no weights are loaded. The model is needed for its tokenizer only. Weights of a mixture
are not applied.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from utils.config import UserError, key
from utils.data.sources import Source, data_key, open_source, sources_of
from utils.input_files import ROW_BYTES
from utils.launch import read_config, start
from utils.models.folders import model_key


@dataclass
class PrepareConfig:
    """The data set, the tokenizer, and the limits of training."""

    data: str | None = data_key(None, "The data set.")
    output_dir: str | None = key(None, "Folder to write to, new or empty; none: nothing is written.")
    model: str = model_key("assets/opt-mini", "The model whose tokenizer is used: a folder or a hub name.")
    max_prompt_tokens: int = key(512, "Longer prompts are cut.", unit="tokens", source="detail 1",
                                 low=8, high=10_000_000)
    max_completions: int = key(9, "Largest prompt group; larger ones are split.", unit="completions",
                               source="IG: K = 4 to 9", low=2, high=1000)
    min_score_ratio: float = key(1.0, "Rows with a smaller `score_ratio` are dropped; 2 is advised for SHP.",
                                 source="SHP", low=0.0, high=1e6)
    max_pairs_per_prompt: int | None = key(None, "Pairwise rows of a prompt beyond this number are dropped; "
                                           "SHP's authors advise 5.",
                                           unit="pairs", source="SHP", low=1, high=10**6)
    max_row_bytes: int = key(ROW_BYTES, "A larger row of a data file is a bad row.", unit="bytes", low=1000,
                             high=10**9)
    on_bad_rows = "skip"  # not keys: this script shows what is bad and what is dropped
    max_dropped_share = 1.0


if __name__ == "__main__":  # before the libraries, which take seconds to import
    CONFIG = read_config(PrepareConfig, None, __doc__)

from rich.console import Console
from rich.table import Table
from rich.text import Text

from utils.console import show_table
from utils.data.columns import ROLES, layouts_of, listed
from utils.data.files import BadRow
from utils.data.layouts import Example, Ranking
from utils.data.report import DataReport, token_lengths
from utils.data.rows import NamedSet, Rows, load_data
from utils.data.validation import finding_lines
from utils.judge.plots import plot_lengths
from utils.models.parents import Parent

ENDS = 60  # of a long text, the tokens that are shown at its start and at its end
BARS = " ▁▂▃▄▅▆▇█"


def kind_of(source: Source, most: int) -> str:
    """The kind of a set, from its first row with a known layout.

    Returns:
        "rankings", "ratings", "examples", or "prompts" for examples without completion.

    Raises:
        UserError: when no row has a known layout.
    """
    first = None
    for _, row in open_source(source, "data", most).rows:
        if isinstance(row, BadRow):
            continue
        first = row if first is None else first
        if layouts := layouts_of(name for name, value in row.items() if value is not None):
            kind = layouts[0].kind
            if kind == "examples" and "messages" in layouts[0].needs and not _answered(row["messages"]):
                return "prompts"
            return "rankings" if kind == "unpaired" else kind
    raise UserError(f"data: '{source.name}' has no row of a known layout"
                    f"{'' if first is None else f' (the first has columns {listed(first)})'}; data/README.md "
                    "lists the layouts")


def _answered(messages) -> bool:
    """Whether a dialogue ends with an answer."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "assistant"


# --------------------------------------------------------------------------------------------- canonical rows


def canonical(rows: Rows):
    """Rows in one layout for each kind, which the training scripts read to the same content.

    A set of rankings stays one; a ranking with NOTES becomes pairs, which have them. Pairs stay pairs,
    because a ranking cannot hold two contradicting labels, or two completions that were not compared. Each
    pair and each rating becomes one row.
    """
    ranked = all(set(stored.meta["layouts"]) == {"prompt, completions"} for stored in rows.sets)
    for row in rows:
        if isinstance(row, Example):
            yield {name: value for name, value in row._asdict().items() if value is not None}
        elif rows.sets[0].meta["kind"] == "ratings":
            yield from _rating_rows(row)
        elif ranked and not row.notes:
            yield _ranking_row(row)
        else:
            yield from _pair_rows(row)


def _ranking_row(row: Ranking) -> dict:
    """A ranking as a row. A completion's rank is the number of better ones, so ties have equal ranks."""
    scores = {} if row.label_scores is None else {"label_scores": row.label_scores}
    if row.margins:
        order = {"scores": _scores(row)}
    else:
        order = {"ranks": [sum(worse == index for _, worse in row.pairs)
                           for index in range(len(row.completions))]}
    return {"prompt": row.prompt, "completions": row.completions, **order, **scores}


def _scores(row: Ranking) -> list[float]:
    """Scores of a ranking's completions whose differences are its margins. The worst ones score 0."""
    margins = dict(zip(row.pairs, row.margins, strict=True))
    worst = min(set(range(len(row.completions))) - {better for better, _ in row.pairs})
    return [margins.get((index, worst), 0.0) for index in range(len(row.completions))]


def _pair_rows(row: Ranking):
    """The pairs of a group as rows."""
    count = len(row.pairs)
    known = zip(row.pairs, row.notes or [{}] * count, row.margins or [None] * count, strict=True)
    for (better, worse), note, margin in known:
        chosen, rejected = row.completions[better], row.completions[worse]
        margins = {} if margin is None else {"margin": margin}
        yield {"prompt": row.prompt, "chosen": chosen, "rejected": rejected, **note, **margins}


def _rating_rows(row: Ranking):
    """The ratings of a prompt as rows, laid out as articles, whose prompt is any text before `TL;DR:`."""
    info = {"article": row.prompt.removesuffix("\n\nTL;DR:")}
    for text, rating in zip(row.completions, row.label_scores, strict=True):
        yield {"info": info, "summary": {"text": text, "axes": {"overall": rating}}}


def write(target: Path, rows: Rows, report: DataReport, figures: dict, lengths: dict) -> None:
    """Write all files to a temporary folder and rename it, so that `target` is complete or does not exist.

    Raises:
        UserError: when the folder cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"output_dir: '{target}' cannot be written to ({error.strerror}); name "
                        "another") from None
    try:
        _write_lines(aside / "rows.jsonl", canonical(rows))
        if figures["rejected"]:
            _write_lines(aside / "rejected_rows.jsonl", report.rejected())
        content = json.dumps(figures, indent=2, ensure_ascii=False) + "\n"
        (aside / "data.json").write_text(content, encoding="utf-8")
        plot_lengths(aside / "lengths.png", lengths)
        aside.chmod(0o755)  # other users cannot read a folder of mkdtemp
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_lines(path: Path, rows) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def loaded(config, kind: str, tokenizer, report: DataReport) -> Rows:
    """The set as training reads it."""
    limits = {"max_completions": config.max_completions, "min_score_ratio": config.min_score_ratio,
              "max_pairs_per_prompt": config.max_pairs_per_prompt}
    return load_data(config, {"data": NamedSet(config.data, kind)}, tokenizer, report, limits)["data"]


def whole_groups(config, kind: str, rows: Rows) -> Rows:
    """The rows, with groups that `max_completions` has split put together again."""
    if kind != "rankings" or len(rows) == len(set(rows.prompts())):
        return rows
    return loaded(replace(config, max_completions=2**31 - 1), kind, None, DataReport())


# ----------------------------------------------------------------------------------------------------- output


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token. Tokens that make one character together are one piece."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(ids):  # an incomplete character
            continue
        texts.append(text[len(before):])
        before = text
    return texts


def marked(tokenizer, ids: list[int]) -> Text:
    """A text with a bar between its tokens. The middle of a long text is left out."""
    parts = pieces(tokenizer, ids)
    if len(parts) > 2 * ENDS:
        parts = [*parts[:ENDS], f" ... {len(parts) - 2 * ENDS} more ... ", *parts[-ENDS:]]
    shown = Text()
    for number, part in enumerate(parts):
        shown.append("│" if number else "", style="dim")
        shown.append(part.replace("\n", "\\n"), style="bold" if number % 2 else "cyan")
    return shown


def show_set(kind: str, figures: dict) -> None:
    """Print the sets, their layouts, and how many rows were rejected, dropped and used."""
    table = Table(title=f"{kind}, for {ROLES[kind]}", title_justify="left", show_header=False)
    for source in figures["sources"]:
        table.add_row("set", source["name"])
        layouts = [f"{name} ({count} rows)" for name, count in source["layouts"].items()]
        table.add_row("layout", "; ".join(layouts))
        table.add_row("rows", f"{source['read']} read, {source['rejected']} rejected")
        for reason, dropped in source["dropped"].items():
            table.add_row("dropped", f"{dropped['rows']} {reason}, the first in row {dropped['first'][0]}")
        if source["unread"]:
            table.add_row("columns not read", listed(source["unread"]))
    table.add_row("used", f"{figures['rows']} {'prompt groups' if kind == 'rankings' else 'rows'}")
    cut, inside = figures["prompts_cut"], figures["prompts_cut_inside"]
    table.add_row("prompts cut", f"{cut} ({cut / figures['rows']:.1%}), {inside} of them inside a sentence "
                  "or turn")
    show_table(table)


def show_rejected(console: Console, figures: dict, report: DataReport) -> None:
    """Print what is wrong with the bad rows."""
    for line in finding_lines(report.rejected()) if figures["rejected"] else ():
        console.print(f"rejected: {line}", soft_wrap=True)


def show_lengths(figures: dict, lengths: dict) -> None:
    """Print the lengths as training sees them: prompts after cutting, completions with their EOS."""
    table = Table(title="Lengths in tokens", title_justify="left")
    for column in ("", "mean", "5 %", "median", "95 %", "longest", "from 0 to the longest"):
        table.add_column(column)
    for name, sizes in lengths.items():
        spread = figures[f"{name}_tokens"]
        figures_shown = [f"{spread[part]:.1f}" for part in ("mean", "p5", "p50", "p95")]
        table.add_row(name, *figures_shown, str(spread["max"]), bars(sizes))
    show_table(table)


def bars(sizes, columns=40) -> str:
    """A histogram as one line of text."""
    counts = [0] * columns
    for size in sizes.tolist():
        counts[size * columns // (int(sizes.max()) + 1)] += 1
    return "".join(BARS[-(-count * 8 // max(counts))] for count in counts)


def show_rows(console: Console, rows: Rows, tokenizer) -> None:
    """Print the first, the middle and the last row as the model gets them."""
    table = rows.dataset()
    for number in sorted({0, len(rows) // 2, len(rows) - 1}):
        row = table[number]
        console.rule(rows.place(number), align="left")
        console.print(Text("prompt: ", style="bold").append(marked(tokenizer, row["prompt"])), soft_wrap=True)
        if "completions" in row:
            completions = {f"completion {place}: ": ids
                           for place, ids in enumerate(row["completions"], start=1)}
        else:
            completions = {"completion: ": row["completion"]} if row["completion"] else {}
        for name, ids in completions.items():
            console.print(Text(name, style="bold").append(marked(tokenizer, ids)), soft_wrap=True)
        if row.get("pairs"):
            pairs = ", ".join(f"{better + 1} > {worse + 1}" for better, worse in row["pairs"])
            console.print(f"better > worse: {pairs}")
        if row.get("label_scores"):
            console.print("label scores: " + ", ".join(f"{score:g}" for score in row["label_scores"]))


def main(config: PrepareConfig) -> None:
    if config.data is None:
        raise UserError("data: name a data set: --data FILE, folder or hub name (data/README.md lists the "
                        "layouts)")
    if config.output_dir is not None:
        refuse_used(Path(config.output_dir).expanduser())
    tokenizer = Parent("model", config.model).tokenizer
    kind, report = kind_of(sources_of(config.data)[0], config.max_row_bytes), DataReport()
    rows = loaded(config, kind, tokenizer, report)
    lengths = token_lengths(rows.dataset())
    report.tokens("data", rows.dataset())
    if kind == "rankings":
        report.groups("data", rows)
    figures = {"key": ROLES[kind], "model": config.model, "max_prompt_tokens": config.max_prompt_tokens,
               "rejected": sum(1 for _ in report.rejected()), **report.figures["data"]}
    console = Console(markup=False, highlight=False)  # markup=False: brackets in a text are text
    show_set(kind, figures)
    show_rejected(console, figures, report)
    show_lengths(figures, lengths)
    if kind == "rankings":
        console.print(report.notes[-1].removeprefix("data: "), soft_wrap=True)  # the line of report.groups
    show_rows(console, rows, tokenizer)
    if config.output_dir is not None:
        target = Path(config.output_dir).expanduser()
        write(target, whole_groups(config, kind, rows), report, figures, lengths)
        rows_file = Path(config.output_dir) / "rows.jsonl"
        console.print(f"\nwritten; train with {ROLES[kind]}: {rows_file}", soft_wrap=True)


def refuse_used(folder: Path) -> None:
    """Raise UserError unless the folder is new or empty."""
    try:
        used = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    except OSError as error:
        raise UserError(f"output_dir: '{folder}' cannot be used ({error.strerror}); name another") from None
    if used:
        raise UserError(f"output_dir: '{folder}' is in use; name a new one")


if __name__ == "__main__":
    start(main, CONFIG)
