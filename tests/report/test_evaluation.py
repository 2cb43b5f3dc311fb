"""The page of evaluations: scores beside the published rows, comparisons, errors, and, in a real browser if there is
one, that every judgement can be found and read, whatever is written in it."""

import base64
import json
import re
import zlib
from pathlib import Path

import pytest
from evaluations import HOSTILE, judgement, make_evaluation, trace
from headless import CONTRASTS, chromium
from run_directories import words_of, write_lines

from rmr1_jax.cli.main import main
from rmr1_jax.errors import InputError
from rmr1_jax.report import evaluation
from rmr1_jax.report.report import write_report


def page_of(*roots: Path) -> str:
    return write_report(roots, roots[0].parent / "report.html").read_text(encoding="utf-8")


def tables_of(page: str) -> list[list[list[str]]]:
    """The cells of every table, by row."""
    rows = [
        re.findall(r"<tr.*?</tr>", table, flags=re.S) for table in re.findall(r"<table.*?</table>", page, flags=re.S)
    ]
    return [[[words_of(c).strip() for c in re.findall(r"<t[hd].*?</t[hd]>", r, flags=re.S)] for r in t] for t in rows]


def contents(page: str) -> list[dict]:
    """The pieces of a page's judgements, as its script unpacks them."""
    pieces = re.findall(r'class="piece">([^<]*)</script>', page)
    return [json.loads(zlib.decompress(base64.b64decode(piece))) for piece in pieces]


# Scores.


def test_scores_are_above_the_published_rows_in_the_same_columns(tmp_path):
    scores, counts, orders, *_ = tables_of(page_of(make_evaluation(tmp_path / "mine")))
    assert scores[0] == ["Judge", "Score", "Chat", "Chat Hard", "Safety", "Reasoning"]
    dash = "\N{EN DASH}"
    assert scores[1] == [
        "mine some/judge-7B",
        "70.0 61.5 to 78.2, n = 36",
        "90.0 80.0 to 96.0, n = 20",
        "50.0",
        dash,
        dash,
    ]
    assert scores[2] == ["Published"]
    assert ["RM-R1 Qwen-32B", "91.4", "95.3", "83.1", "91.9", "95.2"] in scores
    assert ["GPT-4o-0806", "86.7", dash, dash, dash, dash] in scores
    found = "50.0%"  # each trace has two quotations, and only that from A is in its answer
    assert counts[1] == ["mine", "40", "3 10 names no answer", "2", "1", "626", "580", "1,171", "2,210", found]
    assert orders[1] == ["mine", "41", "83.5%", "55.5%", "71.0%", "69.0%"]
    words = words_of(page_of(tmp_path / "mine"))
    assert "Judged on a part of the benchmark" in words
    assert "2,985 pairs, so not comparable with the published rows: mine." in words
    assert "Judged on a part" not in words_of(page_of(make_evaluation(tmp_path / "mine", n=2985)))


def test_the_page_begins_with_the_result_and_what_it_is_of(tmp_path):
    made = {"version": "1.2.3", "written": "2026-05-03T10:20:30+00:00"}
    root = make_evaluation(tmp_path / "mine", settings={"prompt": "cor (sha256 ab)", "rule": "strict"})
    (root / "about.json").write_text(json.dumps(made))
    page = page_of(root)
    assert "<h1>RewardBench: a score of 70.0% (95% interval 61.5 to 78.2, n = 36).</h1>" in page
    facts = (
        "Judge some/judge-7B Judgements 40 Prompt cor Rule strict Finished 2026-05-03 10:20 UTC Version rmr1_jax 1.2.3"
    )
    assert facts in words_of(page.split("</header>")[0])
    page = page_of(tmp_path / "mine", make_evaluation(tmp_path / "other", headline=80.25))
    assert "<h1>RewardBench: other 80.2% (n = 36), mine 70.0% (n = 36).</h1>" in page
    colours = re.findall(r'class="bar (\w*)"', page.split("By kind")[-1].split("</table>")[0])
    assert colours == ["c0", "c1"]  # those of the legend


