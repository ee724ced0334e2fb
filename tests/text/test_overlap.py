"""Texts of evaluation sets are detected: equal texts, and common runs of words."""

import hypothesis
import pytest
from hypothesis import strategies

from gecko_jax.evaluation import set_texts, sets
from gecko_jax.text import overlap

WORDS = [f"word{number}" for number in range(40)]
LONG = " ".join(WORDS)


def known(*texts, name="set", side="query"):
    found = overlap.Contamination()
    found.add(name, side, [(f"q{n}", text) for n, text in enumerate(texts)])
    return found


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        (f"so {' '.join(WORDS[20:33])} there", " ".join(WORDS[20:33])),
        (f"so {' '.join(WORDS[20:32])} there", None),  # one word fewer
        (f"so {' '.join(WORDS[20:26])} X {' '.join(WORDS[26:33])}", None),
        (f"so {' '.join(reversed(WORDS[20:33]))}", None),
        (LONG.upper().replace(" ", ", "), LONG),
    ],
)
def test_a_run_of_thirteen_words_is_detected(text, shared):
    found = known("another text", LONG).find(text)
    assert [match.shared for match in found] == ([shared] if shared else [])
    assert known(LONG).holds(text) == bool(shared)
    for match in found:
        assert (match.set, match.side, match.id) == ("set", "query", "q1")
        assert match.is_same == (shared == LONG)


@pytest.mark.parametrize("length", range(1, 16))
def test_short_texts_count_whole(length):
    text = " ".join(WORDS[:length])
    assert known(text).holds(text)
    assert known(text).holds(f"and {text} too") == (length >= overlap.LEAST_WORDS)


def test_every_set_is_named_once_and_the_best_match_first():
    found = known(LONG, f"{LONG} more", name="a")
    found.add("b", "passage", [("p", " ".join(WORDS[5:30]))])
    found.add("c", "passage", [("p", "nothing of it")])
    assert found.sets == ("a", "b", "c")
    same, run = found.find(LONG)
    assert (same.set, same.is_same, same.id) == ("a", True, "q0")
    assert (run.set, run.side, run.is_same) == ("b", "passage", False)
    assert run.shared in " ".join(WORDS[5:30])
    # A set that is added later is detected, too.
    found.add("d", "text", [("1", LONG)])
    assert [match.set for match in found.find(LONG)] == ["a", "d", "b"]


def test_without_sets_or_words_nothing_is_detected():
    assert not overlap.Contamination().holds(LONG)
    assert not known("?!", "").holds("?!")
    assert not known(LONG).holds("")


# Characters that count as 13 words: one, two (kana) or three per word.
@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("东京铁塔是位于日本东京都港区芝公园的一座电波塔", 13),
        ("ひらがなだけでかかれたながいぶんしょうをここにおいておきます", 26),
        ("กขคงจฉชซฌญฎฏฐฑฒณดตถทธนบปผฝพฟภมยรลวศษสหฬอฮกคจชดตบ", 39),
    ],
)
def test_a_run_has_as_many_characters_as_make_thirteen_words(text, length):
    assert known(text).holds(f"x {text[2 : length + 2]} x")
    assert known(text).holds(f"{text[-1]}{text[2 : length + 2]}{text[0]}")
    assert not known(text).holds(f"x {text[2 : length + 1]} x")
    # A short text of at least 6 words counts as a whole.
    assert known(text[: length // 2]).holds(f"{text[-1]}{text[: length // 2]}{text[0]}")
    assert not known(text[: length // 3]).holds(f"{text[-1]}{text[: length // 3]}")


def test_forms_of_a_character_are_one():
    assert overlap.content_hash("A gecko!") == overlap.content_hash("a GECKO")
    assert overlap.content_hash("a") != overlap.content_hash("b")
    assert overlap.content_hash("?") != overlap.content_hash("!")


def test_sets_are_read_and_distinguished(tmp_path):
    for folder, word in (("dev", "one"), ("test", "two"), ("more/test", "three")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "sts.tsv").write_text(f"{word}\tand {word}\t1\na\tb\t2\n")
    folders = [tmp_path / "dev", tmp_path / "test" / "sts.tsv", tmp_path / "more/test"]
    found = set_texts.read([*folders, "quickstart"])
    assert found.sets[:3] == ("sts", "test/sts", "more/test/sts")
    (match,) = found.find("And THREE")
    assert (match.set, match.side, match.id) == ("more/test/sts", "sentence", "1")
    (passage,) = set_texts.read(["quickstart"]).find(
        sets.load("quickstart")[0].texts[5]
    )
    assert (passage.set, passage.side, passage.is_same) == (
        "quickstart",
        "passage",
        True,
    )
    assert passage.id == sets.load("quickstart")[0].passage_ids[5]
    rows = [("good", "yes", "train"), ("bad", "no", "train"), ("so so", "no", "test")]
    path = tmp_path / "labels.tsv"
    path.write_text("\n".join(map("\t".join, [("text", "label", "split"), *rows])))
    labels = set_texts.read([path])
    assert [m.id for t in ("Good!", "so so") for m in labels.find(t)] == ["1", "1"]


@hypothesis.given(
    strategies.lists(strategies.sampled_from("abcd"), max_size=40),
    strategies.lists(strategies.sampled_from("abcd"), max_size=40),
)
@hypothesis.settings(deadline=None)
def test_matches_equal_those_of_the_rule_with_joined_words(text, other):
    """The reference applies the rule to joined words instead of hashes."""
    length = min(len(text), overlap.COMMON_WORDS)
    written = f" {' '.join(other)} "
    runs = [text[n : n + length] for n in range(len(text) - length + 1)]
    expected = bool(text) and (
        text == other
        or (
            length >= overlap.LEAST_WORDS
            and any(f" {' '.join(run)} " in written for run in runs)
        )
    )
    assert known(" ".join(text)).holds(" ".join(other)) == expected


def test_a_text_without_words_is_no_text_of_a_set():
    found = known("", " -- ", "one two three four five six")
    assert [match.id for match in found.find("one two three four five six")] == ["q2"]
    assert not found.holds("--")
    assert not known("", "--").holds("--")
