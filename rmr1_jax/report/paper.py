"""Holds the published results of RM-R1 (arXiv 2505.02387), typed in from its tables, for comparison with an evaluation.

For models other than RM-R1, only the benchmark's score is given here.

Read next: `evaluation.py`, which puts an evaluation's scores above these rows.
"""

from __future__ import annotations

from types import MappingProxyType

SOURCE = "RM-R1, arXiv 2505.02387"

SIZES = MappingProxyType({"rewardbench": 2985, "rm-bench": 11943, "rmb": 25845})  # pairs in the whole benchmark

# By benchmark: column -> its key in the published score files, which hold shares from 0 to 1.
COLUMNS = MappingProxyType(
    {
        "rewardbench": {
            "Score": "avg_Result_each_section",
            "Chat": "Chat",
            "Chat Hard": "Chat Hard",
            "Safety": "Safety",
            "Reasoning": "Reasoning",
        },
        "rm-bench": {
            "Score": "total_avg_acc",
            "Chat": "chat",
            "Math": "math",
            "Code": "code",
            "Safety": "safety",
            "Easy": "easy_acc",
            "Normal": "normal_acc",
            "Hard": "hard_acc",
        },
        "rmb": {
            "Score": "Accuracy Averaged from Four Sections",
            "Helpfulness, best of N": "BoN Helpfulness",
            "Helpfulness, pairs": "Pairwise Helpfulness",
            "Harmlessness, best of N": "BoN Harmlessness",
            "Harmlessness, pairs": "Pairwise Harmlessness",
        },
    }
)

# By benchmark: model -> percentages in the order of the columns; a short row holds the first ones only.
ROWS = MappingProxyType(
    {
        "rewardbench": {
            "RM-R1 Qwen-7B": (85.2, 94.1, 74.6, 85.2, 86.7),
            "RM-R1 Qwen-14B": (88.2, 93.6, 80.5, 86.9, 92.0),
            "RM-R1 Qwen-32B": (91.4, 95.3, 83.1, 91.9, 95.2),
            "RM-R1 DeepSeek-7B": (80.1, 88.9, 66.2, 78.4, 87.0),
            "RM-R1 DeepSeek-14B": (88.9, 91.3, 79.4, 89.3, 95.5),
            "RM-R1 DeepSeek-32B": (90.9, 95.3, 80.3, 91.1, 96.8),
            "INF-ORM-Llama3.1-70B": (95.1,),
            "Skywork-Critic-70B": (93.3,),
            "Skywork-Reward-Llama-8B": (92.5,),
            "Nemotron-4-340B-Reward": (92.0,),
            "GPT-4o-0806": (86.7,),
        },
        "rm-bench": {
            "RM-R1 Qwen-7B": (70.2, 66.6, 67.0, 54.6, 92.6, 79.2, 71.7, 59.7),
            "RM-R1 Qwen-14B": (76.1, 75.6, 75.4, 60.6, 93.6, 82.6, 77.5, 68.8),
            "RM-R1 Qwen-32B": (79.1, 75.3, 80.2, 66.8, 93.9, 86.3, 80.5, 70.4),
            "RM-R1 DeepSeek-7B": (72.4, 64.0, 83.9, 56.2, 85.3, 75.9, 73.1, 68.1),
            "RM-R1 DeepSeek-14B": (81.5, 71.8, 90.5, 69.5, 94.1, 86.2, 83.6, 74.4),
            "RM-R1 DeepSeek-32B": (83.9, 74.2, 91.8, 74.1, 95.4, 89.5, 85.4, 76.7),
            "GPT-4o-0806": (72.5,),
            "Skywork-Critic-70B": (71.9,),
            "INF-ORM-Llama3.1-70B": (70.9,),
            "Skywork-Reward-Llama-8B": (70.1,),
            "Nemotron-4-340B-Reward": (69.5,),
        },
        "rmb": {
            "RM-R1 Qwen-7B": (66.4, 54.3, 74.0, 60.8, 76.5),
            "RM-R1 Qwen-14B": (69.2, 59.4, 77.6, 62.0, 77.8),
            "RM-R1 Qwen-32B": (73.0, 63.6, 79.1, 68.2, 80.9),
            "RM-R1 DeepSeek-7B": (55.1, 45.1, 65.8, 42.9, 66.4),
            "RM-R1 DeepSeek-14B": (68.5, 59.3, 76.5, 61.3, 76.9),
            "RM-R1 DeepSeek-32B": (69.8, 62.0, 78.2, 61.8, 77.1),
            "GPT-4o-0806": (73.8,),
            "INF-ORM-Llama3.1-70B": (70.5,),
            "Nemotron-4-340B-Reward": (69.9,),
            "Skywork-Reward-Llama-8B": (69.3,),
            "Skywork-Critic-70B": (65.5,),
        },
    }
)
