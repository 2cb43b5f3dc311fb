"""Every recipe in configs/ loads, fits the slices that it names, and has the paper's numbers (arXiv 2505.02387)."""

import dataclasses
import math
import re
import shlex
from pathlib import Path

import pytest
import yaml

from rmr1_jax.config import config_differences, load_config
from rmr1_jax.data.chains.chains import ChainsConfig
from rmr1_jax.data.mix.mixture import MixtureConfig
from rmr1_jax.data.prepare import PrepareConfig
from rmr1_jax.prompts.prompt import get_prompt
from rmr1_jax.train.config import GrpoConfig, SftConfig

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"sft": SftConfig, "grpo": GrpoConfig}
RECIPES = sorted(p for p in (ROOT / "configs").glob("*.yaml") if p.stem.split("_")[0] in STAGES)
# Query heads, key-value heads.
HEADS = {"0.5b": (14, 2), "1.5b": (12, 2), "7b": (28, 4), "14b": (40, 8), "32b": (40, 8)}
CHIPS_OF_A_HOST = 4
# The paper's learning rates.
RATES = {
    "sft_qwen2.5_7b": 5e-6,
    "sft_qwen2.5_14b": 3e-6,
    "sft_qwen2.5_32b": 2e-6,
    "grpo_qwen2.5_7b": 1e-6,
    "grpo_qwen2.5_14b": 7e-7,
    "grpo_qwen2.5_32b": 5e-7,
    "grpo_deepseek_7b": 1e-6,
    "grpo_deepseek_14b": 1e-6,
    "grpo_deepseek_32b": 8e-7,
}
# Defaults that recipes repeat, because a reader needs them.
SHOWN = {
    *("row_length", "max_prompt_length", "prompts_per_step", "mini_batch_prompts"),
    *("sampling.n", "sampling.max_new_tokens", "sampling.slots", "optimizer.lr"),
}


def stage(path: Path) -> type:
    return STAGES[path.stem.split("_")[0]]


def size(path: Path) -> str:
    return path.stem.rsplit("_", 1)[1]


def comments(path: Path) -> list[str]:
    """The comment lines at the start of a file, without the `# `."""
    head = re.match(r"(?:# .*\n)+", path.read_text())
    return [line[2:] for line in head[0].splitlines()]


def slices(path: Path) -> list[tuple[str, list[str]]]:
    """Parse the second line, `Slice: v5e:4x4 (16 chips) with a=1; ...`, into slices and the overrides for each."""
    line = re.fullmatch(r"Slice: (.*)\.", comments(path)[1])[1]
    found = []
    for entry in line.split("; "):
        name, chips, overrides = re.fullmatch(r"(v\d\w?:[\dx]+) \((\d+) chips\)(?: with (.*))?", entry).groups()
        assert math.prod(map(int, name.split(":")[1].split("x"))) == int(chips), entry
        found.append((name, overrides.split() if overrides else []))
    return found


