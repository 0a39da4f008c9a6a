"""What `final/` holds beside the weights; it is put together before the first step, to see that it can be."""

import tempfile
from pathlib import Path

from transformers import GenerationConfig

from utils.distributed import world
from utils.errors import UserError


def describe_sampling(model, tokenizer, config) -> None:
    """Set what `final/generation_config.json` says to whoever generates with it.

    The parent's generation config is not taken over: it says how the parent was sampled from, and may be one
    that transformers reads but does not write. A policy of PPO is sampled from as it was trained; the others
    greedily, as far as nothing else is said. What ended the parent's answers still ends them (`fit_rows`).
    """
    if not model.can_generate():
        return
    sampling = {}
    if config.section == "ppo":  # top_k is 50 where it is not said
        sampling = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, max_new_tokens=config.max_new_tokens, use_cache=True,
        suppress_tokens=getattr(model.generation_config, "suppress_tokens", None), **sampling)


def rehearse_saving(model, tokenizer, config) -> None:
    """Write all of `final/` but its weights into a temporary folder.

    Raises:
        UserError: when the libraries read a part of the parent model, but do not write it.
    """
    describe_sampling(model, tokenizer, config)
    if not world().is_main_process:
        return
    parts = {"config.json": model.config, "the tokenizer": tokenizer}
    if model.can_generate():
        parts["generation_config.json"] = model.generation_config
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            try:
                part.save_pretrained(Path(folder))
            except Exception as error:  # the libraries raise anything
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(f"model: {name} of '{config.model}' can be read, but not be saved again: "
                                f"{reason}") from None
