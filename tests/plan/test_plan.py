"""Tests the parts of `rmr1 plan` that compile nothing: the shape of a model, the mesh, and the formulas, against traces
and by hand. Next: `test_programs.py`, which compiles."""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from planning import MODEL, small_grpo, small_sft

from rmr1_jax.config import dump_config
from rmr1_jax.distributed.mesh import MeshConfig, make_mesh
from rmr1_jax.errors import InputError
from rmr1_jax.model.config import config_to_hf
from rmr1_jax.model.qwen import Qwen, abstract_params, split, with_params
from rmr1_jax.plan.costs import Cost, decode_cost, forward_cost, kernel_scores, prefill_cost, time_bound, update_cost
from rmr1_jax.plan.model import model_shape
from rmr1_jax.plan.plan import read_run
from rmr1_jax.plan.sampler import SamplingTask
from rmr1_jax.plan.traffic import Traffic
from rmr1_jax.plan.train import BatchShape, Lengths, batch_shape, training_mesh
from rmr1_jax.sampler.sample import SamplingConfig
from rmr1_jax.sampler.shapes import Shapes
from rmr1_jax.train.config import GrpoConfig, SftConfig
from rmr1_jax.train.logprobs import row_logprobs
from rmr1_jax.train.sft import sft_micro_loss

# ---- which model, which config, which mesh


@pytest.mark.parametrize(
    ("name", "params", "theta", "tied"),
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.494e9, 1e6, True),
        ("qwen/qwen2.5-1.5b", 1.544e9, 1e6, True),
        ("Qwen/Qwen2.5-7B-Instruct", 7.616e9, 1e6, False),
        ("Qwen/Qwen2.5-14B-Instruct", 14.770e9, 1e6, False),
        ("gaotang/RM-R1-Qwen2.5-Instruct-32B", 32.764e9, 1e6, False),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1.777e9, 1e4, False),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7.616e9, 1e4, False),
        ("gaotang/RM-R1-DeepSeek-Distilled-Qwen-14B", 14.770e9, 1e6, False),
    ],
)
def test_the_shape_of_a_model_from_its_name(name, params, theta, tied):
    """The numbers of parameters are those on the models' pages."""
    config = model_shape(name)
    shapes = jax.tree.leaves(abstract_params(Qwen(config), make_mesh(), jnp.float32))
    assert sum(math.prod(x.shape) for x in shapes) == pytest.approx(params, rel=1e-3)
    assert (config.rope_theta, config.tie_word_embeddings) == (theta, tied)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "Qwen/Qwen2.5-3B-Instruct", "meta/Llama-7B", "x/Qwen2.5-17B", ""])
def test_a_model_of_unknown_shape(name):
    with pytest.raises(InputError, match="its shape is not known"):
        model_shape(name or "nothing")


def test_the_shape_of_a_model_in_a_directory(tmp_path):
    folder = tmp_path / "Qwen2.5-7B-cut"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(MODEL, "bfloat16")))
    assert model_shape(str(folder)) == model_shape(str(folder / "config.json")) == MODEL


@pytest.mark.parametrize("config", [small_sft(), small_grpo(), SftConfig(out="o"), GrpoConfig(out="o")], ids=repr)
def test_the_stage_is_read_from_the_keys(config, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config))
    assert read_run(path, ()) == config
    path.write_text("out: o\nmodel: m\n")
    assert isinstance(read_run(path, ["epochs=2"]), SftConfig)
    assert isinstance(read_run(path, ["sampling.n=2"]), GrpoConfig)
    with pytest.raises(InputError, match="SFT or GRPO"):
        read_run(path, ["micro_rows=4"])
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        read_run(tmp_path / "nowhere.yaml", ())


def test_every_recipe_is_recognised():
    stages = {"sft": SftConfig, "grpo": GrpoConfig}
    configs = Path(__file__).resolve().parents[2] / "configs"
    commands = {path: path.read_text().split()[2] for path in configs.glob("*.yaml")}  # "# rmr1 grpo configs/..."
    recipes = {path: command for path, command in commands.items() if command in stages}
    assert len(recipes) > 20
    for path, command in recipes.items():
        assert isinstance(read_run(path, ()), stages[command]), path


@pytest.mark.parametrize(
    ("mesh", "micro_rows", "slices", "sizes"),
    [
        (MeshConfig(), 8, 1, (1, 8, 1)),
        (MeshConfig(), 16, 1, (1, 8, 1)),
        (MeshConfig(), 4, 1, (1, 4, 2)),  # too few rows for eight devices: heads are split
        (MeshConfig(), 12, 1, (1, 4, 2)),
        (MeshConfig(replica=2), 8, 1, (2, 4, 1)),
        (MeshConfig(tensor=2), 8, 1, (1, 4, 2)),  # the config's tensor axis is kept
        (MeshConfig(), 8, 2, (2, 4, 1)),  # one replica per slice
        (MeshConfig(), 4, 2, (2, 2, 2)),
    ],
    ids=str,
)
def test_a_mesh_with_open_axes_is_chosen(mesh, micro_rows, slices, sizes):
    config = small_sft(rows_per_step=48, micro_rows=micro_rows, mesh=mesh)
    made = training_mesh(config, MODEL, jax.devices(), slices)
    assert tuple(made.shape.values()) == sizes
    assert micro_rows % (sizes[0] * sizes[1]) == 0


