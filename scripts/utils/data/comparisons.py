"""Rows that say which answers are better, in each of their layouts (`utils/data/columns.py`).

There are rankings (a prompt with K completions), comparisons (a prompt with a better and a worse completion)
and ratings (a summary with a number). Every function raises UserError for a row that its layout does not
allow. `where` (`file:line`) is the row's place, for these messages.
"""

import math
import re

from utils.config import UserError
from utils.data.columns import MARGINS, NOTES, Reading, listed
from utils.data.conversations import as_conversation, messages_of, stored_conversation
from utils.data.dialogues import conversation, conversation_row, turn_in
from utils.data.layouts import (
    Ranking,
    column_of,
    is_number,
    plain_prompt,
    post_prompt,
    spaced,
    text_of,
    type_name,
)

_MOST_RANKED = 1000  # completions of a row: they make half a million pairs
_ORACLE = ("gold",)  # column of the embedded data: true scores, which are not for training


def ranking_of(row: dict, reading: Reading, where: str) -> Ranking:
    """Read a ranking from a row with several completions.

    Raises:
        UserError: with the column and what is expected there.
    """
    layout = reading.layout.name
    if layout == "instruction, completions":
        row = _ultrafeedback(row, where)
    elif layout == "prompt, responses, scores":
        row = {**row, "completions": row["responses"]}
    completions = row["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        column = "responses" if "responses" in row else "completions"
        raise UserError(f"{where}: column '{column}' must be a list of two or more texts"
                        + (", best first" if layout == "prompt, completions" else ""))
    if len(completions) > _MOST_RANKED:
        raise UserError(f"{where}: column 'completions' has {len(completions)} texts; at most {_MOST_RANKED} "
                        "are compared with each other")
    texts = [spaced(text_of(text, "a text in column 'completions'", where)) for text in completions]
    if len(set(texts)) < len(texts):
        raise UserError(f"{where}: column 'completions' holds the same text twice")
    ranks, scores, strengths = (_numbers(row, column, len(texts), where)
                                for column in ("ranks", "scores", "label_scores"))
    _refuse_other_orders(row, len(texts), where)
    if scores is not None:
        by_scores = [sum(other > score for other in scores) for score in scores]
        if ranks is not None and _order(ranks) != _order(by_scores):
            raise UserError(f"{where}: columns 'ranks' and 'scores' give two orders (the best has the lowest "
                            "rank and the highest score); leave one out")
        ranks = by_scores
    if ranks is None:
        ranks = list(range(len(texts)))
    pairs = [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]
    margins = None if scores is None else [float(scores[i] - scores[j]) for i, j in pairs]
    if layout != "prompt, completions":
        return Ranking(question_of(row, "prompt", where), texts, pairs, strengths, margins=margins)
    return Ranking(_ranked_prompt(row, where), texts, pairs, strengths, _notes(row, pairs, where),
                   margins)


def _ranked_prompt(row: dict, where: str) -> str:
    """The prompt of a ranking: text, or a list of messages and perhaps `tools`."""
    if isinstance(row["prompt"], list):
        return conversation_row(row, "prompt", where, need_answer=False)[0]
    refuse_tools_beside_text(row, where)
    return plain_prompt(row, where)


def refuse_tools_beside_text(row: dict, where: str) -> None:
    """Raise UserError for tools beside a prompt that is text, which has no place for them."""
    if row.get("tools"):
        raise UserError(f"{where}: column 'tools' is a part of what is asked, and is not read beside a text; "
                        "write the prompt as a list of messages, or leave the column out")


def _notes(row: dict, pairs: list[tuple[int, int]], where: str) -> list[dict[str, str]] | None:
    """The values of NOTES for each pair of a ranking, whose `policies` names one for each completion."""
    policies, count = row.get("policies"), len(row["completions"])
    named = isinstance(policies, list) and len(policies) == count and all(
        isinstance(name, str) for name in policies)
    if policies is not None and not named:
        raise UserError(f"{where}: column 'policies' must name one for each of the {count} completions")
    note = {column: str(row[column]) for column in NOTES
            if column != "policies" and row.get(column) is not None}
    if not note and not named:
        return None
    return [note | ({"policies": " and ".join(sorted([policies[i], policies[j]]))} if named else {})
            for i, j in pairs]


def question_of(row: dict, column: str, where: str) -> str:
    """A column with a question to an assistant, as a conversation of one turn."""
    return stored_conversation([{"role": "user", "content": column_of(row, column, where).strip()}])


def _ultrafeedback(row: dict, where: str) -> dict:
    """A row of openbmb/UltraFeedback: completions are objects with a response and its score."""
    answers = row["completions"] if isinstance(row["completions"], list) else []
    if not answers or not all(isinstance(answer, dict) for answer in answers):
        raise UserError(f"{where}: column 'completions' must be a list of objects with response and "
                        "overall_score")
    scores = [answer.get("overall_score", answer.get("fine-grained_score")) for answer in answers]
    return {"prompt": row["instruction"], "completions": [answer.get("response") for answer in answers],
            "scores": scores if any(score is not None for score in scores) else [None] * len(scores)}


def scored_of(row: dict, where: str) -> tuple[str, str, float]:
    """A row of nvidia/HelpSteer: prompt, answer, and how helpful it is."""
    score = row["helpfulness"]
    if not is_number(score):
        raise UserError(f"{where}: column 'helpfulness' is {type_name(score)}; a number is needed")
    return question_of(row, "prompt", where), spaced(column_of(row, "response", where)), score


def compared_conversations(row: dict, where: str):
    """Prompt, better and worse answer of a row whose `chosen` and `rejected` are conversations, or answers.

    The prompt is None when the two conversations differ before their last answer.
    """
    if isinstance(row.get("prompt"), list):
        prompt, _ = conversation(row["prompt"], f"{where}: column 'prompt'", need_answer=False)
        return prompt, *(spaced(turn_in(row, column, where)) for column in ("chosen", "rejected"))
    if "conversations" in row:
        prompt, _ = conversation_row(row, "conversations", where, need_answer=False)
        return prompt, *(spaced(turn_in(row, column, where)) for column in ("chosen", "rejected"))
    (prompt, chosen), (other, rejected) = (
        conversation(row[column], f"{where}: column '{column}'", need_answer=True)
        for column in ("chosen", "rejected"))
    asked = row.get("prompt")
    if isinstance(asked, str) and asked.strip() not in [turn["content"] for turn in messages_of(prompt)]:
        raise UserError(f"{where}: column 'prompt' is no turn of the conversation in 'chosen'; leave it out, "
                        "or mend the row")
    return prompt if prompt == other else None, spaced(chosen), spaced(rejected)


def _numbers(row: dict, column: str, count: int, where: str) -> list[float] | None:
    """A column with a number for each completion; None where there is none."""
    numbers = row.get(column)
    valid = isinstance(numbers, list) and len(numbers) == count and all(map(is_number, numbers))
    if numbers is not None and not valid:
        raise UserError(f"{where}: column '{column}' must hold one number for each of the {count} "
                        "completions")
    return numbers


def _order(ranks: list) -> list[int]:
    """Ranks as the number of better completions."""
    return [sum(other < rank for other in ranks) for rank in ranks]


def _refuse_other_orders(row: dict, count: int, where: str) -> None:
    """Raise UserError for a column that may order the completions and is not read."""
    read = ("ranks", "scores", "label_scores", "policies", *_ORACLE)
    for column, values in row.items():
        if column in read or not isinstance(values, list):
            continue
        if len(values) == count and None not in map(_grade, values):
            raise UserError(f"{where}: column '{listed([column])}' has a number for each completion, and is "
                            "not read; name it 'scores' (higher is better) or 'ranks' (1 is the best), or "
                            "leave it out")


def comparison_of(row: dict, reading: Reading, where: str):
    """Read a comparison from a row.

    Returns:
        Prompt, better completion, worse completion, and the values of NOTES. The prompt is None when the two
        dialogues of the row share none.

    Raises:
        UserError: with the column and what is expected there.
    """
    layout = reading.layout.name
    if layout == "info, summaries, choice":
        return _openai_comparison(row, where)
    if layout.startswith("history"):
        return _shp_comparison(row, where)
    if row.get("messages") is not None and row["messages"] != row["chosen"]:
        raise UserError(f"{where}: fits two layouts, 'messages' and '{layout}'; leave the columns of one of "
                        "them out")
    note = {column: str(row[column]) for column in NOTES if row.get(column) is not None}
    _refuse_contradiction(row, (*reading.unread, *(name for name in MARGINS if name in row)), where)
    in_turns = isinstance(row["chosen"], list | dict) or isinstance(row.get("prompt"), list)
    if in_turns or "conversations" in row:
        return *compared_conversations(row, where), note
    if layout == "chosen, rejected (dialogues)":
        return *shared_dialogue(row, where), note
    row = with_end(row)
    chosen, rejected = _chosen_and_rejected(row, where)
    return plain_prompt(row, where), spaced(chosen), spaced(rejected), note


def margin_of(row: dict, reading: Reading) -> float | None:
    """How much better the better answer of a comparison is: `margin`, else the difference of the scores.

    None where the layout does not read these columns, or where they hold no numbers.
    """
    if not {*MARGINS} <= reading.layout.columns:
        return None
    margin, better, worse = (_grade(row.get(name)) for name in MARGINS)
    if margin is None and better is not None and worse is not None:
        margin = better - worse
    return margin if is_number(margin) else None


def _chosen_and_rejected(row: dict, where: str) -> tuple[str, str]:
    for column in ("chosen", "rejected"):
        if not isinstance(row[column], str):
            raise UserError(f"{where}: column '{column}' is {type_name(row[column])}; text is needed")
    return row["chosen"], row["rejected"]


def with_end(row: dict) -> dict:
    """A row of CarperAI/openai_summarize_comparisons, in which the prompt's end has moved from the answers
    into the prompt. Other rows stay as they are.
    """
    end, chosen, rejected = "TL;DR:", row.get("chosen"), row.get("rejected")
    for text in (chosen, rejected):
        if not isinstance(text, str) or not text.startswith(end):
            return row
    prompt = row["prompt"]
    if isinstance(prompt, str) and prompt.strip():  # else it is refused as it is
        prompt = f"{prompt.rstrip()}\n\n{end}"
    return {**row, "prompt": prompt, "chosen": chosen[len(end):], "rejected": rejected[len(end):]}


_GRADE = re.compile("score|rating|reward|rank|margin", re.IGNORECASE)


def _refuse_contradiction(row: dict, columns: tuple[str, ...], where: str) -> None:
    """Raise UserError where grades in these columns call the rejected answer the better one."""
    names = {name.lower(): name for name in columns if _GRADE.search(name)}
    for key, name in names.items():
        other = names.get(key.replace("chosen", "rejected")) if "chosen" in key else None
        if other is None and key != "margin":
            continue
        grade, limit = _grade(row[name]), 0.0 if other is None else _grade(row[other])
        if grade is None or limit is None:
            continue
        if grade > limit if "rank" in key else grade < limit:  # rank 1 is the best
            beside = "" if other is None else f" beside '{listed([other])}' ({limit:g})"
            raise UserError(f"{where}: column '{listed([name])}' ({grade:g}){beside} says that the rejected "
                            "answer is the better one; mend the row, or leave these columns out")


def _grade(value) -> float | None:
    """A grade as a number, which is text in CSV; None where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _openai_comparison(row: dict, where: str):
    """A row of openai/summarize_from_feedback: `choice` is the index of the better of two summaries."""
    info, summaries, choice = row["info"], row["summaries"], row["choice"]
    two = isinstance(summaries, list) and len(summaries) == 2
    if not isinstance(info, dict) or not two or not all(isinstance(summary, dict) for summary in summaries):
        raise UserError(f"{where}: columns 'info' and 'summaries' must be an object and a list of two "
                        "objects with 'text'")
    if type(choice) is not int or choice not in (0, 1):
        raise UserError(f"{where}: column 'choice' is {choice!r}; it must be 0 or 1, the better of the two "
                        "summaries")
    prompt = info_prompt(info, where)
    texts = [summary.get("text") for summary in summaries]
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise UserError(f"{where}: column 'summaries': text of summary {number} is {type_name(text)}; "
                            "text is needed")
    extra = row.get("extra") if isinstance(row.get("extra"), dict) else {}
    policies = [summary.get("policy") for summary in summaries]
    named = all(isinstance(policy, str) for policy in policies)
    note = {"confidence": extra.get("confidence"), "batch": row.get("batch"), "worker": row.get("worker"),
            "policies": " and ".join(sorted(policies)) if named else None}
    known = {column: str(note[column]) for column in NOTES if note[column] is not None}
    return prompt, spaced(texts[choice]), spaced(texts[1 - choice]), known


def info_prompt(info, where: str) -> str:
    """The prompt of a post. A news article (CNN/DM) has neither subreddit nor title."""
    if not isinstance(info, dict):
        raise UserError(f"{where}: column 'info' is {type_name(info)}; an object with subreddit, title and "
                        "post is needed")
    if info.get("article"):
        return text_of(info["article"], "column 'info': article", where).strip() + "\n\nTL;DR:"
    return post_prompt(info, "column 'info': {}", where)


def rating_of(row: dict, where: str) -> tuple[str, str, float | None]:
    """Read a rating from a row of the `axis` part of openai/summarize_from_feedback.

    Returns:
        Prompt, summary, and overall rating (1 to 7) or None when it was not rated.

    Raises:
        UserError: with the column and what is expected there.
    """
    summary = row["summary"]
    axes = summary.get("axes") if isinstance(summary, dict) else None
    if not isinstance(axes, dict):
        raise UserError(f"{where}: column 'summary' must be an object with 'text' and 'axes'")
    overall = axes.get("overall")
    if overall is not None and not is_number(overall):
        raise UserError(f"{where}: column 'summary': the overall rating is {overall!r}; a number is needed")
    text = text_of(summary.get("text"), "column 'summary': text", where)
    return info_prompt(row["info"], where), spaced(text), overall


def _shp_comparison(row: dict, where: str):
    """A row of stanfordnlp/SHP: `labels` is 1 when answer A is preferred, and 0 when B is."""
    if row["labels"] not in (0, 1) or isinstance(row["labels"], bool):
        raise UserError(f"{where}: column 'labels' is {row['labels']!r}; it must be 1 (A is better) or 0 (B "
                        "is)")
    grades = [row.get("score_A"), row.get("score_B")]
    if all(map(is_number, grades)) and (grades[0] < grades[1] if row["labels"] else grades[0] > grades[1]):
        raise UserError(f"{where}: column 'labels' is {row['labels']}, but the scores {grades[0]:g} (A) and "
                        f"{grades[1]:g} (B) call the other answer the better one; mend the row, or leave the "
                        "scores out")
    answers = [row["human_ref_A"], row["human_ref_B"]]
    for column, answer in zip("AB", answers, strict=True):
        if not isinstance(answer, str):
            raise UserError(f"{where}: column 'human_ref_{column}' is {type_name(answer)}; text is needed")
    chosen, rejected = answers if row["labels"] == 1 else reversed(answers)
    return column_of(row, "history", where).rstrip(), spaced(chosen), spaced(rejected), {}


def score_ratio(row: dict, where: str) -> float:
    """Column `score_ratio` of SHP: votes of the better answer / votes of the worse.

    Infinite where it is missing.
    """
    ratio = row.get("score_ratio")
    if ratio is not None and not is_number(ratio):
        raise UserError(f"{where}: column 'score_ratio' is {ratio!r}; a number is needed")
    return math.inf if ratio is None else ratio


def shared_dialogue(row: dict, where: str):
    """Split a row of Anthropic/hh-rlhf: two dialogues that are equal up to the last assistant turn.

    Returns:
        Prompt, better and worse completion; or None and both dialogues when they differ before the last turn.
    """
    (chosen, rejected), turn = _chosen_and_rejected(row, where), "\n\nAssistant:"
    if turn not in chosen:
        raise UserError(f"{where}: column 'prompt' is missing, and 'chosen' is not a dialogue with "
                        "'Assistant:' turns")
    head, _, answer = chosen.rpartition(turn)
    other_head, _, other = rejected.rpartition(turn)
    if head != other_head:
        return None, chosen, rejected
    return as_conversation((head + turn).strip()), spaced(answer), spaced(other)
