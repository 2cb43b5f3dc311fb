"""The runs that `chaos.py` injects faults into: small runs of `rmr1`, in processes that start quickly.

Each process is forked from one that has imported everything and has not used a JAX device yet; programs come from a
compilation cache. Read next: `chaos_faults.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import grain  # noqa: F401  (heavy modules are imported once, before the fork)
import transformers
import yaml

from rmr1_jax.cli import main as cli
from rmr1_jax.pairs.pair import render_pair
from rmr1_jax.policy import fresh_policy
from rmr1_jax.prompts.prompt import save_prompt
from rmr1_jax.quickstart import quickstart
from rmr1_jax.quickstart.tokenizer import train_tokenizer
from rmr1_jax.quickstart.world import make_items, oracle_trace, to_pair, world_prompt, world_texts
from rmr1_jax.train import manifest
from rmr1_jax.train.checkpoint import steps_of
from rmr1_jax.train.metrics import read_metrics

transformers.AutoTokenizer  # noqa: B018  (naming it imports it)
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "head_dim": 8}
MODEL = dataclasses.replace(quickstart.MODEL, **TINY, max_position_embeddings=512, rope_theta=1e4)
COMMON = {"dtype": "float32", "remat": "none", "attention": "xla", "keep": 2}
CONFIGS = {
    "sft": COMMON
    | {"row_length": 256, "rows_per_step": 2, "micro_rows": 2, "epochs": 50, "max_steps": 60, "save_every": 3}
    | {"optimizer": {"lr": 1e-2}},
    # A random policy never earns the reward, so the entropy term is what changes its weights.
    "grpo": COMMON
    | {"prompts_per_step": 4, "mini_batch_prompts": 2, "steps": 24, "max_prompt_length": 80, "row_length": 128}
    | {"micro_rows": 16, "sampling": {"n": 2, "max_new_tokens": 12}, "loss": {"kl_coef": 0.0, "entropy_coef": 0.01}}
    | {"optimizer": {"lr": 1e-2, "schedule": "constant", "warmup_ratio": 0.0}, "save_every": 2},
}


def make_world(root: Path) -> None:
    """Writes a model, training rows of both stages, and pairs to judge."""
    tokenizer = train_tokenizer(world_texts(200), root / "tokenizer")
    fresh_policy(MODEL, tokenizer, seed=0).save(root / "model")
    prompt = world_prompt()
    save_prompt(prompt, root / "prompt.yaml")
    for stage in CONFIGS:
        rows = []
        for item in make_items(24, split=stage):
            winner = oracle_trace(item) if stage == "sft" else f"model_{item.better.lower()}"
            rows.append({"context_messages": render_pair(prompt, to_pair(item)), "winner": winner})
        write_rows(root / f"{stage}.jsonl", rows)
    fields = ("id", "question", "response_a", "response_b", "better")
    write_rows(root / "pairs.jsonl", [{k: getattr(i, k) for k in fields} for i in make_items(96, split="dev")])


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def command(root: Path, stage: str, out: Path, **changes: object) -> list[str]:
    """Returns the arguments of `rmr1` for a run of a stage, or of the judge, that writes to `out`."""
    if stage == "judge":
        files = ["--model", root / "model", "--input", root / "pairs.jsonl", "--prompt", root / "prompt.yaml"]
        limits = ["--dtype", "float32", "--max-new-tokens", "12", "--batch-size", "4"]
        return list(map(str, ["judge", *files, "--output", out / "verdicts.jsonl", *limits]))
    out.parent.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[stage] | {"model": f"{root}/model", "data": f"{root}/{stage}.jsonl", "out": str(out)} | changes
    path = root / f"{stage}-{hashlib.sha256(str(out).encode()).hexdigest()[:8]}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [stage, str(path)]


@dataclasses.dataclass
class Child:
    """A forked process that runs `work`; its output goes to `log`."""

    work: Callable[[], int]
    log: Path
    pid: int = 0
    code: int | None = None

    def start(self) -> Child:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                with self.log.open("ab") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                os.nice(1)
                code = self.work() or 0
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else 1
            except Exception:
                traceback.print_exc()  # not raised further: the frames above are the parent's
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        return self

    def send(self, number: signal.Signals) -> None:
        if self.alive():
            os.kill(self.pid, number)

    def alive(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def wait(self, seconds: float = 300) -> int:
        """Returns the exit code, negative for a signal; kills the process when the time is over."""
        for _ in pauses(seconds):
            if not self.alive():
                return self.code
        self.send(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"process {self.pid} was still running after {seconds:g} s; see {self.log}")


def rmr1(arguments: list[str], log: Path) -> Child:
    """Starts `rmr1 ARGUMENTS` in a process of its own."""
    return Child(lambda: cli.main(arguments), log).start()


def pauses(seconds: float, each: float = 0.005) -> Iterator[None]:
    """Yields every few milliseconds until the time is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield
        time.sleep(each)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def weights(run: Path) -> str:
    """The hash of a finished run's weights."""
    files = sorted((run / "model").glob("*.safetensors"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest() if files else "none"


def metrics(run: Path) -> list[dict]:
    """The metrics of every step, without timings."""
    timed = ("tokens_per_second", "mfu")
    rows = read_metrics(run)
    return [{k: v for k, v in row.items() if not k.endswith("seconds") and not k.startswith(timed)} for row in rows]


def differences(run: Path, reference: Path) -> list[str]:
    """Differences from an uninterrupted run: the weights bit for bit, the steps, and the metrics of each step."""
    found = [] if weights(run) == weights(reference) else ["the weights differ"]
    ours, theirs = metrics(run), metrics(reference)
    if [row["step"] for row in ours] != [row["step"] for row in theirs]:
        found.append(f"steps {[row['step'] for row in ours]}")
    found += [f"step {a['step']} differs" for a, b in zip(ours, theirs, strict=False) if a != b][:1]
    return found


def unsound(run: Path) -> list[str]:
    """Finished checkpoints that do not agree with their manifest."""
    wrong = []
    for step in steps_of(run / "checkpoints"):
        try:
            manifest.verify(run / "checkpoints" / str(step))
        except manifest.Damage as e:
            wrong.append(f"checkpoint {step}: {e}")
    return wrong
