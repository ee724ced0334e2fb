"""Passages, fusion of ranks, and the folders of shards."""

import dataclasses
import json
import math

import numpy as np
import pytest

from gecko_jax.evaluation import set_texts
from gecko_jax.fret import fusion, minhash, passages, records
from gecko_jax.inference import ranking
from gecko_jax.text import word_rule

RULES = passages.Rules(min_words=4, max_characters=500, near_duplicate=0.8, limit=0)
GOOD = "Geckos stick to smooth walls without any glue because of many tiny hairs."
LONG = " ".join(f"word{number}" for number in range(60))


def read(tmp_path, *lines, rules=RULES, folders=()):
    path = tmp_path / "corpus.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return passages.read([path], rules, set_texts.read(folders))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": ""}, "empty"),
        ({"text": " \n\t"}, "empty"),
        ({"title": "only"}, "no_text"),
        ({"text": 3}, "no_text"),
        ({"text": GOOD, "title": 3}, "bad_title"),
        ({"text": "too short here"}, "too_short"),
        ({"text": "word " * 101}, "too_long"),
        ({"text": "\x00 four words and more"}, "binary"),
        ({"text": "PK\x03\x04\x14\x06\x08 four words and more"}, "binary"),
        ({"text": "\ufffd" * 5 + " four words and more"}, "binary"),
        ('{"text": "\\ud800 four words and more"}', "binary"),
        ({"text": f"  {GOOD}\n"}, "duplicate"),
        ({"text": GOOD, "title": "Another"}, "duplicate"),
        ({"text": LONG + " end"}, "near_duplicate"),
    ],
)
def test_a_bad_passage_is_counted_under_its_reason(tmp_path, record, reason):
    kept, dropped = read(tmp_path, {"text": GOOD}, {"text": LONG}, record)
    assert [row["text"] for row in kept] == [GOOD, LONG]
    assert dropped == {reason: 1}


def test_passages_of_scripts_without_spaces_have_words(tmp_path):
    rules = dataclasses.replace(RULES, min_words=10)
    long = (
        "壁虎可以在光滑的墙壁和天花板上行走，因为脚趾上有数百万根细毛。",
        "ヤモリは壁や天井を歩くことができる。足の裏に細かい毛があるためである。",
        "ตุ๊กแกสามารถเดินบนกำแพงและเพดานได้เพราะมีขนเล็กๆที่เท้า",
        "ກັບແກ້ສາມາດຍ່າງເທິງຝາແລະເພດານໄດ້ຍ້ອນມີຂົນນ້ອຍຢູ່ຕີນ",
        "តុកកែអាចដើរលើជញ្ជាំងនិងពិដានដោយសាររោមតូចៗនៅជើង",
        "အိမ်မြှောင်သည်နံရံနှင့်မျက်နှာကြက်ပေါ်တွင်လမ်းလျှောက်နိုင်သည်။ခြေထောက်တွင်အမွှေးငယ်များရှိသည်။",
    )
    short = ({"text": "壁虎"}, {"text": "ตุ๊กแก"}, {"text": "ヤモリは歩く"})
    near = {"text": long[0].replace("数百万", "数千万")}
    rules = dataclasses.replace(rules, near_duplicate=0.6)
    kept, dropped = read(
        tmp_path, *({"text": t} for t in long), *short, near, rules=rules
    )
    assert [row["text"] for row in kept] == list(long)
    assert dropped == {"too_short": 3, "near_duplicate": 1}


def test_what_is_kept_keeps_its_source(tmp_path):
    first = {"_id": 7, "title": " A\ttitle", "text": f"{GOOD}  ", "licence": "CC0"}
    kept, _ = read(tmp_path, first, {"positive": LONG})
    common = {"source": "corpus.jsonl"}
    assert kept[0] == {"id": 0, "source_id": "7", "licence": "CC0", **common} | {
        "title": "A title",
        "text": GOOD,
    }
    assert kept[1] == {"id": 1, "source_id": "2", **common, "title": "", "text": LONG}