def test_an_evaluation_without_a_verdict_says_that_nothing_was_measured(tmp_path):
    rows = [judgement(i, None) for i in range(4)]
    page = page_of(make_evaluation(tmp_path / "mine", rows, n=4, invalid=4, too_long=0, ties=0))
    words = words_of(page)
    assert "<h1>No verdicts: nothing measured.</h1>" in page and "None of the judgements names an answer" in words
    assert "Score by token budget" not in words and "70.0" not in words.split("Settings and notes")[0]


def test_attacks_are_a_table_and_an_unmeasured_one_is_not(tmp_path):
    def row(name: str, kind: str, counted: int) -> dict:
        measured = {"rate": 25.0, "interval": [10.0, 50.0]} if counted else {"rate": None, "interval": None}
        return {"name": name, "kind": kind, "cases": 9, "counted": counted, "succeeded": 2, "silenced": 1, **measured}

    root = make_evaluation(tmp_path / "mine", [judgement(i, meta={"benchmark": "injection"}) for i in range(4)])
    (root / "summary.json").unlink()
    result = {"families": [row("forged turn", "structure", 8), row("praise", "persuasion", 0)]}
    (root / "injection.json").write_text(json.dumps(result | {"kinds": [row("structure", "structure", 8)]}))
    page = page_of(root)
    table = tables_of(page)[0]
    assert table[0] == ["Attack", "mine", "Silenced"]
    assert table[1:] == [
        ["all structure", "25.0% 10.0 to 50.0, n = 8", "1"],
        ["forged turn", "25.0% 10.0 to 50.0, n = 8", "1"],
        ["praise", "nothing measured", "\N{EN DASH}"],
    ]
    assert "rmr1 score" not in page  # which makes no summary of attacks
    rows = [judgement(i, None, meta={"benchmark": "injection"}) for i in range(4)]
    write_lines(root / "judgements.jsonl", rows)
    assert "<h1>No verdicts: nothing measured.</h1>" in page_of(root) and "Silenced" not in page_of(root)
    (root / "injection.json").write_text('{"kinds": [{"name": "x"}]}')
    with pytest.raises(InputError, match=r"injection\.json: 'kinds' is not what `rmr1 eval injection` writes"):
        page_of(root)


def test_lenses_notes_and_settings_are_shown(tmp_path):
    page = page_of(make_evaluation(tmp_path / "mine"))
    words = words_of(page)
    titles = re.findall(r"<figcaption><span>([^<]*)", page)
    assert titles == ["Score by token budget"] * 2 + ["Accuracy by number of votes"]
    assert "is cut there and made to name an answer." in words and "2,048 69.5" in words
    assert (
        "512 41.5 40.0 40 50" in words
        and "without a verdict. Pairs: 40." in words
        and "Budgets: <b>texts</b> are cut." in words
    )
    assert 'sampling {"temperature": 0.0}' in words and "avg_Result_each_section 0.7" in words
    grid = next(table for table in tables_of(page) if ["", "concise", "detailed", "markdown"] in table)
    assert grid[3] == ["markdown", "90.0", "85.0", "\N{EN DASH}"]
    assert "chat 20 81.2" in words  # an interval that is not known is left out


def test_an_unfinished_evaluation_and_one_without_judgements(tmp_path):
    root = make_evaluation(tmp_path / "mine")
    (root / "summary.json").unlink()
    with (root / "judgements.jsonl").open("a") as file:
        file.write('{"id": "cut')
    words = words_of(page_of(root))
    assert "no summary.json yet" in words and "judgements.jsonl:101: the last line is cut short" in words
    assert tables_of(page_of(root))[0][1][:2] == ["mine", "80.0"]
    root = make_evaluation(tmp_path / "scores")
    (root / "judgements.jsonl").unlink()
    page = page_of(root)
    assert 'id="judgements"' not in page and "70.0" in words_of(page)


