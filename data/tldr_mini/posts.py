"""Facts -> post: a first-person story that states every fact once, among facts about other people."""

import random
import re
from dataclasses import dataclass
from string import Formatter

import phrases

SLOTS = ("relation", "name", "age", "action", "object", "place", "when", "feeling", "question")
VALUES = {
    "relation": list(phrases.RELATIONS),
    "name": phrases.NAMES["f"] + phrases.NAMES["m"],
    "age": [str(age) for age in range(16, 71)],
    "action": list(phrases.ACTIONS),
    "object": list(phrases.OBJECTS),
    "place": list(phrases.PLACES),
    "when": phrases.WHENS,
    "feeling": phrases.FEELINGS,
    "question": list(phrases.QUESTIONS),
}
PRONOUNS = {"f": ("she", "her", "her"), "m": ("he", "him", "his")}
# Length of a body in words and punctuation marks, which are about as many tokens.
MIN_BODY_PIECES, MAX_BODY_PIECES = 62, 158


@dataclass
class Distractor:
    """A sentence that has nothing to do with the story, with the values it mentions."""

    text: str
    values: dict[str, str]
    is_advice: bool


@dataclass
class Story:
    """A story and its parts."""

    facts: dict[str, str]
    sentences: list[str]
    distractors: list[Distractor]
    body: str

    @property
    def mentions(self) -> dict[str, list[str]]:
        """Wrong values that the story mentions, by slot: what a careless reader would mix up."""
        wrong = {slot: [] for slot in SLOTS}
        for distractor in self.distractors:
            for slot, value in distractor.values.items():
                wrong[slot].append(value)
        return wrong


@dataclass
class Post(Story):
    """A story with the title and the subreddit under which it was posted."""

    subreddit: str
    title: str

    @property
    def prompt(self) -> str:
        """The TL;DR layout, up to where the summary starts."""
        return f"SUBREDDIT: r/{self.subreddit}\n\nTITLE: {self.title}\n\nPOST: {self.body}\n\nTL;DR:"


