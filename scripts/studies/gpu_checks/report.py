"""The result as tables in Markdown, to be read and to be pasted into docs/speed.md."""

import re
from collections import Counter

PARTS = {
    "a": "Equalities on the device",
    "b": "The stages on the embedded data",
    "c": "DeepSpeed against the plain run",
    "d": "Speed and memory",
}


def markdown(machine: dict, rows: list[dict]) -> str:
    """One section for each part that was run, and what failed or was skipped with its reason."""
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items() if version)
    memory = (
        f", {machine['card_memory_mib']} MiB, driver {machine['driver']}"
        if machine["card_memory_mib"]
        else ""
    )
    lines = [
        f"{machine['card']}{memory}, {machine['cores']} cores; {machine['date']}; "
        f"commit {machine['commit']}; {libraries}",
        "",
    ]
    for part, title in PARTS.items():
        mine = [row for row in rows if row["part"] == part]
        if not mine:
            continue
        counts = Counter(row["status"] for row in mine)
        lines += [f"### {title}", "", ", ".join(f"{count} {status}" for status, count in counts.items()), ""]
        lines += {"a": _equalities, "b": _stages, "c": _engines, "d": _speed}[part](mine)
        lines += [
            f"- {row['name']}: {row['status']}: {reason(row['why'])}"
            for row in mine
            if row["status"] != "passed"
        ]
        lines.append("")
    return "\n".join(lines)


def reason(why: str) -> str:
    """The line that names the error, or the last one: libraries warn when they end after an error."""
    lines = why.strip().splitlines()
    return next((line for line in reversed(lines) if re.search(r"\w(Error|Exception)\b", line)), lines[-1])


def _table(header: list[str], cells: list[list[str]]) -> list[str]:
    if not cells:
        return []
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *cells)] + [""]


def _equalities(rows):
    """The largest error of ours, and that of stock rows beside it, of each check."""
    cells = []
    for row in rows:
        errors = [value for value in row["figures"].values() if isinstance(value, dict)]
        if errors:
            worst = max(errors, key=lambda error: error["ours"])
            cells.append([row["name"], f"{worst['ours']:.1e}", f"{worst['stock']:.1e}"])
        for name in ("largest |ratio - 1|", "largest difference of a log-prob"):
            if name in row["figures"]:
                cells.append([row["name"], f"{row['figures'][name]:.1e}", "-"])
    timed = ["ours: ms", "sdpa with a mask: ms", "first call: s"]
    kernels = [
        [row["name"], *(f"{row['figures'][name]:.2f}" for name in timed)]
        for row in rows
        if timed[0] in row["figures"]
    ]
    return [
        *_table(["check", "largest error of ours", "stock rows"], cells),
        *_table(["forward and backward", "ours [ms]", "SDPA with a mask [ms]", "first call [s]"], kernels),
    ]


def _stages(rows):
    shown = {
        "wall seconds",
        "seconds",
        "rouge_avg",
        "base_rouge_avg",
        "accuracy",
        "gold_before",
        "gold_after",
        "kl",
        "tokens_per_second",
        "pairs_per_second",
        "episodes_per_second",
        "peak_memory_mb",
        "stopped after step",
        "off, of the way trained",
        "two undisturbed runs",
    }
    cells = [
        [
            row["name"],
            ", ".join(f"{name} {value:.4g}" for name, value in row["figures"].items() if name in shown),
        ]
        for row in rows
        if row["figures"]
    ]
    return _table(["check", "figures"], cells)


def _engines(rows):
    cells = [[row["name"], f"{row['figures']['largest difference']:.1e}"] for row in rows if row["figures"]]
    return _table(["run", "largest relative difference of a loss"], cells)


def _speed(rows):
    cells = []
    for row in rows:
        found = row["figures"]
        if not found or "ms a step" in found:
            continue
        if "ours" not in found:
            cells.append(
                [row["name"], *[f"{value:.0f} {name}" for name, value in [*found.items()][:1]], *["-"] * 6]
            )
            continue
        ratio = (
            f"{found['ratio']:.2f} ({found['lowest']:.2f} - {found['highest']:.2f})"
            if "ratio" in found
            else "-"
        )
        peaks = [found.get(f"{side}: peak GiB") for side in ("ours", "theirs")]
        planned = found.get("planned GiB")
        cells.append(
            [
                row["name"],
                f"{found['ours']:.4g} {found['unit']}/s",
                f"{found['theirs']:.4g}" if "theirs" in found else "-",
                ratio,
                *["-" if peak is None else f"{peak:.1f}" for peak in peaks],
                f"{planned:.1f}" if planned else "-",
                f"{found['share of the matrix-product rate']:.0%}",
            ]
        )
    comparisons = _table(
        [
            "comparison",
            "ours",
            "theirs",
            "times as fast",
            "ours [GiB]",
            "theirs [GiB]",
            "planned [GiB]",
            "of the matrix-product rate",
        ],
        cells,
    )
    return [*comparisons, *_where(rows)]


def _where(rows):
    """Where the time of a step goes."""
    shown = ("ms a step", "forward: ms", "head: ms", "backward: ms", "optimizer: ms")
    cells = []
    for row in rows:
        found = row["figures"]
        if "ms a step" in found:
            busy, peak = found["busy"], found["peak GiB"]
            cells.append(
                [
                    row["name"],
                    *(f"{found[name]:.1f}" for name in shown),
                    "-" if busy is None else f"{busy:.0%}",
                    str(len(found["waits"])),
                    "-" if peak is None else f"{peak:.1f}",
                ]
            )
    names = ["step [ms]", "forward", "of it the head", "backward", "optimizer", "card busy", "waits", "GiB"]
    return _table(["one step", *names], cells)
