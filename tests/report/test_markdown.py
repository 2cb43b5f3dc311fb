"""Markdown in questions and answers: what is drawn, that no letter is lost, nothing can run, and that it is fast."""

import json

import pytest
from headless import chromium
from run_directories import make_run, sample

from rmr1_jax.report.report import write_report

MARKDOWN = """# Title
Some **bold** and *soft* `x < y` words, 2 * 3 * 4 and snake_case_name.

1. one
2. two
   - inner
> said

| a | b |
|---|---|
| 1 | **2** |

```python
def f():
    return "<b>"
```
<img src=x onerror="document.title='taken'"> [link](https://example.org) ![picture](x.png)"""


def test_markdown_and_code_in_answers_are_drawn_and_stay_harmless(tmp_path):
    code = "def f(x):\n    # note\n    return x\n"
    write_report([make_run(tmp_path / "run", [sample(1, response_a=MARKDOWN, response_b=code)])], tmp_path / "r.html")
    inside = "[...document.querySelectorAll('.side.A {}')].map(element => element.textContent)"
    with chromium(tmp_path / "profile") as browser:
        browser.open(tmp_path / "r.html")
        assert browser.evaluate(inside.format(".heading")) == ["Title"]
        assert browser.evaluate(inside.format("strong")) == ["bold", "2"]
        assert browser.evaluate(inside.format("em")) == ["soft"]
        assert browser.evaluate(inside.format("p code")) == ["x < y"]
        assert browser.evaluate(inside.format("ol > li > p")) == ["one", "two"]
        assert browser.evaluate(inside.format("ol ul li")) == ["inner"]
        assert browser.evaluate(inside.format("blockquote")) == ["said"]
        assert browser.evaluate(inside.format("th, .side.A td")) == ["a", "b", "1", "2"]
        assert browser.evaluate(inside.format("pre")) == ['def f():\n    return "<b>"\n']
        paragraphs = browser.evaluate(inside.format(".words > p:not(.heading)"))
        assert paragraphs == [
            "Some bold and soft x < y words, 2 * 3 * 4 and snake_case_name.",
            MARKDOWN.rsplit("\n", 1)[1],  # HTML, links and pictures are shown as they are written
        ]
        assert browser.evaluate("document.querySelector('.side.B pre').textContent") == code
        assert browser.evaluate("document.querySelectorAll('main img, main b, .words a').length") == 0
        assert browser.evaluate("document.title") == "rmr1 report: run"
        browser.evaluate("document.getElementById('show-source').click()")
        assert browser.evaluate("document.querySelector('.side.A .words').textContent") == MARKDOWN
        assert browser.evaluate("document.querySelectorAll('.side.A .words *').length") == 0
        assert browser.errors() == []


# The letters and digits of a text, and those that are shown of it.
PARTS = """(text => {
  const box = document.createElement('div');
  box.append(...markdown(text, (start, end) => [text.slice(start, end)]));
  return [text, box.textContent].map(words => words.replace(/[^\\p{L}\\p{N}]/gu, ''));
})"""
STRANGE = (
    "",
    "\n\n",
    "- ",
    "a\n- b\n\n c\n  d\n* e",
    "> > > > > > > > > q",
    "| x |\n|---|\n|",
    "```\nopen",
    "# ",
    "***",
)
STRANGE += ("*a **b* c**", "``a`b``", "  indented\n\tonly", "* * *\nx", "a\r\n\r\nb\r\n", "\u202e<b>x", "a **b\nc** d")
STRANGE += ("- a\n  - b\n    - c\n- d\ne\n\nf", "|a|b|\n|-|-|\n|c|\n|d|e|f|\ng", "~~~\n```\n~~~\nx", "> a\nb\n> - c")
SLOW = ("*" * 60_000, "`" * 60_000, "> " * 20_000, "- " * 20_000, "|" * 60_000, "*a " * 20_000, "- a\n" * 20_000)


def test_no_letter_of_a_text_is_lost(tmp_path):
    write_report([make_run(tmp_path / "run")], tmp_path / "r.html")
    with chromium(tmp_path / "profile") as browser:
        browser.open(tmp_path / "r.html")
        for text in STRANGE:
            before, after = browser.evaluate(f"{PARTS}({json.dumps(text)})")
            assert before == after, text
        assert browser.errors() == []


@pytest.mark.slow
def test_a_long_hostile_text_takes_no_time(tmp_path):
    write_report([make_run(tmp_path / "run")], tmp_path / "r.html")
    with chromium(tmp_path / "profile") as browser:
        browser.open(tmp_path / "r.html")
        for text in SLOW:
            browser.evaluate(f"var begun = performance.now(); {PARTS}({json.dumps(text)})")
            assert browser.evaluate("performance.now() - begun") < 5000, text[:4]
