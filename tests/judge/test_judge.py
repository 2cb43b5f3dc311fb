"""Tests of the judge: votes, both orders, pairs that are not judged; with a scripted policy and with a tiny one."""

import dataclasses

import pytest
from jax.errors import JaxRuntimeError
from policies import ScriptedPolicy, answer, prefers, says, tiny_policy

from rmr1_jax.errors import InputError, RunError
from rmr1_jax.judge.file import verdict_row
from rmr1_jax.judge.judge import Judge
from rmr1_jax.judge.judgement import Voting, settle
from rmr1_jax.pairs.pair import PreferencePair
from rmr1_jax.prompts.prompt import get_prompt, save_prompt
from rmr1_jax.quickstart.world import world_prompt


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["A"], ("A", "ok")),
        (["-"], (None, "invalid")),
        (["ABB"], ("B", "ok")),
        (["AB"], (None, "tie")),
        (["A--"], ("A", "ok")),  # an invalid vote is no vote
        (["AB-"], (None, "tie")),
        (["A", "A"], ("A", "ok")),
        (["A", "B"], (None, "tie")),
        (["AAA", "ABB"], (None, "tie")),  # four votes to two, but the orders disagree
        (["A", "-"], ("A", "ok")),
        (["-", "B"], ("B", "ok")),
        (["AB", "BB"], ("B", "ok")),
        (["AB", "BA"], (None, "tie")),
        (["AB", "--"], (None, "tie")),
        (["--", "--"], (None, "invalid")),
    ],
)
def test_settle(verdicts, expected):
    assert settle([[None if v == "-" else v for v in order] for order in verdicts]) == expected


def test_the_prompt_beside_the_model_is_the_default(tmp_path):
    policy = ScriptedPolicy(lambda prompt, number: "")
    assert Judge(policy).prompt.identity == get_prompt("cor").identity
    policy.directory = tmp_path
    save_prompt(world_prompt(), tmp_path / "prompt.yaml")
    assert Judge(policy).prompt.identity == world_prompt().identity != get_prompt("cor").identity
    assert Judge(policy, "compare").prompt.identity == get_prompt("compare").identity


def test_one_verdict():
    judgement = Judge(ScriptedPolicy(prefers("five"))).compare("2 + 3?", "six", "five")
    assert (judgement.winner, judgement.status, judgement.note) == ("B", "ok", None)
    assert judgement.text == answer("B")
    assert judgement.trace.evaluation == "because" and judgement.trace.verdict == "B"
    assert judgement.votes == {"A": 0, "B": 1, "invalid": 0}


def test_identical_answers_are_a_tie_at_once():
    policy = ScriptedPolicy(prefers("five"))
    judgement = Judge(policy).compare("2 + 3?", "five", " five\n", votes=3)
    assert (judgement.winner, judgement.status, judgement.note) == (None, "tie", "the two answers are the same")
    assert judgement.texts == () and judgement.votes == {"A": 0, "B": 0, "invalid": 0}
    pair = PreferencePair.from_answers("1", "2 + 3?", "five", "five", meta={"benchmark": "rewardbench"})
    [asked] = Judge(policy).compare_many([pair])  # as the published evaluations ask
    assert asked.texts and asked.note is None
    known = dataclasses.replace(pair, better="A", meta={})
    assert "correct" not in verdict_row(known, judgement)  # neither is better, whichever was called the chosen one
    assert verdict_row(dataclasses.replace(known, meta=pair.meta), asked)["correct"] is (asked.winner == "A")


def test_votes_show_a_text_of_the_majority():
    judgement = Judge(ScriptedPolicy(says("A-BB"))).compare("q", "x", "y", votes=4)
    assert (judgement.winner, judgement.status) == ("B", "ok")
    assert judgement.votes == {"A": 1, "B": 2, "invalid": 1}
    assert judgement.text == answer("B")


