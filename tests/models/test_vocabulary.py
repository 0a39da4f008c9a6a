"""Stock tokenizers without a PAD of their own, and the rows of the embeddings behind the last word."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from families import draw
from oracle import each_row, stock_scores
from utils.config import UserError
from utils.models.loading import load_policy, load_scalar_model
from utils.models.outputs import response_logprobs, scores
from utils.models.parents import Parent, check_task
from utils.models.prompt_groups import pack
from utils.models.vocabulary import words_of

WORDS = [f"w{number}" for number in range(20)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
# special tokens behind the words, the names that the tokenizer gives, and what must become its PAD
STOCK = {
    "gpt2": (["<|endoftext|>"], {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}, "<pad>"),
    "pythia": (["<|endoftext|>", "<|padding|>"], {"eos_token": "<|endoftext|>"}, "<|padding|>"),
    "llama 2": (["<unk>", "<s>", "</s>"], {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"},
                "<pad>"),
    "llama 3.1": (["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                   "<|finetune_right_pad_id|>", "<|reserved_special_token_1|>"],
                  {"eos_token": "<|end_of_text|>", "bos_token": "<|begin_of_text|>"},
                  "<|finetune_right_pad_id|>"),
    "llama 3": (["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                 "<|reserved_special_token_1|>"],
                {"eos_token": "<|end_of_text|>", "bos_token": "<|begin_of_text|>"},
                "<|reserved_special_token_0|>"),
    "qwen base": (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"],
                  {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, "<|vision_pad|>"),
    "smollm2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>",
                 "unk_token": "<|endoftext|>"}, "<pad>"),
    # a PAD that its template writes is none
    "template": (["<eos>", "<|pad|>", "<|im_start|>", "<|im_end|>"],
                 {"eos_token": "<eos>", "chat_template": f"<|pad|>{TEMPLATE}"}, "<pad>"),
}
# names in which "pad" is a part of a word
NOT_PADDING = ["<|keypad|>", "<|padlock|>", "<|unreserved|>"]


def tokenizer_of(special, names):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
CONFIGS = {
    "tied": lambda rows: GPT2Config(vocab_size=rows, n_embd=16, n_layer=2, n_head=4, n_positions=64),
    "untied": lambda rows: GPTNeoXConfig(**SIZES, vocab_size=rows, intermediate_size=24),
    "llama": lambda rows: LlamaConfig(**SIZES, vocab_size=rows, intermediate_size=24),
}


def saved(folder, tokenizer, rows, config="tied", kind=AutoModelForCausalLM, **more):
    torch.manual_seed(0)
    made = CONFIGS[config](rows)
    for name, value in more.items():
        setattr(made, name, value)
    model = kind.from_config(made)
    for weight in model.parameters():
        torch.nn.init.normal_(weight.data, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Parent("model", str(folder))


@pytest.mark.parametrize("stock", STOCK)
def test_a_stock_tokenizer_gets_a_pad_by_a_fixed_rule(stock, tmp_path, capsys):
    special, names, expected = STOCK[stock]
    tokenizer = tokenizer_of([*NOT_PADDING, *special], names)
    size = len(tokenizer)
    parent = saved(tmp_path / "base", tokenizer, size)
    found = parent.tokenizer
    assert found.pad_token == expected and found.pad_token_id != found.eos_token_id
    assert (found.pad_token_id == size) == (expected == "<pad>")
    assert capsys.readouterr().err.count("model: '") == 1
    # its own words keep their ids, and what is saved is read back with the same PAD, in silence
    assert found(" ".join(WORDS))["input_ids"] == tokenizer(" ".join(WORDS))["input_ids"]
    found.save_pretrained(tmp_path / "base")
    again = Parent("model", str(tmp_path / "base"))
    assert again.tokenizer.pad_token_id == found.pad_token_id and not capsys.readouterr().err
    check_task(parent, Parent("model", str(tmp_path / "base")))


def test_a_pad_of_its_own_stays(tmp_path, capsys):
    tokenizer = tokenizer_of(["<eos>", "<p>", "<pad>"], {"eos_token": "<eos>", "pad_token": "<p>"})
    assert saved(tmp_path, tokenizer, len(tokenizer)).tokenizer.pad_token == "<p>"
    assert not capsys.readouterr().err.count("PAD")


@pytest.mark.parametrize("known", [None, 20, [20, 5], [22, 20]])
def test_the_end_of_a_turn_in_the_template_is_the_end_everywhere(known, tmp_path):
    """A base model's EOS ends texts, its template's turns end otherwise. What ended answers still does."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]  # 20 to 23
    tokenizer = tokenizer_of(special, {"eos_token": "<|endoftext|>", "pad_token": "<pad>"})
    plain = saved(tmp_path / "plain", tokenizer, len(tokenizer))
    assert plain.tokenizer.eos_token_id == 20
    tokenizer.chat_template = TEMPLATE
    parent = saved(tmp_path / "base", tokenizer, len(tokenizer))
    path = tmp_path / "base" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": known}))
    assert parent.tokenizer.eos_token_id == 22
    load_policy(parent).save_pretrained(tmp_path / "final")
    parent.tokenizer.save_pretrained(tmp_path / "final")
    ends = AutoModelForCausalLM.from_pretrained(tmp_path / "final").generation_config.eos_token_id
    before = known if isinstance(known, list) else [known] if known else []
    assert set(ends if isinstance(ends, list) else [ends]) == {22, *before}
    assert AutoTokenizer.from_pretrained(tmp_path / "final").eos_token == "<|im_end|>"
    assert json.loads((tmp_path / "final" / "config.json").read_text())["eos_token_id"] == 22


