"""The published results, typed in from the paper, are consistent with each other."""

from rmr1_jax.config import read_yaml
from rmr1_jax.report.evaluation import PAPER


def test_the_published_rows_agree_with_themselves():
    published = read_yaml(PAPER)["benchmarks"]
    assert list(published) == ["rewardbench", "rm-bench", "rmb"]
    for benchmark, found in published.items():
        rows = found["models"]
        assert len(rows) == 11
        for model, row in rows.items():
            assert len(row) in (1, len(found["columns"])), model
            # The score is the mean of these four in all three benchmarks. The paper's own rounding is off by up to 0.2.
            assert len(row) == 1 or abs(sum(row[1:5]) / 4 - row[0]) <= 0.21, (benchmark, model)
    for row in published["rm-bench"]["models"].values():  # easy, normal and hard are means of the same nine cells
        assert len(row) == 1 or abs(sum(row[5:]) / 3 - row[0]) <= 0.21