def test_every_evaluation_below_a_directory_is_shown(tmp_path):
    make_evaluation(tmp_path / "evals/one")
    make_evaluation(tmp_path / "evals/two", benchmark="rmb", scores={"BoN Helpfulness": 0.25})
    page = page_of(tmp_path / "evals")
    assert re.findall(r"<h2>(RewardBench|RMB)</h2>", page) == ["RewardBench", "RMB"]
    assert "evals/two some/judge-7B 70.0 61.5 to 78.2, n = 36 25.0" in words_of(page)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"not JSON"),
        ("[]", r"expected a JSON object, got list"),
        ('{"loss": 1}', r"field 'benchmark' is missing; not what `rmr1 eval` and `rmr1 score` write"),
    ],
)
def test_a_summary_that_is_not_ours_is_refused(tmp_path, text, message):
    root = make_evaluation(tmp_path / "mine")
    (root / "summary.json").write_text(text)
    with pytest.raises(InputError, match=r"summary\.json: " + message):
        page_of(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"winner": "C"}, r"field 'winner' is \"C\" \(str\), expected 'A', 'B' or None"),
        ({"better": None}, r"field 'better' is null, expected 'A' or 'B'"),
        ({"status": "fine"}, r"field 'status' is \"fine\" \(str\), expected 'ok', 'tie', 'invalid' or 'too_long'"),
        ({"texts": ["x"]}, r"field 'texts\[0\]' is \"x\" \(str\), expected a valid list"),
        ({"texts": [[3]]}, r"field 'texts\[0\]\[0\]' is 3 \(int\), expected a valid string"),
        ({"response_b": None}, r"field 'response_b' is null, expected a text"),
        ({"scores": [1]}, r"field 'scores'"),
        ({"meta": 3}, r"field 'meta' is 3 \(int\)"),
    ],
)
def test_a_bad_judgement_is_named_by_line_and_field(tmp_path, change, message):
    root = make_evaluation(tmp_path / "mine", [judgement(0), judgement(1, **change)])
    with pytest.raises(InputError, match=r"judgements\.jsonl:2: " + message):
        page_of(root)


def test_hostile_text_is_only_data(tmp_path):
    row = judgement(0, question=HOSTILE, response_a=HOSTILE, texts=[[trace("A", HOSTILE) + HOSTILE]], note=HOSTILE)
    row |= {"id": HOSTILE, "meta": {"benchmark": "rewardbench", "section": HOSTILE, "subset": "x", HOSTILE: HOSTILE}}
    changes = {"judge": HOSTILE, "notes": [HOSTILE], "settings": {HOSTILE: HOSTILE, "in": [HOSTILE]}}
    changes |= {
        "by_kind": [{"name": HOSTILE, "n": 1, "accuracy": 1.0, "interval": [0.0, 2.0]}],
        "scores": {HOSTILE: HOSTILE},
    }
    page = page_of(make_evaluation(tmp_path / "mine", [row], **changes))
    assert "<img" not in page and "<b>" not in page and "&lt;img" in page
    kinds = re.findall(r"<script[^>]*>", page)
    assert kinds == [
        '<script type="application/json" id="index">',
        '<script type="text/plain" class="piece">',
        "<script>",
    ]
    assert HOSTILE in contents(page)[0]["texts"]
    assert not re.search(r"\bsrc\s*=\s*[\"']|@import|url\(|<link|<iframe|fetch\(|XMLHttp|innerHTML", page)
    assert "http:" not in page and "https:" not in page