def test_invalid_and_tie_show_the_first_text():
    judge = Judge(ScriptedPolicy(says("-")))
    judgement = judge.compare("q", "x", "y")
    assert (judgement.winner, judgement.status, judgement.text) == (None, "invalid", "no idea")
    assert judgement.votes == {"A": 0, "B": 0, "invalid": 1}
    judgement = Judge(ScriptedPolicy(says("-AB"))).compare("q", "x", "y", votes=3)
    assert (judgement.winner, judgement.status, judgement.text) == (None, "tie", "no idea")


@pytest.mark.parametrize(("a", "b", "winner"), [("five", "six", "A"), ("six", "five", "B")])
def test_both_orders_agree_if_the_judge_reads_the_answers(a, b, winner):
    policy = ScriptedPolicy(prefers("five"))
    judgement = Judge(policy).compare("2 + 3?", a, b, both_orders=True)
    assert (judgement.winner, judgement.status, judgement.note) == (winner, "ok", None)
    assert judgement.votes == {"A": 0, "B": 0, "invalid": 0} | {winner: 2}
    assert judgement.text == answer(winner)  # the text saw the order that the caller gave
    first, second = (bytes(ids).decode() for ids in policy.calls[0][0])
    assert first.index(a) < first.index(b) and second.index(b) < second.index(a)


def test_both_orders_tie_if_the_judge_goes_by_position():
    judgement = Judge(ScriptedPolicy(says("A"))).compare("q", "x", "y", both_orders=True)
    assert (judgement.winner, judgement.status) == (None, "tie")
    assert judgement.votes == {"A": 1, "B": 1, "invalid": 0}


def test_a_text_from_the_other_order_says_so():
    def script(prompt, number):
        return answer("A") if prompt.index("worse") > prompt.index("better") else "no idea"

    judgement = Judge(ScriptedPolicy(script)).compare("q", "worse", "better", both_orders=True)
    assert (judgement.winner, judgement.status, judgement.text) == ("B", "ok", answer("A"))
    assert judgement.note == "the text saw the two answers in the other order"


def test_several_votes_are_sampled_and_one_is_greedy():
    policy = ScriptedPolicy(says("AAA"))
    judge = Judge(policy, max_new_tokens=77)
    judge.compare("q", "x", "y", seed=5)
    judge.compare("q", "x", "y", votes=3)
    Judge(policy, temperature=0.7).compare("q", "x", "y")
    settings = [(s.n, s.temperature, s.max_new_tokens, s.seed) for _, s in policy.calls]
    assert settings == [(1, 0.0, 77, 5), (3, 1.0, 77, 0), (1, 0.7, 8192, 0)]
    with pytest.raises(InputError, match="votes=3 with temperature=0 "):
        Judge(policy, temperature=0).compare("q", "x", "y", votes=3)
    with pytest.raises(InputError, match="votes: Input should be greater than 0 \\(got 0\\)"):
        judge.compare("q", "x", "y", votes=0)


def test_truncation_reaches_the_sampler_and_the_settings_name_only_what_is_set():
    policy = ScriptedPolicy(says("AAA"))
    judge = Judge(policy, temperature=0.6, top_p=0.95, top_k=20, min_p=0.1)
    judge.compare("q", "x", "y")
    Judge(policy, top_p=0.8).compare("q", "x", "y", votes=3)
    settings = [(s.temperature, s.top_p, s.top_k, s.min_p) for _, s in policy.calls]
    assert settings == [(0.6, 0.95, 20, 0.1), (1.0, 0.8, None, 0.0)]
    drawing = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1}
    plain = Judge(policy, temperature=0.6).settings(Voting())
    assert judge.settings(Voting()) == plain | drawing
    # Files of earlier versions continue: without truncation, nothing is added to their settings.
    assert plain.keys().isdisjoint({"top_p", "top_k", "min_p", "chat_template_kwargs"})
    policy.chat_template_kwargs = {"enable_thinking": False}
    assert judge.settings(Voting()) == plain | drawing | {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 5, "min_p": 0.1}, {"top_k": 5, "temperature": 0}])
