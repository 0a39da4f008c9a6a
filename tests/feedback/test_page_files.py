"""The page's files against each other: each word, class, module and export is used, none is missing."""

import re

import pytest

from utils.config import PROJECT

PAGE = PROJECT / "scripts" / "utils" / "feedback" / "page"
LANGUAGES = ("english.js", "chinese.js")
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGE.glob("*"))}
HTML = TEXTS["index.html"]
CODE = "\n".join(text for name, text in TEXTS.items()
                 if name.endswith((".js", ".html")) and name not in LANGUAGES)


def words(name: str) -> dict[str, str]:
    """The keys of a language and what stands behind each."""
    entries = re.findall(r'^  (?:"([\w.]+)"|(\w+)):\s(.*?)(?=^  (?:"|\w+:)|^\};)', TEXTS[name], re.M | re.S)
    return {quoted or bare: text for quoted, bare, text in entries}


def wanted() -> list[str]:
    """Regular expressions for the keys that the code asks for: literal ones, and `look.kind.${kind}`."""
    literal = re.findall(r'"([a-z_]+(?:\.[a-z_0-9.]+)?)"', CODE)
    patterns = re.findall(r"t\(`([^`]+)`", CODE)
    return [*map(re.escape, literal), *(re.sub(r"\$\{[^}]+\}", "[a-z_0-9]+", key) for key in patterns)]


def test_both_languages_have_the_same_words_with_the_same_values():
    english, chinese = map(words, LANGUAGES)
    assert len(english) > 100 and list(english) == list(chinese)
    for key in english:
        names = [set(re.findall(r"\{(\w+)\}", text[key])) for text in (english, chinese)]
        assert names[0] == names[1], key


def test_every_word_is_used_and_every_word_asked_for_is_there():
    keys = words("english.js")
    keys.pop("name")  # the language's own
    used = re.compile("|".join(wanted()))
    assert [key for key in keys if not used.fullmatch(key)] == []
    asked = re.findall(r"""\bt\("([\w.]+)"|data-(?:word|label)="(\w+)\"""", CODE)
    assert [key for pair in asked for key in pair if key and key not in keys] == []


@pytest.mark.parametrize("name", [name for name in TEXTS if name.endswith(".css")])
def test_every_class_of_a_style_sheet_is_given_to_something(name):
    selectors = re.sub(r"/\*.*?\*/|[\w-]+:[^;{}]*;", " ", TEXTS[name], flags=re.S)
    stems = {found.rstrip("0123456789") for found in re.findall(r"\.([a-z][\w-]*)", selectors)}  # of-${count}
    assert [stem for stem in sorted(stems) if not re.search(rf"[\s\"`.]{stem}[\s\"`$]", CODE)] == []


def test_every_module_is_imported_and_every_export_is_used():
    for name, text in TEXTS.items():
        if name.endswith((".js", ".css")):
            assert f'"./{name}"' in CODE or f'"/static/{name}"' in HTML, name
        others = "\n".join(TEXTS[other] for other in TEXTS if other != name and other.endswith(".js"))
        for export in re.findall(r"^export (?:async )?(?:function\*?|const|let|class) (\w+)", text, re.M):
            assert re.search(rf"\b{export}\b", others), (name, export)


@pytest.mark.parametrize("name", [name for name in TEXTS if name.endswith((".js", ".css"))])
def test_the_files_are_small(name):
    assert len(TEXTS[name].splitlines()) <= 300