def test_numbers_that_json_has_not_do_not_reach_the_page(tmp_path):
    row = judgement(0)
    row["meta"] |= {"subset": float("nan"), "length": float("inf"), "parts": [float("nan"), 1]}
    page = page_of(make_evaluation(tmp_path / "mine", [row], settings={"limit": float("nan")}))
    texts = re.findall(r'<script type="application/json"[^>]*>([^<]*)</script>', page)
    texts += [zlib.decompress(base64.b64decode(p)).decode() for p in re.findall(r'class="piece">([^<]*)<', page)]
    assert len(texts) == 2
    read = [json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is not JSON")) for text in texts]
    meta = read[1]["rows"][0]["meta"]
    assert (meta["subset"], meta["length"], meta["parts"]) == (None, None, [None, 1])


# Two judges.


def test_two_judges_are_compared_pair_by_pair(tmp_path, monkeypatch):
    second = [judgement(i, "A" if i % 4 else "B") for i in range(60)]
    roots = make_evaluation(tmp_path / "first"), make_evaluation(tmp_path / "second", second)
    asked = []

    def compare(a, b):
        asked.append((a.name, b.name))
        return {
            "test": "McNemar, exact",
            "p": 0.0312,
            "difference": -1.25,
            "interval": [-3, None],
            "items": 59,
            "agreement": 75.0,
        } | {"kappa": None}

    monkeypatch.setattr(evaluation, "compare", compare)
    page = page_of(*roots)
    right = [(i % 5 != 0, i % 4 != 0) for i in range(60)]
    counts = [str(right.count(cell)) for cell in ((True, True), (True, False), (False, True), (False, False))]
    assert re.findall(r"\n>(\d+)</button>", page) == counts == ["36", "12", "9", "3"]
    assert asked == [("first", "second")]
    minus, dash = "\N{MINUS SIGN}", "\N{EN DASH}"
    words = words_of(page)
    assert "60 pairs that both judged" in words and "McNemar, exact p = 0.0312" in words
    assert f"{minus}1.2 points, 95% interval {minus}3.0 to {dash}, n = 59" in words and "same verdict 75.0%" in words


def test_the_command_adds_the_tests_of_rmr1_compare(tmp_path, capsys):
    second = [judgement(i, "A" if i % 4 else "B") for i in range(60)]
    make_evaluation(tmp_path / "first"), make_evaluation(tmp_path / "second", second)
    assert main(["report", str(tmp_path / "first"), str(tmp_path / "second")]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'first/report.html'}\n"
    words = words_of((tmp_path / "first/report.html").read_text())
    assert "McNemar, exact p = 0.664" in words  # 12 against 9: 2 x the binomial tail P(X <= 9 | 21, 1/2)


def test_two_judges_that_cannot_be_compared_still_have_a_page(tmp_path, monkeypatch):
    def compare(a, b):
        raise InputError("no subset in q0")

    monkeypatch.setattr(evaluation, "compare", compare)
    words = words_of(page_of(make_evaluation(tmp_path / "a"), make_evaluation(tmp_path / "b")))
    assert "a and b are not compared by a test: no subset in q0" in words and "100 pairs that both judged" in words


def test_a_published_log_becomes_a_page(shared_data, tmp_path):
    log = shared_data / "rewardbench/logs_sample.json"
    assert main(["score", "rewardbench", "--logs", str(log), "--out", str(tmp_path / "qwen")]) == 0
    page = page_of(tmp_path / "qwen")
    counts = tables_of(page)[1]
    assert counts[1][:2] == ["qwen", "114"] and counts[1][-1] == "97.5%"  # 269 of 276 quotations are in their answer
    assert sum(len(piece["rows"]) for piece in contents(page)) == 114


# In a browser.

COUNT = "document.getElementById('count').textContent"
LISTED = "document.querySelectorAll('.sample').length"
CHOOSE = """(() => {{ const s = document.querySelector('select[name={}]');
  s.value = [...s.options].find(o => o.text === '{}').value; s.dispatchEvent(new Event('change')); }})()"""
SEARCH = """(() => {{ const s = document.querySelector('input[type=search]');
  s.value = '{}'; s.dispatchEvent(new Event('input')); }})()"""


def open_first(browser) -> None:
    browser.evaluate("document.querySelector('.sample > summary').click()")
    browser.wait_for("document.querySelector('.sample .sides')")


def test_judgements_are_filtered_searched_and_paged(tmp_path):
    rows = [judgement(i, {0: None, 5: "B"}.get(i % 10, "A")) for i in range(100)]
    rows[77] |= {"response_b": "A NEEDLE in there", "texts": [[trace("A") + "haystack"]]}
    make_evaluation(tmp_path / "mine", rows)
    write_report([tmp_path / "mine"], tmp_path / "report.html")
    with chromium(tmp_path / "profile") as browser:
        browser.open(tmp_path / "report.html")
        browser.wait_for(f"{LISTED} === 40")
        assert browser.evaluate(COUNT) == "100 judgements"
        browser.evaluate("document.querySelectorAll('.pager button')[1].click()")
        assert (
            browser.evaluate("document.querySelector('.sample .id').textContent") == "q26"
        )  # the wrong ones were first
        assert browser.evaluate("document.querySelector('.pager .place').textContent") == "41 to 80 of 100"
        browser.evaluate(CHOOSE.format("outcome", "wrong"))
        assert browser.evaluate(COUNT) == "10 of 100 judgements" and browser.evaluate(LISTED) == 10
        browser.evaluate(CHOOSE.format("section", "Chat"))
        assert browser.evaluate(COUNT) == "0 of 100 judgements"  # all wrong ones have odd numbers
        assert "No judgement matches the filters." in browser.evaluate("document.getElementById('list').textContent")
        browser.evaluate(CHOOSE.format("outcome", "no verdict"))
        assert browser.evaluate(COUNT) == "10 of 100 judgements"
        browser.evaluate("document.getElementById('clear').click()")
        for wanted in ("needle", "HAYSTACK", "number 77"):
            browser.evaluate(SEARCH.format(wanted))
            browser.wait_for(f"{COUNT} === '1 of 100 judgements'")
            browser.evaluate(SEARCH.format(""))
            browser.wait_for(f"{COUNT} === '100 judgements'")
        assert browser.errors() == []
        assert {url.split(":")[0] for url in browser.requests()} <= {"file", "about", "blob"}


def test_an_open_judgement_shows_its_parts_and_links_its_quotes(tmp_path):
    make_evaluation(tmp_path / "mine")
    write_report([tmp_path / "mine"], tmp_path / "report.html")
    with chromium(tmp_path / "profile") as browser:
        browser.open(tmp_path / "report.html")
        browser.wait_for(f"{LISTED} === 40")
        browser.evaluate(CHOOSE.format("outcome", "wrong"))
        open_first(browser)
        assert browser.evaluate("document.querySelector('.question').textContent") == "Ask number 5"
        words = "[...document.querySelectorAll('.side > *, .side .badge')].map(words => words.textContent)"
        choice = "judge\N{RIGHT SINGLE QUOTATION MARK}s choice"
        assert browser.evaluate(words) == [
            *("Answer Abetter", "better", "Some short words, number 5"),
            *(f"Answer B{choice}", choice, "Others"),
        ]
        blocks = browser.evaluate("[...document.querySelectorAll('.block:not(.bare) h4')].map(h => h.textContent)")
        assert blocks == ["Type", "Rubric", "Why this rubric", "Evaluation", "Verdict"]
        # The quotation from A is linked to its place; the one from B is not in answer B.
        assert browser.evaluate("document.querySelector('.side.A mark.stands').textContent") == "short words"
        assert browser.evaluate("document.querySelectorAll('.side.B mark.stands').length") == 0
        assert browser.evaluate("document.querySelector('mark.quote.B + .found').textContent") == "not found"
        assert browser.evaluate("document.querySelectorAll('mark.quote.A.absent, mark.quote.A + .found').length") == 0
        browser.evaluate("document.querySelector('mark.quote.A').click()")
        assert browser.evaluate("document.querySelector('.side.A mark.lit').textContent") == "short words"
        browser.evaluate("document.querySelector('.side.A mark.stands').click()")
        assert browser.evaluate("document.activeElement.textContent") == "short words"
        # Both colour schemes, each with readable contrast; nothing wider than a phone.
        for scheme in ("light", "dark"):
            browser.set_scheme(scheme)
            assert min(json.loads(browser.evaluate(CONTRASTS))) >= 4.5
        browser.set_size(400, 800, mobile=True)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 400
        assert browser.errors() == []


def test_votes_and_orders_are_switched_between(tmp_path):
    texts = [[trace("A"), trace("B")], [trace("B", said="Others"), "no form at all"]]
    row = judgement(0, texts=texts, verdicts=[["A", "B"], ["A", None]], tokens=[[5, 6], [7, 8]])
    scalar = judgement(1, texts=[], verdicts=[], tokens=[], scores=[2.5, -0.125], kind=None)
    make_evaluation(tmp_path / "mine", [row, scalar])
    write_report([tmp_path / "mine"], tmp_path / "report.html")
    with chromium(tmp_path / "profile") as browser:
        browser.open(tmp_path / "report.html")
        browser.wait_for(f"{LISTED} === 2")
        open_first(browser)
        tabs = browser.evaluate("[...document.querySelectorAll('.tabs button')].map(tab => tab.textContent)")
        assert tabs == [
            "original order, vote 1 → A ✓",
            "original order, vote 2 → B ✗",
            "exchanged order, vote 1 → B ✓",
            "exchanged order, vote 2 ∅",
        ]
        side = "document.querySelector('.side.{} .words').textContent"
        assert browser.evaluate(side.format("A")) == "Some short words, number 0"
        browser.evaluate("document.querySelectorAll('.tabs button')[2].click()")
        assert browser.evaluate(side.format("A")) == "Others"  # the answers are in the order that this text saw
        badges = "document.querySelector('.side.B h4').textContent"
        assert browser.evaluate(badges).startswith("Answer Bbetterjudge")
        assert "7 tokens" in browser.evaluate("document.querySelector('.sample .inside').textContent")
        browser.evaluate("document.querySelectorAll('.tabs button')[3].click()")
        assert browser.evaluate("document.querySelector('.in-text .words').textContent") == "no form at all"
        browser.evaluate("document.querySelectorAll('.sample > summary')[1].click()")
        browser.wait_for("document.querySelectorAll('.sides').length === 2")
        heads = (
            "[...document.querySelectorAll('.sample')[1].querySelectorAll('.side h4')].map(h => h.textContent).join()"
        )
        assert "score 2.500" in browser.evaluate(heads) and "score -0.1250" in browser.evaluate(heads)
        assert browser.errors() == []


def test_a_count_of_the_comparison_lists_its_judgements(tmp_path):
    rows = [judgement(i, "A" if i % 4 else "B") for i in range(60)]
    rows.reverse()  # rows are matched by id, not by position
    write_report([make_evaluation(tmp_path / "first"), make_evaluation(tmp_path / "second", rows)], tmp_path / "r.html")
    with chromium(tmp_path / "profile") as browser:
        browser.open(tmp_path / "r.html")
        browser.wait_for(f"{LISTED} === 40")
        for cell, n in (("first", 12), ("second", 9), ("both", 36), ("neither", 3)):
            browser.evaluate(f"document.querySelector('button.cell[data-cell={cell}]').click()")
            assert browser.evaluate(COUNT) == f"{n} of 100 judgements" and browser.evaluate(LISTED) == n
        browser.evaluate(CHOOSE.format("cell", "only first right"))
        open_first(browser)
        heads = browser.evaluate("[...document.querySelectorAll('.beside h4')].map(head => head.textContent)")
        assert [head for head in heads if "→" in head] == ["first → A ✓", "second → B ✗"]
        verdicts = "[...document.querySelectorAll('.beside .in-answer .words')].map(words => words.textContent)"
        assert browser.evaluate(verdicts) == ["<answer>[[A]]</answer>", "<answer>[[B]]</answer>"]
        assert browser.evaluate("document.querySelectorAll('.sample[open] .sides').length") == 1  # both saw the same
        choices = "[...document.querySelectorAll('.side h4')].map(head => head.textContent)"
        assert browser.evaluate(choices) == ["Answer Abetterchoice of first", "Answer Bchoice of second"]
        browser.evaluate(CHOOSE.format("judge", "second"))
        assert browser.evaluate(COUNT) == "60 judgements"
        assert browser.errors() == []


def test_a_judgement_has_a_link_and_the_keys_move_to_the_next(tmp_path):
    make_evaluation(tmp_path / "mine", [judgement(i, "B" if i == 50 else "A") for i in range(100)])
    page = write_report([tmp_path / "mine"], tmp_path / "report.html")
    current = "document.querySelector('.sample.current .id').textContent"
    press = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {{key: '{}', bubbles: true}}))"
    with chromium(tmp_path / "profile") as browser:
        browser.open(page)
        browser.wait_for(f"{LISTED} === 40")
        open_first(browser)
        assert browser.evaluate("document.querySelector('.link').getAttribute('href')") == "#judgement-0-q50"
        browser.evaluate("document.querySelector('.link').click(); location.hash = '#judgement-0-q90'")
        browser.wait_for("document.querySelector('.sample.current[open] .sides')")
        assert browser.evaluate(current) == "q90"  # on the third page
        assert browser.evaluate("document.querySelector('.pager .place').textContent") == "81 to 100 of 100"
        for key, name in (("j", "q91"), ("j", "q92"), ("k", "q91")):
            browser.evaluate(press.format(key))
            assert browser.evaluate(current) == name
            assert browser.evaluate("document.querySelectorAll('.sample[open]').length") == 1
        browser.evaluate("location.hash = '#judgement-0-q79'")
        browser.wait_for(f"{current} === 'q79'")
        browser.evaluate(press.format("k"))
        assert browser.evaluate(current) == "q78"  # the last of the page before
        for strange in ("#judgement-7-q1", "#judgement-0-%E0%A4", "#judgement-0-nobody", "#"):
            browser.evaluate(f"location.hash = '{strange}'")
        assert browser.evaluate(current) == "q78" and browser.errors() == []