def test_the_limit_and_the_empty_corpus(tmp_path):
    rules = passages.Rules(4, 500, 0.0, 1)
    kept, _ = read(tmp_path, {"text": GOOD}, {"text": LONG}, rules=rules)
    assert len(kept) == 1
    with pytest.raises(ValueError, match=r"no passage is left \(1 empty\)"):
        read(tmp_path, {"text": ""})
    with pytest.raises(ValueError, match=r"corpus\.jsonl:1: not JSON"):
        read(tmp_path, "{")


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "beir"
    folder.mkdir()
    query = "which small lizard runs along ceilings"
    rows = {
        "corpus": [{"_id": "p", "text": LONG}],
        "queries": [{"_id": "q", "text": query}, {"_id": "r", "text": "what is it"}],
        "qrels": [{"query-id": q, "corpus-id": "p", "score": 1} for q in ("q", "r")],
    }
    for name, records_ in rows.items():
        lines = [json.dumps(record) for record in records_]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    ("text", "is_held"),
    [
        (f"It says {' '.join(LONG.split()[20:33])} there", True),  # 13 words in a row
        (f"It says {' '.join(LONG.split()[20:32])} there", False),
        ("Tell me which small lizard runs along ceilings at night", True),
        ("What is it?", True),  # the same text
        ("Nobody knows what is it that they saw", False),  # three words: no sign
        (GOOD, False),
    ],
)
def test_texts_of_evaluation_sets_are_known(tmp_path, beir, text, is_held):
    assert set_texts.read([beir]).holds(text) == is_held
    filler = {"text": GOOD + " And a filler."}
    padded = {"text": text if len(text.split()) > 3 else f"{text} "}
    rules = passages.Rules(1, 500, 0.0, 0)
    _, dropped = read(tmp_path, filler, padded, rules=rules, folders=[beir])
    assert dropped == ({"evaluation_set": 1} if is_held else {})


def test_signatures_estimate_the_resemblance():
    rng = np.random.default_rng(0)
    vocabulary = [f"w{number}" for number in range(5_000)]
    for share in (0.2, 0.5, 0.9):
        first = rng.choice(vocabulary, 400).tolist()
        cut = int(share * 400)
        second = first[:cut] + rng.choice(vocabulary, 400 - cut).tolist()
        a, b = (minhash.shingles(words) for words in (first, second))
        truth = len(np.intersect1d(a, b)) / len(np.union1d(a, b))
        same = np.mean(minhash.signature(a) == minhash.signature(b))
        # Four standard errors of the mean of 128 equal-or-not.
        assert abs(same - truth) < 4 * math.sqrt(truth * (1 - truth) / minhash.SIZE)


def test_signatures_never_change():
    # What is dropped decides every later record: a change here is a new CODE_VERSION.
    entries = minhash.signature(minhash.shingles(word_rule.words(GOOD)))
    assert entries[:3].tolist() == [91446792, 735418930, 920565559]


def test_near_duplicates_are_found_among_many():
    rng = np.random.default_rng(1)
    vocabulary = [f"w{number}" for number in range(2_000)]
    texts = [" ".join(rng.choice(vocabulary, 80)) for _ in range(200)]
    near = minhash.NearDuplicates(0.75)
    assert [near.add(text) for text in texts] == [None] * 200
    found = [near.add(f"{text} and more") for text in texts]
    assert found == list(range(200))


# --- Fusion -------------------------------------------------------------------------


def settings(**changes):
    values = {
        "k": 0.0,
        "likelihood_weight": 1.0,
        "relevance_weight": 1.0,
        "relevance": "log_prob",
        "positive": "relabelled",
        "negative": "lowest",
        "min_information": 0.0,
    }
    return fusion.Settings(**(values | changes))


def test_ranks_start_at_one_and_ties_keep_the_order():
    assert fusion.ranks([-3.0, -1.0, -2.0, -1.0]).tolist() == [4, 1, 3, 2]


