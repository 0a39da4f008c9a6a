"""What a key that does not exist was probably meant to be."""

import ast
import difflib
import re

from utils.errors import quoted
from utils.paths import PROJECT

_TRAINING_DATA = ("data", "rlhf_training_data", "reward_training_data", "actor_training_data")
_MODEL = ("model",)
# what other programs call it -> our keys; the first that the script has is meant
_ELSEWHERE = {
    "lr": ("learning_rate",), "peak_lr": ("learning_rate",), "actor_learning_rate": ("learning_rate",),
    **dict.fromkeys(("batch_size", "bs", "train_batch_size", "per_device_train_batch_size", "mini_batch_size",
                     "micro_batch_size", "rollout_batch_size"), ("per_device_batch_size", "micro_batch")),
    **dict.fromkeys(("per_device_eval_batch_size", "test_batch_size"), ("eval_batch_size",)),
    **dict.fromkeys(("epochs", "num_epochs", "n_epochs", "epoch"), ("num_train_epochs", "ppo_epochs")),
    "num_train_epochs": ("total_episodes",),
    **dict.fromkeys(("steps", "num_steps", "total_steps", "train_steps", "max_train_steps", "max_steps"),
                    ("max_steps", "total_episodes")),
    "num_ppo_epochs": ("ppo_epochs",), "episodes": ("total_episodes",), "num_episodes": ("total_episodes",),
    **dict.fromkeys(("model_name", "model_name_or_path", "base_model", "model_path", "sft_model",
                     "sft_model_path", "pretrained", "checkpoint", "tokenizer"), _MODEL),
    **dict.fromkeys(("reward_model_path", "reward_model_name_or_path", "rm"), ("reward_model",)),
    **dict.fromkeys(("dataset", "dataset_name", "data", "data_path", "train_data", "train_file",
                     "train_dataset", "training_data", "input"), _TRAINING_DATA),
    **dict.fromkeys(("eval_data", "eval_dataset", "validation_data", "valid_data", "validation_file"),
                    ("actor_validation_data", "reward_validation_data", "rlhf_validation_data")),
    **dict.fromkeys(("test_data", "test_file", "test_dataset"),
                    ("actor_test_data", "reward_test_data", "rlhf_test_data")),
    **dict.fromkeys(("out", "output", "out_dir", "save_dir", "output_path", "logdir", "run_dir"),
                    ("output_dir",)),
    **dict.fromkeys(("resume_from_checkpoint", "continue", "resume_from"), ("resume",)),
    **dict.fromkeys(("bf16", "fp16", "amp", "dtype", "torch_dtype", "precision", "half"),
                    ("mixed_precision", "precision")),
    **dict.fromkeys(("grad_accum", "accumulation_steps", "gradient_accumulation", "accum"),
                    ("gradient_accumulation_steps",)),
    **dict.fromkeys(("max_length", "max_seq_length", "max_seq_len", "seq_len", "max_tokens",
                     "max_source_length", "prompt_length"), ("max_prompt_tokens", "prompt_length")),
    **dict.fromkeys(("response_length", "max_target_length", "max_completion_length", "generate_max_len"),
                    ("max_new_tokens", "completion_length")),
    **dict.fromkeys(("num_generations", "k", "n_samples", "num_samples", "n"), ("responses_per_prompt", "k")),
    **dict.fromkeys(("beta", "kl", "init_kl_coef", "kl_ctl", "kl_penalty"), ("kl_coef",)),
    **dict.fromkeys(("clip_range", "clip", "eps_clip", "epsilon"), ("cliprange",)),
    **dict.fromkeys(("value_loss_coef", "vf_coeff"), ("vf_coef",)),
    **dict.fromkeys(("lora_r", "lora", "r", "rank"), ("lora_rank",)),
    **dict.fromkeys(("adam_epsilon", "eps"), ("adam_eps",)), "beta2": ("adam_beta2",),
    **dict.fromkeys(("warmup", "warmup_ratio", "num_warmup_steps", "lr_warmup_steps"), ("warmup_steps",)),
    **dict.fromkeys(("grad_clip", "clip_grad", "max_norm", "gradient_clipping"), ("max_grad_norm",)),
    **dict.fromkeys(("wandb", "tensorboard", "log_with", "logger", "tracker", "use_wandb"), ("report_to",)),
    **dict.fromkeys(("zero_stage", "ds_config", "deepspeed_config", "zero"), ("deepspeed", "zero")),
    **dict.fromkeys(("checkpointing", "activation_checkpointing", "grad_checkpointing"),
                    ("gradient_checkpointing",)),
    **dict.fromkeys(("log_every", "log_steps", "log_interval"), ("logging_steps",)),
    **dict.fromkeys(("eval_every", "eval_interval", "evaluation_steps"), ("eval_steps",)),
    **dict.fromkeys(("save_every", "save_interval", "checkpoint_steps"), ("save_steps",)),
    "keep": ("save_total_limit",), "random_seed": ("seed",), "temp": ("temperature", "eval_temperature"),
    "gpu": ("gpus",), "num_gpus": ("gpus",), "n_gpus": ("gpus",),
}


def suggestion(name: str, known: list[str], section: str) -> str:
    """What to do about a key that a script does not have, for the end of a message.

    Args:
        name: the key as in a file: underscores, no dashes in front.
        known: the script's keys.
        section: of the script's stage; "": it is no stage.
    """
    meant = [key for key in _ELSEWHERE.get(name, ()) if key in known][:1]
    if not meant and (scripts := _scripts_with(name)) and section:
        return (f"; it is a key of {' and '.join(scripts)}, and this is train_{section}.py (a file for "
                "several stages has sections: docs/options.md)")
    if meant := (meant or difflib.get_close_matches(name, known, n=1, cutoff=.75)
                 or _with_the_words_of(name, known) or difflib.get_close_matches(name, known, n=1)):
        return f"; did you mean {' or '.join(map(quoted, meant))}?"
    return "; --help shows all keys"


def _with_the_words_of(name: str, known: list[str]) -> list[str]:
    """Up to three keys that hold all words of the name: `rows` for eval_rows and test_rows."""
    words = {word for word in name.split("_") if word}
    found = [key for key in known if words and words <= set(key.split("_"))]
    return found if len(found) <= 3 else []


def _scripts_with(name: str) -> list[str]:
    """The stages whose configuration has a key, read from their source: importing a stage takes seconds."""
    scripts = {path.name: _keys_in(path.read_text(encoding="utf-8"))
               for path in sorted((PROJECT / "scripts").glob("train_*.py"))}
    return [script for script, keys in scripts.items() if name in keys]


def _keys_in(source: str) -> set[str]:
    """Names of the annotated fields of the classes in a source text that are called `...StageConfig`."""
    classes = [node for node in ast.parse(source).body
               if isinstance(node, ast.ClassDef) and re.fullmatch(r"\w+StageConfig", node.name)]
    return {field.target.id for node in classes for field in node.body if isinstance(field, ast.AnnAssign)}
