"""The commands that train, plan and export: `rmr1 sft`, `rmr1 grpo`, `rmr1 plan`, `rmr1 export`.

Read next: `train/sft.py`, `train/grpo.py` and `plan/plan.py`, which they call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from rmr1_jax.cli.options import ConfigCommand, Dtype, MaybeText, starting, template_setting
from rmr1_jax.cli.recipes import find_config
from rmr1_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft(ConfigCommand):
    """Train a model on reasoning traces (stage one), or resume an interrupted run."""

    settings = "train.config:SftConfig"

    def run(self) -> None:
        with starting(f"sft: {self.path()}{''.join(f' {each}' for each in self.overrides)}: loading JAX"):
            from rmr1_jax.train.sft import sft

            config = self.load()
        more = template_setting(config.chat_template_kwargs)
        _train(sft, config, f"rmr1 grpo CONFIG.yaml model={config.out}/model out=DIR{more}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo(ConfigCommand):
    """Train a model by reinforcement learning with a verifiable reward (stage two), or resume an interrupted run."""

    settings = "train.config:GrpoConfig"

    def run(self) -> None:
        with starting(f"grpo: {self.path()}{''.join(f' {each}' for each in self.overrides)}: loading JAX"):
            from rmr1_jax.train.grpo import grpo

            config = self.load()
        more = template_setting(config.chat_template_kwargs, "--chat-template-kwargs ")
        _train(grpo, config, f"rmr1 judge --model {config.out}/model --input F --output F{more}")


def _train(stage: Callable[[Any], Any], config: Any, next_command: str) -> None:
    """Runs a stage together with the other processes of the run, if there are any."""
    from rmr1_jax.distributed.exchange import first
    from rmr1_jax.distributed.join import join_processes

    with join_processes():
        stage(config)
        if first():
            print(f"trained: {config.out}/model\nnext:    {next_command}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(ConfigCommand):
    """Estimate the memory and time of a training run on a TPU slice that you do not have, by compiling its programs for
    that slice. Requires the extra `tpu`."""

    config: Annotated[Positional[Path], arg(metavar="CONFIG.yaml|MODEL")]
    """YAML file with the settings of a run; or, with --sampler-only, a model: its directory, or the name of a Qwen2.5
    or DeepSeek-R1-Distill-Qwen model."""
    topology: str
    """TPU generation and shape of the slice: two dimensions for v5e and v6e (v5e:16x16), three for v5p (v5p:4x4x4)."""
    slices: int = 1
    """Number of slices; each holds a replica of the weights."""
    sampler_only: bool = False
    """Plan only the sampler, on one host. For a model: as `rmr1 judge` samples, with overrides such as
    max_prompt_tokens=2048 max_new_tokens=2048 slots=128 tensor=4. For the settings of a GRPO run: the most samples that
    fit without the weights and optimizer of training."""
    lengths: Annotated[tuple[int, int] | None, arg(metavar="PROMPT RESPONSE")] = None
    """Mean tokens of a prompt and of its response. In GRPO they give the rows of an update (by default half of the
    largest lengths), in both stages the share of the positions that the head reads."""
    json: bool = False
    """Print a list of JSON objects instead of a table."""

    def run(self) -> None:
        from rmr1_jax.plan.plan import print_plan
        from rmr1_jax.plan.train import Lengths

        lengths = self.lengths and Lengths(*self.lengths)
        options = {"topology": self.topology, "slices": self.slices, "sampler_only": self.sampler_only}
        print_plan(find_config(self.config), self.overrides, **options, as_json=self.json, lengths=lengths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write the newest checkpoint of a training run as a Hugging Face directory. The run may still be in progress: the
    command leaves its accelerators alone, and holds one weight in memory at a time."""

    checkpoint: Annotated[Positional[Path], arg(metavar="RUN_DIR")]
    """Output directory of `rmr1 sft` or `rmr1 grpo`."""
    out: Path
    """Directory to write."""
    model: MaybeText = None
    """Directory or hub id with the architecture and the tokenizer. Defaults to the model in the run's config.yaml."""
    dtype: Dtype = "bfloat16"
    """Number format of the exported weights."""

    def run(self) -> None:
        import jax

        from rmr1_jax.distributed.mesh import single_device_mesh
        from rmr1_jax.model.qwen import abstract_params
        from rmr1_jax.policy import load, write_model
        from rmr1_jax.train.checkpoint import stored_params

        jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy with the run
        policy = load(self.model or self._model_of_run(), self.dtype, single_device_mesh())
        like = abstract_params(policy.module, policy.mesh, self.dtype)
        params = stored_params(self.checkpoint, like)
        write_model(self.out, policy.module, params, policy.tokenizer, dtype=self.dtype)
        print(f"written: {self.out}")

    def _model_of_run(self) -> str:
        from rmr1_jax.config import read_yaml

        path = self.checkpoint / "config.yaml"
        if not path.is_file():
            raise InputError(f"{self.checkpoint} is not a run directory: it holds no {path.name}")
        if not (model := read_yaml(path).get("model")):
            raise InputError(f"{path} names no model; give --model, a directory with its config.json and tokenizer")
        return model
