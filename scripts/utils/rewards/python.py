"""A function of the user's as a reward.

    rewards:
    - python: mine/reward.py:is_right

The function is called with keyword arguments, those of the following that it has as parameters (all of them,
with the columns, where it takes `**columns`):

    prompts      list[str]         the prompts; of a conversation its turns as text
    completions  list[str]         the answers, without special tokens and without white space around
    references   list[str | None]  the completions in the rows of the data
    tokens       list[list[int]]   the token ids of the answers, with EOS where there is one
    ended        list[bool]        whether an answer has EOS
    messages     list[list[dict] | None]  the conversation with `role` and `content`; None: a plain prompt
    NAME         list              the column NAME of the rows; None where a row lacks it

Each list has one item for each answer. The K answers to a prompt stand one after the other. The function
returns as many numbers, in the same order: int, float or bool; None: this answer gets no score from this
reward. NaN, infinite numbers and another count stop the run.

When: once in each update, with all answers of this process; once in each evaluation and at the end, with all
summaries of held-out prompts. With `processes: main` the first process of each node calls it for all
processes of the node. It runs in a thread of its own, which may outlast the `time_limit`, since Python cannot
end a thread. An exception, or a call longer than `time_limit`, stops the run with one line, which names the
row where a row alone does the same.
"""

import importlib.util
import inspect
import math
import sys
import threading
from numbers import Real

from utils.config import UserError, find_input
from utils.errors import quoted
from utils.rewards.answers import Answers
from utils.rewards.entries import PythonEntry

_OURS = ("prompts", "completions", "references", "tokens", "ended", "messages")
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class PythonReward:
    """A function in a file, which is run when this is made.

    Raises:
        UserError: when the file cannot be run, or has no such function.
    """

    reads_text = True

    def __init__(self, entry: PythonEntry, where: str):
        self.entry, self.where = entry, f"{where}: '{entry.python}'"
        path, _, name = entry.python.rpartition(":")
        self.path = find_input(path, where)
        self.function = getattr(self._module(), name, None)
        if not callable(self.function):
            raise UserError(f"{where}: '{path}' has no function '{name}'")
        parameters = inspect.signature(self.function).parameters.values()
        self.takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
        self.takes = [one.name for one in parameters if one.kind in _BY_NAME]
        self.needs = [one.name for one in parameters
                      if one.kind in _BY_NAME and one.default is inspect.Parameter.empty]

    def _module(self):
        spec = importlib.util.spec_from_file_location(f"user_{self.entry.name}", self.path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickles look a module up by its name
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise UserError(f"{self.where} cannot be run: {type(error).__name__}: {error}") from None
        return module

    def of_answers(self, answers: Answers) -> list[float | None]:
        """The function's scores of some answers."""
        outcome = self._called(answers)
        if isinstance(outcome, Exception):
            raise UserError(f"{self.where} raised {type(outcome).__name__}: {outcome}, for "
                            f"{self._culprit(answers)}")
        count = len(answers.prompts)
        try:
            scores = outcome.tolist() if hasattr(outcome, "tolist") else list(outcome)
        except TypeError:
            raise UserError(f"{self.where} returned {quoted(outcome)}; a list of {count} numbers is needed"
                            ) from None
        if len(scores) != count:
            raise UserError(f"{self.where} returned {len(scores)} scores for {count} answers")
        for score, place in zip(scores, answers.places, strict=True):
            if score is not None and not (isinstance(score, Real) and math.isfinite(score)):
                raise UserError(f"{self.where} returned {quoted(score)} for an answer to {place}; a finite "
                                "number or None is needed")
        return [None if score is None else float(score) for score in scores]

    def _called(self, answers: Answers):
        """What the function returns, or its exception. Raises UserError when it takes too long."""
        names = {name for row in answers.columns for name in row}
        given = {name: [row.get(name) for row in answers.columns] for name in names}
        given |= {name: list(getattr(answers, name)) for name in _OURS}
        lacks = [name for name in self.needs if name not in given]
        if lacks:
            raise UserError(f"{self.where} asks for '{lacks[0]}', which the rows do not have as a column; "
                            f"they have {', '.join(sorted(names)) or 'none besides the prompt'}")
        if not self.takes_all:
            given = {name: values for name, values in given.items() if name in self.takes}
        made = []

        def call():
            try:
                made.append(self.function(**given))
            except Exception as error:
                made.append(error)
            except SystemExit as error:
                made.append(RuntimeError(f"it called sys.exit({error.code})"))

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self.entry.time_limit)
        if not made:
            raise UserError(f"{self.where} did not return within its time_limit of "
                            f"{self.entry.time_limit:g} s, for {len(answers.prompts)} answers, the first to "
                            f"{answers.places[0]}")
        return made[0]

    def _culprit(self, answers: Answers) -> str:
        """The first answer that makes the function raise alone; or all of them."""
        for number, place in enumerate(answers.places):
            if isinstance(self._called(answers.take([number])), Exception):
                return f"the answer {quoted(answers.completions[number])} to {place}"
        return f"{len(answers.places)} answers together, the first to {answers.places[0]}"
