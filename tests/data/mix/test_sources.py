"""Evaluation sets are told from training sets by the values in their rows, never by the names of the fields."""

import pytest
from mixtures import code, error_of, made, math_step, own, said, simple, skywork

TEXTS = {"prompt": "q", "chosen": "x", "rejected": "y"}
MESSAGES = {name: said(text) for name, text in TEXTS.items()} | {"chosen": said("q", "x"), "rejected": said("q", "y")}
THREE = {"prompt": "q", "chosen": ["x"] * 3, "rejected": ["y"] * 3}
ONE = {"prompt": "q", "chosen": ["x"], "rejected": ["y", "z", "w"], "num_correct": 1, "num_incorrect": 3}
RMB = {"conversation_input": said("q"), "category_path": "Pairwise_set/Harmlessness/S1", "pair_uid": 1}
RMB |= {"chosen": {"llm_name": "m", "answer": "x"}, "reject": {"llm_name": "n", "answer": "y"}}
EVALUATION_SETS = [
    ("rewardbench", {**TEXTS, "subset": "hep-cpp", "id": 4020}),
    ("rewardbench", {**TEXTS, "Subset": "hep-cpp"}),  # whatever the field is called
    ("rewardbench", {**MESSAGES, "source": "llmbar-natural"}),
    ("rewardbench-2", {**ONE, "subset": "Precise IF", "id": "7"}),
    ("rewardbench-2", {**ONE, "chosen": ["x", "z"], "num_correct": 2, "part": "Ties"}),
    ("rm-bench", {**THREE, "id": "safety-response/3155", "domain": "safety-response"}),
    ("rm-bench", {**THREE, "domain": "chat", "name": "chat/8"}),
    ("rmb", RMB),
]
TRAINING_SETS = [
    TEXTS,
    {**TEXTS, "id": 1},
    {**TEXTS, "id": 1, "subset": "my chats"},
    {**TEXTS, "id": "math/12", "domain": "math", "subset": "Math"},
    {**MESSAGES, "id": 1, "subset": "train", "domain": "chat"},
    {"chosen": MESSAGES["chosen"], "rejected": MESSAGES["rejected"], "id": 1, "subset": "s", "domain": "code"},
    {**ONE, "id": 1, "subset": "Algebra"},
    {**TEXTS, "chosen": ["x"], "rejected": ["y", "z", "w"], "id": 1, "subset": "Math"},
    {**THREE, "id": 1, "domain": "law"},
    skywork(1),
    code(1),
    math_step(1),
    own(1, category_path="news", subset="Safety"),
]


@pytest.mark.parametrize(("name", "row"), EVALUATION_SETS)
def test_an_evaluation_set_is_told_from_its_values(tmp_path, name, row):
    message = error_of(made, simple(tmp_path, [row]), tmp_path)
    assert f"is an evaluation set: 1 of 1 rows have values of {name} (" in message
    assert "it belongs in overlap.benchmarks" in message


@pytest.mark.parametrize("row", TRAINING_SETS)
def test_a_training_set_is_not_called_an_evaluation_set_for_its_fields(tmp_path, row):
    report, pairs, _ = made(simple(tmp_path, [row]), tmp_path)
    assert report.sources[0].kept == len(pairs) >= 1 and not report.sources[0].notes
    assert all(pair.id.startswith("own/") and "benchmark" not in pair.meta for pair in pairs)


def test_a_few_rows_of_a_benchmark_are_noted(tmp_path):
    rows = [{**TEXTS, "prompt": f"q{k}", "subset": "hep-go" if k < 2 else "other", "id": k} for k in range(5)]
    report, pairs, _ = made(simple(tmp_path, rows), tmp_path)
    assert len(pairs) == 5
    assert report.table().splitlines()[-1] == "own: 2 rows have values of rewardbench, an evaluation set"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("rewardbench/filtered_sample.jsonl", "114 of 114 rows have values of rewardbench"),
        ("rm_bench/dataset_sample.json", "200 of 200 rows have values of rm-bench"),
        ("rmb/Pairwise_set", "135 of 135 rows have values of rmb"),
        ("rmb/BoN_set", "31 of 31 rows have values of rmb"),
    ],
)
def test_published_evaluation_sets_are_refused(shared_data, tmp_path, path, words):
    tree = {"out": str(tmp_path / "out"), "sources": [{"path": str(shared_data / path)}]}
    assert words in error_of(made, tree, tmp_path)
