"""The command that judges pairs, `rmr1 judge`, and the options that it shares with `rmr1 eval`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rmr1_jax.cli.endpoint import EndpointOptions
from rmr1_jax.cli.options import (
    Dtype,
    MaybeFloat,
    MaybeInt,
    MaybePath,
    TemplateArguments,
    all_processes,
    template_arguments,
)
from rmr1_jax.errors import InputError

if TYPE_CHECKING:
    from rmr1_jax.judge.endpoint import EndpointJudge
    from rmr1_jax.judge.judge import Judge as PolicyJudge
    from rmr1_jax.judge.judgement import JudgeSampling, Voting


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
    prompt: str = "cor"
    """The prompt: cor, reasoning, compare, rubric, or a prompt file. `rmr1 data prompt` makes the file for a published
    checkpoint."""
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
    batch_size: int = 1024
    """Number of pairs that are judged at a time, by all processes together. A run that was killed judges its last batch
    again."""
    dtype: Dtype = "bfloat16"
    """Data type of the model's matrix products; a model behind an endpoint has its own."""
    tensor: MaybeInt = None
    """Number of devices that share one copy of the weights; the devices of a process hold as many copies as fit.
    Defaults to the smallest number with which the weights take at most half of each device's memory."""
    slots: MaybeInt = None
    """Maximum number of texts that are sampled at once, in each process. Lower it if memory runs out. Defaults to 64
    for each copy of the weights."""

    def voting(self) -> Voting:
        from rmr1_jax.judge.judgement import Voting

        return Voting(votes=self.votes, both_orders=self.both_orders, seed=self.seed)

    def sampling(self) -> JudgeSampling:
        """How texts are sampled, checked against the voting. Needs the model's directory only where the options ask for
        its recommendation."""
        from rmr1_jax.config import build_config
        from rmr1_jax.judge.judgement import JudgeSampling

        options = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        given = {name: value for name, value in options.items() if value is not None}
        if given.get("top_k") == 0:
            given["top_k"] = None
        # At a temperature of 0 nothing is drawn, and the model's other values would be refused.
        if self.generation_config and given.get("temperature") != 0:
            from rmr1_jax.files.hub import locate
            from rmr1_jax.policy import MODEL_FILES
            from rmr1_jax.sampler.generation_config import recommended_sampling

            given = recommended_sampling(locate(self.model, kind="model", patterns=MODEL_FILES)) | given
        found = build_config(JudgeSampling, given, source="sampling options")
        found.settled(self.voting())
        return found

    def model_name(self) -> str:
        """The name of the model's directory, or of its repository on the hub."""
        path = Path(self.model)
        return path.resolve().name if path.is_dir() else self.model.rsplit("/", 1)[-1]

    def load_judge(self, **options: Any) -> PolicyJudge:
        """Load the policy; `options` are more arguments of `Judge`."""
        from rmr1_jax.judge.judge import Judge
        from rmr1_jax.policy import load
        from rmr1_jax.prompts.prompt import get_prompt

        # Before the weights, so that a mistake in these shows at once.
        prompt, sampling = get_prompt(self.prompt), dataclasses.asdict(self.sampling())
        lengths = {"max_new_tokens": self.max_new_tokens, "max_prompt_tokens": self.max_prompt_tokens}
        arguments = template_arguments(self.chat_template_kwargs)
        policy = load(self.model, self.dtype, tensor=self.tensor, chat_template_kwargs=arguments)
        return Judge(policy, prompt, slots=self.slots, **sampling, **lengths, **options)

    @staticmethod
    def print_stats(judge: Any) -> None:
        """Print how many texts all processes sampled and how fast, if the judge samples (a collective)."""
        from rmr1_jax.distributed.exchange import first

        policy = getattr(judge, "policy", None)
        text = "" if policy is None else policy.stats_text()
        if text and first():
            print(text, file=sys.stderr)

    def identity(self, directory: Path) -> dict[str, Any]:
        """A digest that identifies the model in a directory."""
        from rmr1_jax.files.append import model_digest

        return {"model": f"{self.model_name()} (sha256 {model_digest(directory)})", "dtype": self.dtype}


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
        return EndpointJudge(endpoint, self.prompt, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge(AnyJudgeOptions):
    """Judge a file of preference pairs. To continue a run that was killed, run the same command again."""

    judge: Literal["policy", "endpoint"] = "policy"
    """Kind of the model: a policy that writes traces, or a model behind an OpenAI-style endpoint."""
    input: Path
    """File of pairs: JSONL, JSON, Parquet or CSV, perhaps compressed with gzip, in our own format, in that of TRL,
    OpenRLHF, UltraFeedback, HelpSteer or OpenRubrics, or in that of a benchmark."""
    output: Path
    """JSONL file to write, with one row for each pair: id, winner, status, votes, text, and correct if the better
    answer is known."""
    rule: Literal["strict", "eval"] = "strict"
    """Rule that reads the verdict from a text. eval is the rule of the published evaluations."""
    seed: int = 0
    """Random seed of the sampling, and of the order in which chosen and rejected answers are shown."""
    rejects: MaybePath = None
    """JSONL file for rows that cannot be read, with the reasons. Without it, such a row is an error."""
    profile: MaybePath = None
    """Directory for a profile of the judging, for XProf or TensorBoard. Everything is recorded, compilation too, so
    give it a file of a few pairs."""

    def run(self) -> None:
        from rmr1_jax.distributed.profile import profiling
        from rmr1_jax.files.append import files_digest
        from rmr1_jax.judge.file import Output, judge_file
        from rmr1_jax.pairs.containers import source_files
        from rmr1_jax.pairs.read import read_pairs
        from rmr1_jax.pairs.rows import ReadReport

        self.check_options()
        reading = {"seed": self.seed, "rejects": self.rejects}
        report, voting = ReadReport(), self.voting()
        # All rows are read before the model is loaded, so that a bad row shows now and not after hours.
        total = sum(1 for _ in read_pairs(self.input, report=report, **reading))
        with all_processes(loads_model=self.judge != "endpoint") as first:
            if report.rejected and first:
                print(f"{report}: see {self.rejects}", file=sys.stderr)
            if self.judge == "endpoint":
                judge, identity = self.load_endpoint_judge(rule=self.rule), {}
            else:
                judge = self.load_judge(rule=self.rule)
                identity = self.identity(judge.policy.tokenizer.directory)
            data = f"{self.input.name} (sha256 {files_digest(source_files(self.input))})"
            output = Output(path=self.output, identity={**identity, "input": data})
            pairs = read_pairs(self.input, **reading)
            with profiling(self.profile):
                summary = judge_file(judge, pairs, output, voting, batch_size=self.batch_size, total=total)
            self.print_stats(judge)
            if first:
                print(f"{summary}\nwritten: {self.output}")
