"""What DeepSpeed's files become: "auto" filled in as transformers does it; what is refused."""

import copy
import json
from types import SimpleNamespace

import pytest
from transformers import AutoConfig
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

import train_ppo
import train_sft
from utils import zero, zero_file
from utils.config import PROJECT, UserError, parse_config
from utils.models.parents import Parent
from utils.zero import load_settings, use_engine

FOLDER = PROJECT / "configs" / "deepspeed"
FILES = sorted(path.stem for path in FOLDER.glob("*.json"))
PROCESSES = 3
MODEL = str(PROJECT / "assets" / "opt-mini")


@pytest.fixture(autouse=True)
def active(monkeypatch):
    """Three processes without a group, and a module that remembers nothing afterwards."""
    monkeypatch.setattr(zero, "world", lambda: SimpleNamespace(num_processes=PROCESSES))
    monkeypatch.setattr(zero, "_form_group", lambda: None)
    monkeypatch.setattr(zero, "_compile_ops", lambda settings: None)
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)
    monkeypatch.setattr("deepspeed.comm.get_world_size", lambda: PROCESSES)
    monkeypatch.setattr(zero, "_active", {})
    yield zero._active
    unset_hf_deepspeed_config()


def config_of(*words, script=train_sft, kind="SFTStageConfig", stage="sft"):
    default = PROJECT / "configs" / "tldr_mini" / f"{stage}.yaml"
    return parse_config(getattr(script, kind), default, list(words))


def settings_of(config):
    return load_settings(config, Parent("model", MODEL))


def filled_by_transformers(settings, config):
    """By hand what its `Trainer` leaves to DeepSpeed: gathered weights get as large a bucket as gradients."""
    arguments = SimpleNamespace(
        world_size=PROCESSES, per_device_train_batch_size=config.per_device_batch_size,
        max_grad_norm=config.max_grad_norm, gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=1.0, adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1.0, weight_decay=0.0,
        save_on_each_node=False, fp16=config.mixed_precision == "fp16", bf16=config.mixed_precision == "bf16",
        fp16_full_eval=False, bf16_full_eval=False, get_warmup_steps=lambda steps: 1)
    theirs = HfTrainerDeepSpeedConfig(copy.deepcopy(settings))
    theirs.trainer_config_process(arguments)
    model = SimpleNamespace(config=AutoConfig.from_pretrained(config.model))
    theirs.trainer_config_finalize(arguments, model, 10)
    engine = theirs.config["zero_optimization"]
    if "allgather_bucket_size" in engine:
        engine["allgather_bucket_size"] = engine["reduce_bucket_size"]
    if engine.get("offload_optimizer", {}).get("nvme_path"):
        engine["offload_optimizer"]["nvme_path"] = f"{config.output_dir}/nvme"
    return theirs.config


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("name", FILES)
def test_auto_is_what_transformers_makes_of_it(name, precision, active):
    words = "--per_device_batch_size 5 --gradient_accumulation_steps 7 --max_grad_norm 0.3"
    config = config_of("--deepspeed", str(FOLDER / f"{name}.json"), "--model", MODEL,
                       *words.split(), "--mixed_precision", precision)
    settings = json.loads((FOLDER / f"{name}.json").read_text())
    assert '"auto"' in json.dumps(settings)
    expected = filled_by_transformers(settings, config)
    found = settings_of(config)
    assert found == expected and '"auto"' not in json.dumps(found)
    assert active["settings"] == found and active["kept"].config == found


def test_ppo_accumulates_nothing():
    """The loop counts its micro-batches itself."""
    config = config_of("--deepspeed", "configs/deepspeed/zero2.json", "--per_device_batch_size", "5",
                       "--model", MODEL, script=train_ppo, kind="PPOStageConfig", stage="ppo")
    found = settings_of(config)
    assert (found["train_batch_size"], found["gradient_accumulation_steps"]) == (5 * PROCESSES, 1)