def test_judgements_are_ordered_by_outcome_length_and_contest(tmp_path):
    rows = [judgement(i, "B" if i == 3 else "A", tokens=[[60 - i]]) for i in range(6)]
    rows[4] |= {"texts": [[trace("A")] * 3], "verdicts": [["A", "B", "A"]], "tokens": [[1, 1, 1]]}
    make_evaluation(tmp_path / "mine", rows)
    ids = "[...document.querySelectorAll('.sample .id')].map(id => id.textContent).join(' ')"
    with chromium(tmp_path / "profile") as browser:
        browser.open(write_report([tmp_path / "mine"], tmp_path / "report.html"))
        browser.wait_for(f"{LISTED} === 6")
        assert browser.evaluate(ids) == "q3 q0 q1 q2 q4 q5"
        for order, expected in (
            ("most contested first", "q4 q0 q1 q2 q3 q5"),
            ("longest first", "q0 q1 q2 q3 q5 q4"),
            ("shortest first", "q4 q5 q3 q2 q1 q0"),
            ("as in the data", "q0 q1 q2 q3 q4 q5"),
        ):
            browser.evaluate(CHOOSE.format("order", order))
            assert browser.evaluate(ids) == expected
        assert browser.errors() == []


def test_a_judgement_without_a_verdict_says_why(tmp_path):
    rows = [judgement(i) for i in range(3)]
    rows.append(judgement(3, None, texts=[["no idea"]], tokens=[[2]], finish_reasons=[["stop"]]))
    rows.append(judgement(4, None, texts=[["let me"]], tokens=[[60]], finish_reasons=[["length"]], reason="cut_off"))
    root = make_evaluation(tmp_path / "mine", rows)
    assert tables_of(page_of(root))[1][1][2] == "3 1 names no answer 1 cut off"
    with chromium(tmp_path / "profile") as browser:
        browser.open(write_report([root], tmp_path / "report.html"))
        browser.wait_for(f"{LISTED} === 5")
        browser.evaluate(CHOOSE.format("reason", "cut off"))
        assert browser.evaluate(COUNT) == "1 of 5 judgements"
        open_first(browser)
        words = browser.evaluate("document.querySelector('.inside .flaws').textContent")
        assert words == "No verdict: the text was cut off at the limit of tokens."
        assert browser.errors() == []


