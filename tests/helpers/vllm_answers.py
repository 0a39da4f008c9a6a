"""Answers of models by vLLM, in the environment of requirements-vllm.txt: see tests/stages/test_served.py.

    .venv-vllm/bin/python tests/helpers/vllm_answers.py jobs.json answers.json

A job has `model`, a folder; `prompts`, texts or lists of messages; and `sampling`, vLLM's SamplingParams.
An answer has `prompt` and `tokens`, ids; `text`; and `ended`, whether a token ended it.
"""

import gc
import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
               "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}

from vllm import LLM, SamplingParams


def answers(job: dict) -> list[dict]:
    model = LLM(job["model"], dtype="float32", max_num_seqs=8, enforce_eager=True, seed=0,
                distributed_executor_backend="uni")
    sampling = job["sampling"]
    sampling["logit_bias"] = {int(word): bias for word, bias in sampling["logit_bias"].items()} or None
    ask = model.generate if isinstance(job["prompts"][0], str) else model.chat
    found = ask(job["prompts"], SamplingParams(**sampling), use_tqdm=False)
    return [{"prompt": list(one.prompt_token_ids), "tokens": list(one.outputs[0].token_ids),
             "text": one.outputs[0].text, "ended": one.outputs[0].finish_reason == "stop"} for one in found]


if __name__ == "__main__":
    jobs, output = map(Path, sys.argv[1:])
    found = []
    for job in json.loads(jobs.read_text()):
        found.append(answers(job))
        gc.collect()
    output.write_text(json.dumps(found))
