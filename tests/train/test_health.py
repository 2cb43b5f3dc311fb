"""What the first step's metrics say about a run."""

import pytest

from rmr1_jax.train.health import CollapseWatch


@pytest.mark.parametrize(("mixed", "warns"), [(0.0, True), (0.25, False)])
def test_rewards_that_are_equal_in_every_group_are_said_at_once(capsys, mixed, warns):
    watch = CollapseWatch()
    for step in range(3):
        watch.look({"reward": -1.0, "mixed_groups": mixed, "truncated": 0.0}, step)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == warns
    if warns:
        assert said[0].startswith("warning: at step 0, the rewards within each group are equal (mixed_groups 0, mean")
        assert "mean reward -1.000)" in said[0] and "nothing is learned from them" in said[0]
