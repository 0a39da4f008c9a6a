"""The models that a run starts from: a folder or a hub name, resolved once, with all that is known of it.

A folder that a stage wrote has a stage.json, which says what trained it and on which task.
"""

import hashlib
import json
import os
import pickle
import sys
from functools import cached_property
from pathlib import Path

from huggingface_hub import constants, scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import CacheNotFound
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer

from utils.config import UserError, find_input
from utils.data.chat import Chat
from utils.data.layouts import TLDR_TEMPLATE
from utils.distributed import world
from utils.input_files import read_json, read_text
from utils.models.folders import model_folder
from utils.models.vocabulary import give_pad

# transformers would ask a web service to convert a model without safetensors, and send it the user's token
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# which stages may have made the model under a key
_STAGES_OF = {"model": ("sft", "ppo"), "reward_model": ("reward",), "guard_model": ("reward",)}


class Parent:
    """One model that a run starts from. Its parts are read when they are first asked for.

    Args:
        key: the configuration key that names it, for messages.
        name: a folder (looked up from the current folder, then the project's) or a hub name.
        chat_template: a Jinja file in place of the tokenizer's own template; None: its own, if there is one.
        stages: which may have made it; None: those that the key says.

    Raises:
        UserError: when the name is neither.
    """

    def __init__(self, key: str, name: str, chat_template: str | None = None,
                 stages: tuple[str, ...] | None = None):
        self.key, self.name, self.chat_template, self._told = key, name, chat_template, False
        self.stages = stages or _STAGES_OF.get(key, ())
        self.folder = model_folder(key, name)  # None: on the hub

    @property
    def path(self) -> str:
        """What `from_pretrained` takes."""
        return self.name if self.folder is None else str(self.folder)

    def load(self, loader):
        """`loader(path)`; whatever a broken folder makes the libraries raise becomes a UserError of one line.
        """
        try:
            return loader(self.path)
        except pickle.UnpicklingError:  # its text tells how to run what is in the file
            raise UserError(f"{self.key}: '{self.name}' cannot be loaded: its .bin file holds something else "
                            "than weights, which could run code; take a model with .safetensors files"
                            ) from None
        except Exception as error:  # the libraries raise anything, their own kinds among them
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{self.key}: '{self.name}' cannot be loaded: {reason}") from None

    @cached_property
    def adapter(self) -> LoraConfig | None:
        """What the adapters in the folder are; None: it holds a whole model."""
        if self.folder is None or not (self.folder / "adapter_config.json").is_file():
            return None
        if self.stage is None:
            raise UserError(f"{self.key}: '{self.name}' holds adapters that were not trained here; merge "
                            "them with peft, merge_and_unload() and save_pretrained(), and name the merged "
                            "model")
        return self.load(LoraConfig.from_pretrained)

    @cached_property
    def base(self) -> "Parent":
        """The whole model: this one, or the one that the adapters belong to.

        Raises:
            UserError: when that one is not where it was, or has other weights now.
        """
        if self.adapter is None:
            return self
        base = Parent(self.key, self.adapter.base_model_name_or_path)
        if self.stage.get("base", {}).get("sha256") != base.identity.get("sha256"):
            raise UserError(f"{self.key}: '{self.name}' holds adapters of '{base.name}', whose weights have "
                            "changed since; put the old ones back, or train that stage again")
        return base

    @cached_property
    def weights_path(self) -> str:
        """Where `from_pretrained` finds the weights: `path`, or offline a conversion in the hub's cache.

        OPT's smaller models have .bin files only. Their weights as safetensors stand in a pull request, and
        may be the only ones that were downloaded.
        """
        online = self.folder is None and not constants.is_offline_mode()
        if self.folder is not None or online or self._cached(*_SAFETENSORS, *_PICKLED):
            return self.path
        try:
            repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
        except CacheNotFound:
            return self.path
        revisions = [revision for repo in repos if repo.repo_id == self.name for revision in repo.revisions]
        converted = [str(revision.snapshot_path) for revision in revisions
                     if {file.file_name for file in revision.files} & set(_SAFETENSORS)]
        return converted[0] if converted else self.path

    def _cached(self, *files: str) -> bool:
        """Whether one of the files is in the folder, or in the cache of the hub."""
        if self.folder is not None:
            return any((self.folder / file).is_file() for file in files)
        return any(isinstance(try_to_load_from_cache(self.name, file), str) for file in files)

    def say_if_pickled(self) -> None:
        """Once weights are loaded: a line, the first time, when they came from .bin files."""
        if self._told or not world().is_main_process:
            return
        self._told = True
        if self._cached(*_PICKLED) and not self._cached(*_SAFETENSORS):
            print(f"{self.key}: '{self.name}' has no .safetensors file; its .bin file was read by torch's "
                  "loader for weights only", file=sys.stderr)

    @cached_property
    def config(self):
        """The architecture, without code from outside."""
        return self.load(lambda path: AutoConfig.from_pretrained(path, trust_remote_code=False))

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states; UserError when the config does not say it."""
        try:
            return self.config.get_text_config().hidden_size
        except AttributeError as error:
            raise UserError(
                f"{self.key}: the config of '{self.name}' says no hidden_size ({error})") from None

    @property
    def is_reward_model(self) -> bool:
        """Whether it is a sequence classification model with one label, whose output is a score."""
        kind = (self.config.architectures or ["unknown"])[0]
        return self.config.num_labels == 1 and "SequenceClassification" in kind

    @property
    def has_tokenizer(self) -> bool:
        return self.folder is None or any((self.folder / file).is_file() for file in _TOKENIZER_FILES)

    @property
    def _has_sentencepiece_only(self) -> bool:
        found = self.folder and [file for file in _TOKENIZER_FILES if (self.folder / file).is_file()]
        return found == ["tokenizer.model"]

    @cached_property
    def tokenizer(self):
        """The tokenizer; it must have an EOS token. Without a PAD of its own it gets one (`give_pad`)."""
        if not self.has_tokenizer:  # transformers would make up an empty tokenizer
            raise UserError(f"{self.key}: '{self.name}' holds a model but no tokenizer files "
                            f"({', '.join(_TOKENIZER_FILES)}); copy those of the model it was "
                            f"made from into it")
        if self._has_sentencepiece_only:
            raise UserError(f"{self.key}: '{self.name}' has its tokenizer as tokenizer.model only, which is "
                            "not read here; copy the tokenizer.json of the same model into the folder")
        tokenizer = self.load(lambda path: AutoTokenizer.from_pretrained(path, trust_remote_code=False))
        if self.chat_template is not None:
            tokenizer.chat_template = read_text(find_input(self.chat_template, "chat_template"))
        if tokenizer.chat_template:  # what ends an answer there ends it everywhere
            tokenizer.eos_token = Chat(tokenizer).end
        if tokenizer.eos_token_id is None:
            raise UserError(f"{self.key}: the tokenizer of '{self.name}' has no EOS token, so no "
                            f"summary could ever end")
        done = give_pad(tokenizer)
        if done and world().is_main_process:
            print(f"{self.key}: '{self.name}' has no PAD token of its own: {done}", file=sys.stderr)
        return tokenizer

    @cached_property
    def stage(self) -> dict | None:
        """stage.json; None for a hub model or one that was not trained here."""
        if self.folder is None or not (self.folder / "stage.json").exists():
            return None
        try:
            stage = read_json(self.folder / "stage.json")
        except UserError:
            stage = None
        if not isinstance(stage, dict):
            raise UserError(f"{self.key}: '{self.folder / 'stage.json'}' is no JSON object; train "
                            f"that stage again, or "
                            "remove the file if the model was not made here")
        return stage

    @cached_property
    def identity(self) -> dict:
        """Which weights these are: the name, and for a folder the checksum of each file of weights."""
        if self.folder is None:
            return {"name": self.name}
        files = sorted(self.folder.glob("*.safetensors")) or sorted(self.folder.glob("pytorch_model*.bin"))
        base = {} if self.adapter is None else {"base": self.base.identity}
        return {"name": self.name, "sha256": {path.name: _sha256(path) for path in files}} | base

    @property
    def run(self) -> tuple[str, Path] | None:
        """Stage and folder of the finished run whose final/ this is; None for another model."""
        finished = self.stage is not None and (self.folder.parent / "summary.json").exists()
        return (self.stage["stage"], self.folder.parent) if finished else None


def task_of(tokenizer) -> dict:
    """What two stages must agree on, as stage.json has it."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    template = tokenizer.chat_template and json.dumps(tokenizer.chat_template)
    return {
        "prompt_template": TLDR_TEMPLATE,
        "chat_template_sha256": template and hashlib.sha256(template.encode()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def check_task(*parents: Parent) -> None:
    """Refuse parents of the wrong stage or trained on another task, before a weight is loaded.

    The first parent's tokenizer is the one that the stage uses. A parent without stage.json is not known to
    be of a task, but its tokenizer can be compared.

    Raises:
        UserError: naming the key, what differs, and both values.
    """
    ours = task_of(parents[0].tokenizer)
    for parent in parents:
        theirs = parent.stage
        if theirs is None:
            theirs = {} if parent is parents[0] else task_of(parent.tokenizer)
        elif theirs.get("stage") not in parent.stages:
            raise UserError(f"{parent.key}: '{parent.name}' comes from the stage "
                            f"'{theirs.get('stage')}'; needed is one of "
                            f"{' or '.join(parent.stages)}")
        for item, value in ours.items():
            if item in theirs and theirs[item] != value:
                raise UserError(f"{parent.key}: '{parent.name}' was trained with another "
                                f"{item.replace('_', ' ')} ({theirs[item]!r:.60} there, {value!r:.60} here); "
                                f"use models of one family")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
