"""One short check of a model at load: of a prompt group it says what its stock form says of plain rows.

The check runs the model at hand, so that no family has to be known. It refuses

- a tokenizer with ids beyond the model's embedding rows;
- rows that are longer than the model has positions, or that change what it says of shorter ones (RoPE that
  depends on the longest row);
- layers through which the answers of a row, or padding, reach each other (state spaces, convolutions);
- randomness that is left after dropout was switched off;
- logits or scores that are not what our heads make of the last hidden states.

It costs forward passes of 42, 18 and 8 tokens; five more, of 28 tokens in all, where the model is to sample.
"""

import torch

from utils.config import UserError
from utils.models.four_bit import arithmetic_of
from utils.models.generation import forced_logits
from utils.models.outputs import hidden_states, trunk
from utils.models.parents import Parent
from utils.models.prompt_groups import pack
from utils.zero import full_shape, gathered_weights

_ADVICE = "use OPT, GPT-2, GPT-NeoX, Llama, Mistral, Qwen2, Qwen3 or another plain transformer"
# Layers that see what a rule of positions says: a short row shows what they do. Others choose among the
# columns of a long row (MiniMax-M3 takes blocks of 128), which a short row does not show.
_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
_REASON = 200  # letters of a library's message that are shown


def refuse_unfit(model, parent: Parent, tokenizer, tokens: int, what: str, *, dropout: bool = False) -> None:
    """Raise UserError, naming key and model, when training or sampling with the model would go wrong.

    Every rank must call it, because under ZeRO-3 the weights are gathered. Random states stay as they are.

    Args:
        model: a policy or a scalar model, with our heads and without adapters.
        tokenizer: the one whose ids the model is going to read.
        tokens: of the longest prompt with an answer.
        what: the configuration keys that decide `tokens`.
        dropout: the model is trained with its dropout, which is not looked at then.
    """
    refuse_unknown_ids(model, parent, tokenizer)
    refuse_too_long(model, tokens, what)
    name, was_training = f"{parent.key}: '{parent.name}'", model.training
    with torch.no_grad(), gathered_weights(model):
        device = model.get_input_embeddings().weight.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                _Check(model, tokens - 1).refuse(name, what, dropout)
        except UserError:
            raise
        except Exception as error:  # a model that lacks an argument or a part raises anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:_REASON]
            raise UserError(f"{name} cannot be computed in prompt groups ({type(error).__name__}: {reason}); "
                            f"{_ADVICE}") from None
        finally:
            model.train(was_training)


def refuse_unknown_ids(model, parent: Parent, tokenizer) -> None:
    """Raise UserError when the tokenizer has ids for which the model has no embedding."""
    rows, largest = full_shape(model.get_input_embeddings().weight)[0], max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(f"{parent.key}: '{parent.name}' has {rows} embedding rows, but the tokenizer has ids "
                        f"up to {largest}; load the model with transformers, call "
                        f"resize_token_embeddings({largest + 1}), and save it with the tokenizer")