@pytest.mark.parametrize(
    ("mesh", "micro_rows", "message"),
    [
        (MeshConfig(), 2, r"micro_rows=2 .* 8 devices: .* multiples of 8, 4; set micro_rows to a multiple of 4 with"),
        (MeshConfig(tensor=1, fsdp=8), 4, "micro_rows=4 .* multiples of 8"),
        (MeshConfig(tensor=4), 8, "mesh.tensor=4 does not divide 4 heads and 2 key-value heads; take a divisor of 2"),
        (MeshConfig(replica=3), 8, r"does not cover 8 devices exactly; replica x tensor must be one of \[1, 2, 4, 8\]"),
    ],
    ids=str,
)
def test_no_mesh_divides_rows_and_heads(mesh, micro_rows, message):
    with pytest.raises(InputError, match=message):
        training_mesh(small_sft(rows_per_step=micro_rows, micro_rows=micro_rows, mesh=mesh), MODEL, jax.devices())


def test_the_shape_of_a_batch():
    assert batch_shape(small_sft(rows_per_step=32)) == BatchShape(4, 4, 8, 128)
    # 8 prompts x 4 texts of (32 + 128) / 2 tokens fill 16 rows: 4 micro-batches of 4. The head reads 4/5 of a row.
    separate = functools.partial(small_grpo, share_prompts=False)
    segments = ((32, 80, 0),)
    assert batch_shape(separate()) == BatchShape(4, 4, 4, 160, 130, segments)
    half = ((16, 80, 0),)
    assert batch_shape(separate(mini_batch_prompts=4, micro_rows=3)) == BatchShape(3, 4, 3, 160, 130, half)


def test_the_shape_of_a_batch_with_shared_prompts():
    """A group of 15 + 4 x 65 tokens is longer than a row of 160: its prompt is in two rows."""
    shape = batch_shape(small_grpo())
    assert shape == BatchShape(4, 4, 4, 160, 150, ((16, 15, 0), (32, 65, 15)))
    assert sum(shape.sequences[0]) == 16 * 15 + 32 * 65 <= shape.tokens
    assert shape.sequences[1] == [0] * 16 + [15] * 32
    given = batch_shape(small_grpo(micro_rows=1), Lengths(32, 8))
    assert given == BatchShape(4, 4, 1, 160, 80, ((8, 31, 0), (32, 9, 31)))  # 8 groups of 67 tokens in 4 rows
    assert batch_shape(small_sft(), Lengths(30, 10)) == BatchShape(2, 2, 8, 128, 32, ((51, 40, 0),))


def test_the_recipe_s_rows_have_half_of_the_positions():
    lengths = Lengths(1151, 700)
    once, each = (
        batch_shape(GrpoConfig(out="o", micro_rows=1, share_prompts=share), lengths).tokens for share in (True, False)
    )
    assert once / each == pytest.approx(6.20 / 13.27, rel=0.02)  # millions of a step: distinct, and all


# ---- formulas


def product_flops(function, *arguments) -> float:
    """Count the FLOPs of the matrix products that JAX traces in a function; loops count as often as they run."""

    def count(jaxpr) -> float:
        total = 0.0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                summed = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
                total += 2 * math.prod(eqn.outvars[0].aval.shape) * summed
            times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            total += times * sum(count(inner) for inner in jaxprs_in_params(eqn.params))
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def row_batch(rows: int, length: int) -> dict[str, jax.Array]:
    names = ("tokens", "positions", "segment_ids")
    return {name: jnp.ones((rows, length), jnp.int32) for name in names} | {"weights": jnp.ones((rows, length), "f")}


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("length", [64, 384])
def test_flops_against_a_trace(remat, length):
    """The formula is exact for the products of layers, of attention's blocks and of the head's chunks, and counts what
    remat recomputes. At length 384 attention has three blocks."""
    mesh = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_params(Qwen(MODEL), mesh, jnp.float32))
    config = small_sft(row_length=length, rows_per_step=4, micro_rows=2, remat=remat)
    shape = batch_shape(config)
    batch, forward = row_batch(2, length), {"remat": remat, "attention": "xla"}
    loss = functools.partial(sft_micro_loss, split(Qwen(MODEL))[0], **forward)
    traced = product_flops(jax.grad(loss, has_aux=True), params, batch)
    cost = update_cost(config, MODEL, mesh, shape)
    assert cost.flops == shape.micro_batches * traced
    assert cost.tokens == 4 * length
    logprobs = product_flops(lambda params: row_logprobs(with_params(Qwen(MODEL), params), batch, **forward), params)
    assert forward_cost(config, MODEL, mesh, shape).flops == shape.micro_batches * logprobs
    # By hand: six FLOPs for each weight and token, and the pairs of causal attention.
    matrices = 3 * (64 * (2 * 4 + 2 * 2) * 16 + 3 * 64 * 96) + 160 * 64
    pairs = length * (length + 1) / 2
    assert cost.model_flops == pytest.approx(4 * (6 * matrices * length + 3 * 4 * 3 * 4 * 16 * pairs))
    assert cost.model_flops < cost.flops