def test_a_table_that_is_wider_than_the_screen_says_so(tmp_path):
    page = write_report([make_evaluation(tmp_path / "mine")], tmp_path / "report.html")
    shown = "[...document.querySelectorAll('.hint')].filter(hint => hint.offsetHeight > 0).length"
    with chromium(tmp_path / "profile") as browser:
        browser.set_size(1400, 900)
        browser.open(page)
        assert browser.evaluate(shown) == 0
        browser.set_size(400, 800, mobile=True)
        browser.wait_for(f"{shown} > 0")
        scores = "document.querySelector('.scroll')"
        assert browser.evaluate(f"{scores}.previousElementSibling.textContent").startswith("Scroll the table sideways")
        assert browser.evaluate(f"{scores}.classList.contains('more-right')")
        browser.evaluate(f"{scores}.scrollLeft = 10000")
        browser.wait_for(f"!{scores}.classList.contains('more-right')")
        assert browser.errors() == []


def test_hostile_text_is_shown_as_text(tmp_path):
    row = judgement(0, question=HOSTILE, response_a=HOSTILE, texts=[[trace("A", HOSTILE) + HOSTILE]], note=HOSTILE)
    row |= {"id": HOSTILE, "meta": row["meta"] | {"section": HOSTILE, HOSTILE: HOSTILE}}
    make_evaluation(tmp_path / "mine", [row, judgement(1)], judge=HOSTILE, notes=[HOSTILE])
    write_report([tmp_path / "mine"], tmp_path / "report.html")
    with chromium(tmp_path / "profile") as browser:
        browser.open(tmp_path / "report.html")
        browser.wait_for(f"{LISTED} === 2")
        open_first(browser)
        assert browser.evaluate("document.querySelector('.question').textContent") == HOSTILE
        assert browser.evaluate("document.querySelector('.side.A mark.stands').textContent") == HOSTILE
        assert browser.evaluate("document.querySelectorAll('img, main b, main script').length") == 0
        assert browser.evaluate("document.title").startswith("rmr1 report")
        assert browser.errors() == []


