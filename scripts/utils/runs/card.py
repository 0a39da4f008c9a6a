"""The model card of `final/`: what others need in order to use the model, and the metadata for the hub."""

import dataclasses

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from utils.data.sources import sources_of
from utils.models.parents import Parent
from utils.paths import find_local, is_hub_name

_TASKS = {"sft": "text-generation", "reward": "text-classification", "ppo": "text-generation"}
_TITLES = {"sft": "A language model after supervised fine-tuning",
           "reward": "A reward model",
           "ppo": "A language model after reinforcement learning from human feedback (PPO)"}
# figures of summary.json: name on the hub, and what it says
_FIGURES = {
    "rouge1": ("rouge", "ROUGE-1 on held-out prompts"), "rouge2": ("rouge", "ROUGE-2 on held-out prompts"),
    "rougeL": ("rouge", "ROUGE-L on held-out prompts"),
    "accuracy": ("accuracy", "accuracy on held-out pairs"),
    "score_after": ("reward", "mean score of its answers by the reward model it was trained with"),
    "kl": ("kl", "KL to the model it started from [nats an answer]"),
}
_USE = {
    "text-generation": '''
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer(prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
```
''',
    "text-classification": '''
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
text = prompt + completion + tokenizer.eos_token  # the score is read at the end-of-sequence token
inputs = tokenizer(text, return_tensors="pt")
score = model(**inputs).logits.item() - model.config.score_shift
```

The one output is the score of a completion after its prompt. The higher of two scores is the answer that
people would rather have. Scores of different prompts compare less well.

- `score_shift` puts the reference answers at 0 on average. It is 0 where the shift could be put into the
  weights. A model that ends in a norm without bias (Llama, Qwen, Gemma) has no place for it.
- A `text-classification` pipeline gives the score as it is, since `problem_type` is `regression`. It appends
  no end-of-sequence token and knows no `score_shift`: write the first and subtract the second.
- The score of a text without its end-of-sequence token means nothing: it was not trained.
''',
}
# how this reads for conversations, whose template writes the special tokens that the tokenizer would add
_CHAT = {
    'inputs = tokenizer(prompt, return_tensors="pt")':
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,\n'
        '                                       return_tensors="pt")',
    "text = prompt +":
        "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)\n"
        "text = prompt +",
    "tokenizer(text, ": "tokenizer(text, add_special_tokens=False, ",
    "write the first and subtract the second.":
        "write the first and subtract the second. Give it `add_special_tokens=False` with the text.",
}
_LIMITS = """\
It was tested on held-out rows of the data above, and on nothing else: not on other subjects or languages, not
for safety, bias, truth or personal data. It may repeat what its data and its base model have in them. It is
meant for research, and for people who check what it writes."""

_ROUNDED = """ The weights of the linear layers were rounded to numbers in 4 bits (NF4, QLoRA), and adapters \
were trained beside them. Here are the rounded weights with the adapters added."""


_ADAPTERS = """ The weights of the linear layers were rounded to numbers in 4 bits (NF4, QLoRA), and \
adapters were trained beside them. Here are the adapters alone. \
peft's `PeftModel.from_pretrained(base, folder)` puts them into the base that `adapter_config.json` names."""


def model_card(config, stage: str, parents: list[Parent], summary: dict, tokenizer) -> str:
    """The text of `final/README.md`.

    Args:
        config: of the stage.
        stage: "sft", "reward" or "ppo".
        summary: what summary.json holds.
    """
    task, data = _TASKS[stage], _data_of(config)
    figures = [(kind, text, summary[name], _interval(summary, name))
               for name, (kind, text) in _FIGURES.items() if name in summary]
    hub_sets = [name for names in data.values() for name in names if _on_hub(name)]
    test = next((names[0] for key, names in data.items() if key.endswith("test_data")), "held-out rows")
    metadata = ModelCardData(
        base_model=[parent.name for parent in parents if parent.folder is None] or None,
        datasets=list(dict.fromkeys(hub_sets)) or None, license=_licence(parents[0]),
        library_name="transformers", pipeline_tag=task, tags=["rlhf", stage], model_name=f"{stage} model",
        eval_results=[EvalResult(task_type=task, dataset_type=test, dataset_name=test, metric_type=kind,
                                 metric_value=value, metric_name=f"{text}{span}")
                      for kind, text, value, span in figures],
    )
    measured = [f"| {text} | {value:.3f} | {span.removeprefix(', 95 %: ')} |"
                for _, text, value, span in figures]
    use = _USE[task].replace("MAX_NEW_TOKENS", str(getattr(config, "max_new_tokens", "")))
    for plain, chat in _CHAT.items() if tokenizer.chat_template else ():
        use = use.replace(plain, chat)
    return "\n".join([
        "---", metadata.to_yaml().strip(), "---",
        f"# {_TITLES[stage]}",
        "Made from " + " and ".join(f"`{parent.name}` (`{parent.key}`)" for parent in parents) + "."
        + (_ADAPTERS if config.save_adapters else _ROUNDED if config.load_in_4bit else ""),
        "", "## Use it", use.strip(), "", _layout(tokenizer),
        "", "## Figures", "| measure | value | 95 % interval |", "|---|---|---|", *measured,
        "", "## Made with", "```sh", f"python scripts/train_{stage}.py --config config.yaml", "```",
        "where `config.yaml` says, besides the defaults:", "```yaml", _changes(config), "```",
        "", "Data:", *(f"- `{key}`: {', '.join(names)}" for key, names in data.items()),
        "", "## Limits", _LIMITS, "",
    ])


def _interval(summary: dict, name: str) -> str:
    low, high = summary.get(f"{name}_low"), summary.get(f"{name}_high")
    return "" if low is None or high is None else f", 95 %: {low:.3f} - {high:.3f}"


def _data_of(config) -> dict[str, list[str]]:
    """Data key -> the names of its sets."""
    named = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
             if field.name.endswith("_data")}
    return {key: [source.name for source in sources_of(value)] for key, value in named.items() if value}


def _on_hub(name: str) -> bool:
    return find_local(name) is None and is_hub_name(name)


def _licence(parent: Parent) -> str | None:
    """The licence in the card of a base model that lies here; None where it says none."""
    card = parent.folder and parent.folder / "README.md"
    if not card or not card.is_file():
        return None
    try:
        licence = ModelCard.load(card).data.license
    except (ValueError, OSError, yaml.YAMLError):  # somebody's own text
        return None
    return licence if isinstance(licence, str) else None


def _layout(tokenizer) -> str:
    if tokenizer.chat_template:
        return ("A prompt is a conversation through the tokenizer's chat template, with the generation "
                f"prompt. A completion ends with `{tokenizer.eos_token}`.")
    return ("A prompt is plain text in the layout of the data below. A completion follows it with one space "
            f"and ends with `{tokenizer.eos_token}`.")


def _changes(config) -> str:
    """The keys that differ from the defaults, as YAML."""
    defaults = type(config)()
    changes = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
               if getattr(config, field.name) != getattr(defaults, field.name)
               and field.name not in ("output_dir", "resume")}
    return yaml.safe_dump(changes, sort_keys=False, allow_unicode=True).strip() if changes else "# nothing"
