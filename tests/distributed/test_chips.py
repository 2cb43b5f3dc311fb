"""The table of chips."""

from types import SimpleNamespace

import pytest

from rmr1_jax.distributed.chips import CHIPS, chip_of


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("TPU v9", None),
        ("cpu", None),
    ],
)
def test_peak_flops(kind, peak):
    chip = chip_of(SimpleNamespace(device_kind=kind))
    assert (chip and chip.flops) == peak


def test_bandwidths_are_known_for_all_chips_that_a_run_is_planned_for():
    for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite"):
        assert None not in CHIPS[kind]