@pytest.mark.parametrize("k", [0.0, 60.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_fusion_is_the_formula(k, weights):
    ql, rc = [1, 3, 2], [2, 3, 1]
    chosen = settings(k=k, likelihood_weight=weights[0], relevance_weight=weights[1])
    expected = [
        weights[0] / (k + a) + weights[1] / (k + b) for a, b in zip(ql, rc, strict=True)
    ]
    assert fusion.fuse(ql, rc, chosen).tolist() == pytest.approx(expected)


def test_the_triple_is_the_best_and_the_worst():
    fused = np.array([0.5, 2.0, 0.3, 0.3])
    rng = np.random.default_rng(0)

    def choose(position, **changes):
        choice = fusion.choose(fused, position, settings(**changes), rng)
        return choice.positive, choice.negatives

    assert choose(0) == (1, [3])
    assert choose(0, positive="seed") == (0, [3])
    assert choose(0, negative="none") == (1, [])
    # The seed may be the worst; as the positive it is never its own negative.
    assert choose(3, positive="seed") == (3, [2])
    drawn = {choose(0, negative="sampled")[1][0] for _ in range(50)}
    assert drawn == {0, 2, 3}
    with pytest.raises(ValueError, match="both weights are 0"):
        fusion.fuse([1], None, settings(likelihood_weight=0.0))


def test_relevance_is_the_best_label_or_the_odds():
    log_probs = [math.log(p) for p in (0.1, 0.2, 0.3, 0.4)]
    grades = [0, 3, 1, 2]
    assert fusion.relevance_score(log_probs, grades, "log_prob") == log_probs[1]
    odds = fusion.relevance_score(log_probs, grades, "log_odds")
    assert odds == pytest.approx(math.log(0.6) - math.log(0.4))


# --- Shards -------------------------------------------------------------------------


def test_a_stage_counts_its_records(tmp_path):
    stage = records.Stage(tmp_path, "generate", {"model": "m"})
    stage.begin()
    assert stage.done() is None
    fields = {"task": "t", "query": "q", "prompt": "p@1", "model": "m", "shots": [0]}
    stage.write(
        0,
        [
            {"id": 0, **fields, "usage": {"requests": 2}},
            {"id": 1, "dropped": "empty"},
        ],
    )
    stage.write(
        1,
        [
            {"id": 2, "dropped": "empty"},
            {"id": 3, **fields, "usage": {"requests": 1}},
        ],
    )
    done = stage.finish(2)
    assert (done["records"], done["kept"], done["dropped"]) == (4, 2, {"empty": 2})
    assert done["usage"] == {"requests": 3}
    assert stage.done() == done


def test_a_stage_of_other_facts_is_refused_by_every_difference(tmp_path):
    facts = {"model": {"name": "m", "revision": "1"}, "seed": 0}
    records.Stage(tmp_path, "fuse", facts).begin()
    other = {"model": {"name": "n", "revision": "1"}, "seed": 1}
    with pytest.raises(ValueError, match="begun with other settings") as error:
        records.Stage(tmp_path, "fuse", other).begin()
    assert "model.name: was 'm', is 'n'" in str(error.value)
    assert "seed: was 0, is 1" in str(error.value)
    assert "revision" not in str(error.value)
    records.Stage(tmp_path, "fuse", facts).begin()


def test_a_lock_has_one_holder(tmp_path):
    path = tmp_path / "a.lock"
    with records.try_lock(path) as first, records.try_lock(path) as second:
        assert (first, second) == (True, False)
    with records.try_lock(path) as again:
        assert again


def test_bm25_built_once_ranks_as_before():
    texts = ["a gecko on a wall", "the honey jar", "a wall of honey", "nothing"]
    retriever = ranking.Bm25Retriever([("", text) for text in texts])
    found = retriever.search(["honey wall", "xyz"], ["", ""], 2)
    assert [best for best, _ in found] == [[2, 0], []]
    ids = ranking.bm25_rankings(["honey wall", "xyz"], texts, list("abcd"), 2)
    assert ids == [["c", "b"], []]  # a and b tie
    stop_words = ranking.Bm25Retriever([("", "the"), ("", "of")])
    assert stop_words.search(["the"], [""], 1) == [([], [])]
