"""Which models a stage holds, whether they fit, and which change would make them fit."""

from typing import NamedTuple

from planning.architectures import model_of
from planning.memory import CHOICES, GIB, Held, Item, Work, Zero, items_of, peak, samples, stored_bytes

STAGES = ("sft", "reward", "ppo")
_MAX_BATCH = 2**16  # prompt groups: ends the search where memory does not limit the batch


class Setup(NamedTuple):
    """Everything that the memory depends on except the stage and the ZeRO configuration."""

    model: str
    reward_model: str | None  # None: of the policy's size
    value_model: str  # separate, shared, none
    lora_rank: int  # 0: no LoRA
    processes: int
    per_node: int  # processes of a node
    device_memory: float | None  # bytes of one GPU; None: the processes run on this machine's CPU
    host_memory: float | None  # bytes of a node; None: unknown
    micro_batch: int  # this and all below: see `Work`
    generation_batch: int
    prompt: int
    completion: int
    k: int
    precision: str
    checkpointing: bool
    load_in_4bit: bool = False  # weights under adapters (needs lora_rank)

    @property
    def cpu(self) -> bool:
        """Whether the processes run without a GPU."""
        return self.device_memory is None

    def work(self, stage: str) -> Work:
        """What one process computes in a stage. SFT has one completion for each prompt."""
        k = 1 if stage == "sft" else self.k
        return Work(stage, self.micro_batch, self.generation_batch, self.prompt, self.completion, k,
                    self.precision, self.checkpointing, self.processes, self.cpu)


class Plan(NamedTuple):
    """The memory of one stage with one ZeRO configuration."""

    stage: str
    zero: Zero
    items: list[Item]  # of one process
    device: int  # peak bytes of one GPU; 0 on a CPU
    host: int  # peak bytes of a node, summed over its processes
    nvme: int  # peak bytes of a node
    fits: bool


def held_models(stage: str, setup: Setup) -> list[Held]:
    """The models that train_sft.py, train_reward.py or train_ppo.py keeps in memory.

    With LoRA the reference policy is the policy with its adapter switched off. The reward model is likewise a
    separate value model with its adapter switched off. Neither takes memory of its own.
    """
    rank, rounded = setup.lora_rank, setup.load_in_4bit
    policy = model_of(setup.model, "model", False, rank, rounded)
    if stage == "sft":
        return [Held("policy", policy, True)]
    scorer, field = setup.reward_model or setup.model, "reward_model" if setup.reward_model else "model"
    reward_model = model_of(scorer, field, True, 0, rounded)
    if stage == "reward":
        return [Held("reward_model", model_of(scorer, field, True, rank, rounded), True)]
    if setup.value_model == "shared":
        value_head = policy.hidden + 1  # weight and bias
        policy = policy._replace(trained=(*policy.trained, value_head))
    held = [Held("policy", policy, True)]
    if setup.value_model == "separate":
        held.append(Held("value_model", model_of(scorer, field, True, rank, rounded), True))
    if not rank:
        held.append(Held("ref_policy", model_of(setup.model, "model"), False))
    if not rank or setup.value_model != "separate":
        held.append(Held("reward_model", reward_model, False))
    return held


def plan(stage: str, zero: Zero, setup: Setup) -> Plan:
    """The memory of a stage with a ZeRO configuration."""
    items = items_of(held_models(stage, setup), zero, setup.work(stage))
    node = min(setup.per_node, setup.processes)
    device = 0 if setup.cpu else peak(items, "device")
    host = node * (peak(items, "device", "host") if setup.cpu else peak(items, "host"))
    fits_device = setup.cpu or device <= setup.device_memory
    fits_host = setup.host_memory is None or host <= setup.host_memory
    return Plan(stage, zero, items, device, host, node * peak(items, "nvme"), fits_device and fits_host)


def largest(field: str, stage: str, zero: Zero, setup: Setup) -> int:
    """The largest `micro_batch` or `generation_batch` (`field`) that fits. 0: not even 1 fits."""
    def fits(count):
        return plan(stage, zero, setup._replace(**{field: count})).fits

    low, high = 0, 1
    while high < _MAX_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Batches(NamedTuple):
    """The largest batches that fit; 0: not even 1 fits."""

    micro_batch: int
    recomputing: int  # micro_batch with gradient checkpointing
    generation_batch: int


def batches_of(one: Plan, setup: Setup) -> Batches:
    """The largest batches for the stage and the ZeRO configuration of a plan."""
    case = (one.stage, one.zero)
    # training and sampling alternate, so each has the memory to itself: the other's batch is 1
    alone = setup._replace(micro_batch=1, generation_batch=1)
    return Batches(largest("micro_batch", *case, alone._replace(checkpointing=False)),
                   largest("micro_batch", *case, alone._replace(checkpointing=True)),
                   largest("generation_batch", *case, alone))


def choices_of(names: list[str], load_in_4bit: bool = False) -> list[Zero]:
    """ZeRO configurations by name, fastest first. An empty list means all.

    ZeRO-3 does not shard weights in 4 bits.
    """
    return [zero for zero in CHOICES if (not names or zero.name in names)
            and not (load_in_4bit and zero.stage == 3)]


def cheapest(plans: list[Plan]) -> Plan | None:
    """The fastest configuration that fits. `plans` are sorted fastest first."""
    return next((one for one in plans if one.fits), None)


def remedies(stage: str, choices: list[Zero], setup: Setup) -> list[str]:
    """Command-line options with which some configuration fits, or why no number of GPUs helps."""
    small = {"micro_batch": 1, "generation_batch": 1, "checkpointing": True}
    changes = [
        ("--gradient_checkpointing true", {"checkpointing": True}),
        ("--micro_batch 1", {"micro_batch": 1}),
        ("--generation_batch 1", {"generation_batch": 1}),
        ("--micro_batch 1 --generation_batch 1 --gradient_checkpointing true", small),
        ("--lora_rank 8", {"lora_rank": 8}),
        ("--lora_rank 8 --micro_batch 1 --generation_batch 1 --gradient_checkpointing true",
         {"lora_rank": 8, **small}),
        ("--lora_rank 8 --load_in_4bit true --micro_batch 1 --generation_batch 1 "
         "--gradient_checkpointing true", {"lora_rank": 8, "load_in_4bit": True, **small}),
    ]
    options = [option for option, change in changes if _any_fits(stage, choices, setup._replace(**change))]
    if setup.cpu:
        return options
    policy_bytes = weights_gathered(stage, setup)
    if policy_bytes > setup.device_memory:
        enough = f"{policy_bytes / GIB:.0f}"
        return [*options, f"--gpu_memory {enough} or more: sampling needs the whole policy on each GPU"]
    for gpus in (setup.processes * 2**i for i in range(1, 8)):
        more = setup._replace(processes=gpus, per_node=min(gpus, max(setup.per_node, 8)))
        if _any_fits(stage, choices, more):
            return [*options, f"--gpus {gpus}"]
    return options


def weights_gathered(stage: str, setup: Setup) -> int:
    """Bytes of the policy's weights while it samples, which nothing shards. 0 in the reward stage."""
    work, policy = setup.work(stage), held_models(stage, setup)[0].model
    return stored_bytes(policy, work.compute_bytes) * samples(work)


def _any_fits(stage, choices, setup):
    return any(plan(stage, zero, setup).fits for zero in choices
               if not (setup.load_in_4bit and zero.stage == 3))


