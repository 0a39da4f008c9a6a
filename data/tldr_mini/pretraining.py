"""The pretraining corpus of the mini base model: stories of the same world, and people talking about them.

A reward model must compare a summary with its post, fact by fact. A network of this size does not
learn that from a few thousand noisy rankings. Here a commenter retells the story, at times with a
wrong fact, and the author says what is right, wrong or missing. Nothing has the layout or the
wording of a TL;DR, because SFT is what teaches the model to summarise.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import phrases
from posts import (
    SLOTS,
    VALUES,
    Story,
    arrange,
    derived,
    draw_distractors,
    draw_facts,
    layout,
    make_story,
    pieces,
    sentence_case,
)
from summaries import drop_brackets, subject, wrong_value

MIN_DOCUMENT, MAX_DOCUMENT = 150, 290


@dataclass
class Voice:
    """How the commenters (your, you, ...) and the author (my, I, ...) refer to the story's main person."""

    commenter: dict[str, str]
    author: dict[str, str]


def first_person() -> Voice:
    return Voice(
        commenter={"your": "your", "you": "you", "feel": "feel", "want": "want", "ask": "ask", "do": "do"},
        author={"my": "my", "I": "I", "feel": "feel", "ask": "ask"},
    )


def third_person(owner: str) -> Voice:
    return Voice(
        commenter={"your": f"{owner}'s", "you": owner, "feel": "feels", "want": "wants", "ask": "asks",
                   "do": "does"},
        author={"my": f"{owner}'s", "I": owner, "feel": "feels", "ask": "asks"},
    )  # fmt: skip


def words_for(facts: dict[str, str]) -> dict[str, str]:
    return derived(facts) | {"whether": phrases.QUESTIONS[facts["question"]]["whether"]}


def third_person_story(rng: random.Random) -> tuple[Story, Voice]:
    """A story about somebody, told by a friend."""
    facts = draw_facts(rng)
    owner = rng.choice([name for name in VALUES["name"] if name != facts["name"]])
    words = words_for(facts) | {"owner": owner}
    words["subject"] = rng.choice([words["name"], words["she"]])
    distractors = draw_distractors(rng, facts, rng.choice([2, 3, 4]), owner)

    def sentence(bank: list[str]) -> str:
        return sentence_case(rng.choice(bank).format(**words))

    parts = {
        "opener": [sentence(phrases.THIRD_PERSON_OPENERS)],
        "story": [sentence(phrases.THIRD_PERSON_INTRODUCTIONS), sentence(phrases.THIRD_PERSON_EVENTS)],
        "feeling": [sentence(phrases.THIRD_PERSON_FEELINGS)],
        "question": [sentence(phrases.THIRD_PERSON_QUESTIONS)],
        "closer": [sentence(phrases.CLOSERS)],
    }
    sentences = arrange(rng, parts, [distractor.text for distractor in distractors])
    return Story(facts, sentences, distractors, layout(rng, sentences)), third_person(owner)


# --- A retelling and its verdict --------------------------------------------------------------------


def swapped_facts(rng: random.Random, story: Story, keep: set[str]) -> dict[str, str]:
    """One or two wrong values among the slots in `keep`; at times another person of the story altogether."""
    people = [d.values for d in story.distractors if "relation" in d.values and "name" in d.values]
    if people and {"relation", "name"} <= keep and rng.random() < 0.2:
        person = rng.choice(people)
        return {slot: person[slot] for slot in ("relation", "name")}
    slots = rng.sample([slot for slot in SLOTS if slot in keep], rng.choice([1, 1, 2]))
    values = dict(story.facts)
    for slot in slots:
        values[slot] = wrong_value(rng, story, slot, values)
    return {slot: values[slot] for slot in slots}


def retelling(rng: random.Random, story: Story, voice: Voice) -> str:
    """A commenter's retelling and, on the next line, the author's verdict on it."""
    keep = set(rng.sample(SLOTS, rng.choice([3, 4, 5, 6, 7, 7, 8, 8, 9, 9])))
    swaps = swapped_facts(rng, story, keep) if rng.random() < 0.45 else {}
    values = story.facts | swaps
    if rng.random() < 0.7:
        told, keep = as_sentences(rng, values, keep, voice)
        swaps = {slot: value for slot, value in swaps.items() if slot in keep}
    else:
        told = as_claims(rng, values, keep, voice)
    return f"{told}\n{verdict(rng, story.facts, swaps, keep, voice)}"


