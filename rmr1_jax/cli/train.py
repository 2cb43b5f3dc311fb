"""The commands that train, plan and export: `rmr1 sft`, `rmr1 grpo`, `rmr1 plan`, `rmr1 export`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from rmr1_jax.cli.options import ConfigFile, Dtype, MaybeText, Overrides
from rmr1_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft:
    """Stage one: distil reasoning traces into a model. A killed run goes on from its last checkpoint."""

    config: ConfigFile
    """The run's settings; configs/ has one file for each run."""
    overrides: Overrides = ()
    """Settings that replace the file's, e.g. out=runs/sft optimizer.lr=1e-5"""

    def run(self) -> None:
        from rmr1_jax.config import load_config
        from rmr1_jax.train.config import SftConfig
        from rmr1_jax.train.sft import sft

        config = load_config(SftConfig, self.config, self.overrides)
        _train(sft, config, f"rmr1 grpo CONFIG.yaml model={config.out}/model out=DIR")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo:
    """Stage two: reinforcement learning with a verifiable reward. A killed run goes on from its last checkpoint."""

    config: ConfigFile
    """The run's settings; configs/ has one file for each run."""
    overrides: Overrides = ()
    """Settings that replace the file's, e.g. out=runs/grpo optimizer.lr=1e-6"""

    def run(self) -> None:
        from rmr1_jax.config import load_config
        from rmr1_jax.train.config import GrpoConfig
        from rmr1_jax.train.grpo import grpo

        config = load_config(GrpoConfig, self.config, self.overrides)
        _train(grpo, config, f"rmr1 judge --model {config.out}/model --input F --output F")


def _train(stage: Callable[[Any], Any], config: Any, then: str) -> None:
    """Run a stage with the other processes of the run, if there are any; and say which command comes next."""
    from rmr1_jax.distributed.exchange import first
    from rmr1_jax.distributed.join import together

    with together():
        stage(config)
        if first():
            print(f"trained: {config.out}/model\nnext:    {then}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes on a TPU slice that is not there, by compiling its programs for it. Needs the extra `tpu`."""

    config: ConfigFile
    """The run's settings, of `rmr1 sft` or of `rmr1 grpo`."""
    overrides: Overrides = ()
    """Settings that replace the file's, e.g. micro_rows=64 mesh.tensor=4"""
    topology: str
    """The slice: v5e:16x16, v6e:4x4 (two dimensions), v5p:4x4x4 (three)."""
    slices: int = 1
    """Slices, the replicas of one another."""
    sampler_only: bool = False
    """A GRPO run's sampler with nothing of training beside it, as a judge has it."""
    json: bool = False
    """Print a list of JSON objects instead of a table."""

    def run(self) -> None:
        from rmr1_jax.plan.plan import print_plan

        options = {"topology": self.topology, "slices": self.slices, "sampler_only": self.sampler_only}
        print_plan(self.config, self.overrides, **options, as_json=self.json)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write the newest checkpoint of a run as a Hugging Face directory, while the run goes on or after it."""

    checkpoint: Annotated[Positional[Path], arg(metavar="RUN_DIR")]
    """The directory of a run of `rmr1 sft` or `rmr1 grpo`."""
    out: Path
    """The directory to write."""
    model: MaybeText = None
    """Where the architecture and the tokenizer are from; by default the model that the run's config.yaml names."""
    dtype: Dtype = "bfloat16"
    """Of the weights in the files."""

    def run(self) -> None:
        import jax

        from rmr1_jax.policy import load
        from rmr1_jax.train.checkpoint import restore_params

        policy = load(self.model or self._model_of_run(), self.dtype)
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), policy.params)
        policy = policy.with_params(like)  # the old weights go before the new ones come
        policy.with_params(restore_params(self.checkpoint, like)).save(self.out)
        print(f"written: {self.out}")

    def _model_of_run(self) -> str:
        import yaml

        path = self.checkpoint / "config.yaml"
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as e:
            raise InputError(f"{self.checkpoint} is not a run directory: {path} cannot be read ({e})") from e
        model = config.get("model") if isinstance(config, dict) else None
        if not model:
            raise InputError(f"{path} names no model; give --model, a directory with its config.json and tokenizer")
        return model
