"""Keys of PPO that make no sense together."""

from importlib.util import find_spec

from utils.distributed import world
from utils.errors import UserError

MOST_EPISODES = 1_000_000  # in one update: beyond this somebody has mistaken a key


def refuse_contradictions(config) -> None:
    """Raise UserError for keys that make no sense together."""
    processes = world().num_processes
    if config.prompts_per_update % processes:
        raise UserError(f"prompts_per_update: {config.prompts_per_update} prompts cannot be shared out "
                        f"over {processes} processes; take a multiple")
    if config.episodes_per_update > MOST_EPISODES:
        raise UserError(f"prompts_per_update: {config.prompts_per_update} prompts with "
                        f"{config.responses_per_prompt} responses each are {config.episodes_per_update} in "
                        f"one update; at most {MOST_EPISODES} are taken, published are 512")
    if config.advantage != "gae" and config.responses_per_prompt < 2:
        raise UserError(f"responses_per_prompt: advantage '{config.advantage}' compares the responses to a "
                        "prompt with each other, so there must be 2 or more; or take advantage 'gae'")
    if bool(config.ptx_coef) != bool(config.actor_training_data):
        raise UserError("actor_training_data: it is for ptx_coef; give both or neither (the data that "
                        "train_sft.py learnt from)")
    if (engine := config.rollout_engine) != "own" and config.compile_trunk:
        raise UserError(f"rollout_engine: '{engine}' does not work on compiled layers; take 'own', or "
                        "leave compile_trunk out")
    if engine != "own" and config.deepspeed:
        raise UserError(f"rollout_engine: '{engine}' does not work on weights that DeepSpeed holds; take "
                        "'own', or leave deepspeed out")
    if engine == "vllm" and config.load_in_4bit:
        raise UserError("rollout_engine: 'vllm' does not take weights in 4 bits; take 'own', or leave "
                        "load_in_4bit out")
    if engine == "vllm" and find_spec("vllm") is None:
        raise UserError("rollout_engine: vLLM is not installed; requirements-vllm.txt installs it, in an "
                        "environment of its own")
    if config.ema_decay and config.load_in_4bit:
        raise UserError("ema_decay: it averages whole models, which weights in 4 bits do not allow; leave "
                        "ema_decay or load_in_4bit out")
    if config.advantage != "gae" and config.value_model != "separate":
        raise UserError(f"value_model: advantage '{config.advantage}' has none; leave it out, or take 'gae'")
    if config.target_kl is not None and config.ppo_epochs == 1:
        raise UserError("target_kl: it leaves out later passes, but ppo_epochs is 1; raise that, or "
                        "leave target_kl out")
    if config.kl_target is not None:
        episodes = config.episodes_per_update
        if not config.kl_coef:
            raise UserError("kl_coef: 0 never adapts to kl_target; give a first value above 0")
        if episodes >= 5 * config.kl_horizon:  # the factor 1 - .2 episodes / horizon
            raise UserError(f"kl_horizon: with {episodes} episodes an update it must be above "
                            f"{episodes / 5:g}, or one update would turn kl_coef to 0 and below")