def as_sentences(
    rng: random.Random, values: dict[str, str], keep: set[str], voice: Voice
) -> tuple[str, set[str]]:
    """A retelling in whole sentences, and the slots that it really tells: no age without a person."""
    if not keep & {"relation", "name"}:
        keep = keep - {"age"}
    your = voice.commenter["your"]
    words = words_for(values) | voice.commenter
    words["who"] = subject(keep, values, your) if keep & {"relation", "name"} else "somebody"
    words["did"] = values["action"] if "action" in keep else "did something to"
    words["what"] = f"{your} {values['object']}" if "object" in keep else "something"
    usable = [template for template in phrases.RETELLINGS if "place" in keep or not needs_place(template)]
    return sentence_case(drop_brackets(rng.choice(usable), keep).format(**words)), keep


def needs_place(template: str) -> bool:
    return "{where}" in drop_brackets(template, set())


def as_claims(rng: random.Random, values: dict[str, str], keep: set[str], voice: Voice) -> str:
    """A retelling as loose claims, in any order."""
    words = words_for(values) | voice.commenter
    claims = [rng.choice(phrases.CLAIMS[slot]).format(**words) for slot in SLOTS if slot in keep]
    rng.shuffle(claims)
    text = rng.choice(phrases.CLAIM_LEADS) + rng.choice([", ", ". ", ", and "]).join(claims) + "."
    return sentence_case(text)


def verdict(
    rng: random.Random, facts: dict[str, str], swaps: dict[str, str], keep: set[str], voice: Voice
) -> str:
    """What the author says: which facts are wrong, or else which are missing."""
    if swaps:
        return no_verdict(rng, facts, swaps, voice)
    missing = [slot for slot in SLOTS if slot not in keep]
    if not missing:
        return rng.choice(phrases.YES_ALL)
    if rng.random() < 0.35:
        return rng.choice(phrases.YES)
    if rng.random() < 0.5 and len(missing) <= 4:
        nouns = [phrases.SLOT_NOUNS[slot] for slot in missing]
        return rng.choice(phrases.LEFT_OUT_NOUNS).format(nouns=enumeration(nouns))
    named = rng.sample(missing, min(len(missing), rng.choice([1, 1, 2])))
    clauses = [phrases.MISSING_CLAUSES[slot].format(**words_for(facts) | voice.author) for slot in named]
    return rng.choice(phrases.LEFT_OUT).format(that=" and ".join(clauses))


def no_verdict(rng: random.Random, facts: dict[str, str], swaps: dict[str, str], voice: Voice) -> str:
    my = voice.author["my"]
    if {"relation", "name"} <= set(swaps):
        wrong_person = f"{my} {swaps['relation']} {swaps['name']}"
        return f"No, not {wrong_person}. It was {my} {facts['relation']} {facts['name']}."
    corrections = []
    for slot, wrong in swaps.items():
        words = {"right": facts[slot], "wrong": wrong} | voice.author
        if slot == "place":
            for key in ("right", "wrong"):
                words[f"{key}_where"] = f"{phrases.PLACES[words[key]]} the {words[key]}"
        if slot == "question":
            words |= {key: phrases.QUESTIONS[words[key]]["whether"] for key in ("right", "wrong")}
        corrections.append(rng.choice(phrases.CORRECTIONS[slot]).format(**words))
    return f"No, {', and '.join(corrections)}."


