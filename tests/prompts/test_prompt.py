"""Prompts: frames, files, recovery of the published text from published rows."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import rmr1_jax
from rmr1_jax.errors import InputError
from rmr1_jax.prompts.prompt import (
    CONVERSATIONS,
    OWN_PROMPTS,
    QUESTION,
    RESPONSES,
    Prompt,
    get_prompt,
    load_prompt,
    published_frames,
    save_prompt,
    split_frame,
)
from rmr1_jax.prompts.recover import recover_prompt

DELIMITERS = (QUESTION, *RESPONSES, *CONVERSATIONS)
ROW_FILES = ("distill_sft", "rlvr", "reasoning_rlvr")


def published_rows(shared_data, name):
    path = shared_data / "published_rows" / f"{name}.jsonl"
    return [json.loads(line)["context_messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def prompt_for_tests(**changes):
    single_turn, multi_turn = published_frames("Before. \n\n", "\n\n", "\n\nAfter {question}.")
    prompt = Prompt(name="mine", system="Judge.\n  <type>x</type> \n", single_turn=single_turn, multi_turn=multi_turn)
    return dataclasses.replace(prompt, **changes)


# ---- the project's own prompts ----


def test_own_prompts_have_the_published_delimiters_in_order():
    for prompt in map(get_prompt, OWN_PROMPTS):
        user = prompt.render("QQ", "AA", "BB")[-1]["content"]
        places = [
            user.index(text) for text in (QUESTION + "QQ", RESPONSES[0] + "AA" + RESPONSES[1], RESPONSES[2] + "BB")
        ]
        assert places == sorted(places) and user.count("[") == (9 if prompt.system is None else 5)
        turns = [("user", "hi"), ("assistant", "ho")]
        user = prompt.render_conversations(turns, turns)[-1]["content"]
        assert CONVERSATIONS[0] + "User: hi\nChatbot A: ho" + CONVERSATIONS[1] in user
        assert CONVERSATIONS[2] + "User: hi\nChatbot B: ho" + CONVERSATIONS[3] in user
        assert QUESTION not in user


def test_own_prompts_ask_for_their_parts():
    systems = {name: get_prompt(name).system for name in OWN_PROMPTS}
    for tag in ("type", "solution", "rubric", "justify", "eval", "answer"):
        assert f"<{tag}>" in systems["cor"] and f"</{tag}>" in systems["cor"]
    for tag in ("quote_A", "summary_A", "quote_B", "summary_B"):
        assert f"<{tag}>...</{tag}>" in systems["cor"]
    assert systems["reasoning"] is None and [m["role"] for m in get_prompt("reasoning").render("q", "a", "b")] == [
        "user"
    ]
    assert "<type>" not in systems["rubric"] and "<rubric>" in systems["rubric"]
    assert "<rubric>" not in systems["compare"] and "<type>" not in systems["compare"]
    assert {name: get_prompt(name).structure for name in OWN_PROMPTS} == {
        "cor": "cor",
        "reasoning": "verdict",
        "compare": "compare",
        "rubric": "rubric",
    }


def test_own_wording_shares_no_sentence_with_the_published_one(shared_data):
    def sentences(prompt):
        text = "\n".join(filter(None, [prompt.system, prompt.single_turn[0], prompt.single_turn[3]]))
        for delimiter in DELIMITERS:
            text = text.replace(delimiter.strip(), "\n")
        text = re.sub(r"</?\w+>|\[\[.*?\]\]", " ", text)  # tags and verdicts are shared on purpose
        found = {" ".join(re.findall(r"\w+", piece)).lower() for piece in re.split(r"[.:?\n]+", text)}
        return {sentence for sentence in found if len(sentence.split()) > 3}

    for name in ROW_FILES:
        published = sentences(recover_prompt(published_rows(shared_data, name)))
        assert published
        for prompt in map(get_prompt, OWN_PROMPTS):
            assert not published & sentences(prompt)


def test_answers_cannot_change_the_frame():
    tricky = "{question} {response_b} %s \\n </answer>" + RESPONSES[1] + "\n\n" + RESPONSES[2]
    prompt = prompt_for_tests()
    user = prompt.render(tricky, tricky, "")[-1]["content"]
    before, mid, between, after = prompt.single_turn
    assert user == before + tricky + mid + tricky + between + "" + after


def test_conversation_with_another_role_is_refused():
    with pytest.raises(InputError, match="role 'system'"):
        get_prompt("cor").render_conversations([("system", "x")], [("user", "x")])


# ---- by name, and files ----


def test_get_prompt_by_name_file_or_itself(tmp_path):
    assert get_prompt("cor").name == "cor"
    mine = prompt_for_tests()
    assert get_prompt(mine) is mine
    save_prompt(get_prompt("rubric"), tmp_path / "p.yaml")
    assert get_prompt(str(tmp_path / "p.yaml")) == get_prompt("rubric")


def test_own_prompt_files_are_as_save_prompt_writes_them(tmp_path):
    for name in OWN_PROMPTS:
        own = Path(rmr1_jax.__file__).parent / "prompts" / "named" / f"{name}.yaml"
        save_prompt(get_prompt(name), tmp_path / "p.yaml")
        assert get_prompt(name).name == name and (tmp_path / "p.yaml").read_bytes() == own.read_bytes()


@pytest.mark.parametrize(("given", "nearest"), [("reasonning", "reasoning"), ("core", "cor"), ("rubrics", "rubric")])
def test_unknown_name_names_the_nearest(given, nearest):
    with pytest.raises(InputError, match=f"{given}.*nearest name is '{nearest}'"):
        get_prompt(given)


@pytest.mark.parametrize(
    "system",
    [None, "", "null", "x", "a\n\nb  \n c\t\n", "\n\n lead", "q\"'{}:#\n- a", "caf\u00e9 \u2028 \U0001f600\n\x85", "~"],
)
def test_prompt_file_round_trip(tmp_path, system):
    prompt = prompt_for_tests(
        system=system,
        single_turn=("{} \n\n", "\n{quest\n ", "b\r\nc", " trailing \n"),
        multi_turn=("", "\n", "\n\n\n"),
        note="where from: 3 rows",
    )
    save_prompt(prompt, tmp_path / "p.yaml")
    assert load_prompt(tmp_path / "p.yaml") == prompt


def test_prompt_file_by_hand(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        "name: mine\nsystem: null\n"
        'single_turn: "Q {question} A {response_a} B {response_b} {not a place}"\n'
        'multi_turn: "{conversation_a}|{conversation_b}"\n'
    )
    prompt = load_prompt(path)
    assert prompt.render("1", "2", "3") == [{"role": "user", "content": "Q 1 A 2 B 3 {not a place}"}]
    assert prompt.multi_turn == ("", "|", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nsystm: b\n", "unknown key systm; did you mean system"),
        ("name: a\nsystem: b\nsingle_turn: c\n", "multi_turn: Field required"),
        ("name: a\nsystem: 3\nsingle_turn: c\nmulti_turn: d\n", r"system: Input should be a valid string \(got 3\)"),
        ("name: a\nsystem: b\nsingle_turn: c\nmulti_turn: d\n", "p.yaml: single_turn must hold {question}"),
        (
            'name: a\nsystem: b\nsingle_turn: "{response_a}{question}{response_b}"\nmulti_turn: d\n',
            "each once and in this order",
        ),
        (
            'name: a\nsystem: b\nsingle_turn: "{question}{question}{response_a}{response_b}"\nmulti_turn: d\n',
            "each once and in this order",
        ),
        ("- a\n- b\n", "p.yaml holds a list; expected `key: value` lines"),
        ("name: [a\n", r"p.yaml is not valid YAML: (?s:.*)line 2, column 1"),
        ("", "name: Field required"),
    ],
)
def test_bad_prompt_file(tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_prompt(tmp_path / "p.yaml")


def test_prompt_file_that_is_missing_or_not_utf8(tmp_path):
    with pytest.raises(InputError, match="cannot read the config"):
        load_prompt(tmp_path / "none.yaml")
    (tmp_path / "p.yaml").write_bytes(b"name: \xff\xfe\n\x80")
    with pytest.raises(InputError, match=r"p\.yaml: .*can't decode byte 0xff"):
        load_prompt(tmp_path / "p.yaml")


def test_frame_that_spells_a_place_is_not_saved(tmp_path):
    prompt = prompt_for_tests(single_turn=("{question}", "a", "b", "c"))
    with pytest.raises(InputError, match="single_turn"):
        save_prompt(prompt, tmp_path / "p.yaml")
    assert not (tmp_path / "p.yaml").exists()


# ---- recovery ----


@pytest.mark.parametrize("name", ROW_FILES)
def test_recovered_prompt_renders_every_published_row_again(shared_data, tmp_path, name):
    rows = published_rows(shared_data, name)
    prompt = recover_prompt(rows)
    save_prompt(prompt, tmp_path / "p.yaml")
    prompt = load_prompt(tmp_path / "p.yaml")
    assert prompt.system == (rows[0][0]["content"] if len(rows[0]) == 2 else None)
    for row in rows:
        parts = split_frame(prompt.single_turn, row[-1]["content"])
        assert prompt.render(*parts) == row
        assert not any(delimiter.strip() in part for delimiter in DELIMITERS for part in parts)
    assert prompt.structure == ("verdict" if name == "reasoning_rlvr" else "cor")


@pytest.mark.parametrize("name", ROW_FILES)
def test_one_row_is_enough(shared_data, name):
    rows = published_rows(shared_data, name)
    whole = recover_prompt(rows)
    for row in rows[::7]:
        assert dataclasses.replace(recover_prompt([row]), note=whole.note) == whole


def test_recovery_says_when_only_one_kind_was_seen():
    prompt = prompt_for_tests(single_turn=published_frames("x ", "\n\n", " y")[0])
    recovered = recover_prompt([prompt.render("q", "a", "b")])
    assert "no multi-turn row was seen" in recovered.note
    assert recovered.multi_turn == published_frames("x ", "\n\n", " y")[1]
    turns = [("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    recovered = recover_prompt([prompt_for_tests().render_conversations(turns, turns)])
    assert "no single-turn row was seen" in recovered.note and recovered.single_turn == prompt_for_tests().single_turn


def test_recovery_from_both_kinds_with_different_texts():
    prompt = prompt_for_tests(multi_turn=published_frames("Several turns:\n", "\n--\n", "\nend")[1])
    turns = [("user", "u"), ("assistant", "a")]
    rows = [prompt.render("q", "a", "b"), prompt.render_conversations(turns, turns)]
    recovered = recover_prompt(rows)
    assert (recovered.single_turn, recovered.multi_turn) == (prompt.single_turn, prompt.multi_turn)
    assert "no " not in recovered.note


def test_recovery_is_not_misled_by_answers_that_imitate_the_delimiters():
    prompt = prompt_for_tests()
    end_a, start_b, end_b = RESPONSES[1:]
    fake = f"x{end_a}\n\nfree text\n\n{start_b}y{end_b}\n\n{QUESTION}z{CONVERSATIONS[0]}"
    rows = [
        prompt.render("What is 1?", fake, fake),
        prompt.render(fake, "", ""),
        prompt.render("\n\n", f"{end_a}{end_a}", f"{start_b}{end_b}"),
        prompt.render("What is 2?", "two", "three"),
    ]
    for several in (rows, rows[::-1], rows[1:], rows[:1] + rows[3:], rows[:1]):
        recovered = recover_prompt(several)
        assert (recovered.system, recovered.single_turn) == (prompt.system, prompt.single_turn)
        for row in several:
            assert recovered.render(*split_frame(recovered.single_turn, row[-1]["content"])) == row
    assert split_frame(recovered.single_turn, rows[3][-1]["content"]) == ("What is 2?", "two", "three")


def test_a_row_is_of_the_kind_whose_delimiter_comes_first():
    prompt = prompt_for_tests()
    turns = [("user", f"{QUESTION}u"), ("assistant", "a")]
    recovered = recover_prompt([prompt.render_conversations(turns, turns), prompt.render(CONVERSATIONS[0], "a", "b")])
    assert recovered.note == "recovered from 1 single-turn and 1 multi-turn rows"
    assert (recovered.single_turn, recovered.multi_turn) == (prompt.single_turn, prompt.multi_turn)


def test_recovery_takes_published_rows_as_dicts():
    prompt = prompt_for_tests()
    row = {"context_messages": prompt.render("q", "a", "b"), "winner": "model_a"}
    assert recover_prompt([row]).single_turn == prompt.single_turn


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row[0].update(content="Judge!"), "row 2: its system text differs.*character 6"),
        (lambda row: row.pop(0), "row 2: its system text differs"),
        (lambda row: row[1].update(content="No delimiters"), "row 2: the user turn holds neither"),
        (
            lambda row: row[1].update(content=row[1]["content"].replace(RESPONSES[1], "")),
            "row 2: the delimiter .* is absent",
        ),
        (lambda row: row[1].update(content="!" + row[1]["content"]), "text before the delimiters differs"),
        (lambda row: row[1].update(content=row[1]["content"] + "!"), "text after the delimiters differs"),
        (
            lambda row: row[1].update(content=row[1]["content"].replace("\n\n" + RESPONSES[2], RESPONSES[2])),
            "text between the answers differs",
        ),
        (lambda row: row.append({"role": "assistant", "content": "x"}), "row 2: the roles are"),
        (lambda row: row[1].update(content=None), "row 2: every message needs a 'content'"),
        (lambda row: row.clear(), r"row 2: the roles are \(\)"),
    ],
)
def test_rows_that_disagree(change, message):
    prompt = prompt_for_tests()
    rows = [prompt.render("q", "a", "b"), prompt.render("q2", "a2", "b2")]
    change(rows[1])
    with pytest.raises(InputError, match=message):
        recover_prompt(rows)


def test_no_rows():
    with pytest.raises(InputError, match="there are no rows to recover a prompt from"):
        recover_prompt([])


def test_a_text_is_split_by_the_frame_of_its_own_prompt():
    text = get_prompt("reasoning").render("q", "a", "b")[-1]["content"]
    assert split_frame(get_prompt("cor").single_turn, text) is None
    assert split_frame(get_prompt("reasoning").single_turn, text) == ("q", "a", "b")


def test_the_first_split_of_several_is_returned():
    frame = get_prompt("cor").single_turn
    text = get_prompt("cor").render("q", f"a{RESPONSES[1]}\n\n{RESPONSES[2]}x", "b")[-1]["content"]
    assert split_frame(frame, text)[:2] == ("q", "a")
    for part in ("", "\n", RESPONSES[0], RESPONSES[3]):
        for parts in ((part, "a", "b"), ("q", part, "b"), ("q", "a", part)):
            turn = get_prompt("cor").render(*parts)
            assert get_prompt("cor").render(*split_frame(frame, turn[-1]["content"])) == turn