def test_parents_of_another_template_are_refused(tmp_path):
    special = ["<eos>", "<|im_start|>", "<|im_end|>", "<pad>"]
    tokenizer = tokenizer_of(special, {"eos_token": "<eos>", "pad_token": "<pad>", "chat_template": TEMPLATE})
    own = saved(tmp_path / "own", tokenizer, len(tokenizer))
    (tmp_path / "other.jinja").write_text("{{ '' }}" + TEMPLATE)
    other = Parent("model", own.name, str(tmp_path / "other.jinja"))
    check_task(own, own)
    with pytest.raises(UserError, match="^model: .* another chat template sha256"):
        check_task(other, own)
    with pytest.raises(UserError, match="^chat_template: 'none.jinja' does not exist"):
        Parent("model", own.name, "none.jinja").tokenizer  # noqa: B018


@pytest.mark.parametrize(("rows", "grown"), [(23, 24), (64, 128), (128, 256), (100, 100)])
@pytest.mark.parametrize("config", CONFIGS)
def test_an_added_pad_has_a_row_and_no_word_changes(config, rows, grown, tmp_path):
    """Rows that somebody rounded up stay rounded; free rows are used."""
    words = [f"<w{number}>" for number in range(min(rows, 128) - len(WORDS) - 1)] if rows != 100 else []
    tokenizer = tokenizer_of([*words, "<eos>"], {"eos_token": "<eos>"})
    parent = saved(tmp_path / "base", tokenizer, rows, config)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = load_policy(parent).eval()
    size = len(tokenizer)
    assert parent.tokenizer.pad_token_id == size and words_of(parent.tokenizer) == size
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == grown
    weight = model.get_input_embeddings().weight
    torch.testing.assert_close(weight[rows:], weight[:rows].mean(0).expand(grown - rows, -1))
    prompts, completions = [[3, 4, 5], [6]], [[[7, 8], [9, size - 1]], [[1, 2, 3]]]
    groups = pack(prompts, completions, size)
    found = response_logprobs(model, groups, 1.0)[groups.response_mask]
    expected = [row for prompt, completion in each_row(prompts, completions)
                for row in stock(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1, :size]
                .log_softmax(-1)[torch.arange(len(completion)), completion]]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
    found.sum().backward()
    assert all(weight.grad is None or not weight.grad[size:].any() for layer in
               (model.get_output_embeddings(), model.get_input_embeddings()) for weight in [layer.weight])
    # saved and loaded again the model is the same, and it is stock
    model.save_pretrained(tmp_path / "final")
    parent.tokenizer.save_pretrained(tmp_path / "final")
    again = load_policy(Parent("model", str(tmp_path / "final"))).eval()
    assert torch.equal(response_logprobs(again, groups, 1.0), response_logprobs(model, groups, 1.0))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert plain.config.pad_token_id == plain.generation_config.pad_token_id == size
    assert plain.generation_config.suppress_tokens == list(range(size, grown))


@torch.no_grad()
def test_no_row_behind_the_last_word_is_sampled(tmp_path):
    """Here these rows have by far the highest logits, ours and those of a checkpoint with more rows."""
    tokenizer = tokenizer_of(["<eos>"], {"eos_token": "<eos>"})
    parent = saved(tmp_path / "base", tokenizer, 40, "untied")
    model = load_policy(parent).eval()
    hidden = torch.randn(16)
    model.get_output_embeddings().weight[21:] = 100 * hidden
    model.gpt_neox.final_layer_norm.bias += 10 * hidden
    drawn = draw(model, [[3, 4], [5]], k=4, eos_id=20, pad_id=21)
    assert max(token for response in drawn.responses for token in response) <= 20
    model.save_pretrained(tmp_path / "final")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert stock.generate(torch.tensor([[3, 4]]), max_new_tokens=8, do_sample=False).max() <= 20


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS)
def test_stock_tools_read_the_reward_model_at_the_last_token(config, tmp_path):
    """They look for the last token that is not PAD, so it may not be the EOS."""
    tokenizer = tokenizer_of(["<eos>"], {"eos_token": "<eos>"})
    parent = saved(tmp_path / "base", tokenizer, len(tokenizer), config)
    model = load_scalar_model(parent, new_head_seed=0).eval()
    model.score.weight *= 30
    model.save_pretrained(tmp_path / "reward")
    parent.tokenizer.save_pretrained(tmp_path / "reward")
    eos, pad = parent.tokenizer.eos_token_id, parent.tokenizer.pad_token_id
    prompts, completions = [[3, 4, 5], [6]], [[[7, 8, eos], [9, eos]], [[1, 2, 3, eos]]]
    found = scores(model, pack(prompts, completions, pad))
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    read = AutoTokenizer.from_pretrained(tmp_path / "reward")
    assert stock.config.pad_token_id == read.pad_token_id == pad
    rows = [prompt + completion for prompt, completion in each_row(prompts, completions)]
    torch.testing.assert_close(found, stock_scores(stock, rows, pad), rtol=1e-4, atol=1e-4)
    reward = load_scalar_model(Parent("reward_model", str(tmp_path / "reward")),
                               vocab_size=load_policy(parent).config.vocab_size)
    torch.testing.assert_close(scores(reward, pack(prompts, completions, pad)), found)
