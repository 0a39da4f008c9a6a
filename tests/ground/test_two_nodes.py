"""Two launchers on this machine are two nodes; what is left of a run when one of its processes is gone."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kill_test
from run_folders import furthest, metrics, weights
from utils import distributed
from utils.config import PROJECT
from utils.errors import UserError

WORDS = ("--model {models}/base --reward_model {models}/reward --total_episodes 32 --prompts_per_update 4 "
         "--responses_per_prompt 2 --ppo_epochs 1 --eval_steps 2 --save_steps 1 --max_new_tokens 8 "
         "--per_device_batch_size 2 --eval_rows 4 --test_rows 4")
DYING = Path(__file__).parents[1] / "helpers" / "dying_process.py"
LOST = (r"error: another process of this run died or hung \([\w ]+\); the last checkpoint is intact: "
        ".* go on with --resume")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    kill_test.make_models(folder)
    return folder


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launched(nodes, file, *words, models, out):
    """Exit status and output of the launcher of each node; a hang ends in an error."""
    port, command = free_port(), [file, *words, *WORDS.format(models=models).split(), "--output_dir", out]
    started = [subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--node_rank", str(node),
         "--nproc_per_node", str(2 // nodes), "--master_addr", "127.0.0.1", "--master_port", str(port),
         *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    ) for node in range(nodes)]
    try:
        outputs = [launcher.communicate(timeout=200)[0] for launcher in started]
    finally:
        for launcher in started:
            if launcher.poll() is None:  # torchrun ends its processes when it is asked to end
                launcher.terminate()
                launcher.wait(60)
    return [(launcher.returncode, output) for launcher, output in zip(started, outputs, strict=True)]


def test_a_port_in_use_is_said(monkeypatch):
    """Before, it was taken for another process that had died."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(distributed, "PartialState",
                            lambda **_: torch.distributed.TCPStore("127.0.0.1", port, is_master=True))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=f"^MASTER_PORT: {port} is in use on this machine.*--standalone"):
            distributed.world()


@pytest.mark.parametrize("error", [ValueError("no rank"),
                                   torch.distributed.DistStoreError("Timed out\nmore")])
def test_processes_that_do_not_find_each_other_are_one_line(error, monkeypatch):
    def fails(**_):
        raise error

    monkeypatch.setattr(distributed, "PartialState", fails)
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^MASTER_ADDR, MASTER_PORT: the 2 processes .* at a:1 \([\w ]+\);"):
        distributed.world()


@pytest.mark.slow
def test_two_nodes_make_the_run_of_one(models, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for nodes, out in ((1, one), (2, two)):
        for status, output in launched(nodes, PROJECT / "scripts" / "train_ppo.py", models=models, out=out):
            assert status == 0, output[-3000:]
    assert metrics(one) == metrics(two) and len(metrics(one)) > 4
    assert furthest(weights(one / "final"), weights(two / "final")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_is_gone_ends_the_other(rank, models, tmp_path):
    """Its launcher and its process are killed at once; on the other nobody is left who could tell."""
    results = launched(2, DYING, rank, "node", models=models, out=tmp_path / "run")
    status, output = results[1 - rank]
    assert status == 1 and re.search(LOST, output), output[-3000:]
    assert results[rank][0] == -9
    assert (tmp_path / "run" / "checkpoints" / "update-1").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "how"), [(0, "kill"), (1, "kill"), (1, "hang"), (0, "full")])
def test_one_process_that_is_gone_ends_the_other(rank, how, models, tmp_path):
    [(status, output)] = launched(1, DYING, rank, how, models=models, out=tmp_path / "run")
    assert status == 1 and re.search(LOST, output), output[-3000:]
    full = "error: metrics.jsonl: No space left on device; what was saved so far is intact"
    assert how != "full" or full in output
    ours = output[: output.index("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")]
    assert ours.count("Traceback") == 1, "that of the launcher"
    assert (tmp_path / "run" / "checkpoints" / "update-1").exists()