def test_truncation_of_a_greedy_judge_is_refused(options):
    judge = Judge(ScriptedPolicy(says("A")), **options)
    with pytest.raises(
        InputError, match=r"^top_\w=.* changes nothing at temperature 0 \(greedy\).* \(--temperature 1\)"
    ):
        judge.compare("q", "x", "y")


def test_a_prompt_that_does_not_fit_is_not_asked_and_not_cut():
    policy = ScriptedPolicy(prefers("five"), positions=1000)
    judge = Judge(policy, get_prompt("cor"), max_new_tokens=400)
    room = 600 - len(policy.render(get_prompt("cor").render("q", "five", "")))
    fits, misses, fits_not = ("q", "five", "x" * room), ("q", "six", "five"), ("q", "five", "x" * (room + 1))
    found = judge.compare_many([fits_not, fits, misses, fits_not])
    assert [j.status for j in found] == ["too_long", "ok", "ok", "too_long"]
    assert [j.winner for j in found] == [None, "A", "B", None]
    assert found[0].note == "the prompt has 601 tokens, the limit is 600"
    assert found[0].votes == {"A": 0, "B": 0, "invalid": 0} and found[0].text == ""
    assert [len(ids) for ids in policy.calls[0][0]] == [600, 600 - room + len("five") - 1]
    assert Judge(policy, max_new_tokens=400, max_prompt_tokens=599).compare(*fits).status == "too_long"
    assert Judge(policy, max_new_tokens=400, max_prompt_tokens=9999).max_prompt_tokens == 600


def test_two_empty_answers_are_a_flagged_tie_and_one_is_judged():
    policy = ScriptedPolicy(prefers("five"))
    found = Judge(policy).compare_many([("q", "", " \n"), ("q", "", "five")])
    assert (found[0].winner, found[0].status, found[0].note) == (None, "tie", "both answers are empty")
    assert (found[1].winner, found[1].status) == ("B", "ok")
    assert len(policy.calls[0][0]) == 1
    policy.calls.clear()
    assert Judge(policy).compare("q", "", "").status == "tie"
    assert Judge(policy).compare_many([]) == [] and policy.calls == []


def test_a_judgement_keeps_every_text_by_order_and_vote():
    judgement = Judge(ScriptedPolicy(says("A-B"))).compare("q", "x", "y", votes=3, both_orders=True)
    own = (answer("A"), "no idea", answer("B"))
    assert judgement.texts == (own, own)
    assert judgement.verdicts == (("A", None, "B"), ("B", None, "A"))  # the other order's, in the pair's own letters
    assert judgement.tokens == (tuple(map(len, own)),) * 2


def test_a_pair_is_yielded_as_soon_as_its_last_text_is_sampled():
    policy = ScriptedPolicy(says("AA"))
    stream, written = policy.stream, []

    def out_of_turn(*args, **options):
        for found in sorted(stream(*args, **options), key=lambda f: (f[0] % 2, -f[0], f[1])):
            written.append(found[:2])
            yield found

    policy.stream = out_of_turn
    pairs = [PreferencePair.from_answers(str(k), "q", "x", f"y{k}") for k in range(3)]
    seen = [(number, len(written)) for number, _ in Judge(policy).stream(pairs, Voting(votes=2))]
    assert seen == [(2, 2), (0, 4), (1, 6)]
    written.clear()
    seen = [(number, len(written)) for number, _ in Judge(policy).stream(pairs, Voting(votes=2, both_orders=True))]
    assert seen == [(2, 8), (1, 10), (0, 12)]  # the first orders of all three, then the others
    assert [j.texts[1][0] for j in Judge(policy).compare_many(pairs, votes=2, both_orders=True)] == [answer("A")] * 3


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [
        (
            "RESOURCE_EXHAUSTED: out of memory",
            RunError,
            "memory is too small for 64 texts of up to 99 tokens, .*; lower slots",
        ),
        ("INTERNAL: a defect", JaxRuntimeError, "^INTERNAL: a defect$"),
    ],
)
def test_out_of_memory_errors_say_what_to_lower(told, error, message):
    policy = ScriptedPolicy(says("A"))
    stream = policy.stream

    def fails(*args):
        yield from stream(*args)
        raise JaxRuntimeError(told)

    policy.stream = fails
    with pytest.raises(error, match=message):
        Judge(policy, max_new_tokens=99).compare("q", "x", "y")


