"""An evaluation in a process of its own, to be killed or weighed: `eval_worker.py BENCHMARK DATA OUT [OPTIONS]`.

The judge is scripted and needs no JAX: verdicts follow from a pair's id, and pairs are finished out of order. Or it is
the model in a directory, with the small world's prompt. Prints the process's peak memory in MiB.
"""

import hashlib
import itertools
import random
import resource
import sys
import time
from pathlib import Path

from rmr1_jax.eval.evaluate import evaluate
from rmr1_jax.judge.judgement import judgement_of, nothing_to_judge


class ScriptedJudge:
    """Right three times in four, without a verdict once in sixteen; `seconds` for each judgement."""

    whole_batches = False

    def __init__(self, seconds: float = 0.0, rule: str = "eval"):
        self.seconds, self.rule, self.asked = seconds, rule, 0

    def stream(self, pairs, votes=1, both_orders=False, seed=0):
        order = list(enumerate(pairs))
        random.Random(f"{seed}{pairs[0].id}").shuffle(order)
        for number, pair in order:
            self.asked += 1
            time.sleep(self.seconds)
            if known := nothing_to_judge(pair):
                yield number, known
                continue
            shown = (pair, pair.swapped())[: 2 if both_orders else 1]
            texts = [
                [self.text(side, f"{seed}/{order}/{vote}") for vote in range(votes)] for order, side in enumerate(shown)
            ]
            yield number, judgement_of(texts, [[len(text) // 4 for text in own] for own in texts], self.rule)

    def text(self, pair, name):
        draw = hashlib.sha256(f"{pair.id}/{name}".encode()).digest()[0]
        verdict = "none" if draw % 16 == 0 else pair.better if draw % 4 else {"A": "B", "B": "A"}[pair.better]
        kind = ("Chat", "Reasoning")[draw // 16 % 2]
        return f"<type>{kind}</type>\n<eval>{'so it is. ' * (draw % 50)}</eval>\n<answer>[[{verdict}]]</answer>"

    def settings(self, votes=1, both_orders=False, seed=0):
        return {"rule": self.rule, "votes": votes, "both_orders": both_orders, "seed": seed}


def main(benchmark: str, data: str, out: str, seconds: str = "0", batch_size: str = "64", model: str = "") -> None:
    judge = model_judge(model, float(seconds)) if model else ScriptedJudge(float(seconds))
    evaluate(benchmark, judge, Path(data), Path(out), name="scripted", batch_size=int(batch_size))
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
