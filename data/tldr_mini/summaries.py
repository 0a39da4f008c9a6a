"""Facts -> summaries: references, and the better and worse summaries that the reward model learns to rank."""

import math
import random
import re
from dataclasses import dataclass, replace

import phrases
from posts import SLOTS, VALUES, Post, Story, derived, fits, gender_of, pieces, placeholders, sentence_case
from utils.judge.gold import gold_score, words_of

# How often a reference mentions a fact. Authors leave facts out. PPO can learn to put them in.
REFERENCE_CHANCES = {
    "name": 0.75, "age": 0.35, "place": 0.65, "when": 0.65, "feeling": 0.42, "question": 0.95,
}  # fmt: skip
ESSENTIAL = ("relation", "action", "object")
OTHER_KINDS = {"complete": 0.19, "partial": 0.16, "wrong": 0.26, "rambling": 0.20, "model_like": 0.19}
# If a row has a wrong summary: how often it equals another of the row except for the swapped facts.
# About a third of all rows have such a pair.
MINIMAL_PAIR_CHANCE = 0.5
MIN_PIECES, MAX_PIECES = 8, 46
MIN_REFERENCE, MAX_REFERENCE = 15, 32


@dataclass
class Draft:
    """A summary and what it is made from."""

    kind: str
    template: str
    keep: frozenset[str]  # slots that it mentions
    values: dict[str, str]  # facts, some of them perhaps swapped for wrong ones
    text: str = ""

    def rendered(self) -> "Draft":
        return replace(self, text=render(self.template, self.keep, self.values))


def drop_brackets(template: str, keep: frozenset[str] | set[str]) -> str:
    """Remove [bracketed] text with a fact that is not kept, and the brackets of the rest."""
    slot_of = {"where": "place", "whether": "question"}

    def bracket(match: re.Match) -> str:
        slots = {slot_of.get(field, field) for field in placeholders(match.group(1))}
        return match.group(1) if (slots & set(SLOTS)) <= keep else ""

    return re.sub(r"\[([^]]*)\]", bracket, template)


def render(template: str, keep: frozenset[str], values: dict[str, str]) -> str:
    """Fill a summary template with the facts it keeps. One leading space, as in the TL;DR data."""
    words = derived(values) | {
        "who": subject(keep, values),
        "did": values["action"] if "action" in keep else "did something to",
        "what": f"my {values['object']}" if "object" in keep else "a thing of mine",
    }
    return " " + sentence_case(drop_brackets(template, keep).format(**words).strip())


def subject(keep: frozenset[str] | set[str], values: dict[str, str], my: str = "my") -> str:
    """The kept parts of "my sister Anna (24)", or "someone"."""
    words = [f"{my} {values['relation']}"] if "relation" in keep else []
    words += [values["name"]] if "name" in keep else []
    if not words:
        return "someone"
    return " ".join([*words, f"({values['age']})"] if "age" in keep else words)


def draw_template(rng: random.Random) -> str:
    weights, templates = zip(*phrases.SUMMARY_STYLES, strict=True)
    return rng.choices(templates, weights)[0]


def need_words() -> int:
    """Words of the longest complete summary. The gold score subtracts for words beyond it."""
    longest = {slot: max(VALUES[slot], key=lambda value: len(words_of(value))) for slot in SLOTS}
    return max(len(words_of(render(template, frozenset(SLOTS), longest)))
               for _, template in phrases.SUMMARY_STYLES)


# --- The kinds --------------------------------------------------------------------------------------


def reference(rng: random.Random, post: Post) -> Draft:
    """What the author wrote: true, and rarely complete."""
    while True:
        mentioned = {slot for slot, chance in REFERENCE_CHANCES.items() if rng.random() < chance}
        keep = frozenset(mentioned.union(ESSENTIAL))
        draft = Draft("reference", draw_template(rng), keep, post.facts).rendered()
        if MIN_REFERENCE <= pieces(draft.text) <= MAX_REFERENCE:
            return draft


def complete(rng: random.Random, post: Post) -> Draft:
    """Every fact."""
    return Draft("complete", draw_template(rng), frozenset(SLOTS), post.facts).rendered()


def partial(rng: random.Random, post: Post) -> Draft:
    """A reference with 2 to 4 facts fewer, perhaps even without who did it or what it was."""
    draft = reference(rng, post)
    kept = [slot for slot in SLOTS if slot in draft.keep]
    dropped = rng.sample(kept, min(rng.randint(2, 4), len(kept) - 2))
    return replace(draft, kind="partial", keep=draft.keep - set(dropped)).rendered()


def wrong(rng: random.Random, post: Post, base: Draft | None = None) -> Draft:
    """`base` (else a reference or a complete summary) with 1 to 3 facts swapped for wrong ones."""
    base = base or rng.choice([reference, complete, complete])(rng, post)
    values = dict(base.values)
    for _ in range(rng.choices([1, 2, 3], weights=[50, 30, 20])[0]):
        swap_one(rng, post, base.keep, values)
    return replace(base, kind="wrong", values=values).rendered()


def model_like(rng: random.Random, post: Post) -> Draft:
    """Like a sample of a mediocre model: facts missing at random, some wrong, now and then a glitch."""
    keep = {slot for slot in REFERENCE_CHANCES if rng.random() < 0.6}
    draft = Draft("model_like", draw_template(rng), frozenset(keep.union(ESSENTIAL)), dict(post.facts))
    for slot in SLOTS:
        if slot in draft.keep and rng.random() < 0.08:
            draft.values[slot] = wrong_value(rng, post, slot, draft.values)
    draft = draft.rendered()
    if rng.random() < 0.2:
        draft.text = rng.choice([cut_off, stutter])(rng, draft.text)
    return draft


