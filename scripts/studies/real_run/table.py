"""The figures of a run, or of several, as one table."""

from rich.table import Table


def rows_of(summaries: dict[str, dict], figures: dict) -> dict[str, str]:
    """What came out: a figure with its 95 % interval, by its name."""
    rows = {"ROUGE mean, base model": f"{summaries['sft']['base_rouge_avg']:.3f}",
            "ROUGE mean, after SFT": f"{summaries['sft']['rouge_avg']:.3f}"}

    def interval(values, name="accuracy", before=""):
        return f"{values[name]:.3f} ({values[before + 'low']:.3f} - {values[before + 'high']:.3f})"

    for name, values in figures.get("rouge", {}).items():
        rows[f"ROUGE mean, {name}"] = f"{values['rouge_avg']:.3f}"
    if not figures:
        rows["reward model, accuracy"] = f"{summaries['reward']['accuracy']:.3f}"
    for kind, found in figures.get("accuracy", {}).items():
        for worse, values in found.items():
            rows[f"{kind}, the author's above: {worse}"] = interval(values)
    for name, values in figures.get("gpt-4", {}).items():
        rows[f"GPT-4's choices, {name}"] = interval(values)
    if "dialogues" in summaries:
        values = summaries["dialogues"]
        rows["dialogues, accuracy"] = interval(values, before="accuracy_")
    for name, values in figures.get("ppo over sft", {}).items():
        by = f"PPO over SFT, {name}"
        rows[f"{by}: win rate"] = interval(values, "win_rate")
        rows[f"{by}: at equal length"] = interval(values, "equal", "equal_")
        rows[f"{by}: score"] = f"{values['score_before']:.3f} to {values['score']:.3f}"
        rows[f"{by}: tokens"] = f"{values['tokens_before']:.1f} to {values['tokens']:.1f}"
        rows[f"{by}: share that ends"] = f"{values['ended_before']:.2f} to {values['ended']:.2f}"
    rows["KL to SFT [nats a summary]"] = f"{figures.get('kl', summaries['ppo']['kl']):.2f}"
    for name, cost in figures.get("cost", {}).items():
        rows[f"{name}: seconds, peak memory [MiB]"] = f"{cost['seconds']:.0f}, {cost['peak_memory_mb']:.0f}"
    return rows


def table_of(columns: dict[str, dict[str, str]]) -> Table:
    """A line for each figure, a column for each run."""
    table = Table(title="A real model on real posts", title_justify="left")
    for column in ("figure (95 % interval)", *columns):
        table.add_column(column, overflow="fold")
    for name in dict.fromkeys(name for rows in columns.values() for name in rows):
        table.add_row(name, *(rows.get(name, "") for rows in columns.values()))
    return table
