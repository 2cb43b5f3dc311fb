"""Tests the plan of a judge: its programs are those of `rmr1 judge` on such a host, with the same layout and slots."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from planning import MODEL
from policies import tiny_policy

from rmr1_jax.cli import main as cli
from rmr1_jax.distributed.mesh import MeshConfig, make_mesh
from rmr1_jax.errors import InputError
from rmr1_jax.judge.judge import Judge
from rmr1_jax.model.config import config_to_hf
from rmr1_jax.model.qwen import Qwen
from rmr1_jax.pairs.pair import PreferencePair, render_pair
from rmr1_jax.plan import plan as plan_module
from rmr1_jax.plan import sampler as plan_sampler
from rmr1_jax.plan.compile import Compiled
from rmr1_jax.plan.judging import JudgingConfig, judging_lines, judging_shapes
from rmr1_jax.plan.slice import Target
from rmr1_jax.plan.traffic import COLLECTIVES, Traffic
from rmr1_jax.policy import load
from rmr1_jax.quickstart.world import world_prompt
from rmr1_jax.sampler import layout as layout_module
from rmr1_jax.sampler import programs
from rmr1_jax.sampler import shapes as shapes_module
from rmr1_jax.sampler.layout import weight_bytes

NEW, PAIRS = 128, 64


def text_of(program, arguments) -> str:
    """The program before compilation, without what its signature says about the placement of arguments."""
    text = program.lower(*arguments).as_text()
    return text[text.index("\n", text.index("@main(")) :]


def placed(arguments) -> list:
    """Shape and dtype of each array, and the sharding where it is placed: the host's arrays are not."""
    leaves = jax.tree.leaves(arguments)
    return [(x.shape, jnp.dtype(x.dtype), getattr(x, "sharding", None)) for x in leaves if hasattr(x, "shape")]


def same_placement(ours, theirs) -> bool:
    def same(a, b):
        return a[:2] == b[:2] and (a[2] is None or b[2] is None or a[2].is_equivalent_to(b[2], len(a[0])))

    return len(ours) == len(theirs) and all(map(same, ours, theirs))


def planned(monkeypatch, config, target, judging):
    """{program: arguments} that the plan compiles, with its mesh and shapes."""
    found = {}

    def compile_program(program, *arguments, devices, **options):
        if program in (programs.decode, programs.prefill_prompts):
            found[program] = arguments, text_of(program, arguments)
        return Compiled(0, 0, 0, 0.0, Traffic(dict.fromkeys(COLLECTIVES, 0.0), 0.0))

    monkeypatch.setattr(plan_sampler, "compile_program", compile_program)
    (line, *_) = judging_lines(judging, config, target)
    mesh, _, shapes = judging_shapes(judging, config, target)
    return found, mesh, shapes, line


def test_a_judge_runs_the_programs_of_its_plan(tmp_path, monkeypatch):
    tiny_policy().save(tmp_path)
    config = tiny_policy().config
    one = weight_bytes(Qwen(config), make_mesh(MeshConfig(), jax.devices()[:1]), jnp.float32)
    memory = int(1.9 * one)  # a copy of the weights on one device would take more than half
    monkeypatch.setattr(layout_module, "free_memory", lambda devices: memory)
    pairs = [
        PreferencePair.from_answers(str(k), f"{k} Reverse " + "a b c d " * 10, "x " * 20, "y") for k in range(PAIRS)
    ]

    policy = load(tmp_path, "float32")
    judge = Judge(policy, world_prompt(), max_new_tokens=NEW)
    longest = max(len(policy.tokenizer.render(render_pair(judge.prompt, pair))) for pair in pairs)
    judging = JudgingConfig(model="x", dtype="float32", max_prompt_tokens=longest, max_new_tokens=NEW, batch_size=PAIRS)
    plan, mesh, shapes, line = planned(monkeypatch, config, Target([], jax.devices(), memory), judging)
    assert policy.mesh == mesh and dict(mesh.shape) == {"replica": 1, "fsdp": 4, "tensor": 2}
    assert line["overrides"] == f"--tensor 2 --slots {4 * shapes.slots}" and 1 < shapes.slots < PAIRS / 4

    left = memory - weight_bytes(Qwen(config), mesh, jnp.float32)
    monkeypatch.setattr(shapes_module, "free_memory", lambda devices: left)
    seen = {program: [] for program in plan}

    def recording(program):
        def call(*arguments):
            if same_placement(placed(arguments), placed(plan[program][0])):
                seen[program].append(text_of(program, arguments))
            return program(*arguments)

        return call

    for name in ("decode", "prefill_prompts"):
        monkeypatch.setattr(programs, name, recording(getattr(programs, name)))
    judge.compare_many(pairs)
    assert policy.stats.slots == 4 * shapes.slots
    for program, texts in seen.items():
        assert texts and set(texts) == {plan[program][1]}


def test_what_a_plan_for_judging_refuses():
    def shapes(memory, **settings):
        return judging_shapes(JudgingConfig(model="x", dtype="float32", **settings), MODEL, target(memory))

    def target(memory):
        return Target([], jax.devices(), memory)

    with pytest.raises(InputError, match=r"the weights of this model .* need .* give|or a smaller model"):
        shapes(10_000)
    need = weight_bytes(Qwen(MODEL), make_mesh(MeshConfig(tensor=4)), jnp.float32)
    with pytest.raises(InputError, match=r"holds no sample of 4096 \+ 8192 tokens"):
        shapes(need + 1000)
    with pytest.raises(InputError, match="tensor=3 does not divide"):
        shapes(2**30, tensor=3)


def test_the_command_plans_a_model(tmp_path, monkeypatch, capsys):
    used = jax.config.jax_enable_compilation_cache
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(MODEL, "bfloat16")))
    monkeypatch.setattr(plan_module, "slice_target", lambda topology, slices: Target([], jax.devices()[:4], 2**24))
    monkeypatch.setattr(
        plan_sampler,
        "compile_program",
        lambda *a, **k: Compiled(2**20, 0, 0, 0.0, Traffic(dict.fromkeys(COLLECTIVES, 0.0), 0.0)),
    )
    command = ["plan", str(tmp_path), "--topology", "v5e:2x2", "--sampler-only"]
    try:
        assert cli.main([*command, "max_prompt_tokens=256", "max_new_tokens=256", "--json"]) == 0
        lines = json.loads(capsys.readouterr().out)
        assert [line["program"] for line in lines] == ["decode", "prefill", "grow"]
        assert lines[0]["mesh"] == "fsdp=4 a host" and lines[0]["fits"] and lines[0]["slots"] > 4
        assert cli.main([*command, "max_prompt_tokens=256", "max_new_tokens=256", "slots=8", "tensor=2"]) == 0
        assert "Settings of this plan: --tensor 2 --slots 8" in capsys.readouterr().out
        assert cli.main([*command, "max_new_token=256"]) == 2
        assert "did you mean max_new_tokens" in capsys.readouterr().err
        assert cli.main([*command[:-1]]) == 2
        assert re.search(r"cannot read the config|--sampler-only", capsys.readouterr().err)
    finally:
        jax.config.update("jax_enable_compilation_cache", used)
