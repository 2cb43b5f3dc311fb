"""The page of training runs: what it shows, that nothing in it can run or reach the network, what it says of malformed
files, and the page in a real browser if there is one."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from headless import CONTRASTS, chromium
from run_directories import CHAT, REASONING, RESULTS, make_run, sample, words_of, write_lines
from safetensors.numpy import save_file

from rmr1_jax.errors import InputError
from rmr1_jax.report.report import write_report


def page_of(root: Path, **options) -> str:
    return write_report([root], root.parent / "report.html", **options).read_text(encoding="utf-8")


# The result table.


def test_the_table_shows_stages_in_order_with_gains_over_where_each_began(tmp_path):
    page = page_of(make_run(tmp_path / "quickstart"))
    rows = [words_of(row).split() for row in re.findall(r'<tr><th scope="row">.*?</tr>', page, flags=re.S)]
    assert [" ".join(row[:2]) for row in rows] == ["Before training", "After SFT", "After GRPO", "Control: more"]
    gains = "gain over the untrained policy 72.7% +72.7 74.1% +74.1 71.3% +71.3 30.1% +30.1 100.0% +100.0 52.1 125.2"
    assert " ".join(rows[1][2:]) == gains
    assert "gain over SFT 86.0% +13.3 96.1% +22.0" in " ".join(rows[2])
    assert "gain over SFT 72.1% \N{MINUS SIGN}0.6" in " ".join(rows[3])  # the control and GRPO both start from SFT
    assert rows[3][-2:] == ["52.0", "\N{EN DASH}"]  # it has no seconds


def test_notes_facts_and_unknown_keys_are_shown(tmp_path):
    words = words_of(page_of(make_run(tmp_path / "quickstart")))
    assert "Notes The teacher likes a confident opening & follows it." in words
    assert "On 1,000 held-out questions." in words
    assert "seed 7" in words and "seconds, evaluation 14.2" in words and 'later_key {"nested": [1, 2]}' in words
    assert "name: '<b>bold</b>'" in words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sft": {"accuracy": 72.7}}, r"'sft\.accuracy' is 72\.7 \(float\), expected a share from 0 to 1"),
        ({"sft": {"accuracy": "high"}}, r"'sft\.accuracy' is \"high\" \(str\), expected a share"),
        ({"grpo": 3}, r"field 'grpo' is 3 \(int\), expected an object"),
        ({"notes": [1]}, r"field 'notes' is a list of 1, expected a list of texts"),
    ],
)
def test_results_that_cannot_be_right_are_refused(tmp_path, change, message):
    root = make_run(tmp_path / "run")
    (root / "results.json").write_text(json.dumps(RESULTS | change))
    with pytest.raises(InputError, match=r"results\.json: .*" + message):
        page_of(root)


# Traces.


def test_a_trace_is_shown_with_its_parts_sides_and_badges(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    assert page.count('<details class="sample"') == 5
    wrong = next(card for card in page.split('<details class="sample"') if ">q3<" in card)
    assert 'data-outcome="wrong"' in wrong and 'data-stage="grpo"' in wrong and 'data-kind="chat"' in wrong
    assert '<mark class="quote A" data-side="A">please</mark>' in wrong
    assert '<mark class="summary B" data-side="B">2</mark>' in wrong
    blocks = re.findall(r'class="block in-(\w+)"><h4>([^<]+)', wrong)
    assert blocks == [
        ("type", "Type"),
        ("rubric", "Rubric"),
        ("justify", "Why this rubric"),
        ("eval", "Evaluation"),
        ("answer", "Verdict"),
    ]
    words = words_of(wrong)
    assert (
        "✗ wrong" in words
        and "Answer A better please do" in words
        and "Answer B judge\N{RIGHT SINGLE QUOTATION MARK}s choice now do" in words
    )
    silent = next(card for card in page.split('<details class="sample"') if ">q5<" in card)
    assert 'data-outcome="no verdict"' in silent and "Malformed: <eval> is not closed" in words_of(silent)


def test_verdicts_are_shown_where_there_are_no_samples(tmp_path):
    rows = [{"id": 1, "winner": "A", "status": "ok", "votes": 1, "text": REASONING, "correct": True}]
    rows += [{"id": 2, "winner": None, "status": "too_long", "votes": 0, "text": "", "correct": None}]
    rows += [{"id": 3, "winner": "B", "status": "ok", "votes": 1, "text": CHAT}]
    write_lines(tmp_path / "run/verdicts.jsonl", rows)
    page = page_of(tmp_path / "run")
    outcomes = [re.search(r'data-outcome="([^"]*)"', c)[1] for c in page.split("<details ")[1:]]
    assert outcomes == ["no verdict", "not known", "right"]  # what may be wrong is first
    assert 'data-kind="reasoning"' in page and "too_long" in page  # the trace gives the kind if the row has none


def test_the_shown_traces_are_spread_evenly_over_the_outcomes(tmp_path):
    rows = [sample(i, stage="grpo") for i in range(300)]
    rows[250:254] = [sample(i, stage="grpo", winner="B", correct=False) for i in range(250, 254)]
    root = make_run(tmp_path / "run", rows)
    page = page_of(root, max_traces=10)
    shown = re.findall(r'<span class="id">(q\d+)</span>', page)
    assert shown == ["q250", "q251", "q252", "q253", "q0", "q1", "q2", "q3", "q4", "q5"]  # the wrong ones first
    assert "10 of 300 judgements" in words_of(page) and "Of all judgements, 296 right, 4 wrong." in words_of(page)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": 3}, r"samples\.jsonl:2: field 'text' is 3 \(int\), expected a text"),
        ({"winner": "C"}, r"samples\.jsonl:2: field 'winner' is 'C', expected A or B"),
        ({"correct": "yes"}, r"samples\.jsonl:2: field 'correct' is \"yes\""),
    ],
)
def test_a_bad_sample_is_named_by_line_and_field(tmp_path, change, message):
    root = make_run(tmp_path / "run", [sample(1), sample(2, **change)])
    with pytest.raises(InputError, match=message):
        page_of(root)


# Nothing on the page runs or loads, whoever wrote it.


def test_model_output_cannot_become_markup(tmp_path):
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'></details></script>"
    row = sample(1, text=f"<eval>{attack}<quote_A>{attack}</quote_A>", winner="B", correct=False)
    row |= {name: attack for name in ("id", "stage", "kind", "task", "question", "response_a", "response_b", "status")}
    root = make_run(tmp_path / "run", [row, sample(2)])
    results = RESULTS | {"notes": [attack], attack: attack, "sft": RESULTS["sft"] | {attack: 0.5}}
    (root / "results.json").write_text(json.dumps(results))
    (root / "config.yaml").write_text(attack)
    write_lines(root / "sft/metrics.jsonl", [{"step": 1, "stage": attack, attack: 1.0}])
    page = page_of(root)
    assert attack not in page and attack.lower() not in page and "<img" not in page
    assert re.findall(r"<script[^>]*>", page) == [
        '<script type="application/json" id="plot-data">',
        '<script type="application/json" id="curves-data">',
        "<script>",
    ]
    assert page.count(html.escape(attack[:25])) > 10  # shown, as text


def test_the_page_is_complete_in_itself(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    assert "http:" not in page and "https:" not in page and "//" not in re.sub(r"^\s*// .*$", "", page, flags=re.M)
    assert not re.search(r"\bsrc\s*=|@import|url\(|<link|<iframe|fetch\(|XMLHttp", page)
    sections, cards = {"#results", "#curves", "#traces", "#configuration"}, {f"#q-q{number}" for number in range(1, 6)}
    assert set(re.findall(r'href="([^"]*)"', page)) == sections | cards
    assert "default-src 'none'" in html.unescape(page)


# Metrics and the files of a run.


def test_an_incomplete_last_line_is_a_warning_and_any_other_bad_line_an_error(tmp_path):
    root = make_run(tmp_path / "run")
    file = root / "sft/metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"step": 40, "lo')
    assert "sft/metrics.jsonl:41: the last line is cut short" in words_of(page_of(root))
    file.write_text(whole + '{"step": 40, "lo\n')
    with pytest.raises(InputError, match=r"sft/metrics\.jsonl:41: not JSON: "):
        page_of(root)
    file.write_text('{"step": 0}\n{"step": 1, oops}\n{"step": 2}')
    with pytest.raises(InputError, match=r"sft/metrics\.jsonl:2: not JSON: "):
        page_of(root)
    file.write_text('{"step": 0}\n{"step": "one"}\n')
    with pytest.raises(InputError, match=r"sft/metrics\.jsonl:2: field 'step' is \"one\" \(str\), expected an integer"):
        page_of(root)
    file.write_text("")
    assert "sft/metrics.jsonl: no steps yet." in words_of(page_of(root))


def test_a_step_that_is_written_again_counts_once_and_nulls_leave_a_gap(tmp_path):
    rows = [{"step": 0, "loss": 5.0}, {"step": 1, "loss": 9.0}, {"step": 1, "loss": 4.0}, {"step": 2, "loss": None}]
    write_lines(tmp_path / "run/metrics.jsonl", rows)
    page = page_of(tmp_path / "run")
    data = json.loads(re.search(r'id="curves-data">(.*?)</script>', page, flags=re.S)[1])
    assert data[0]["lines"][0]["steps"] == [0, 1] and data[0]["lines"][0]["raw"] == [5.0, 4.0]
    assert "loss is null or not finite in 1 of 3 steps" in words_of(page)


def figures(page: str) -> list[str]:
    return re.findall(r"<figcaption><span>([^<]*)", page)


def test_curves_are_in_groups_with_learning_first_and_speed_folded_away(tmp_path):
    names = (
        "data_seconds",
        "eval_seconds",
        "grad_norm",
        "my_own",
        "loss",
        "eval_loss",
        "accuracy",
        "tokens_per_second",
    )
    rows = [{"step": i, **{name: 1 / (i + at + 2) for at, name in enumerate(names)}} for i in range(30)]
    write_lines(tmp_path / "run/metrics.jsonl", rows)
    page = page_of(tmp_path / "run")
    shown, folded = page.split('<details class="more">')
    assert re.findall(r'<h4 class="group">([^<]*)', page) == ["Learning", "Health"]
    assert figures(shown) == ["accuracy", "loss", "held-out loss", "gradient norm"]
    assert "<summary>Speed and other metrics</summary>" in "<details>" + folded
    assert figures(folded) == ["tokens per second", "data seconds", "eval seconds", "my own"]


def test_a_constant_is_not_drawn_and_no_metric_is_drawn_twice(tmp_path):
    rows = [{"step": i, "loss": 1 / (i + 1), "skipped": 0, "lr": 1e-4, "ratio_mean": 1 + 1e-7 * i} for i in range(30)]
    for row in rows:
        row |= dict.fromkeys(("tokens_per_second", "tokens_per_second_per_device"), 7.0 + row["step"])
    write_lines(tmp_path / "run/metrics.jsonl", rows)
    page = page_of(tmp_path / "run")
    assert figures(page) == ["loss", "tokens per second"]
    words = words_of(page)
    assert "Constant, so not drawn: learning rate 1e-4, ratio mean 1, skipped 0." in words
    assert "The same values: tokens per second per device." in words


def test_held_out_metrics_of_some_steps_have_a_dot_each_and_no_mean(tmp_path):
    rows = [{"step": i, "loss": 1 / (i + 1)} for i in range(40)]
    for row in rows[::10]:
        row["eval_accuracy"] = 0.5 + row["step"] / 100
    write_lines(tmp_path / "run/metrics.jsonl", rows)
    page = page_of(tmp_path / "run")
    assert "is null or not finite" not in page and figures(page) == ["held-out accuracy", "loss"]
    data = json.loads(re.search(r'id="curves-data">(.*?)</script>', page, flags=re.S)[1])
    assert data[0]["percent"] and data[0]["lines"][0]["steps"] == [0, 10, 20, 30]
    assert data[0]["lines"][0]["mean"] == data[0]["lines"][0]["raw"] == [0.5, 0.6, 0.7, 0.8]
    assert page.split("</figure>")[0].count("<circle cx=") == 4
    assert "The held-out accuracy went from 50% to 80% in 31 steps." in words_of(page)


def test_two_runs_share_their_panels_and_are_told_apart(tmp_path):
    first, second = make_run(tmp_path / "a/quickstart"), make_run(tmp_path / "b/quickstart")
    page = write_report([first, second, first], tmp_path / "deep/er/both.html").read_text()
    words = words_of(page)
    assert "a/quickstart, b/quickstart" in words and page.count("<figure>") == 3
    assert "held-out questions: a/quickstart 86.0%, b/quickstart 86.0%." in words
    assert [re.search(r'class="bar (\w*)"', part)[1] for part in page.split("<table>")[1:]] == ["c0", "c1"]
    data = json.loads(re.search(r'id="curves-data">(.*?)</script>', page, flags=re.S)[1])
    assert [[line["run"] for line in panel["lines"]] for panel in data] == [[0, 1]] * 3
    assert 'name="run"' in page


# The top of the page.


def test_the_result_comes_first_in_a_sentence(tmp_path):
    page = page_of(make_run(tmp_path / "quickstart"))
    sentence = "After GRPO the judge is right on 86.0% of 1,000 held-out questions"
    assert f"<h1>{sentence}; it was on 72.7% after SFT, 0.0% before training.</h1>" in page
    assert "Model" not in words_of(page.split("</header>")[0])  # no file of this run says it


def test_a_run_says_its_model_size_steps_duration_and_version(tmp_path):
    root = make_run(tmp_path / "quickstart")
    for name, steps, seconds in (("sft", 3, 40.0), ("grpo", 2, 31.0)):
        rows = [{"step": i, "stage": name, "loss": 2.0 - i, "seconds": seconds} for i in range(steps)]
        write_lines(root / name / "metrics.jsonl", rows)
        (root / name / "config.yaml").write_text("model: some/model-7B\n")
        about = {"version": "1.2.3", "written": f"2026-05-0{steps}T10:20:30+00:00", "mesh": {"fsdp": 4, "tensor": 2}}
        for step, facts in ((steps, about), (1, {"version": "0"})):
            (root / name / f"checkpoints/{step}").mkdir(parents=True)
            (root / name / f"checkpoints/{step}/manifest.json").write_text(json.dumps({"about": facts}))
    (root / "sft/model").mkdir()
    save_file({"a": np.zeros((1000, 500)), "b": np.zeros(20)}, root / "sft/model/model.safetensors")
    words = words_of(page_of(root).split("</header>")[0])
    assert "Model some/model-7B Parameters 500k Steps SFT 3, GRPO 2 Duration SFT 2 min 0 s, GRPO 1 min 2 s" in words
    assert "Devices 8 Finished 2026-05-03 10:20 UTC Version rmr1_jax 1.2.3" in words


STRANGE = ("", "[1]", "{", "a: [", '{"about": {"mesh": {"fsdp": "x"}, "written": "soon", "version": 3}}')


@pytest.mark.parametrize("text", STRANGE)
def test_facts_that_cannot_be_read_are_left_out(tmp_path, text):
    write_lines(tmp_path / "run/metrics.jsonl", [{"step": 0, "loss": 1.0}])
    for file in ("config.yaml", "model/config.json", "model/m.safetensors", "checkpoints/7/manifest.json"):
        (tmp_path / "run" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / file).write_text(text)
    words = words_of(page_of(tmp_path / "run").split("</header>")[0])
    assert "Steps 1" in words and not re.search(r"Model|Parameters|Finished|Version|Devices", words)


# Several traces of one question.


def test_the_traces_of_one_question_stand_beside_each_other(tmp_path):
    rows = [sample(1, stage=stage, winner=side, correct=side == "A") for stage, side in (("grpo", "A"), ("sft", "B"))]
    page = page_of(make_run(tmp_path / "run", [*rows, sample(2, stage="sft")]))
    assert page.count('<details class="sample"') == 2
    card = next(card for card in page.split('<details class="sample"') if ">q1<" in card)
    assert re.findall(r'<div class="trace" data-stage="(\w+)"', card) == ["sft", "grpo"] and 'class="beside"' in card
    words = words_of(card)
    quote = "\N{RIGHT SINGLE QUOTATION MARK}"
    assert "\N{BALLOT X} wrong after SFT \N{CHECK MARK} right after GRPO" in words
    assert f"Answer A better judge{quote}s choice after GRPO" in words
    assert f"Answer B judge{quote}s choice after SFT" in words
    assert "After SFT \N{BALLOT X} wrong" in words and "After GRPO \N{CHECK MARK} right" in words


def test_rollouts_are_shown_with_step_and_reward_evenly_over_the_steps(tmp_path):
    pair = {"question": "Ask", "response_a": "1", "response_b": "2", "better": "A", "text": CHAT, "status": "ok"}
    rows = [
        {"step": step, "id": f"p{n}", "reward": [1.0, -1.0][n], "verdict": "AB"[n], "new_tokens": 9, **pair}
        for step in range(500)
        for n in range(2)
    ]
    rows[-1] = {
        "step": 499,
        "id": "p1",
        "prompt": "Rendered",
        "text": CHAT[:20],
        "verdict": None,
        "reward": -1,
        "finish_reason": "length",
    }
    write_lines(tmp_path / "run/grpo/rollouts.jsonl", rows)
    page = page_of(tmp_path / "run", max_traces=20)
    shown = [int(step) for step in re.findall(r">step (\d+)</span>", page)]
    assert len(shown) == 10 and shown == sorted(shown) and shown[0] == 0 and shown[-1] == 499
    words = words_of(page)
    assert "10 of 1,000 texts of training are shown, spread evenly over the steps." in words
    assert "\N{CHECK MARK} right reward 1 step 0 GRPO" in words
    last = words_of(page.rsplit('<details class="sample"', 1)[1])
    assert "reward \N{MINUS SIGN}1 step 499" in last and "Rendered" in last
    assert "No verdict: the text was cut off at the limit of tokens." in last


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"text": "Both A and [[A]] or [[B]]"}, "the text names both answers"),
        ({"text": "no idea"}, "the text names no answer"),
        ({"text": "[[A]]"}, "the verdict is in a form that the rule does not read"),
        ({"finish_reasons": [["length"]]}, "the text was cut off at the limit of tokens"),
        ({"finish_reason": "length"}, "the text was cut off at the limit of tokens"),
        ({"status": "invalid", "reason": "refused"}, "the endpoint refused the request"),
        ({"status": "too_long", "text": ""}, None),
    ],
)
def test_a_trace_without_a_verdict_says_why(tmp_path, change, why):
    row = sample(1, winner=None, correct=None) | change
    words = words_of(page_of(make_run(tmp_path / "run", [row])))
    assert (f"No verdict: {why}." in words) if why else ("No verdict:" not in words)


# In a browser.


def test_the_page_works_in_a_browser(tmp_path):
    root = make_run(tmp_path / "run")
    write_report([root], tmp_path / "report.html")
    with chromium(tmp_path / "profile") as browser:
        browser.open(tmp_path / "report.html")
        shown = "[...document.querySelectorAll('.sample')].filter(s => s.offsetHeight > 0).length"
        choose = "s = document.querySelector('select[name={}]'), s.value = '{}', s.dispatchEvent(new Event('change'))"
        assert browser.evaluate(shown) == 5
        browser.evaluate("var s; " + choose.format("outcome", "right"))
        assert browser.evaluate(shown) == 3
        browser.evaluate(choose.format("kind", "reasoning"))
        assert browser.evaluate(shown) == 1
        assert browser.evaluate("document.getElementById('count').textContent") == "1 of 5 questions"
        browser.evaluate(choose.format("outcome", "wrong"))
        assert browser.evaluate(shown) == 0
        browser.evaluate("document.getElementById('close-all').click()")
        assert browser.evaluate("document.querySelectorAll('.sample[open]').length") == 0
        browser.evaluate(choose.format("outcome", ""))
        browser.evaluate(choose.format("kind", ""))
        browser.evaluate("document.getElementById('open-all').click()")
        assert browser.evaluate("document.querySelectorAll('.sample[open]').length") == 5
        assert browser.evaluate("document.querySelector('code.tag').offsetWidth") == 0
        browser.evaluate("document.getElementById('show-tags').click()")
        assert browser.evaluate("document.querySelector('code.tag').offsetWidth") > 0
        # The curves' tooltip, by pointer and by key.
        browser.evaluate(
            "var svg = document.querySelectorAll('figure svg')[1], tip = svg.parentNode.querySelector('.tip')"
        )
        browser.evaluate(
            "var b = svg.getBoundingClientRect(); svg.dispatchEvent(new PointerEvent('pointermove', "
            "{clientX: b.left + b.width * (46 + 284 * 0.5) / 340, clientY: b.top + 20}))"
        )
        assert browser.evaluate("tip.textContent").split("\n")[0] in ("step 19", "step 20")
        assert browser.evaluate("tip.textContent").split("\n")[1].startswith("74.")
        browser.evaluate("svg.dispatchEvent(new KeyboardEvent('keydown', {key: 'Home'}))")
        assert browser.evaluate("tip.textContent").split("\n")[0] == "step 0" and not browser.evaluate("tip.hidden")
        # Both colour schemes, each with readable contrast; nothing wider than a phone.
        for scheme in ("light", "dark"):
            browser.set_scheme(scheme)
            assert min(json.loads(browser.evaluate(CONTRASTS))) >= 4.5
        browser.set_size(400, 800, mobile=True)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 400
        assert browser.errors() == []
        assert {url.split(":")[0] for url in browser.requests()} <= {"file", "about"}


def test_a_script_that_gets_into_the_page_is_not_run(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    (tmp_path / "bad.html").write_text(page.replace("</body>", "<script>var taken = true</script></body>"))
    with chromium(tmp_path / "profile") as browser:
        browser.open(tmp_path / "bad.html")
        assert browser.evaluate("typeof taken") == "undefined"
        assert browser.evaluate("document.querySelector('.controls').hidden") is False  # its own script has run


def test_a_trace_has_a_link_a_place_in_the_order_and_keys(tmp_path):
    rows = [sample(i, text=CHAT + " " * 50 * i) for i in range(1, 4)]
    rows.append(sample(9, winner="B", correct=False))
    write_report([make_run(tmp_path / "run", rows)], tmp_path / "r.html")
    ids = "[...document.querySelectorAll('.sample .id')].map(id => id.textContent).join(' ')"
    press = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {{key: '{}', bubbles: true}}))"
    order = "s = document.getElementById('order'), s.value = '{}', s.dispatchEvent(new Event('change'))"
    with chromium(tmp_path / "profile") as browser:
        browser.open(tmp_path / "r.html")
        assert browser.evaluate(ids) == "q9 q1 q2 q3"
        browser.evaluate("var s; " + order.format("length"))
        assert browser.evaluate(ids) == "q3 q2 q1 q9"
        browser.evaluate(order.format("number"))
        assert browser.evaluate(ids) == "q1 q2 q3 q9"
        browser.evaluate("document.getElementById('close-all').click(); location.hash = '#q-q2'")
        browser.wait_for("document.getElementById('q-q2').open")
        browser.evaluate("document.querySelector('#q-q2 summary').focus();" + press.format("j"))
        assert browser.evaluate("[...document.querySelectorAll('.sample[open]')].map(s => s.id)") == ["q-q3"]
        browser.evaluate(press.format("k"))
        assert browser.evaluate("[...document.querySelectorAll('.sample[open]')].map(s => s.id)") == ["q-q2"]
        assert browser.errors() == []