def test_a_place_is_that_of_the_whole_path():
    numbers = {"a": 1, "b.a": 2, "b.c.a": 3}
    settings = {"a": "auto", "b": {"a": "auto", "n": None, "c": {"a": "auto", "d": [4], "e": False}}}
    found = zero_file._filled(settings, numbers, "")
    assert found == {"a": 1, "b": {"a": 2, "c": {"a": 3, "d": [4], "e": False}}}


def test_without_the_key_nothing_is_loaded(active):
    assert settings_of(config_of()) is None and not active


BROKEN = {
    "no file": (None, "deepspeed: '.*' does not exist"),
    "no JSON": ("{", "engine.json:1: is not JSON"),
    "a list": ("[]", "is no DeepSpeed configuration"),
    "no stage": ('{"zero_optimization": {}}', "is no DeepSpeed configuration"),
    "no such stage": ('{"zero_optimization": {"stage": 4}}', "must be one of 1, 2, 3, found 4"),
    "no sharding": ('{"zero_optimization": {"stage": 0}}',
                    "found 0; for no sharding leave the key deepspeed out"),
    "an optimizer": ('{"zero_optimization": {"stage": 1}, "optimizer": {}}',
                     "leave optimizer and scheduler out"),
    "another key": ('{"zero_optimization": {"stage": 1, "overlap_com": true}}',
                    "zero_optimization.overlap_com: Extra inputs"),
    "no device": ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}',
                  "zero_optimization.offload_param.device: Input should be 'none', 'cpu' or 'nvme'"),
    "a device alone": ('{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}',
                       "zero_optimization.offload_optimizer:"),
    "true for a stage": ('{"zero_optimization": {"stage": true}}', "must be one of 1, 2, 3, found True"),
    "text for a stage": ('{"zero_optimization": {"stage": "2"}}', "must be one of 1, 2, 3, found '2'"),
    "a list for a stage": ('{"zero_optimization": {"stage": [2]}}', "must be one of 1, 2, 3, found"),
    "another batch": ('{"zero_optimization": {"stage": 2}, "train_batch_size": 9}',
                      "train_batch_size is 9, but per_device_batch_size x gradient_accumulation_steps x "
                      "processes of the run makes it 48; write \"auto\""),
    "a batch as text": ('{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "16"}',
                        "train_micro_batch_size_per_gpu is '16', but per_device_batch_size of the run"),
    "a batch that is true": ('{"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": true}',
                             "gradient_accumulation_steps is True, but"),
    "other clipping": ('{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}',
                       "gradient_clipping is 0.5, but max_grad_norm of the run makes it 1.0"),
    "fp16 as a number": ('{"zero_optimization": {"stage": 2}, "fp16": 5}',
                         "fp16 must be a mapping .*, found 5"),
    "bf16 as true": ('{"zero_optimization": {"stage": 2}, "bf16": true}',
                     "bf16 must be a mapping .*, found True"),
    "both": ('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": true}, "bf16": {"enabled": true}}',
             "bf16.enabled is True, but mixed_precision of the run makes it False"),
    "text for a truth": ('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": "no"}}',
                         "fp16.enabled is 'no', but mixed_precision"),
    "a number as text": ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "500"}}',
                         "zero_optimization.reduce_bucket_size must be a number, found '500'"),
    "text for a number": ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}',
                          "zero_optimization.reduce_bucket_size: Input should be a valid integer"),
    "true for a number": ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": true}}',
                          "zero_optimization.reduce_bucket_size must be a number, found True"),
    "text for true": ('{"zero_optimization": {"stage": 2, "overlap_comm": "yes"}}',
                      "zero_optimization.overlap_comm must be true or false, found 'yes'"),
    "text within": ('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", '
                    '"buffer_count": "4"}}}',
                    "zero_optimization.offload_optimizer.buffer_count must be a number, found '4'"),
    "a negative number": ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}',
                          "reduce_bucket_size: "),
    "zero as a list": ('{"zero_optimization": [2]}', "is no DeepSpeed configuration"),
    "zero as true": ('{"zero_optimization": true}', "is no DeepSpeed configuration"),
    "a typo": ('{"zero_optimization": {"stage": 2}, "gradient_cliping": 1}',
               "'gradient_cliping' is not read here; did you mean 'gradient_clipping'?"),
    "another arithmetic": ('{"zero_optimization": {"stage": 2}, "amp": {"enabled": true}}',
                           "'amp' is not read here"),
    "auto elsewhere": ('{"zero_optimization": {"stage": "auto"}}', "must be one of 1, 2, 3, found 'auto'"),
    "auto for another": ('{"zero_optimization": {"stage": 1, "mine": "auto"}}',
                         "'zero_optimization.mine' cannot be \"auto\""),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_broken_configuration_is_refused(case, tmp_path):
    text, message = BROKEN[case]
    path = tmp_path / "engine.json"
    if text is not None:
        path.write_text(text)
    config = config_of("--deepspeed", str(path))
    with pytest.raises(UserError, match=f"^deepspeed: .*{message}" if text else message):
        settings_of(config)