def sentence_case(text: str) -> str:
    """Capitalise the first letter of every sentence, and write "an" before a vowel."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return re.sub(r"(^|[.?!] |\n)([a-z])", lambda match: match.group(1) + match.group(2).upper(), text)


def placeholders(template: str) -> list[str]:
    """The names in braces, in order."""
    return [field for _, field, _, _ in Formatter().parse(template) if field]


def gender_of(name: str) -> str:
    return "f" if name in phrases.NAMES["f"] else "m"


def derived(facts: dict[str, str]) -> dict[str, str]:
    """The facts plus the words that templates derive from them."""
    she, her, hers = PRONOUNS[gender_of(facts["name"])]
    return facts | {
        "where": f"{phrases.PLACES[facts['place']]} the {facts['place']}",
        "advice": phrases.QUESTIONS[facts["question"]]["advice"],
        "she": she, "her": her, "hers": hers,
    }  # fmt: skip


def fits(action: str, obj: str) -> bool:
    """Whether the action can be done to the object. Nobody rips a mug."""
    return phrases.ACTIONS[action] in ("any", phrases.OBJECTS[obj])


def draw_facts(rng: random.Random, taken: dict[str, set[str]] | None = None) -> dict[str, str]:
    """One value per slot, none of them in `taken`. The age suits the relation, the object the action."""
    taken = taken or {slot: set() for slot in SLOTS}

    def draw(slot: str, values: list[str] | None = None) -> str:
        return rng.choice([value for value in values or VALUES[slot] if value not in taken[slot]])

    relation = draw("relation")
    gender, youngest, oldest = phrases.RELATIONS[relation]
    action = draw("action")
    return {
        "relation": relation,
        "name": draw("name", phrases.NAMES[gender or rng.choice("fm")]),
        "age": draw("age", [str(age) for age in range(youngest, oldest + 1)]),
        "action": action,
        "object": draw("object", [obj for obj in VALUES["object"] if fits(action, obj)]),
        "place": draw("place"),
        "when": draw("when"),
        "feeling": draw("feeling"),
        "question": draw("question"),
    }


def draw_distractors(
    rng: random.Random, facts: dict[str, str], count: int, owner: str | None = None
) -> list[Distractor]:
    """Sentences about other people, times and things. No value is the story's own, and none occurs twice.

    With an `owner` the story is about that person and told in the third person.
    """
    advice, others = phrases.ADVICE, phrases.DISTRACTORS
    if owner:
        advice, others = phrases.THIRD_PERSON_ADVICE, phrases.THIRD_PERSON_DISTRACTORS
    taken = {slot: {facts[slot]} for slot in SLOTS}
    taken["name"].add(owner)
    distractors, templates = [], set()
    while len(distractors) < count:
        is_advice = rng.random() < 0.3
        template = rng.choice(advice if is_advice else others)
        if template in templates:
            continue
        templates.add(template)
        other = draw_facts(rng, taken)
        values = {slot: other[slot] for slot in stated_slots(template)}
        for slot, value in values.items():
            taken[slot].add(value)
        text = rng.choice(phrases.DISTRACTOR_LEADS) + template.format(**derived(other), owner=owner)
        distractors.append(Distractor(sentence_case(text), values, is_advice))
    return distractors


def stated_slots(template: str) -> list[str]:
    """The slots whose values a template states."""
    slot_of = {"where": "place", "advice": "question"}
    fields = {slot_of.get(field, field) for field in placeholders(template)}
    return [slot for slot in SLOTS if slot in fields]


def event_sentences(rng: random.Random, words: dict[str, str]) -> list[str]:
    """What happened, in one or two sentences."""
    words = words | {"subject": rng.choice([words["name"], words["she"]])}
    templates = [rng.choice(phrases.EVENTS)] if rng.random() < 0.6 else rng.choice(phrases.SPLIT_EVENTS)
    lead = rng.choice(phrases.EVENT_LEADS)
    return [
        sentence_case((lead if index == 0 else "") + template.format(**words))
        for index, template in enumerate(templates)
    ]


def question_sentence(rng: random.Random, question: str) -> str:
    """The author's question, worded differently from the summary's."""
    bank = phrases.QUESTIONS[question]
    if rng.random() < 0.25:
        return sentence_case(rng.choice(bank["asks"]))
    return sentence_case(f"{rng.choice(phrases.QUESTION_LEADS)} {rng.choice(bank['clauses'])}.")


def arrange(rng: random.Random, parts: dict[str, list[str]], asides: list[str]) -> list[str]:
    """Put the parts into one of a few sensible orders and scatter the asides among them.

    Introduction and event stay together, so that "she" is always the person just introduced. Most asides
    come after them, because many refer to what happened.
    """
    orders = [("opener", "story", "feeling", "question"), ("opener", "story", "question", "feeling"),
              ("opener", "question", "story", "feeling"), ("opener", "feeling", "story", "question"),
              ("story", "feeling", "question")]  # fmt: skip
    order = rng.choices(orders, weights=[50, 14, 10, 10, 16])[0]
    blocks = [parts[key] for key in order]
    for aside in asides:
        first = blocks.index(parts["story"]) + 1 if rng.random() < 0.75 else min(order.index("story"), 1)
        blocks.insert(rng.randint(first, len(blocks)), [aside])
    if rng.random() < 0.4:
        blocks.append(parts["closer"])
    return [sentence for block in blocks for sentence in block]


def layout(rng: random.Random, sentences: list[str]) -> str:
    """The sentences as one block, as a few paragraphs, or on loose lines."""
    style = rng.choices(["block", "paragraphs", "lines"], weights=[60, 25, 15])[0]
    gap, chance = {"block": (" ", 0.0), "paragraphs": ("\n\n", 0.25), "lines": ("\n", 0.35)}[style]
    text = sentences[0]
    for sentence in sentences[1:]:
        text += (gap if rng.random() < chance else " ") + sentence
    return text


def first_person_sentences(
    rng: random.Random, facts: dict[str, str], distractors: list[Distractor]
) -> list[str]:
    """The sentences of a story told in the first person, in order."""
    words = derived(facts)
    introduction = sentence_case(rng.choice(phrases.INTRODUCTIONS).format(**words))
    parts = {
        "opener": [sentence_case(rng.choice(phrases.OPENERS))],
        "story": [introduction, *event_sentences(rng, words)],
        "feeling": [sentence_case(rng.choice(phrases.FEELING_SENTENCES).format(**words))],
        "question": [question_sentence(rng, facts["question"])],
        "closer": [sentence_case(rng.choice(phrases.CLOSERS))],
    }
    return arrange(rng, parts, [distractor.text for distractor in distractors])


def pieces(text: str) -> int:
    """Number of words and punctuation marks: the unit of length, because there is no tokenizer yet."""
    return len(re.findall(r"[A-Za-z']+|\d+|[^\w\s]|\n+", text))


def make_story(rng: random.Random) -> Story:
    """Draw facts and tell them. A draw that is too short or too long is thrown away."""
    while True:
        facts = draw_facts(rng)
        distractors = draw_distractors(rng, facts, rng.choices([2, 3, 4, 5], weights=[54, 31, 11, 4])[0])
        sentences = first_person_sentences(rng, facts, distractors)
        body = layout(rng, sentences)
        if MIN_BODY_PIECES <= pieces(body) <= MAX_BODY_PIECES:
            return Story(facts, sentences, distractors, body)


def make_post(rng: random.Random) -> Post:
    """A story with a title and, in 8 % of the posts, an edit at the end."""
    story = make_story(rng)
    title = rng.choice(phrases.TITLES).format(**story.facts)
    edit = "\n\n" + rng.choice(phrases.EDITS) if rng.random() < 0.08 else ""
    subreddit = rng.choice(phrases.SUBREDDITS)
    return Post(story.facts, story.sentences, story.distractors, story.body + edit, subreddit, title)
