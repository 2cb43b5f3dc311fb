"""The options that `rmr1 judge` and `rmr1 eval` share, and how they print counts. Next: `judge.py`, `eval.py`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmr1_jax.cli.endpoint import EndpointOptions
from rmr1_jax.cli.options import (
    AutoDtype,
    MaybeFloat,
    MaybeInt,
    MaybeText,
    TemplateArguments,
    template_arguments,
)
from rmr1_jax.errors import InputError

if TYPE_CHECKING:
    from rmr1_jax.judge.endpoint import EndpointJudge
    from rmr1_jax.judge.judge import Judge as PolicyJudge
    from rmr1_jax.judge.judgement import AnyJudge, JudgeSampling, Voting
    from rmr1_jax.judge.summary import Summary
    from rmr1_jax.prompts.prompt import Prompt


# The options that are refused for each kind of judge, because they have no effect on it, and the reason.
_ENDPOINT_ONLY = tuple(field.name for field in dataclasses.fields(EndpointOptions))
_WITHOUT_EFFECT = {
    "policy": (_ENDPOINT_ONLY, "is for a model behind an endpoint; give --judge endpoint, or leave it out"),
    "scalar": (
        (*_ENDPOINT_ONLY, "top_p", "top_k", "min_p", "generation_config", "slots"),
        "has no effect, because --judge scalar samples no text; leave it out",
    ),
    "endpoint": (
        ("tensor", "slots", "max_prompt_tokens", "generation_config", "profile"),
        "has no effect, because --judge endpoint loads no model here; leave it out",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """How a policy judges."""

    model: str
    """The model: a Hugging Face directory (such as RUN/model), a hub id, or the model's name at the endpoint."""
    prompt: MaybeText = None
    """The prompt: cor, reasoning, compare, rubric, or a prompt file. `rmr1 data prompt` makes the file for a published
    checkpoint. Defaults to prompt.yaml in the model's directory, which training writes, or to cor if there is none."""
    votes: int = 1
    """Number of texts for each pair and order. The majority of the valid verdicts wins."""
    both_orders: bool = False
    """Compare (A, B) and (B, A). If the two orders disagree, the pair is a tie."""
    temperature: MaybeFloat = None
    """Sampling temperature. Defaults to 0 (greedy) for one vote and to 1 for several."""
    top_p: MaybeFloat = None
    """Draw only from the smallest set of tokens whose probability reaches this. Defaults to 1 (all tokens)."""
    top_k: MaybeInt = None
    """Draw only from this many of the most probable tokens. Defaults to 0 (all tokens)."""
    min_p: MaybeFloat = None
    """Draw only tokens with at least this share of the most probable token's probability. Defaults to 0 (all
    tokens)."""
    generation_config: bool = False
    """Take the temperature, top-p, top-k and min-p that are not given from the model's generation_config.json."""
    chat_template_kwargs: TemplateArguments = None
    """Arguments for the model's chat template, as JSON, such as '{"enable_thinking": false}' for Qwen3. Give those that
    the model was trained with."""
    max_new_tokens: MaybeInt = None
    """Maximum length of a text in tokens. Defaults to 8192, or to half of the model's positions if that is less."""
    max_prompt_tokens: MaybeInt = None
    """Maximum length of a prompt in tokens. Pairs with a longer one are not judged and get the status too_long.
    Defaults to the positions that --max-new-tokens leaves."""
    seed: int = 0
    """Random seed of the sampling."""
    batch_size: MaybeInt = None
    """Number of pairs that are judged at a time, by all processes together. A run that was killed judges its last batch
    again, so that it gives the same texts to the last bit; at the end of a batch the devices wait for its longest text.
    Defaults to four times --slots of all processes, at most 1024; to 1024 for an endpoint, which repeats no pair."""
    dtype: AutoDtype = "auto"
    """Data type of the model's matrix products. auto is float32 on a CPU, where it is faster, and bfloat16 elsewhere;
    rows that were made with another one are continued with that. A model behind an endpoint has its own."""
    tensor: MaybeInt = None
    """Number of devices that share one copy of the weights; the devices of a process hold as many copies as fit.
    Defaults to the smallest number with which the weights take at most half of each device's memory."""
    slots: MaybeInt = None
    """Maximum number of texts that are sampled at once, in each process. Lower it if memory runs out. Defaults to 64
    for each copy of the weights."""

    def voting(self) -> Voting:
        from rmr1_jax.judge.judgement import Voting

        return Voting(votes=self.votes, both_orders=self.both_orders, seed=self.seed)

    def sampling(self, directory: Path | None = None) -> JudgeSampling:
        """How texts are sampled, checked against the voting. directory: the model's, for --generation-config."""
        from rmr1_jax.config import build_config
        from rmr1_jax.judge.judgement import JudgeSampling

        options = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        given = {name: value for name, value in options.items() if value is not None}
        if given.get("top_k") == 0:
            given["top_k"] = None
        # At a temperature of 0 nothing is drawn, and the model's other values would be refused.
        if self.generation_config and given.get("temperature") != 0:
            from rmr1_jax.sampler.generation_config import recommended_sampling

            given = recommended_sampling(directory) | given
        found = build_config(JudgeSampling, given, source="sampling options")
        found.settled(self.voting())
        return found

    def model_name(self) -> str:
        """The name of the model's directory, or of its repository on the hub."""
        path = Path(self.model)
        return path.resolve().name if path.is_dir() else self.model.rsplit("/", 1)[-1]

    def load_judge(self, output: Path | None, **options: Any) -> PolicyJudge:
        """Load the policy, to judge into the file `output`; `options` are more arguments of `Judge`."""
        from rmr1_jax.distributed.terminal import say, waiting

        with waiting(f"loading {self.model}"):
            from rmr1_jax.judge.judge import Judge
            from rmr1_jax.policy import load, model_directory

            # Before the weights, so that a mistake in these shows at once.
            directory, earlier = model_directory(self.model), earlier_settings(output)
            prompt, why = self.settled_prompt(directory, earlier)
            sampling = dataclasses.asdict(self.sampling(directory))
            lengths = {"max_new_tokens": self.max_new_tokens, "max_prompt_tokens": self.max_prompt_tokens}
            arguments = template_arguments(self.chat_template_kwargs)
            dtype = self.settled_dtype(earlier)
            policy = load(directory, dtype, tensor=self.tensor, chat_template_kwargs=arguments)
        if why:
            say(f"prompt: {why}")
        return Judge(policy, prompt, slots=self.slots, **sampling, **lengths, **options)

    def settled_prompt(self, directory: Path, earlier: Mapping[str, Any]) -> tuple[Prompt, str]:
        """The prompt that is given, and ""; otherwise the model's own or "cor", and a line that says which. Rows that
        were made with "cor" before the model had a prompt of its own are continued with it."""
        from rmr1_jax.prompts.prompt import PROMPT_FILE, get_prompt

        if self.prompt is not None:
            return get_prompt(self.prompt), ""
        own, cor = directory / PROMPT_FILE, get_prompt("cor")
        if not own.is_file():
            return cor, f"cor; the model has no {PROMPT_FILE} (--prompt gives another)"
        if earlier.get("prompt") == cor.identity:
            return cor, "cor, as in the rows that are continued"
        return get_prompt(own), f"{own}, the model's own (--prompt gives another)"

    def settled_dtype(self, earlier: Mapping[str, Any]) -> str:
        """The data type that is given, or that of the rows that are continued."""
        return earlier.get("dtype", "auto") if self.dtype == "auto" else self.dtype

    @staticmethod
    def print_stats(judge: Any) -> None:
        """Print how many texts all processes sampled and how fast, if the judge samples (a collective)."""
        from rmr1_jax.distributed.exchange import first

        policy = getattr(judge, "policy", None)
        text = "" if policy is None else policy.stats_text()
        if text and first():
            print(text, file=sys.stderr)

    def pairs_at_a_time(self, judge: AnyJudge) -> int:
        """The batch size that is given, or the default for `judge`."""
        from rmr1_jax.distributed.exchange import this_process

        slots = getattr(judge, "slots", None)
        default = min(1024, 4 * slots * this_process()[1]) if slots else 1024
        return default if self.batch_size is None else self.batch_size

    def identity(self, directory: Path, dtype: str) -> dict[str, Any]:
        """A digest that identifies the model in a directory, and the data type that it computes in."""
        from rmr1_jax.files.append import model_digest

        return {"model": f"{self.model_name()} (sha256 {model_digest(directory)})", "dtype": dtype}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyJudgeOptions(EndpointOptions, JudgeOptions):
    """How a policy or a model behind an endpoint judges."""

    judge: str = "policy"

    def check_options(self) -> None:
        """Raise InputError for the first option that has no effect on the kind of judge that was asked for."""
        names, reason = _WITHOUT_EFFECT[self.judge]
        for field in dataclasses.fields(self):
            if field.name in names and getattr(self, field.name) != field.default:
                raise InputError(f"--{field.name.replace('_', '-')} {reason}")

    def load_endpoint_judge(self, **options: Any) -> EndpointJudge:
        """The judge behind the endpoint; `options` are more arguments of `EndpointJudge`."""
        from rmr1_jax.judge.endpoint import EndpointJudge
        from rmr1_jax.sampler.sample import LONGEST

        arguments, sampling = template_arguments(self.chat_template_kwargs), self.sampling()
        extra = {"chat_template_kwargs": arguments} if arguments else {}
        endpoint = self.endpoint(self.model, self.max_new_tokens or LONGEST, extra)
        options |= {"temperature": sampling.temperature, "truncation": sampling}
        return EndpointJudge(endpoint, self.prompt or "cor", **options)


def earlier_settings(output: Path | None) -> dict[str, Any]:
    """The settings of the rows that a file holds; empty if it holds none."""
    from rmr1_jax.eval.logs import settings_of

    return settings_of(output) if output and output.is_file() and output.stat().st_size else {}


def print_summary(summary: Summary, settings: Mapping[str, Any]) -> None:
    """Print the counts, what helps where there is no verdict, and a warning if there is no verdict at all."""
    print("\n  ".join([str(summary), *summary.remedies(settings)]))
    if summary.warning:
        print(summary.warning, file=sys.stderr)
