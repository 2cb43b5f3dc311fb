"""Rows as the model sees them: the whole text, the trained tokens marked, control characters escaped."""

import json

import numpy as np
import pytest
from prepared import config_of, rows, write_rows

from rmr1_jax.cli.main import main
from rmr1_jax.data.examples import Example, sft_example
from rmr1_jax.data.prepare import prepare
from rmr1_jax.data.show import pieces, show, show_example, visible
from rmr1_jax.errors import InputError


def test_the_pieces_are_the_row(tokenizer):
    messages = [{"role": "user", "content": "na\u00efve \u65e5\u672c \U0001f642 <|im_end|>"}]
    example = sft_example(tokenizer, "x", messages, "<answer>[[A]]</answer>\U0001f642")
    shown = list(pieces(example, tokenizer))
    assert "".join(text for text, _ in shown) == tokenizer.hf.decode(example.tokens, skip_special_tokens=False)
    assert "".join(text for text, trained in shown if trained) == "<answer>[[A]]</answer>\U0001f642<|im_end|>"
    assert len(shown) > 10 and not any("\ufffd" in text for text, _ in shown)


def test_a_broken_character_is_shown_and_no_token_is_lost(tokenizer):
    ids = tokenizer.encode("\U0001f642")
    example = Example("x", np.asarray([*ids[:-1], *tokenizer.encode("ab")], np.int32), np.zeros(len(ids) + 1, bool))
    text = "".join(text for text, _ in pieces(example, tokenizer))
    assert "\ufffd" in text and text.endswith("b")


def test_trained_tokens_are_marked(tokenizer):
    example = sft_example(tokenizer, "row-1", [{"role": "user", "content": "Which?"}], "<answer>[[A]]</answer>")
    head, plain = show_example(example, tokenizer).split("\n", 1)
    trained = int(example.trained.sum())
    assert head == f"row-1  ({len(example)} tokens: {len(example) - trained} of the prompt, {trained} trained)"
    assert plain.count("\u27e6") == plain.count("\u27e7") == trained
    assert plain.index("\u27e6") > plain.index("assistant")
    coloured = show_example(example, tokenizer, colour=True)
    assert coloured.count("\x1b[30;") == trained and "\u27e6" not in coloured
    assert coloured.count("\x1b[0m") == len(example)


def test_control_characters_are_escaped(tokenizer):
    assert visible("a\x1b[31m\x07\u202eb\tc\nd") == "a\\x1b[31m\\x07\\u202eb\tc\nd"
    example = Example("id\x1b]0;x\x07", np.asarray(tokenizer.encode("\x1b[2Jx"), np.int32), np.zeros(99, bool)[:0])
    example = Example(example.id, example.tokens, np.zeros(len(example.tokens), bool))
    assert "\x1b" not in show_example(example, tokenizer) and "\\x1b[2Jx" in show_example(example, tokenizer)


def test_prepared_sets_rows_and_pairs_are_shown(tmp_path, world_tokenizer, capsys):
    data = write_rows(tmp_path / "rows.jsonl", rows(5))
    pair = {"id": "p", "question": "2+2?", "response_a": "4", "response_b": "5", "better": "A"}
    pairs = write_rows(tmp_path / "pairs.jsonl", [pair])
    prepare(config_of(model=str(world_tokenizer), data=str(data), out=str(tmp_path / "set")))
    model = ["--model", str(world_tokenizer)]

    def shown(*arguments):
        assert main(["data", "show", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    from_rows = shown(data, *model, "-n", 2)
    assert from_rows == shown(tmp_path / "set", "-n", 2) == shown(tmp_path / "set", *model, "--count", 2)
    assert "r0  (" in from_rows and "r1  (" in from_rows and "r2  (" not in from_rows and "source s1" in from_rows
    assert shown(data, *model).count("trained)") == 0 and "\u27e6" in shown(data, *model)
    of_pair = shown(pairs, *model, "--prompt", "cor")
    assert "0 trained; better A)" in of_pair and "2+2?" in of_pair and "\u27e6" not in of_pair
    for arguments, message in (
        ((data,), "give --model"),
        ((pairs, *model), "--prompt of `rmr1 data show`"),
        ((data, *model, "-n", 0), "expected at least 1 row"),
        ((tmp_path / "nowhere", *model), "nowhere"),
    ):
        assert main(["data", "show", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err


def test_a_set_is_not_shown_with_another_tokenizer(tmp_path, world_tokenizer):
    import shutil

    data = write_rows(tmp_path / "rows.jsonl", rows(5))
    prepare(config_of(model=str(world_tokenizer), data=str(data), out=str(tmp_path / "set")))
    other = shutil.copytree(world_tokenizer, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("<|im_end|>", "<|endoftext|>")
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="prepared with another tokenizer"):
        next(show(tmp_path / "set", model=str(other)))


def test_prepare_on_the_command_line(tmp_path, world_tokenizer, capsys):
    data = write_rows(tmp_path / "rows.jsonl", rows(5))
    config = tmp_path / "prepare.yaml"
    config.write_text(f"model: {world_tokenizer}\ndata: {data}\nout: {tmp_path / 'set'}\nworkers: 1\n")
    assert main(["data", "prepare", str(config), "limit=4"]) == 0
    out = capsys.readouterr().out
    assert "4 kept" in out and "1 left out" in out and f"data={tmp_path / 'set'} model={world_tokenizer}" in out
    assert main(["data", "prepare", str(config)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["data", "prepare", str(config), "max_lenght=4"]) == 2
    assert "did you mean max_length?" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "set")]) == 0
    assert (tmp_path / "set" / "report.html").is_file()
    assert len(list(show(tmp_path / "set", count=99))) == 4  # a file more in the directory spoils nothing