def rambling(rng: random.Random, post: Post) -> Draft:
    """A summary with needless words, from the post's asides or from nowhere, or one that never ends."""
    draft = replace(rng.choice([reference, reference, complete, partial])(rng, post), kind="rambling")
    style = rng.choices(["copy", "filler", "repeat", "cut"], weights=[50, 22, 18, 10])[0]
    if style == "cut":
        draft.text = cut_off(rng, draft.text)
    elif style == "copy":
        asides = [distractor.text for distractor in post.distractors]
        draft.text = add_sentences(rng, draft.text, rng.sample(asides, rng.choice([1, 1, 2])))
    elif style == "filler":
        draft.text = add_sentences(rng, draft.text, rng.sample(phrases.FILLERS, rng.randint(1, 2)))
    else:
        draft.text += " " + rng.choice(sentences_of(draft.text))
    return draft


def swap_one(rng: random.Random, post: Post, keep: frozenset[str], values: dict[str, str]) -> None:
    """Replace a right value with a wrong one, half of the time with one that the post mentions."""
    slots = [slot for slot in SLOTS if slot in keep and values[slot] == post.facts[slot]]
    mentioned = [slot for slot in slots if post.mentions[slot]]
    if mentioned and rng.random() < 0.5:
        slot = rng.choice(mentioned)
        values[slot] = rng.choice(post.mentions[slot])
    elif slots:
        slot = rng.choice(slots)
        values[slot] = value_from_nowhere(rng, post, slot, values)


def wrong_value(rng: random.Random, post: Story, slot: str, values: dict[str, str]) -> str:
    if post.mentions[slot] and rng.random() < 0.5:
        return rng.choice(post.mentions[slot])
    return value_from_nowhere(rng, post, slot, values)


def value_from_nowhere(rng: random.Random, post: Story, slot: str, values: dict[str, str]) -> str:
    """A wrong value that the post does not mention.

    It suits the other values where possible, so that only the post can tell that it is wrong.
    """

    def suits(value: str) -> bool:
        trial = values | {slot: value}
        gender, youngest, oldest = phrases.RELATIONS[trial["relation"]]
        return (
            gender_of(trial["name"]) == gender_of(values["name"])
            and (gender or gender_of(trial["name"])) == gender_of(trial["name"])
            and youngest <= int(trial["age"]) <= oldest
            and fits(trial["action"], trial["object"])
        )

    known = {post.facts[slot], *post.mentions[slot]}
    others = [value for value in VALUES[slot] if value not in known]
    return rng.choice([value for value in others if suits(value)] or others)


def sentences_of(text: str) -> list[str]:
    return re.findall(r"\S[^.?!]*[.?!]?", text)


def add_sentences(rng: random.Random, text: str, sentences: list[str]) -> str:
    """Insert sentences before, after or between the sentences of the text."""
    parts = sentences_of(text)
    for sentence in sentences:
        parts.insert(rng.randint(0, len(parts)), sentence)
    return " " + " ".join(parts)


def cut_off(rng: random.Random, text: str) -> str:
    """Stop in mid-sentence."""
    words = text.split()
    kept = words[: rng.randint(max(MIN_PIECES, len(words) // 2), max(MIN_PIECES, len(words) - 1))]
    return " " + " ".join(kept).rstrip(".?!")


def stutter(rng: random.Random, text: str) -> str:
    """Say three to five words twice."""
    words = text.split()
    start, length = rng.randint(0, len(words) - 3), rng.randint(3, 5)
    return " " + " ".join(words[: start + length] + words[start : start + length] + words[start + length :])


# --- Rankings ---------------------------------------------------------------------------------------

MAKERS = {"complete": complete, "partial": partial, "wrong": wrong, "rambling": rambling,
          "model_like": model_like}


def draw_completions(rng: random.Random, post: Post, count: int) -> list[Draft]:
    """A reference and `count` - 1 other summaries, all different, none too short or too long."""
    while True:
        kinds = rng.choices(list(OTHER_KINDS), list(OTHER_KINDS.values()), k=count - 1)
        drafts = [reference(rng, post), *(MAKERS[kind](rng, post) for kind in kinds)]
        if "wrong" in kinds and rng.random() < MINIMAL_PAIR_CHANCE:
            bases = [draft for draft in drafts if draft.kind in ("reference", "complete", "partial")]
            drafts[kinds.index("wrong") + 1] = wrong(rng, post, rng.choice(bases))
        texts = [draft.text for draft in drafts]
        if len(set(texts)) == count and all(MIN_PIECES <= pieces(text) <= MAX_PIECES for text in texts):
            return drafts


def ranking(rng: random.Random, post: Post, gold: dict, count: int = 4) -> dict:
    """`count` completions, sorted best first by a labeller with Gumbel noise.

    Sorting by score + Gumbel noise draws from the Plackett-Luce model. In it any two completions follow
    Bradley-Terry: P(i before j) = sigmoid(score_i - score_j), which is what the reward model's loss assumes.
    """
    drafts = draw_completions(rng, post, count)
    scored = []
    for draft in drafts:
        score = gold_score(draft.text, post.facts, gold)
        noisy = score / gold["temperature"] - math.log(-math.log(rng.random()))
        scored.append((noisy, score, draft))
    scored.sort(key=lambda item: item[0], reverse=True)
    return {
        "completions": [draft.text for _, _, draft in scored],
        "label_scores": [round(score / gold["temperature"], 4) for _, score, _ in scored],
        "gold": [round(score, 4) for _, score, _ in scored],
        "kinds": [draft.kind for _, _, draft in scored],
    }
