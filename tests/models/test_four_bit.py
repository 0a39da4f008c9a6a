"""Weights in 4 bits: the numbers of transformers' own quantised models, what is trained, what is saved.

Stock layers round once more at the first call on a CPU with AVX512-BF16 (and fail where they are narrow), so
the oracle's switch for that is off, too.
"""

from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import train_ppo
import train_reward
import train_sft
from families import PAD, policy, random_groups, scalar_model
from loops import TOKENIZER, ppo_loop, rolled_out, save_parents
from utils.config import UserError, parse_config
from utils.contradictions import refuse_contradictions
from utils.models.fitness import refuse_unfit
from utils.models.four_bit import layers_of, merge_dense, storage_of
from utils.models.loading import load_policy, load_scalar_model, trainable, without_dropout
from utils.models.lora import share_weights
from utils.models.outputs import response_logprobs, scores
from utils.models.parents import Parent
from utils.models.prompt_groups import pack

CONFIG = SimpleNamespace(load_in_4bit=True, mixed_precision="no", lora_rank=2, lora_alpha=3,
                         gradient_checkpointing=False, compile_trunk=False)
GROUPS = pack(*random_groups([4, 1, 7], [[3, 1, 5], [2], [4, 4]]), PAD)
IDS = torch.arange(3, 27).view(2, 12)
KINDS = {"model": AutoModelForCausalLM, "reward_model": AutoModelForSequenceClassification}
FAMILIES = ("opt", "gpt2", "llama-gqa")  # linear layers as usual, transposed, and without biases
both_kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tmp_path_factory):
    """PPO's keys for tiny saved models of each family."""
    return save_parents(tmp_path_factory.mktemp(request.param), request.param)


def load(folders, kind, config=CONFIG):
    loader = load_policy if kind == "model" else load_scalar_model
    return without_dropout(loader(Parent(kind, folders[kind]), storage=storage_of(config))).eval()


def stock(folders, kind, **keys):
    """As the QLoRA paper has it, by transformers alone."""
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                               bnb_4bit_compute_dtype=torch.float32)
    model = KINDS[kind].from_pretrained(folders[kind], quantization_config=asked, dtype=torch.float32, **keys)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def moved(model):
    """After training steps, say: adapters that are not 0."""
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight.data, std=0.3, generator=torch.Generator().manual_seed(0))
    return model


def close(ours, theirs):  # products are summed in another order where memory lies otherwise
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def said(model, kind):
    return response_logprobs(model, GROUPS, 0.7) if kind == "model" else scores(model, GROUPS)


@both_kinds
@torch.no_grad()
def test_with_a_fresh_adapter_logits_are_those_of_the_stock_quantised_model(folders, kind):
    ours, theirs = trainable(load(folders, kind), CONFIG), stock(folders, kind)
    assert len(layers_of(ours)) == len(layers_of(theirs)) > 5
    close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    exact = KINDS[kind].from_pretrained(folders[kind]).eval()(input_ids=IDS).logits
    assert (ours(input_ids=IDS).logits - exact).abs().max() > 1e-3, "rounding must be seen"


@both_kinds
def test_adapters_and_the_head_alone_learn_and_the_weights_keep_their_bytes(folders, kind):
    model = trainable(load(folders, kind), CONFIG)
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    scales = {name: layer.weight.quant_state.absmax.clone() for name, layer in layers_of(model)}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name or name == "score.weight" for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1)
    for mode in (True, False, True):  # sampling and evaluation come between steps
        said(model.train(mode), kind).sum().backward()
        optimizer.step()
    with torch.no_grad():
        said(model.eval(), kind)
    assert all(weight.grad is not None for weight in trained.values())
    now = dict(model.named_parameters())
    assert all(now[name].grad is None and torch.equal(now[name], weight) for name, weight in frozen.items())
    assert all(torch.equal(layer.weight.quant_state.absmax, scales[name]) for name, layer in layers_of(model))