def test_the_rule_decides_what_counts_as_a_verdict():
    policy = ScriptedPolicy(lambda prompt, number: "I lean to [[A]], say")
    assert Judge(policy).compare("q", "x", "y").status == "invalid"
    assert Judge(policy, rule="eval").compare("q", "x", "y").winner == "A"


def test_a_thought_that_the_template_opens_belongs_to_the_text():
    def judge(text):
        return Judge(ScriptedPolicy(lambda prompt, number: text, opening="<think>\n")).compare("q", "x", "y")

    ended = judge("Hm.</think>" + answer("A"))
    assert (ended.winner, ended.text) == ("A", "<think>\nHm.</think>" + answer("A"))
    assert judge("I might end with " + answer("A")).status == "invalid"


def test_a_conversation_is_shown_whole():
    policy = ScriptedPolicy(says("A"))
    talk = [("user", "hi"), ("assistant", "hello"), ("user", "bye")]
    pair = PreferencePair.from_preference(
        "t", [*talk, ("assistant", "so long")], [*talk, ("assistant", "no")], chosen_in_b=True
    )
    Judge(policy).compare_many([pair])
    (asked,) = policy.calls[0][0]
    assert "Chatbot B: hello\nUser: bye\nChatbot B: so long" in bytes(asked).decode()


def test_limits_follow_the_model():
    policy = ScriptedPolicy(says("A"), positions=512)
    judge = Judge(policy)
    assert (judge.max_new_tokens, judge.max_prompt_tokens) == (256, 256)
    policy.config = dataclasses.replace(policy.config, sliding_window=100)
    assert (Judge(policy).max_new_tokens, Judge(policy).max_prompt_tokens) == (50, 50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "core"}, "the nearest name is 'cor'"),
        ({"rule": "loose"}, "rule='loose' is not known; give one of strict, eval"),
        ({"max_new_tokens": 512}, "max_new_tokens=512 must be from 1 to 511: the model has 512 positions"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be from 1 to 511"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens=0 must be at least 1"),
        ({"top_p": 1.5}, "top_p: Input should be less than or equal to 1 \\(got 1.5\\)"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
    ],
)
def test_invalid_arguments_of_a_judge_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Judge(ScriptedPolicy(says("A"), positions=512), **options)


def test_malformed_pairs_are_refused():
    with pytest.raises(InputError, match=r"pair 1 is \('q', 'x'\); expected"):
        Judge(ScriptedPolicy(says("A"))).compare_many([("q", "x", "y"), ("q", "x")])


def test_a_real_policy_judges_each_pair_as_if_it_were_alone():
    judge = Judge(tiny_policy(), world_prompt(), max_new_tokens=12)
    pairs = [(f"Reverse a b {c}", f"{c} b a", f"{c} a b" + " x" * k) for k, c in enumerate("cdefgh")]
    together = judge.compare_many(pairs, votes=2, both_orders=True, seed=3)
    alone = [judge.compare(*pair, votes=2, both_orders=True, seed=3) for pair in pairs[::2]]
    assert [j.text for j in together[::2]] == [j.text for j in alone]
    assert len({j.text for j in together}) > 1
    assert [sum(j.votes.values()) for j in together] == [4] * 6
    other = judge.compare_many(pairs, votes=2, both_orders=True, seed=4)
    assert [j.text for j in other] != [j.text for j in together]
