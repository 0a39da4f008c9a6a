"""What a stage holds, whether that fits, and what would make it fit."""

from typing import NamedTuple

from planning.architectures import model_of
from planning.memory import CHOICES, GIB, Held, Item, Work, Zero, items_of, peak, samples

STAGES = ("sft", "reward", "ppo")
_MOST = 2**16  # prompt groups; where a micro-batch takes nothing it is no limit


class Setup(NamedTuple):
    """Everything that the bytes depend on, but stage and choice."""

    model: str
    reward_model: str | None  # None: of the policy's size
    value_model: str  # separate, shared, none
    lora_rank: int
    processes: int
    per_node: int
    device_memory: float | None  # bytes of one GPU; None: processes on this machine's CPU
    host_memory: float | None  # bytes of a node; None: unknown
    micro_batch: int
    generation_batch: int
    prompt: int
    completion: int
    k: int
    precision: str
    checkpointing: bool

    @property
    def cpu(self) -> bool:
        return self.device_memory is None

    def work(self, stage: str) -> Work:
        """SFT has one completion for a prompt."""
        return Work(stage, self.micro_batch, self.generation_batch, self.prompt, self.completion, 1 if stage == "sft" else self.k,
                    self.precision, self.checkpointing, self.processes, self.cpu)


class Plan(NamedTuple):
    """One stage with one choice."""

    stage: str
    zero: Zero
    items: list[Item]
    device: int  # bytes of one GPU at the peak; 0 on a CPU
    host: int  # bytes of a node at the peak, a sum over its processes
    nvme: int  # bytes of a node
    fits: bool


def held_models(stage: str, setup: Setup) -> list[Held]:
    """As train_sft.py, train_reward.py and utils/models/ppo_models.py hold them.

    With LoRA the reference is the policy without its adapter, and the reward model a separate value model without its.
    """
    rank = setup.lora_rank
    policy = model_of(setup.model, "model", lora_rank=rank)
    if stage == "sft":
        return [Held("policy", policy, True)]
    scorer, field = setup.reward_model or setup.model, "reward_model" if setup.reward_model else "model"
    reward_model = model_of(scorer, field, scalar=True)
    if stage == "reward":
        return [Held("reward_model", model_of(scorer, field, True, rank), True)]
    if setup.value_model == "shared":
        policy = policy._replace(trained=(*policy.trained, policy.hidden + 1))  # a linear layer on the trunk
    held = [Held("policy", policy, True)]
    if setup.value_model == "separate":
        held.append(Held("value_model", model_of(scorer, field, True, rank), True))
    if not rank:
        held.append(Held("ref_policy", model_of(setup.model, "model"), False))
    if not rank or setup.value_model != "separate":
        held.append(Held("reward_model", reward_model, False))
    return held


def plan(stage: str, zero: Zero, setup: Setup) -> Plan:
    """The bytes of a stage with a choice."""
    items = items_of(held_models(stage, setup), zero, setup.work(stage))
    node = min(setup.per_node, setup.processes)
    device = 0 if setup.cpu else peak(items, "device")
    host = node * (peak(items, "device", "host") if setup.cpu else peak(items, "host"))
    fits = (setup.cpu or device <= setup.device_memory) and (setup.host_memory is None or host <= setup.host_memory)
    return Plan(stage, zero, items, device, host, node * peak(items, "nvme"), fits)


def largest(field: str, stage: str, zero: Zero, setup: Setup) -> int:
    """The largest `micro_batch` or `generation_batch` that fits, all else as it is; 0: not even one."""
    def fits(count):
        return plan(stage, zero, setup._replace(**{field: count})).fits

    low, high = 0, 1
    while high < _MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Batches(NamedTuple):
    """The largest that fit; 0: not even one. Training and sampling take turns, so each has the memory for itself."""

    micro_batch: int
    recomputing: int  # micro-batch with gradient checkpointing
    generation_batch: int


def batches_of(one: Plan, setup: Setup) -> Batches:
    """Of the stage and choice of a plan."""
    place = (one.stage, one.zero)
    alone = setup._replace(micro_batch=1, generation_batch=1)
    return Batches(largest("micro_batch", *place, alone._replace(checkpointing=False)),
                   largest("micro_batch", *place, alone._replace(checkpointing=True)),
                   largest("generation_batch", *place, alone))


def choices_of(names: list[str]) -> list[Zero]:
    """By name, from the fastest to the slowest; none named: all."""
    return [zero for zero in CHOICES if not names or zero.name in names]


def cheapest(plans: list[Plan]) -> Plan | None:
    """The fastest choice that fits; `plans` are in that order."""
    return next((one for one in plans if one.fits), None)


def remedies(stage: str, choices: list[Zero], setup: Setup) -> list[str]:
    """Changes after which some choice fits, as a user would make them; or why no number of GPUs helps."""
    small = {"micro_batch": 1, "generation_batch": 1, "checkpointing": True}
    changes = [
        ("--gradient_checkpointing true", {"checkpointing": True}),
        ("--micro_batch 1", {"micro_batch": 1}),
        ("--generation_batch 1", {"generation_batch": 1}),
        ("--micro_batch 1 --generation_batch 1 --gradient_checkpointing true", small),
        ("--lora_rank 8", {"lora_rank": 8}),
        ("--lora_rank 8 --micro_batch 1 --generation_batch 1 --gradient_checkpointing true", {"lora_rank": 8, **small}),
    ]
    found = [name for name, change in changes if _any_fits(stage, choices, setup._replace(**change))]
    if setup.cpu:
        return found
    policy = weights_gathered(stage, setup)
    if policy > setup.device_memory:
        return [*found, f"--gpu_memory {policy / GIB:.0f} and more, for sampling needs the whole policy on each GPU"]
    count = next((n for n in (setup.processes * 2**i for i in range(1, 8)) if _any_fits(
        stage, choices, setup._replace(processes=n, per_node=min(n, max(setup.per_node, 8))))), None)
    return [*found, *([f"--gpus {count}"] if count else [])]


def weights_gathered(stage: str, setup: Setup) -> int:
    """Bytes of the policy's weights where they are sampled from, which no choice shards; 0 in the reward stage."""
    work = setup.work(stage)
    return held_models(stage, setup)[0].model.parameters * work.compute_bytes * samples(work)


def _any_fits(stage, choices, setup):
    return any(plan(stage, zero, setup).fits for zero in choices)


