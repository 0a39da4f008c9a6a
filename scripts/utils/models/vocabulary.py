"""The words of a tokenizer and the rows of a model's embeddings: a PAD token where there is none."""

import re

import torch

from utils.zero import gathered_weights

_NEW_PAD = "<pad>"
# what tokenizers call tokens that were never trained, the better ones first
_UNUSED = (r"(?<![a-z])pad(ding)?(?![a-z])", r"(?<![a-z])(reserved|unused)(?![a-z])")
_BLOCKS = (128, 64, 1)  # rows that somebody rounded up are a multiple of the first or the second


def give_pad(tokenizer) -> str | None:
    """Give a tokenizer a PAD token that is not its EOS (detail 4), always the same one.

    PAD as EOS would be masked away, and no model would learn to stop. Taken is the first unused special token
    whose name says padding, else the first that says reserved, else a new `<pad>`.

    Returns:
        A clause that says what was done; None when there was a PAD.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return None
    ours = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    template = tokenizer.chat_template or ""
    unused = [token for token, number in sorted(tokenizer.get_added_vocab().items(), key=lambda item: item[1])
              if number not in ours and token not in template]
    found = [token for name in _UNUSED for token in unused if re.search(name, token.lower())]
    if found:
        tokenizer.pad_token = found[0]
        return f"its unused token '{found[0]}' ({tokenizer.pad_token_id}) is taken for padding"
    tokenizer.add_special_tokens({"pad_token": _NEW_PAD})
    return f"a new token '{_NEW_PAD}' ({tokenizer.pad_token_id}) is added for padding"


def words_of(tokenizer) -> int:
    """How many rows of the embeddings stand for words that can be sampled: the rows behind them are unused.

    A PAD behind all other tokens is one that was added after the model was trained.
    """
    last = len(tokenizer) - 1
    return last if tokenizer.pad_token_id == last else last + 1


def fit_rows(model, tokenizer) -> None:
    """Give an added PAD a row of the embeddings, and tell the configs which tokens are PAD and EOS.

    The new rows are the mean of the others. Nothing reads them here. It matters to tools that sample from all
    rows: there a mean is as likely as any word, and 0 may be the likeliest. So `generation_config` suppresses
    them too.
    """
    pad, rows = tokenizer.pad_token_id, model.get_input_embeddings().num_embeddings
    if pad == rows:
        block = next(size for size in _BLOCKS if rows % size == 0)
        model.resize_token_embeddings(pad + 1, pad_to_multiple_of=block, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                with torch.no_grad(), gathered_weights(layer, change=True):
                    for weight in layer.parameters():  # a head may have a bias
                        weight[rows:] = weight[:rows].mean(0)
    model.config.pad_token_id, model.config.eos_token_id = pad, tokenizer.eos_token_id
    if model.can_generate():
        model.generation_config.pad_token_id = pad
        known = model.generation_config.eos_token_id  # None, a number or a list; all of them end an answer
        known = known if isinstance(known, list) else [known]
        ends = list(dict.fromkeys([tokenizer.eos_token_id, *(end for end in known if end is not None)]))
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        unused = range(words_of(tokenizer), model.get_input_embeddings().num_embeddings)
        model.generation_config.suppress_tokens = list(unused) or None