def test_the_kernel_computes_whole_blocks_once():
    mesh = make_mesh(MeshConfig(fsdp=8))
    plain, kernel = (
        update_cost(c, MODEL, mesh, batch_shape(c)).flops
        for c in (small_sft(remat="full", attention=kind, row_length=1024) for kind in ("xla", "pallas"))
    )
    scores = 16 * 4 * 3 * 4 * 16 / 2  # 16 rows; four FLOPs a pair, three layers, four heads of 16
    assert kernel - plain == pytest.approx(scores * 1024 * 4.5 * (256 - 128))  # blocks of 256 and of 128
    dots, none = (
        update_cost(small_sft(remat=r, attention="pallas"), MODEL, mesh, BatchShape(1, 1, 8, 128)).flops
        for r in ("dots", "none")
    )
    assert dots == none  # what the kernel's backward pass needs is kept


def test_the_kernel_s_scores_are_those_of_the_blocks_that_meet():
    """Rows of 1,024 in blocks of 256. Four segments: the diagonal. A prompt with three responses: each sees the prompt
    too. Of a group that is longer than a row, what fits is counted: a prompt of two blocks with two of four responses.
    """
    shape = functools.partial(BatchShape, 16, 16, 1, 1024, None)
    assert kernel_scores(shape(((64, 256, 0),))) == 64 * 256**2
    assert kernel_scores(shape(((16, 256, 0), (48, 256, 256)))) == 16 * (4 + 3) * 256**2
    assert kernel_scores(shape(((8, 512, 0), (32, 256, 512)))) == 8 * (3 + 2 * 3) * 256**2 * (512 + 4 * 256) / 1024


def test_the_sampler_s_costs_by_hand():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    task = SamplingTask(SamplingConfig(n=4, max_new_tokens=96), 64, 32, jnp.dtype("float32"))
    shapes = Shapes(banks=4, slots=8, entries=6, ranks=4, room=32, widths=(48, 96))
    matrices = 3 * (64 * (2 * 4 + 2 * 2) * 16 + 3 * 64 * 96)
    heads = 4 * 3 * 4 * 16
    decode = decode_cost(MODEL, mesh, shapes, task)
    assert decode.tokens == 16 * 32
    assert decode.model_flops == 16 * 32 * (2 * (matrices + 160 * 64) + heads * (32 + 48))
    assert decode.flops == 16 * (32 * 2 * (matrices + 160 * 64) + heads * 4 * (6 * 4 * 32 + 8 * 96))
    cache = shapes.cache_bytes(MODEL, 4) / 8
    assert decode.memory == 16 * (4 * (matrices + 160 * 64) / 2 + cache)
    prefill = prefill_cost(MODEL, mesh, shapes, task)
    assert prefill.tokens == 4 * 8 * 16
    assert prefill.flops == 4 * 8 * 16 * (2 * matrices + heads * 32)


@pytest.mark.parametrize(
    ("cost", "traffic", "bound"),
    [
        (Cost(197e12, 2 * 197e12, 1e9, 2, 0), Traffic({"all-gather": 1e9}, 0), ("compute", 1.0, 0.5)),
        (Cost(197e12, 197e12, 2 * 819e9, 1, 0), Traffic({"all-gather": 1e9}, 0), ("memory", 2.0, 0.5)),
        (Cost(197e12, 197e12, 1e9, 1, 0), Traffic({"all-gather": 3e11, "all-reduce": 5e11}, 0), ("links", 4.0, 0.25)),
        (Cost(197e12, 197e12, 1e9, 1, 0), Traffic({}, 3.125e9 * 5), ("links", 5.0, 0.2)),
    ],
    ids=["compute", "memory", "links", "slices"],
)
def test_the_largest_bound_is_the_time(cost, traffic, bound):
    name, seconds, mfu = time_bound(cost, traffic, SimpleNamespace(device_kind="TPU v5 lite"))
    assert (name, seconds, mfu) == (bound[0], pytest.approx(bound[1]), pytest.approx(bound[2]))
    assert time_bound(cost, traffic, SimpleNamespace(device_kind="cpu")) is None
