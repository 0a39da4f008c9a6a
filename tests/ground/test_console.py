"""What a person sees, on real pseudo-terminals: log lines and bars do not mix, tables do not break."""

import gzip
import io
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import warnings

import pytest
from rich.table import Table

from feedback import FeedbackConfig
from terminal import Screen, run_in_terminal, terminal
from tiny_models import save_opt
from utils.config import PROJECT, parse_config
from utils.console import AboveBars, progress_bar, show_table, warn_above_bars
from utils.data.rows import load_examples

WIDTHS = [40, 80, 120]
BAR = re.compile(r"(outer|sft|reward|ppo): +\d+%\|[^|]*\| \d+/\d+ \[[^]]*\]")


def test_the_screen_of_these_tests_by_hand():
    screen = Screen(5)
    screen.feed("abc\rX\r\n12\x1b[A!")
    assert screen.rows_of_text == ["Xb!", "12"]
    screen = Screen(5)
    screen.feed("12345")  # the cursor waits behind a full line
    assert screen.rows_of_text == ["12345"]
    screen.feed("6\r\nend\x1b[0m")
    assert screen.rows_of_text == ["12345", "6", "end"] and screen.lines == ["123456", "end"]
    screen.feed("\x1b[2A\rX\x1b[K")
    assert screen.rows_of_text == ["X", "6", "end"]


# --------------------------------------------------------------------------------------------- bars and lines


@pytest.fixture
def on_terminal(monkeypatch):
    """Runs a function with this process's stdout and stderr on a terminal of so many columns; its screen."""
    def run(function, columns):
        with terminal(columns) as (end, screen), os.fdopen(os.dup(end), "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            monkeypatch.setattr(sys, "stderr", os.fdopen(os.dup(end), "w", buffering=1))
            function()
            sys.stderr.close()
            monkeypatch.undo()
        return screen
    return run


@pytest.mark.parametrize("columns", WIDTHS)
def test_lines_stand_above_the_bars_and_whole(columns, on_terminal):
    """Logged inside of nested bars, short ones and long ones, ours and those of libraries."""
    long = "a line that is longer than every terminal here, " * 4
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)

    def work():
        log = logging.Logger("ours")
        log.addHandler(AboveBars(sys.stdout))
        root.handlers.clear()
        logging.captureWarnings(False)  # a test before may have left it on
        warn_above_bars()
        with progress_bar(total=3, desc="outer") as outer:
            for number in range(3):
                for _ in progress_bar(range(3), desc="inner, which is wiped out", leave=False, mininterval=0):
                    log.info("inside %d", number)
                log.info(long + "%d", number)
                warnings.warn(f"python warns {number}", stacklevel=1)
                logging.getLogger("accelerate").warning("a library warns %d", number)
                outer.set_postfix(loss="0.219")
                outer.update(1)
        log.info("after")

    try:
        lines = on_terminal(work, columns).lines
    finally:
        root.handlers[:] = handlers
        logging.captureWarnings(False)
    expected = [line for number in range(3) for line in
                [f"inside {number}"] * 3 + [f"{long}{number}", f"a library warns {number}"]]
    others = [line for line in lines if line not in expected]
    assert [line for line in lines if line in expected] == expected
    pythons = [line for line in others if re.search(r"python warns \d", line)]
    assert len(pythons) == 3 and all(line.startswith(f"{__file__}:") for line in pythons)
    rest = [line for line in others if "warn" not in line and line]
    assert rest[1:] == ["after"] and rest[0].startswith("outer: 100%|"), rest
    assert columns < 80 or BAR.fullmatch(rest[0])


@pytest.mark.parametrize("streams", ["both", "stdout", "stderr"])
def test_where_a_stream_is_no_terminal_there_are_no_bars(streams, monkeypatch):
    """`> train.log 2>&1`, `| tee train.log`, `2> errors`: a bar would leave its strokes between the lines."""
    with terminal(80) as (end, screen), os.fdopen(os.dup(end), "w") as stream:
        files = {"stdout": stream, "stderr": stream}
        pipe = io.StringIO()
        for name in ("stdout", "stderr") if streams == "both" else (streams,):
            files[name] = pipe
        for name, file in files.items():
            monkeypatch.setattr(sys, name, file)
        for _ in progress_bar(range(3), desc="outer"):
            pass
        monkeypatch.undo()
    assert screen.lines == [""] and pipe.getvalue() == ""


# ----------------------------------------------------------------------------------------------------- tables


def example_table(rows=3):
    table = Table(title="A title", title_justify="left")
    for name in ("stage", "measure [unit]", "value"):
        table.add_column(name)
    for number in range(rows):
        table.add_row("reward" if number == 0 else "", f"measure {number} " + 30 * "x", f"{number / 7:.3f}")
    return table


@pytest.mark.parametrize("columns", [1, 20, 60, 61, 80, 200])
def test_a_table_fits_the_terminal_or_is_a_list(columns, on_terminal, monkeypatch):
    """61 columns are what it needs."""
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = on_terminal(lambda: show_table(example_table()), columns)
    monkeypatch.delenv("COLUMNS", raising=False)
    text = "\n".join(screen.lines)
    cells = [f"measure {number} " + 30 * "x" for number in range(3)] + ["0.000", "0.143", "0.286", "[unit]"]
    assert all(cell in text for cell in cells), "no cell is cut or broken"
    if columns >= 61:
        assert not screen.wrapped and {len(line) for line in screen.lines if "│" in line} == {61}
    else:
        assert "│" not in text
        items = [item for number in range(3) for item in (f"measure [unit]: {cells[number]}",
                                                          f"value: {number / 7:.3f}")]
        assert screen.lines[:2] == ["A title", "stage: reward"]
        assert "; ".join(screen.lines[2:-1]).replace("  ", "") == "; ".join(items)
        whole = {f"  {item}" for item in items}
        assert all(len(line) <= columns or line in whole for line in screen.lines[2:])