def test_what_the_run_decides_may_be_left_out_or_said_again(tmp_path):
    path = tmp_path / "engine.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": 48, "gradient_clipping": 1}')
    found = settings_of(config_of("--deepspeed", str(path), "--mixed_precision", "bf16"))
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"]) == (48, 16)
    assert found["bf16"] == {"enabled": True} and found["fp16"] == {"enabled": False}
    assert found["gradient_clipping"] == 1


@pytest.mark.parametrize("more", [
    {"fp16": {"enabled": False, "loss_scale": "big"}}, {"aio": 3}, {"bf16": {"enabled": False, "foo": 1}},
    {"wall_clock_breakdown": "x"}, {"communication_data_type": "x"}, {"flops_profiler": 3},
])
def test_what_deepspeed_itself_refuses_is_one_line_before_the_data_is_read(more, monkeypatch):
    monkeypatch.setattr("deepspeed.comm.get_world_size", lambda: 1)
    settings = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}}
    zero._refuse_what_deepspeed_refuses(settings, "mine.json")
    with pytest.raises(UserError, match="^deepspeed: 'mine.json' is refused by DeepSpeed [(].*[)]$"):
        zero._refuse_what_deepspeed_refuses(settings | more, "mine.json")


@pytest.mark.parametrize(("words", "message"), [
    ("--deepspeed configs/deepspeed/zero3.json --ema_decay 0.9", "^ema_decay: .* ZeRO-3"),
    ("--deepspeed configs/deepspeed/zero3_nvme.json --resume", "^resume: DeepSpeed does not bring back"),
])
def test_what_an_engine_cannot_do_is_refused(words, message):
    config = config_of(*words.split(), script=train_ppo, kind="PPOStageConfig", stage="ppo")
    with pytest.raises(UserError, match=message):
        settings_of(config)


def test_launchers_may_add_their_local_rank():
    assert config_of("--local_rank=1", "--local-rank=0", "--seed", "3").seed == 3


def engine_of(**more):
    return SimpleNamespace(zero_optimization_stage=lambda: 2, **{"world_size": PROCESSES, **more})


def test_an_engine_that_is_not_in_force_is_refused(active):
    use_engine(object())  # it was not asked for
    active["settings"] = {}
    for engine in (SimpleNamespace(world_size=PROCESSES), engine_of(world_size=1)):
        with pytest.raises(UserError, match="^deepspeed: it was asked for, but the model was not put into"):
            use_engine(engine)
    use_engine(ours := engine_of())
    assert active["engine"] is ours


def test_a_lock_that_a_killed_run_left_is_named(tmp_path, monkeypatch):
    zero._wait_for_lock(tmp_path / "no folder" / "lock")
    (tmp_path / "lock").touch()
    monkeypatch.setattr(zero, "LOCK_SECONDS", -1)
    with pytest.raises(UserError, match="^deepspeed: '.*/lock' is there, but nothing has been .*; remove it"):
        zero._wait_for_lock(tmp_path / "lock")


def test_a_run_with_its_optimizer_on_nvme_cannot_go_on(active):
    assert zero.resumable()
    for name in FILES:
        active["settings"] = json.loads((FOLDER / f"{name}.json").read_text())
        assert zero.resumable() == (name != "zero3_nvme")