@both_kinds
@torch.no_grad()
def test_the_merged_model_is_the_dequantised_one_with_the_adapter(folders, kind, tmp_path):
    model = moved(trainable(load(folders, kind), CONFIG))
    before, expected = model(input_ids=IDS).logits, stock(folders, kind).dequantize(torch.float32)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            change = 3 / 2 * module.lora_B["default"].weight @ module.lora_A["default"].weight
            expected.get_submodule(name).weight += change
    merge_dense(model, torch.float32)
    model.save_pretrained(tmp_path)
    loaded, info = KINDS[kind].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not hasattr(loaded.config, "quantization_config")
    assert loaded.state_dict().keys() == KINDS[kind].from_pretrained(folders[kind]).state_dict().keys()
    for logits in (before, expected.eval()(input_ids=IDS).logits):
        torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_merged_model_has_the_number_type_of_its_base(folders, tmp_path):
    model = moved(trainable(load(folders, "model"), CONFIG))
    before = model(input_ids=IDS).logits
    merge_dense(model, torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (loaded(input_ids=IDS).logits - before).abs().max() < 0.05 * before.abs().max()


@both_kinds
@torch.no_grad()
def test_a_second_model_is_on_the_same_bytes(folders, kind):
    model = load(folders, kind)
    second = share_weights(model)
    trainable(model, CONFIG)
    for name, layer in layers_of(second):
        first = model.get_submodule(name).get_base_layer()
        assert layer.weight.data_ptr() == first.weight.data_ptr()
        assert layer.weight.quant_state is layer.quant_state is first.quant_state is not None
    assert not torch.equal(said(moved(model), kind), said(second, kind))
    close(said(second, kind), said(load(folders, kind), kind))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@both_kinds
def test_the_check_at_load_passes_it(folders, kind, precision):
    config = SimpleNamespace(load_in_4bit=True, mixed_precision=precision)
    refuse_unfit(load(folders, kind, config), Parent(kind, folders[kind]), TOKENIZER, 40, "keys")


def test_before_the_first_step_of_ppo_the_ratio_is_1_and_the_kl_0(folders, tmp_path):
    config = train_ppo.PPOStageConfig(
        **folders, output_dir=str(tmp_path), max_prompt_tokens=16, max_new_tokens=6, prompts_per_update=7,
        responses_per_prompt=3, total_episodes=42, per_device_batch_size=2, load_in_4bit=True, lora_rank=2)
    loop, models = ppo_loop(config)
    episodes, rollout = rolled_out(loop, models)
    mask = rollout.response_mask
    # sampling decodes token by token from a cache, the others take whole rows: equal to rounding
    torch.testing.assert_close(rollout.logprobs[mask], rollout.ref_logprobs[mask], rtol=0, atol=1e-5)
    again = episodes.measure(lambda groups: loop.model(groups, config.temperature)[0].detach())
    torch.testing.assert_close((again - rollout.logprobs)[mask].exp(), torch.ones(int(mask.sum())),
                               rtol=0, atol=1e-5)
    policy_bytes = {layer.weight.data_ptr() for _, layer in layers_of(models.policy)}
    assert policy_bytes == {layer.weight.data_ptr() for _, layer in layers_of(models.ref_policy)}
    of_values = {layer.weight.data_ptr() for _, layer in layers_of(models.trained.value_model)}
    assert of_values == {layer.weight.data_ptr() for _, layer in layers_of(models.rewards.models[0])}


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@both_kinds
def test_weights_that_are_no_numbers_are_seen_in_the_file(kind, number, tmp_path):
    made = policy("opt") if kind == "model" else scalar_model("opt")
    made.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.fc1.weight"))
    weights[name].view(-1)[5] = number
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"no finite numbers \(NaN or infinite\), in {name}"):
        load({kind: str(tmp_path)}, kind)


def test_a_model_that_is_stored_quantised_is_refused(tmp_path):
    folders = save_parents(tmp_path)
    stock(folders, "model").save_pretrained(tmp_path / "rounded")
    with pytest.raises(UserError, match=r"^model: '.*rounded' is stored quantised \(bitsandbytes\); take"):
        load({"model": str(tmp_path / "rounded")}, "model")


STAGES = {"sft": train_sft.SFTStageConfig, "reward": train_reward.RewardStageConfig,
          "ppo": train_ppo.PPOStageConfig}


@pytest.mark.parametrize("stage", STAGES)
def test_without_adapters_it_is_refused(stage):
    with pytest.raises(UserError, match="^command line: load_in_4bit: weights in 4 bits cannot be trained"):
        parse_config(STAGES[stage], None, ["--load_in_4bit", "true"])
    assert parse_config(STAGES[stage], None, ["--load_in_4bit", "true", "--lora_rank", "4"]).load_in_4bit


def test_no_average_is_taken_of_weights_in_4_bits():
    config = parse_config(STAGES["ppo"], None, "--load_in_4bit true --lora_rank 4 --ema_decay .9".split())
    with pytest.raises(UserError, match="^ema_decay: it averages whole models"):
        refuse_contradictions(config)
