"""The comparison of samplers: each K has three sides, with vLLM four, and each has a rate."""

import fake_vllm
from studies.sampling import SamplingConfig, rows
from utils.rollouts import vllm_engine

SIDES = ["ours", "generate", "generate_batch"]


def test_each_side_has_a_rate(monkeypatch):
    monkeypatch.setattr("studies.sampling.find_spec", lambda name: None)
    found = list(rows(SamplingConfig(posts=1, prompt=5, response=3, k=[2])))
    assert [(k, name) for k, name, _ in found] == [(2, name) for name in SIDES]
    assert all(rate > 0 for *_, rate in found)


def test_vllm_is_a_side_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(vllm_engine, "_engines", {})
    with fake_vllm.installed():
        found = list(rows(SamplingConfig(posts=1, prompt=5, response=3, k=[2])))
    assert [name for _, name, _ in found] == [*SIDES, "vllm"] and all(rate > 0 for *_, rate in found)