def test_a_row_of_many_figures_takes_few_lines(on_terminal, monkeypatch):
    """As those of the memory planner, which has 15 columns: a line for each would be pages."""
    monkeypatch.setenv("COLUMNS", "80")
    table = Table("stage", *(f"column {number}" for number in range(14)))
    table.add_row("sft", *("0.125" for _ in range(14)))
    screen = on_terminal(lambda: show_table(table), 80)
    assert len(screen.lines) == 6 and not screen.wrapped  # 4 of `column 0: 0.125` in a line


def test_in_a_file_a_table_is_as_wide_as_it_needs(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    table = example_table()
    table.add_column("wide")
    table.add_row("", "", "", "y" * 300)
    show_table(table)
    assert "y" * 300 in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- whole stages

EPOCHS = ("--max_steps 4 --logging_steps 1 --per_device_batch_size 4 --save_steps 2 --eval_steps 2 "
          "--eval_rows 4")
WORDS = {
    "sft": f"--model {{0}}/base {EPOCHS} --actor_training_data {{0}}/actor_train.jsonl --actor_test_data "
           "data/tldr_mini/actor_test.jsonl.gz --test_rows 4 --max_new_tokens 8",
    "reward": f"--model {{1}}/sft/final {EPOCHS} --reward_training_data {{0}}/reward_train.jsonl "
              "--reward_test_data data/tldr_mini/reward_test.jsonl.gz --test_rows 8",
    "ppo": "--model {1}/sft/final --reward_model {1}/reward/final --rlhf_training_data {0}/rlhf_train.jsonl "
           "--rlhf_test_data data/tldr_mini/rlhf_test.jsonl.gz --gold_rules data/tldr_mini/gold.json "
           "--total_episodes 32 --prompts_per_update 4 --responses_per_prompt 2 --ppo_epochs 2 "
           "--eval_steps 2 --save_steps 2 --eval_rows 4 --test_rows 4 --max_new_tokens 8",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("console")
    save_opt(folder / "base", eos_logit=1.0)
    for name in ("actor_train", "reward_train", "rlhf_train"):
        with gzip.open(PROJECT / "data" / "tldr_mini" / f"{name}.jsonl.gz", "rt") as rows:
            (folder / f"{name}.jsonl").write_text("".join(next(rows) for _ in range(6)))
    return folder


def command(stage, folder, out):
    return [sys.executable, str(PROJECT / "scripts" / f"train_{stage}.py"),
            "--config", str(PROJECT / "configs" / "tldr_mini" / f"{stage}.yaml"), "--report_to", "none",
            *WORDS[stage].format(folder, out).split(), "--output_dir", str(out / stage)]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_the_three_stages_on_a_terminal(columns, folder):
    """Every line is a whole message, a whole bar, or part of what is printed at the end; the table fits."""
    out = folder / f"run{columns}"
    for stage in WORDS:
        status, screen = run_in_terminal(command(stage, folder, out), columns, cwd=folder)
        assert status == 0, screen.lines
        logged = [line.split(" ", 2)[2] for line in (out / stage / "train.log").read_text().splitlines()]
        end = next(number for number, line in enumerate(screen.lines) if line == "RLHF in three stages")
        first, *running = [line for line in screen.lines[:end] if line]
        assert first.startswith(f"train_{stage}.py: loading")
        others = [line for line in running if not BAR.fullmatch(line)]
        assert [line for line in others if line in logged] == logged and len(logged) >= 3
        said = [line for line in others if line not in logged]  # before the run has its log
        assert len(said) <= 4
        assert not any(mark in line for line in others for mark in ("%|", "it/s", "step/s"))
        table = [line for line in screen.rows_of_text if line[:1] in "┏┃┡│└" and line]
        assert len(table) >= 5 and len({len(line) for line in table}) == 1 and len(table[0]) <= columns
        assert not any(mark in line for line in screen.lines for mark in ("Removed shared", "Warning"))
    # the demo's end: two posts before and after, and the commands to try the model and to rate it
    text = "\n".join(screen.lines)
    rows = [json.loads(line) for line in (out / "ppo" / "samples.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["posts"] == "test"]
    for row in rows[:2]:
        assert f"{row['prompt'].strip()}\n--- before (sft): " in text
        assert f"--- after (ppo): {row['ppo'].strip() or '(nothing)'}" in text
    if columns == 80:  # once
        tried, rated = (shlex.split(re.search(rf"^{words}: (.+)$", text, re.MULTILINE)[1]) for words in
                        ("try the model", "rate its answers in a browser"))
        page = parse_config(FeedbackConfig, None, rated[2:])
        assert rated[:2] == ["python", "scripts/feedback.py"] and page.model == [str(out / "ppo" / "final")]
        assert page.reward_model == str(out / "reward" / "final")
        assert load_examples(page.prompts, "rlhf_training_data", need_completion=False)
        assert tried[:2] == ["python", "scripts/chat.py"]
        answer = subprocess.run([sys.executable, *tried[1:], "--prompt", "-"], input=rows[0]["prompt"],
                                capture_output=True, text=True, check=True, cwd=PROJECT)
        assert answer.stdout.endswith("\n") and answer.stdout.count("\n") == 1


@pytest.mark.slow
def test_the_output_of_a_stage_in_a_file_has_whole_lines_alone(folder):
    out = folder / "file"
    found = subprocess.run(command("sft", folder, out), capture_output=True, text=True, cwd=folder)
    assert found.returncode == 0 and "\r" not in found.stdout + found.stderr and "%|" not in found.stdout
    assert found.stderr == ""
