"""An evaluation in a process of its own, to be killed or measured: `eval_worker.py BENCHMARK DATA OUT [OPTIONS]`.

The judge is scripted and needs no JAX: verdicts follow from a pair's id, and pairs are finished out of order. Or it is
the model in a directory, with the small world's prompt. Prints the process's peak memory in MiB.
"""

import dataclasses
import hashlib
import itertools
import random
import resource
import sys
import time
from pathlib import Path

from rmr1_jax.eval.evaluate import NamedJudge, evaluate, load
from rmr1_jax.judge.judgement import Text, Voting, judgement_of, known_tie


class ScriptedJudge:
    """Right three times in four, without a verdict once in sixteen; `seconds` for each judgement."""

    whole_batches = False

    def __init__(self, seconds: float = 0.0, rule: str = "eval"):
        self.seconds, self.rule, self.asked = seconds, rule, 0

    def stream(self, pairs, voting):
        order = list(enumerate(pairs))
        random.Random(f"{voting.seed}{pairs[0].id}").shuffle(order)
        for number, pair in order:
            self.asked += 1
            time.sleep(self.seconds)
            if found := known_tie(pair):
                yield number, found
                continue
            texts = [
                [self.text(shown, f"{voting.seed}/{order}/{vote}") for vote in range(voting.votes)]
                for order, shown in enumerate(voting.shown(pair))
            ]
            yield number, judgement_of([[Text(text, len(text) // 4) for text in own] for own in texts], self.rule)

    def text(self, pair, name):
        draw = hashlib.sha256(f"{pair.id}/{name}".encode()).digest()[0]
        verdict = "none" if draw % 16 == 0 else pair.better if draw % 4 else {"A": "B", "B": "A"}[pair.better]
        kind = ("Chat", "Reasoning")[draw // 16 % 2]
        return f"<type>{kind}</type>\n<eval>{'so it is. ' * (draw % 50)}</eval>\n<answer>[[{verdict}]]</answer>"

    def settings(self, voting):
        return {"rule": self.rule, **dataclasses.asdict(voting)}


def run_benchmark(benchmark, judge, data, out, *, name="scripted", limit=None, batch_size=1024, **voting):
    """`evaluate` on the data in a file or folder."""
    pairs, judge = load(benchmark, data, limit), NamedJudge(judge=judge, name=name)
    return evaluate(benchmark, judge, pairs, out, Voting(**voting), batch_size=batch_size)


def main(benchmark: str, data: str, out: str, seconds: str = "0", batch_size: str = "64", model: str = "") -> None:
    judge = model_judge(model, float(seconds)) if model else ScriptedJudge(float(seconds))
    run_benchmark(benchmark, judge, Path(data), Path(out), batch_size=int(batch_size))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def model_judge(model: str, seconds: float):
    from rmr1_jax.judge.judge import Judge
    from rmr1_jax.policy import load
    from rmr1_jax.quickstart.world import world_prompt

    class SlowJudge(Judge):
        def stream(self, *args):
            for found in super().stream(*args):
                time.sleep(seconds)
                yield found

    return SlowJudge(load(model, "float32"), world_prompt(), rule="eval", max_new_tokens=24, slots=4)


if __name__ == "__main__":
    main(*itertools.islice(sys.argv, 1, None))
