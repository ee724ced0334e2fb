import json
import re

import mutations

from gecko_jax.cli import entry
from gecko_jax.io import wording


def test_counts_have_singular_and_plural():
    counts = {0: "0 pairs", 1: "1 pair", 2: "2 pairs", 2_000: "2,000 pairs"}
    assert {n: wording.counted(n, "pair") for n in counts} == counts


def test_control_characters_do_not_reach_the_terminal():
    assert (
        wording.printable("a\x1b[31m b\x00\x9b é 🦎")
        == "a\ufffd[31m b\ufffd\ufffd é 🦎"
    )


def test_a_message_cannot_look_like_another_one():
    told = wording.message(f"x.json: {mutations.HOSTILE}; mend it\n  in two lines")
    first, *others = told.split("\n")
    assert first == "x.json: x"
    assert all(line.startswith("  ") for line in others)
    assert others[-1] == "  in two lines"
    assert not re.search("[\x1b\x9b\u202e]", told)
    assert len(wording.message("x" * 10_000)) < 5_000


def test_a_line_of_json_has_no_control_characters_and_means_the_same():
    value = {"text": f"{mutations.HOSTILE} \x7f \u2028 é"}
    line = wording.json_line(value)
    assert json.loads(line) == value
    assert "é" in line
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u202e]", line)


def test_untrusted_text_is_escaped_in_markdown():
    for written in (
        wording.markdown(mutations.HOSTILE),
        wording.markdown_code(mutations.HOSTILE),
        wording.markdown_code("a ` b"),
        wording.markdown_code("[x](javascript:1)", in_table=True),
    ):
        assert not re.search(r"[\n\x1b\x9b<]|\]\(|(?<!\\)[|`]", written)
    assert wording.markdown("CC BY-SA 4.0 (a_b)") == r"CC BY-SA 4.0 (a\_b)"
    assert wording.markdown_code("a | b", in_table=True) == r"`a \| b`"
    assert wording.markdown_code("title: T | text: <b") == r"title: T \| text: &lt;b"


def test_errors_of_the_command_line_are_printable(tmp_path, capsys):
    for arguments in (
        ["export", f"--model={tmp_path}/{mutations.HOSTILE}", "--output=x"],
        ["data", "prepare", mutations.HOSTILE],
        ["search", f"--index={tmp_path}", f"--{mutations.HOSTILE}", "--model=mini"],
        [mutations.HOSTILE],
    ):
        assert entry.main(arguments) in (1, 2)
        lines = capsys.readouterr().err.rstrip().split("\n")
        assert sum(line.startswith("gecko") for line in lines) == 1, lines
        assert not re.search("[\x1b\x9b\u202e]", "".join(lines))
