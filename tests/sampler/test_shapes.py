"""The shapes that a run can have: few, large enough, and within the budget."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmr1_jax.errors import InputError
from rmr1_jax.model.config import QwenConfig
from rmr1_jax.sampler.programs import empty_cache
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.sampler.shapes import Shapes, plan_shapes

SIZES = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
CONFIG = QwenConfig(
    **(SIZES | {"model_type": "qwen2", "num_layers": 3, "max_position_embeddings": 99, "rope_theta": 1e4}),
    **{"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "qkv_bias": False, "qk_norm": False},
)
MIB = 2**-10  # in GiB


def plan(*, prompts=64, longest=200, banks=1, itemsize=4, free_gib=None, **sampling) -> Shapes:
    settings = SamplingConfig(**{"n": 4, "max_new_tokens": 300, "slots": 32} | sampling)
    sizes = {"prompts": prompts, "longest": longest, "banks": banks, "itemsize": itemsize}
    return plan_shapes(CONFIG, settings, **sizes, free_gib=free_gib)


def test_prompts_have_room_and_little_padding():
    lengths = range(1, 9000)
    rooms = [plan(longest=n + 1).room for n in lengths]  # the last token of a prompt is fed by decode
    assert all(n <= room and room % 16 == 0 for n, room in zip(lengths, rooms, strict=True))
    assert all(room - n <= room / 3 for n, room in zip(lengths, rooms, strict=True) if n > 64)
    assert rooms == sorted(rooms) and len(set(rooms)) <= 20
    assert plan(longest=1).room == 16  # nothing to prefill


def test_rings_double_up_to_the_limit():
    for limit in [1, 15, 16, 17, 63, 64, 100, 128, 200, 255, 1000, 1024, 8191, 8192]:
        widths = plan(max_new_tokens=limit).widths
        assert limit <= widths[-1] < limit + 16 * 2 ** (len(widths) - 1) and len(widths) <= 4
        assert all(wide == 2 * narrow for narrow, wide in itertools.pairwise(widths))
        assert widths[0] % 16 == 0
        assert limit < 256 or widths[0] <= limit / 4 + 16  # a young row does not pay for an old one


@pytest.mark.parametrize(("slots", "n", "prompts"), [(256, 7, 1024), (8, 4, 50), (56, 1, 56), (1, 7, 3), (100, 30, 4)])
def test_the_last_samples_run_in_ever_fewer_rows(slots, n, prompts):
    shapes = plan(slots=slots, n=n, prompts=prompts)
    sizes = shapes.sizes
    assert sizes[0] == (slots, shapes.entries, shapes.ranks) and len(sizes) <= 10
    rows = [size[0] for size in sizes]
    assert all(a > b >= a / 2 for a, b in itertools.pairwise(rows)) and rows[-1] <= math.ceil(slots / 64)
    shared = [size[1:] == (shapes.entries, shapes.ranks) and size[1] < size[0] for size in sizes[1:]]
    own = [size[1:] == (size[0], 1) for size in sizes[1:]]
    assert all(a != b for a, b in zip(shared, own, strict=True))
    assert own == sorted(own)  # once they have copies they keep them


@pytest.mark.parametrize(
    ("slots", "n", "prompts", "banks"), [(8, 4, 50, 1), (64, 7, 30, 8), (16, 3, 5, 4), (9, 20, 9, 2)]
)
def test_all_slots_of_all_banks_can_be_filled(slots, n, prompts, banks):
    shapes = plan(slots=slots, n=n, prompts=prompts, banks=banks)
    assert shapes.banks == banks and shapes.slots == math.ceil(min(slots, prompts * n) / banks)
    assert shapes.entries * shapes.ranks >= shapes.slots and shapes.ranks <= n
    assert shapes.entries * banks < prompts + banks


def nbytes(shapes: Shapes, entries: int, slots: int, width: int, dtype) -> int:
    """Of the buffers as the sampler makes them."""
    sizes = {"banks": shapes.banks, "entries": entries, "room": shapes.room, "slots": slots, "width": width}
    cache = jax.eval_shape(lambda: empty_cache(CONFIG, **sizes, dtype=dtype))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


@pytest.mark.parametrize(("banks", "dtype"), [(1, jnp.float32), (4, jnp.bfloat16)], ids=str)
def test_cache_bytes_are_those_of_the_largest_cache(banks, dtype):
    # Room for prompts is most of the first case, and rings are most of the second.
    for sampling in ({"max_new_tokens": 16, "longest": 900}, {"max_new_tokens": 900, "longest": 16}):
        shapes = plan(banks=banks, itemsize=np.dtype(dtype).itemsize, **sampling)
        held = [nbytes(shapes, e, b, width, dtype) for b, e, _ in shapes.sizes for width in shapes.widths]
        assert shapes.cache_bytes(CONFIG, np.dtype(dtype).itemsize) == max(held)


def test_slots_follow_from_the_budget():
    unbounded = plan(slots=100)
    assert unbounded.slots == 100
    before = 0
    for budget in (1, 2, 4, 8, 16, 64):
        shapes = plan(slots=100, cache_gib=budget * MIB)
        assert shapes.cache_bytes(CONFIG, 4) <= budget * 2**20
        if shapes.slots < 100:
            assert plan(slots=shapes.slots + 1).cache_bytes(CONFIG, 4) > budget * 2**20  # one more does not fit
        assert shapes.slots > before or before == 100
        before = shapes.slots
    assert before == 100  # `slots` is a bound too
    some = plan(slots=100, cache_gib=4 * MIB).slots
    assert 1.8 * some < plan(slots=100, cache_gib=4 * MIB, itemsize=2).slots < 2.2 * some
    assert plan(slots=100, cache_gib=4 * MIB, max_new_tokens=900).slots < some
    assert plan(slots=100, cache_gib=4 * MIB, longest=900).slots < some
    # What is free on the devices counts where nothing is given.
    assert plan(slots=100, free_gib=4 * MIB).slots == plan(slots=100, free_gib=MIB, cache_gib=4 * MIB).slots == some
    # The budget is for all devices together.
    assert plan(slots=100, cache_gib=4 * MIB, banks=4).slots <= math.ceil(some / 4)


@pytest.mark.parametrize("limit", [100, 3000, 5001, 7003])
def test_a_budget_that_holds_nothing_says_how_much_would_do(limit):
    with pytest.raises(InputError) as error:
        plan(cache_gib=0.1 * MIB, max_new_tokens=limit, banks=3)
    message = str(error.value)
    assert f"cache_gib={0.1 * MIB} holds no sample of 200 + {limit} tokens on 3 data-parallel devices" in message
    least = float(re.search(r"at least ([\d.e-]+),", message)[1])
    assert plan(cache_gib=least, max_new_tokens=limit, banks=3).slots == 1
    with pytest.raises(InputError, match=r"beside the weights, .* GiB .* holds no sample .*\(a larger tensor"):
        plan(free_gib=0.1 * MIB, max_new_tokens=limit, banks=3)
    with pytest.raises(InputError):
        plan(cache_gib=0.98 * least, max_new_tokens=limit, banks=3)
