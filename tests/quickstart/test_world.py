"""The small world: splits are disjoint, items balanced, responses checkable from the question alone, texts short."""

import re
from collections import Counter, defaultdict

import pytest
from scipy.stats import binomtest
from transformers import AutoTokenizer

from rmr1_jax.errors import InputError
from rmr1_jax.pairs.pair import render_pair
from rmr1_jax.prompts.trace import parse_trace
from rmr1_jax.prompts.verdict import eval_verdict, strict_verdict, training_reward
from rmr1_jax.quickstart import quickstart, world
from rmr1_jax.quickstart.cases import DAYS, ITEMS, LETTERS, MANNERS, NAMES
from rmr1_jax.quickstart.tokenizer import DELIMITERS, SPECIAL, TAGS, train_tokenizer
from rmr1_jax.quickstart.world import (
    CONFIDENT,
    SPLITS,
    UNSURE,
    make_items,
    oracle_trace,
    teacher_trace,
    to_pair,
    world_prompt,
    world_texts,
)

N = 4000


@pytest.fixture(scope="module")
def items():
    return make_items(N, split="sft", seed=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(train_tokenizer(world_texts(), tmp_path_factory.mktemp("tok")))


# An independent checker. It reads the question and a response as a person would and ignores the item's other fields.
# The patterns match whole texts, so a question or a response contains nothing else.

TASK = r"(?:(Reverse|Rotate|Swap) ([a-z] [a-z] [a-z])|(Increase) (\d \d \d))\."
ASK = r"Ask (\w+) for the (\w+) by (\w+): (\w+), (\w+), (\w+)"
ANSWER = r"(\w+)! It is (\w \w \w)\."
MESSAGE = r"(\w+)! Hi (\w+), send the (\w+) by (\w+) (\w+)\."


def content(question: str) -> tuple:
    """The content of a question, regardless of the order of its parts."""
    if message := re.fullmatch(ASK, question):
        return (*message.groups()[:3], frozenset(message.groups()[3:]))
    return parts(question)


def parts(question: str) -> tuple[str, str]:
    """The verb of a Reasoning question, and the letters or digits that it is about."""
    verb, row = filter(None, re.fullmatch(TASK, question).groups())
    return verb, row


def compared(question: str, response: str) -> list[tuple[str, str]]:
    """(wanted, said by the response): character by character, or quality by quality in the order of the question."""
    if message := re.fullmatch(ASK, question):
        wanted = dict(zip(("name", "item", "day"), message.groups()[:3], strict=True)) | {"polite": "please"}
        said = dict(zip(("name", "item", "day", "polite"), re.fullmatch(MESSAGE, response).groups()[1:], strict=True))
        return [(wanted[quality], said[quality]) for quality in message.groups()[3:]]
    return list(zip(worked(question)[1], re.fullmatch(ANSWER, response)[2].split(), strict=True))


def is_right(question: str, response: str) -> bool:
    return all(wanted == said for wanted, said in compared(question, response))


def worked(question: str) -> tuple[list[str], list[str]]:
    """The letters or digits of a Reasoning question, and its right answer."""
    verb, row = parts(question)
    x, y, z = given = row.split()
    if verb == "Increase":
        return given, [digit.translate(str.maketrans("0123456789", "1234567890")) for digit in given]
    return given, {"Reverse": [z, y, x], "Rotate": [y, z, x], "Swap": [y, x, z]}[verb]


def opening(response: str) -> str:
    return response[: response.index("! ") + 2]


def response(item, side: str) -> str:
    return item.response_a if side == "A" else item.response_b


def pair(item) -> tuple[str, str, str]:
    """The question, the better answer and the worse one, without their openings."""
    both = [response(item, side) for side in (item.better, other(item.better))]
    return item.question, *(text.removeprefix(opening(text)) for text in both)


def confident(item, side: str) -> bool:
    return opening(response(item, side)) in CONFIDENT


def other(side: str) -> str:
    return "B" if side == "A" else "A"


def verdict(trace: str) -> str:
    return re.search(r"<answer>\[\[([AB])\]\]</answer>$", trace)[1]


def assert_fair(wins: int, n: int) -> None:
    assert n > 100 and binomtest(wins, n).pvalue > 1e-3, (wins, n)


# Splits


def test_no_question_is_in_two_splits_and_no_pair_twice_in_one():
    seen = {}
    for split in SPLITS:
        for seed in (0, 1):
            items = make_items(2000, split=split, seed=seed)
            assert len({pair(item) for item in items}) == len(items)
            for item in items:
                assert seen.setdefault(content(item.question), split) == split


@pytest.mark.parametrize("kind", ["reasoning", "chat"])
def test_there_are_enough_pairs(kind):
    items = make_items(8000, split="sft", kinds=(kind,))  # somewhat more of a kind than the quickstart uses
    assert {item.kind for item in items} == {kind} and len({pair(item) for item in items}) == 8000


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_split_is_large_enough_for_the_quickstart(seed):
    counts = {"sft": quickstart.SFT_ITEMS, "grpo": quickstart.GRPO_ITEMS, "test": quickstart.TEST_ITEMS}
    questions = {"sft": 6500, "grpo": 1650, "test": 750}  # approximate numbers, stated in the README
    owner = {}
    for split, n in counts.items():
        items = make_items(n, split=split, seed=seed)
        assert len({pair(item) for item in items}) == len(items) == n
        assert {owner.setdefault(content(item.question), split) for item in items} == {split}
        assert list(owner.values()).count(split) == pytest.approx(questions[split], rel=0.03)
        cells = Counter((item.kind, item.better, confident(item, "A"), confident(item, "B")) for item in items)
        assert len(cells) == 16 and set(cells.values()) == {n // 16}


def test_questions_repeat_but_not_often():
    """With too many repetitions in the SFT data, a small policy memorizes the questions."""
    items = make_items(quickstart.SFT_ITEMS, split="sft")
    for kind in ("reasoning", "chat"):
        times = Counter(content(item.question) for item in items if item.kind == kind)
        assert 2 <= times.total() / len(times) <= 2.5  # on average
        assert max(times.values()) <= (6 if kind == "reasoning" else 12)  # three digits have six slips


def test_a_split_without_enough_questions_says_so(monkeypatch):
    with pytest.raises(InputError, match="expected one of sft, grpo, dev, test"):
        make_items(8, split="train")
    with pytest.raises(InputError, match="expected some of"):
        make_items(8, split="sft", kinds=("poetry",))
    monkeypatch.setattr(world, "SPLITS", {"sft": 0.999, "test": 0.001})
    with pytest.raises(InputError, match=r"no unused pair of this task.*ask for fewer"):
        make_items(200, split="test", kinds=("reasoning",))


def test_items_and_traces_depend_on_the_seed_alone(items):
    assert make_items(N, split="sft", seed=0) == items
    assert make_items(N, split="sft", seed=1) != items
    assert [teacher_trace(i, seed=3) for i in items[:200]] == [teacher_trace(i, seed=3) for i in items[:200]]
    assert [teacher_trace(i, seed=3) for i in items[:200]] != [teacher_trace(i, seed=4) for i in items[:200]]
    assert len({i.id for i in items}) == N


# Correctness, and that only the content reveals it


def test_exactly_the_better_response_is_right(items):
    for item in items:
        assert is_right(item.question, item.response_a) == (item.better == "A"), item
        assert is_right(item.question, item.response_b) == (item.better == "B"), item


def test_the_worse_response_has_one_plausible_mistake(items):
    for item in items:
        pairs = compared(item.question, response(item, other(item.better)))
        wrong = [(wanted, said) for wanted, said in pairs if wanted != said]
        if item.kind == "chat":  # it misses the quality that the item is about, and nothing else that was asked
            at = re.fullmatch(ASK, item.question).groups()[3:].index(item.task)
            assert wrong == [pairs[at]]
        elif item.task == "increase":  # one digit is one off, modulo 10
            assert [(int(wanted) - int(said)) % 10 for wanted, said in wrong] in ([1], [9])
        else:  # the same letters in another order
            assert {wanted for wanted, _ in wrong} == {said for _, said in wrong}


@pytest.mark.parametrize("split", SPLITS)
def test_sides_kinds_and_openings_are_balanced_exactly(split):
    count = Counter()
    for item in make_items(1600, split=split, seed=5):
        count[item.kind, item.better, confident(item, item.better), confident(item, other(item.better))] += 1
    assert set(count.values()) == {100} and len(count) == 16


def test_tempted_means_that_only_the_worse_response_is_confident(items):
    for item in items:
        assert item.tempted == (confident(item, other(item.better)) and not confident(item, item.better))
    assert sum(item.tempted for item in items) == N // 4


@pytest.mark.parametrize("kind", ["reasoning", "chat"])
def test_surface_features_do_not_reveal_the_better_response(items, kind):
    rules = {opening: lambda text, opening=opening: text.startswith(opening) for opening in CONFIDENT + UNSURE}
    rules |= {"confident": lambda text: text.startswith(CONFIDENT), "characters": len}
    if kind == "reasoning":  # nor does the answer itself, without the question
        rules["order"] = lambda text: text.removeprefix(opening(text))
    for rule in rules.values():
        differs = [
            (rule(i.response_a) > rule(i.response_b)) == (i.better == "A")
            for i in items
            if i.kind == kind and rule(i.response_a) != rule(i.response_b)
        ]
        assert_fair(sum(differs), len(differs))


def test_length_reveals_nothing(items, tokenizer):
    """Both responses of an item have equally many tokens, and every opening is two tokens."""
    for item in items:
        a, b = (tokenizer(text)["input_ids"] for text in (item.response_a, item.response_b))
        assert len(a) == len(b), item
        for text, ids in ((item.response_a, a), (item.response_b, b)):
            assert opening(text) in CONFIDENT + UNSURE
            assert tokenizer.decode(ids[:2]) + " " == opening(text)


def test_sides_and_openings_do_not_depend_on_the_task(items):
    tasks = Counter(item.task for item in items)
    assert set(tasks) == {"reverse", "rotate", "swap", "increase", "name", "item", "day", "polite"}
    for task, n in tasks.items():
        of_task = [item for item in items if item.task == task]
        assert n == N // 8
        assert_fair(sum(item.better == "A" for item in of_task), n)
        for better in (True, False):
            assert_fair(sum(confident(i, i.better if better else other(i.better)) for i in of_task), n)


# Traces


def test_the_oracle_is_always_right_and_the_teacher_only_errs_where_tempted():
    items = make_items(8000, split="sft", seed=2)
    wrong = Counter()
    for item in items:
        better = "A" if is_right(item.question, item.response_a) else "B"
        assert verdict(oracle_trace(item)) == better
        trace = teacher_trace(item, seed=7)
        # It always evaluates correctly: its trace differs from the oracle's in the letter of the verdict alone.
        assert trace == oracle_trace(item).replace(f"[[{better}]]", f"[[{verdict(trace)}]]")
        wrong[item.tempted] += verdict(trace) != better
    assert wrong[False] == 0
    assert binomtest(wrong[True], 2000, 0.75).pvalue > 1e-3
    assert all(teacher_trace(i, bias=0.0) == oracle_trace(i) for i in items[:500])
    assert all((teacher_trace(i, bias=1.0) != oracle_trace(i)) == i.tempted for i in items[:500])


def test_every_check_is_true_and_the_verdict_follows_from_them(items):
    """Each yes or no follows from the words, each summary from the yes and no, the verdict from the summaries; and a
    summary ends with the opening word of its side."""
    for item in items:
        trace, value = oracle_trace(item), {}
        for side in "AB":
            pairs = compared(item.question, response(item, side))
            sounds = f" {opening(response(item, side))[:-2]}"
            agrees = [wanted == said for wanted, said in pairs]
            checks = [f" {wanted} {said} {'yes' if wanted == said else 'no'}" for wanted, said in pairs]
            quotes = re.findall(rf"<quote_{side}>([ \w]*)</quote_{side}>", trace)
            [summary] = re.findall(rf"<summary_{side}>([ \w]*)</summary_{side}>", trace)
            if item.kind == "reasoning":
                value[side] = int(all(agrees))
                assert quotes == ["".join(f" {said}" for _, said in pairs)]
                assert summary == "".join(checks) + (" right" if all(agrees) else " wrong") + sounds
            else:
                value[side] = sum(weight for weight, agree in zip((3, 2, 1), agrees, strict=True) if agree)
                assert quotes == [f" {said}" for _, said in pairs]
                assert re.findall(rf"</quote_{side}>( \w+ \w+ \w+)", trace) == checks
                assert summary == f" {value[side]}{sounds}"
        assert verdict(trace) == max(value, key=value.get) and value["A"] != value["B"]


def test_the_rubric_lists_the_requested_qualities_in_order(items):
    for item in (i for i in items if i.kind == "chat"):
        asked = re.fullmatch(ASK, item.question).groups()[3:]
        wanted = [word for word, _ in compared(item.question, item.response_a)]
        first, second, third = asked
        assert f"<rubric> {first} 3, {second} 2, {third} 1<justify> as asked</justify></rubric>" in oracle_trace(item)
        assert re.findall(r" (\w+)<quote_A>", oracle_trace(item)) == list(asked)
        assert item.rubric == tuple(zip(asked, wanted, strict=True))


def test_a_solution_has_three_steps_and_each_is_true(items):
    for item in (i for i in items if i.kind == "reasoning"):
        assert item.task == item.question.split()[0].lower()
        given, right = worked(item.question)
        steps, answer = re.search(r"<solution> (.*) gives (.*)</solution>", oracle_trace(item)).groups()
        assert steps.split(", ") == [f"{x} to {y}" for x, y in zip(given, right, strict=True)]
        assert answer.split() == right and len(right) == 3


def test_traces_parse_with_every_tag(items):
    for item in items[:400]:
        trace = oracle_trace(item)
        parsed = parse_trace(trace)
        assert (parsed.kind, parsed.verdict) == (item.kind, item.better)
        assert parsed.is_complete() and parsed.evaluation and parsed.quotes
        assert bool(parsed.solution) == (item.kind == "reasoning")
        assert bool(parsed.rubric) == bool(parsed.justify) == (item.kind == "chat")
        assert training_reward(trace, item.better) == 1.0 and training_reward(trace, other(item.better)) == -1.0
        assert eval_verdict(trace) == strict_verdict(trace) == item.better


# Tokens


def rendered(item, tokenizer) -> str:
    messages = world_prompt().render(item.question, item.response_a, item.response_b)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_prompts_and_traces_are_short_and_round_trip(items, tokenizer):
    assert len(tokenizer) <= quickstart.MODEL.vocab_size
    assert world_prompt().structure == "cor"
    for item in items[:1000]:
        text = rendered(item, tokenizer)
        ids, trace_ids = tokenizer(text)["input_ids"], tokenizer(oracle_trace(item))["input_ids"]
        assert len(ids) <= quickstart.GRPO.max_prompt_length and len(trace_ids) + 1 <= quickstart.MAX_TRACE
        assert tokenizer.decode(ids) == text and tokenizer.decode(trace_ids) == oracle_trace(item)
        # The trace's tokens do not depend on the text before it.
        assert tokenizer(text + oracle_trace(item))["input_ids"] == ids + trace_ids


def test_all_prompts_and_all_traces_of_a_kind_have_one_layout(items, tokenizer):
    """Equally many tokens, tags and delimiters at the same positions: a policy can copy from fixed distances."""
    marks = {tokenizer.convert_tokens_to_ids(token) for token in (*SPECIAL, *DELIMITERS, *TAGS)}

    def layout(text: str) -> tuple:
        ids = tokenizer(text)["input_ids"]
        return len(ids), tuple((at, id) for at, id in enumerate(ids) if id in marks)

    layouts = defaultdict(set)
    for item in items:
        layouts[item.kind, "prompt"].add(layout(rendered(item, tokenizer)))
        layouts[item.kind, "trace"].add(layout(oracle_trace(item)))
    tokens = {what: [length for length, _ in found] for what, found in layouts.items()}
    assert tokens == {
        ("reasoning", "prompt"): [41],
        ("reasoning", "trace"): [61],
        ("chat", "prompt"): [57],
        ("chat", "trace"): [69],
    }


def test_any_text_round_trips(tokenizer):
    texts = ("Grüße, 世界! 🙂\n\n\t x  = 12.5;\n", "[The Start of Chatbot A's Response]", " <answer>[[A]]</answer>", "")
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_word_letter_digit_and_tag_is_one_token(items, tokenizer):
    texts = [text for i in items for text in (i.question, i.response_a, i.response_b)]
    words = {word for text in texts for word in re.findall(r"^\w+| [A-Za-z]+| \d", text)}
    words |= {word for item in items for word in re.findall(r" [A-Za-z]+| \d", oracle_trace(item))}
    lists = [*LETTERS, *"0123456789", *NAMES, *ITEMS, *DAYS, *MANNERS]
    openings = [text[:-2] for text in CONFIDENT + UNSURE]
    assert len(set(lists)) == 14 + 10 + 16 + 16 + 7 + 2  # no word in two lists
    assert words >= {*openings, *(f" {word}" for word in (*lists, *openings))}
    assert [word for word in words if len(tokenizer(word)["input_ids"]) != 1] == []
    for tag in ("<type>", "<solution>", "<quote_A>", "</quote_B>", "[Client Question]\n", "<|im_end|>"):
        assert len(tokenizer(tag)["input_ids"]) == 1


def test_the_saved_tokenizer_is_deterministic_and_has_its_special_tokens(tmp_path, tokenizer):
    texts = world_texts(400)
    first, second = (train_tokenizer(texts, tmp_path / name) for name in ("a", "b"))
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"


def test_an_item_becomes_a_pair_that_renders_the_same(items):
    prompt = world_prompt()
    for item in items[:200]:
        pair = to_pair(item)
        assert (pair.id, pair.better) == (item.id, item.better) and pair.single_turn
        assert render_pair(prompt, pair) == prompt.render(item.question, item.response_a, item.response_b)
