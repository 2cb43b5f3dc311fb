"""Synthetic data with the benchmarks' full counts, in their own formats."""

import json

from rmr1_jax.eval.rewardbench import SECTIONS


def made_data(benchmark, path, times=1, words=200):
    """Write synthetic rows with `times` the full counts of a benchmark; returns their path."""

    def text(*name):
        return " ".join(f"{'-'.join(map(str, name))}.{k}" for k in range(words))

    def message(role, content):
        return {"role": role, "content": content}

    if benchmark == "rewardbench":
        sizes = {s: 447 if s == "math-prm" else n for own in SECTIONS.values() for s, n in own.items()}
        rows = (
            {"prompt": text(s, k), "chosen": text(s, k, "c"), "rejected": text(s, k, "r"), "subset": s, "id": k}
            for s, n in sizes.items()
            for k in range(times * n)
        )
        return write_rows(path / "filtered.jsonl", rows)
    if benchmark == "rm-bench":
        sizes = {"chat": 129, "math": 529, "code": 228, "safety-refuse": 284, "safety-response": 157}
        rows = (
            {
                "id": f"{domain}/{k}",
                "prompt": text(domain, k),
                "chosen": [text(domain, k, "c", style) for style in range(3)],
                "rejected": [text(domain, k, "r", style) for style in range(3)],
                "domain": domain,
            }
            for domain, n in sizes.items()
            for k in range(times * n)
        )
        return write_rows(path / "rm_bench.jsonl", rows)

    def answered(*name):
        return {"llm_name": "m", "answer": text(*name)}

    def pairs(goal, n):
        category = f"Pairwise_set/{goal}/made"
        for k in range(times * n):
            asked = {"pair_uid": str(k), "conversation_input": [message("user", text(goal, k))]}
            yield {**asked, "chosen": answered("c"), "reject": answered("r", k), "category_path": category}

    def best_of(goal, items, comparisons):
        for k in range(times * items):
            losers = 3 if k % items < comparisons - 2 * items else 2
            turns = [message("user", text(goal, k)), message("assistant", "so"), message("user", "and?")]
            asked = {"bon_uid": str(k), "conversation_input": turns if k % 3 == 0 else turns[:1]}
            found = {"bon_best": answered("b", k), "loser_list": [answered("l", k, j) for j in range(losers)]}
            yield {**asked, **found, "category_path": f"BoN_set/{goal}/made"}

    sets = {
        "Pairwise_set/Helpfulness": pairs("Helpfulness", 10067),
        "Pairwise_set/Harmlessness": pairs("Harmlessness", 7064),
        "BoN_set/Helpfulness": best_of("Helpfulness", 2109, 4854),
        "BoN_set/Harmlessness": best_of("Harmlessness", 1677, 3860),
    }
    for name, rows in sets.items():
        write_rows(path / name / "made.jsonl", rows)
    return path


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path
