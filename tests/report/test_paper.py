"""The published results, typed in from the paper, are consistent with each other."""

from rmr1_jax.report.paper import COLUMNS, ROWS


def test_the_published_rows_agree_with_themselves():
    for benchmark, rows in ROWS.items():
        assert len(rows) == 11
        for model, row in rows.items():
            assert len(row) in (1, len(COLUMNS[benchmark])), model
            # The score is the mean of these four in all three benchmarks. The paper's own rounding is off by up to 0.2.
            assert len(row) == 1 or abs(sum(row[1:5]) / 4 - row[0]) <= 0.21, (benchmark, model)
    for row in ROWS["rm-bench"].values():  # easy, normal and hard are means of the same nine cells
        assert len(row) == 1 or abs(sum(row[5:]) / 3 - row[0]) <= 0.21