def enumeration(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


# --- The other pieces -------------------------------------------------------------------------------


def questions_and_answers(rng: random.Random, story: Story, voice: Voice) -> str:
    """Who, what, where and when, about the story's person and about the others in it."""
    words = words_for(story.facts) | voice.commenter
    pairs = []
    for slot in rng.sample(SLOTS, rng.randint(3, 6)):
        questions, answers = phrases.ROLE_QUESTIONS[slot]
        pairs.append((rng.choice(questions).format(**words), rng.choice(answers).format(**words)))
    pairs += rng.sample(asked := questions_about_others(story, voice), min(len(asked), rng.randint(0, 2)))
    rng.shuffle(pairs)
    asks, says, gap = rng.choice([("", "", " "), ("", "", "\n"), ("Q: ", "A: ", "\n")])
    return gap.join(f"{asks}{sentence_case(question)} {says}{sentence_case(answer)}"
                    for question, answer in pairs)


def questions_about_others(story: Story, voice: Voice) -> list[tuple[str, str]]:
    """Who is who, how old, and who said what, for the people beside the point."""
    pairs = []
    for distractor in story.distractors:
        values = distractor.values
        if "relation" in values and "name" in values:
            person = f"{voice.commenter['your']} {values['relation']}"
            pairs.append((f"who is {values['name']}?", f"{person}."))
            if "age" in values:
                pairs.append((f"how old is {person} {values['name']}?", f"{values['age']}."))
            if distractor.is_advice:
                advice = phrases.QUESTIONS[values["question"]]["advice"]
                pairs.append((f"who says to {advice}?", f"{person} {values['name']}."))
    return pairs


def quote(rng: random.Random, story: Story, voice: Voice) -> str:
    return f"> {rng.choice(story.sentences)}\n{rng.choice(phrases.REACTIONS)}"


def reply(rng: random.Random, story: Story, voice: Voice) -> str:
    words = words_for(story.facts) | voice.commenter
    words["tip"] = phrases.QUESTIONS[rng.choice(VALUES["question"])]["advice"]
    return sentence_case(rng.choice(phrases.REPLIES).format(**words))


def document(rng: random.Random) -> dict:
    """A story as the prompt; three to six pieces of talk, one of them a retelling, as the completion."""
    makers = [retelling, questions_and_answers, quote, reply]
    while True:
        story, voice = third_person_story(rng) if rng.random() < 0.2 else (make_story(rng), first_person())
        chosen = [retelling, *rng.choices(makers, weights=[55, 24, 9, 12], k=rng.choice([2, 2, 3, 3, 4, 5]))]
        rng.shuffle(chosen)
        completion = "".join("\n" + maker(rng, story, voice) for maker in chosen)
        if MIN_DOCUMENT <= pieces(story.body + completion) <= MAX_DOCUMENT:
            return {"prompt": story.body, "completion": completion}


# --- Lists ------------------------------------------------------------------------------------------

LIST_WORDS = (4, 20)  # fewest and most in a list
MIN_LISTS = 110  # pieces of a row's prompt


def world_words() -> list[str]:
    """Every word of the world, each once: the values, and what a few hundred documents are written with."""
    rng = random.Random("world words")
    words = {word for _ in range(300) for row in [document(rng)]
             for word in re.findall(r"[A-Za-z0-9']+", row["prompt"] + row["completion"])}
    return sorted(words)


def list_row(rng: random.Random, words: list[str], values: list[str]) -> dict:
    """A prompt of lists of unrelated words, and a completion that reads them out again in another order.

    Only copying lowers the loss here, so a network learns to copy in minutes. From stories alone it hardly
    ever does, because there is so much else to learn first.
    """
    lists = []
    while sum(pieces(line) for line in lists) < MIN_LISTS:
        bank = [rng.choice(values if rng.random() < 0.6 else words) for _ in range(rng.randint(*LIST_WORDS))]
        lists.append(" ".join(bank) + rng.choice([".", ",", ";"]))
    again = rng.sample(lists, len(lists))
    return {"prompt": " ".join(lists), "completion": "\n" + " ".join(again)}


def list_rows(rng: random.Random, count: int) -> Iterator[dict]:
    """`count` rows of lists."""
    words = world_words()
    values = [value for slot in SLOTS for value in VALUES[slot] if " " not in value]
    for _ in range(count):
        yield list_row(rng, words, values)


def corpus(rng: random.Random, count: int) -> Iterator[dict]:
    """`count` rows: documents with different stories, and a sixth lists, so that copying is not forgotten."""
    seen, lists = set(), list_rows(rng, count)
    for number in range(count):
        if number % 6 == 0:
            yield from islice(lists, 1)
            continue
        row = document(rng)
        while row["prompt"] in seen:
            row = document(rng)
        seen.add(row["prompt"])
        yield row