def refuse_too_long(model, tokens: int, what: str) -> None:
    """Raise UserError when a row would need more positions than the model has."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", tokens)
    if tokens > limit:
        raise UserError(f"{what} makes rows of {tokens} tokens, but the model has {limit} positions; lower "
                        "max_prompt_tokens")


class _Check:
    """A prompt of P = 4 tokens with K = 2 answers of R = 4, as plain rows and as a group beside a longer one.

    States are those of the prompt's last token and of the answers' tokens: (K, R + 1, D).
    """

    def __init__(self, model, far: int):
        self.model = model
        weight = model.get_input_embeddings().weight
        dtype = arithmetic_of(model)
        self.bound = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        # ordinary words: special tokens stand at the ends of a vocabulary
        words = [(len(weight) // 2 + i) % len(weight) for i in range(18)]
        self.prompt, self.answers, self.longer = words[:4], [words[4:8], words[8:12]], words[12:]
        self.rows = torch.tensor([self.prompt + answer for answer in self.answers], device=weight.device)
        self.far = max(far, self.rows.shape[1])
        # columns of each answer's states in the group's row
        self.columns = [[3, 4, 5, 6, 7], [3, 8, 9, 10, 11]]

    def refuse(self, name: str, what: str, dropout: bool) -> None:
        """Raise UserError, which starts with `name`, for the first thing that is wrong."""
        model = self.model.train(not dropout)
        first, second = self.grouped()
        # to the bound, since a matrix product may sum the rows of a batch in different orders
        if first.isfinite().all() and self.differ(first, second):
            raise UserError(f"{name} is random in training although its dropout was switched off: "
                            f"{self.first_random()}; {_ADVICE}")
        model.eval()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        stock = self.stock(self.far)
        if not stock.isfinite().all():
            raise UserError(f"{name} computes NaN or infinite numbers; its weights are damaged")
        # such RoPE puts the frequencies of the longest row into a buffer; a table that has grown is none
        moved = any(buffer.shape == buffers[name].shape and not torch.equal(buffer, buffers[name])
                    for name, buffer in model.named_buffers() if name in buffers)
        if moved or self.differ(first, stock):
            if moved or not self.differ(first, self.stock()):
                raise UserError(f"{name} says something else of a text when a longer one is in the batch "
                                f"(its RoPE depends on the longest row), and {what} makes rows of "
                                f"{self.far + 1} tokens; lower max_prompt_tokens")
            raise UserError(f"{name} cannot be computed in prompt groups: what it says of an answer changes "
                            "with the other answers of its row, or with padding, in "
                            f"{self.first_mixing()}; {_ADVICE}")
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _KINDS
        if kinds:
            raise UserError(f"{name} has layers of type {', '.join(sorted(kinds))}, which are not built in "
                            f"here; {_ADVICE}")
        self.refuse_outputs(name, first)

    def refuse_outputs(self, name: str, states) -> None:
        """The same for what the model makes of its states, and for what the sampler sees."""
        stock = self.model(input_ids=self.rows[:1], use_cache=False).logits[0]  # (P + R, V), or (1,)
        score, head = getattr(self.model, "score", None), self.model.get_output_embeddings()
        scale = None
        if score is not None:
            ours = score(states[0, -1])
            scale = score.weight.abs() @ states[0, -1].abs()  # a score near 0 is a sum of terms that cancel
        elif head is not None:
            logits = head.logits(head(states))  # (K, R + 1, V)
            ours, stock = logits[0], stock[3:, : head.words].float()
        if (score is None and head is None) or self.differ(ours, stock, scale):
            raise UserError(f"{name} does more to its last hidden states than one linear head, which is not "
                            f"built in here; {_ADVICE}")
        if score is None:
            sampled = forced_logits(self.model, [self.longer, self.prompt], [self.answers] * 2, pad_id=0)
            if self.differ(sampled[1], logits[:, :-1]):
                raise UserError(f"{name} would sample from other probabilities than it is trained on; "
                                f"{_ADVICE}")

    def differ(self, ours, stock, scale=None) -> bool:
        """Whether two results are further apart than rounding. `scale`: the size of what was summed."""
        return not (ours - stock).abs().max() <= self.bound * (stock if scale is None else scale).abs().max()

    def stock(self, far: int | None = None) -> torch.Tensor:
        """States of plain rows. With `far` they end in a token at that position, which a causal model cannot
        tell before.
        """
        rows, positions = self.rows, torch.arange(self.rows.shape[1], device=self.rows.device)
        if far is not None:
            rows = torch.cat([rows, rows[:, :1]], 1)
            positions = torch.cat([positions, positions.new_tensor([far])])
        states = trunk(self.model)(
            input_ids=rows, attention_mask=torch.ones_like(rows), position_ids=positions.expand_as(rows),
            use_cache=False,
        ).last_hidden_state
        return states[:, 3:8]

    def grouped(self) -> tuple[torch.Tensor, torch.Tensor]:
        """States of two equal rows with padding at their ends."""
        groups = pack([self.longer, self.prompt, self.prompt], [self.answers] * 3, 0).to(self.rows.device)
        states = hidden_states(self.model, groups)  # (3, 14, D)
        return states[1, self.columns], states[2, self.columns]

    def first_random(self) -> str:
        """The module that makes different numbers of two equal rows."""
        flows = self.flows(self.grouped, (3, 14))
        return self.first(*({name: [part[row] for part in parts] for name, parts in flows.items()}
                            for row in (1, 2)))

    def first_mixing(self) -> str:
        """The module that makes other numbers of an answer in a group than of its plain row."""
        grouped, plain = self.flows(self.grouped, (3, 14)), self.flows(self.stock, (2, 8))
        return self.first(
            {name: [part[1, self.columns] for part in parts] for name, parts in grouped.items()},
            {name: [part[:, 3:8] for part in parts] for name, parts in plain.items()},
        )

    def first(self, ours: dict, others: dict) -> str:
        """The first module to end whose output differs and whose input does not."""
        for name, parts in ours.items():
            *same, made = (self.differ(*pair) for pair in zip(parts, others.get(name, parts), strict=True))
            if made and not any(same):
                return f"{name} ({type(self.model.get_submodule(name)).__name__})"
        return "the model"

    def flows(self, run, shape: tuple[int, int]) -> dict[str, list[torch.Tensor]]:
        """Input, where it is states too, and output of each module's first call in `run()`, by their ends.

        Args:
            shape: rows and columns of the states; other tensors are left out.
        """
        flows = {}

        def keep(name):
            def hook(module, args, kwargs, output):
                taken = states(args) or states(kwargs.values())
                if made := states(output if isinstance(output, tuple) else [output]):
                    flows.setdefault(name, [*taken, *made])
            return hook

        def states(values):
            return [value for value in values if isinstance(value, torch.Tensor) and value.ndim == 3
                    and value.shape[:2] == shape][:1]

        hooks = [module.register_forward_hook(keep(name), with_kwargs=True)
                 for name, module in self.model.named_modules() if name]
        run()
        for hook in hooks:
            hook.remove()
        return flows