def leaves(tree: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


each = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def test_the_set_of_recipes_is_complete():
    qwen = {f"{stage}_qwen2.5_{size}" for stage in STAGES for size in HEADS}
    assert {path.stem for path in RECIPES} == qwen | {f"grpo_deepseek_{size}" for size in HEADS if size != "0.5b"}


@each
def test_the_first_line_is_the_command(path):
    program, command, file, *overrides = shlex.split(comments(path)[0])
    assert program == "rmr1" and STAGES[command] is stage(path) and ROOT / file == path
    config = load_config(stage(path), path)
    assert load_config(stage(path), path, overrides) == config  # the file has the same values
    assert size(path) in config.model.lower()
    if path.stem.startswith("grpo_qwen"):
        assert config.model == load_config(SftConfig, path.with_name(path.name.replace("grpo", "sft"))).out + "/model"


@each
def test_rows_and_heads_divide_on_every_slice_it_names(path):
    heads, kv_heads = HEADS[size(path)]
    for name, overrides in slices(path):
        config = load_config(stage(path), path, overrides)
        chips = math.prod(map(int, name.split(":")[1].split("x")))
        mesh = config.mesh
        assert mesh.fsdp == -1 and chips % (mesh.replica * mesh.tensor) == 0, name
        assert config.micro_rows % (chips // mesh.tensor) == 0, name
        assert heads % mesh.tensor == 0 and kv_heads % mesh.tensor == 0, name
        sampling = getattr(config, "sampling_tensor", None) or mesh.tensor
        assert CHIPS_OF_A_HOST % sampling == 0 and kv_heads % sampling == 0, name  # a sampler stays within a host


@each
def test_it_repeats_only_the_defaults_that_a_reader_needs(path):
    given = leaves(yaml.safe_load(path.read_text()))
    default = leaves(dataclasses.asdict(stage(path)(out="")))
    resolved = leaves(dataclasses.asdict(load_config(stage(path), path)))
    repeated = {key for key in given if resolved[key] == default[key]}
    assert repeated <= SHOWN


@each
def test_the_learning_rate(path):
    rate = load_config(stage(path), path).optimizer.lr
    if path.stem in RATES:
        assert rate == RATES[path.stem]
        assert re.search(r"^  lr: \S+ +# the paper's\b", path.read_text(), re.M)
    else:  # the paper has no model of this size: at least its rate for 7B, and marked as extrapolated
        assert size(path) in ("0.5b", "1.5b") and rate >= RATES[re.sub(r"_[\d.]+b$", "_7b", path.stem)]
        assert "The paper trains no model of this size" in path.read_text()
        assert re.search(r"^  lr: \S+ +# extrapolated", path.read_text(), re.M)


@each
def test_the_paper_s_recipe(path):
    config = load_config(stage(path), path)
    optimizer, moments = config.optimizer, (config.optimizer.b1, config.optimizer.b2)
    if stage(path) is SftConfig:
        assert (config.row_length, config.epochs) == (12288, 1)
        assert (moments, optimizer.weight_decay, optimizer.clip) == ((0.9, 0.95), 0.0, 1.0)
        assert (optimizer.schedule, optimizer.final_ratio, optimizer.warmup_ratio) == ("cosine", 0.1, 0.03)
        examples = config.rows_per_step * config.row_length / (1130 + 645)  # mean tokens of a prompt and of a trace
        assert 128 / 1.25 < examples < 128 * 1.25
        return
    assert (moments, optimizer.weight_decay, optimizer.clip) == ((0.9, 0.999), 0.01, 1.0)
    assert (optimizer.schedule, optimizer.warmup_ratio) == ("constant", 0.0)
    assert (config.prompts_per_step, config.mini_batch_prompts, config.updates_per_step) == (1024, 128, 8)
    assert (config.max_prompt_length, config.sampling.max_new_tokens, config.row_length) == (4096, 8192, 12288)
    sampling = config.sampling
    assert (sampling.n, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 1.0, 1.0, None)
    assert (config.loss.clip_low, config.loss.clip_high) == (0.2, 0.2)
    assert (config.loss.kl_coef, config.loss.kl_kind, config.loss.entropy_coef) == (1e-3, "k3", 0.0)
    assert (config.aggregation, config.normalize_std, config.dynamic_sampling) == ("sequence", True, 1)
    # The Instruct models' prompt asks for the whole Chain-of-Rubrics trace, the DeepSeek models' for a verdict.
    assert config.structure == ("verdict" if "deepseek" in path.stem else "cor")


# Experiments: the parent, and the keys beside `out` in which it differs.
CHILDREN = {
    "ablation_cold_start_32b": ("grpo_qwen2.5_32b", {"model", "data", "reward", "structure"}),
    "ablation_rubrics_32b": ("ablation_cold_start_32b", {"data", "structure"}),
    "ablation_categories_32b": ("ablation_rubrics_32b", {"data", "structure"}),
    "baseline_sft_32b": ("sft_qwen2.5_32b", {"data"}),
    "baseline_sft_9k_32b": ("baseline_sft_32b", {"data"}),
    "baseline_distilled_sft_32b": ("baseline_sft_32b", {"model"}),
}


def test_the_set_of_experiments_is_complete():
    found = {p.stem for kind in ("ablation", "baseline") for p in (ROOT / "configs").glob(f"{kind}_*.yaml")}
    assert found == set(CHILDREN)


@pytest.mark.parametrize("name", CHILDREN)
def test_an_experiment_differs_from_its_parent_only_in_the_listed_keys(name):
    path = ROOT / "configs" / f"{name}.yaml"
    program, command, file = shlex.split(comments(path)[0])
    assert (program, ROOT / file) == ("rmr1", path)
    assert slices(path)
    parent, keys = CHILDREN[name]
    mine, theirs = (dataclasses.asdict(load_config(STAGES[command], path.with_stem(n))) for n in (name, parent))
    differences = config_differences(theirs, mine)
    assert set(differences) == keys | {"out"}
    assert differences["out"][1] == f"runs/{name}"
    if "structure" in keys:
        assert get_prompt(prepared(path).prompt).structure == mine["structure"]


def prepared(path: Path) -> PrepareConfig:
    """The config of the `rmr1 data prepare` in a recipe's first lines, whose output it trains on."""
    line = re.search(r"rmr1 data prepare (.*)", "\n".join(comments(path)).replace("\\\n", ""))[1]
    file, *overrides = shlex.split(line)
    config = load_config(PrepareConfig, ROOT / file, overrides)
    assert yaml.safe_load(path.read_text())["data"] == config.out
    return config


def test_the_rows_of_the_answer_only_baselines():
    whole, few = (prepared(ROOT / "configs" / f"baseline_{name}_32b.yaml") for name in ("sft", "sft_9k"))
    assert (whole.stage, whole.target, whole.limit) == ("sft", "verdict", None)
    assert (few.target, few.limit) == ("verdict", 9000)


@pytest.mark.parametrize("stage", STAGES)
def test_the_recipes_that_prepare_the_stages(stage):
    path = ROOT / "configs" / f"prepare_{stage}.yaml"
    program, *command, file = shlex.split(comments(path)[0])[:4]
    assert (program, command, ROOT / file) == ("rmr1", ["data", "prepare"], path)
    config = load_config(PrepareConfig, path, shlex.split(comments(path)[0])[4:])
    assert load_config(PrepareConfig, path) == config and config.stage == stage
    recipe = load_config(STAGES[stage], ROOT / "configs" / f"{stage}_qwen2.5_7b.yaml")
    assert config.max_length == (recipe.row_length if stage == "sft" else recipe.max_prompt_length)


def test_the_recipe_of_chains():
    path = ROOT / "configs" / "chains.yaml"
    program, *command, file, pairs, out = shlex.split(comments(path)[0])
    assert (program, command, ROOT / file) == ("rmr1", ["data", "chains"], path)
    assert load_config(ChainsConfig, path, [pairs, out]) == load_config(ChainsConfig, path)


def test_the_paper_s_mixture():
    path = ROOT / "configs" / "mixture_rm_r1.yaml"
    program, *command, file, override = shlex.split(comments(path)[0])
    assert (program, command, ROOT / file) == ("rmr1", ["data", "mix"], path)
    config = load_config(MixtureConfig, path)
    assert load_config(MixtureConfig, path, [override]) == config
    skywork, code, math_step = config.sources
    assert (skywork.path, skywork.exclude) == (
        "Skywork/Skywork-Reward-Preference-80K-v0.2",
        {"source": ("magpie_ultra",)},
    )
    assert (code.path, code.count, code.shuffle) == ("Vezora/Code-Preference-Pairs", 8000, 42)
    assert (math_step.path, math_step.count) == ("xinlai/Math-Step-DPO-10K", None)
    assert [source.format for source in config.sources] == ["skywork", "code-preference", "math-step"]