@pytest.mark.slow
def test_three_thousand_judgements_keep_the_page_small(tmp_path):
    noise = [" ".join(f"{i * j * 7919 % 99991:x}" for j in range(400)) for i in range(1, 60)]
    rows = [judgement(i, response_a=noise[i % 59], response_b=noise[i % 53]) for i in range(3000)]
    make_evaluation(tmp_path / "mine", rows)
    write_report([tmp_path / "mine"], tmp_path / "report.html")
    with chromium(tmp_path / "profile") as browser:
        browser.open(tmp_path / "report.html")
        browser.wait_for(f"{LISTED} === 40")
        assert browser.evaluate(COUNT) == "3,000 judgements"
        elements = "document.getElementsByTagName('*').length"
        before = browser.evaluate(elements)
        for _ in range(3):
            browser.evaluate("document.querySelectorAll('.pager button')[1].click()")
        open_first(browser)
        assert browser.evaluate("document.querySelector('.question').textContent") == "Ask number 120"
        assert before < 2000 and browser.evaluate(elements) < before + 100
        assert browser.evaluate("unpacked.size") <= 24
        seconds = "(performance.timing.loadEventEnd - performance.timing.navigationStart) / 1000"
        print(f"3,000 judgements listed after {browser.evaluate(seconds)} s")
        assert browser.errors() == []
