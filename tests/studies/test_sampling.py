"""The comparison of samplers: each K has three sides, and each has a rate."""

from studies.sampling import SamplingConfig, rows


def test_each_side_has_a_rate():
    found = list(rows(SamplingConfig(posts=1, prompt=5, response=3, k=[2])))
    assert [(k, name) for k, name, _ in found] == [(2, "ours"), (2, "generate"), (2, "generate_batch")]
    assert all(rate > 0 for *_, rate in found)
