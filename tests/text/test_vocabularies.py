"""The vocabulary has seqio's ids, keeps EOS when it truncates, and reports errors."""

import pathlib
import pickle
import threading

import pytest
import sentencepiece

from gecko_jax.data import pieces, task_table
from gecko_jax.text import vocabularies

TEXTS = [
    "task: search result | query: arrays in PostgreSQL",
    "title: none | text: def f(x): return 漢字 🙂 ñ",
    "  spaces   and\nlines ",
    "<extra_id_0> and <extra_id_3> are sentinels",
]


@pytest.fixture(scope="module")
def bundled() -> vocabularies.Vocabulary:
    return vocabularies.load(task_table.QUICKSTART_VOCABULARY)


def test_bundled_vocabulary_has_t5_ids(bundled):
    assert bundled.size == 8000
    assert (bundled.pad_id, bundled.eos_id) == (0, 1)


def test_every_text_ends_in_eos_and_none_holds_another(bundled):
    for tokens in bundled.encode([*TEXTS, "</s> <pad>"]):
        assert tokens[-1] == 1
        assert not {0, 1} & set(tokens[:-1])


def test_trimming_keeps_eos(bundled):
    (full,) = bundled.encode(TEXTS[:1])
    (trimmed,) = bundled.encode(TEXTS[:1], max_length=5)
    assert trimmed == [*full[:4], 1]
    assert bundled.encode(TEXTS[:1], max_length=len(full)) == [full]
    with pytest.raises(ValueError, match="max_length=1: must be at least 2"):
        bundled.encode(TEXTS, max_length=1)


def test_bytes_and_spaces_survive_the_round_trip(bundled):
    (tokens,) = bundled.encode([TEXTS[1]])
    assert bundled.decode(tokens) == TEXTS[1]


@pytest.mark.parametrize("extra_ids", [0, 100])
def test_ids_agree_with_seqio(extra_ids):
    from gecko_jax import data

    seqio = data.load_seqio()
    theirs = seqio.SentencePieceVocabulary(
        str(task_table.QUICKSTART_VOCABULARY), extra_ids
    )
    ours = vocabularies.load(task_table.QUICKSTART_VOCABULARY, extra_ids)
    assert ours.size == theirs.vocab_size == 8000 + extra_ids
    assert ours.encode(TEXTS) == [[*theirs.encode(text), 1] for text in TEXTS]
    in_graph = [theirs.encode_tf(text).numpy().tolist() for text in TEXTS]
    assert ours.encode(TEXTS) == [[*tokens, 1] for tokens in in_graph]


def test_fingerprints_distinguish_vocabularies(bundled):
    with_sentinels = vocabularies.load(task_table.QUICKSTART_VOCABULARY, extra_ids=100)
    assert with_sentinels.fingerprint != bundled.fingerprint
    assert with_sentinels != bundled
    copy = pickle.loads(pickle.dumps(bundled))
    assert copy == bundled
    assert copy.encode(TEXTS) == bundled.encode(TEXTS)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.model: no such vocabulary"):
        vocabularies.load(tmp_path / "none.model")
    broken = tmp_path / "broken.model"
    broken.write_bytes(
        pathlib.Path(task_table.QUICKSTART_VOCABULARY).read_bytes()[:5000]
    )
    with pytest.raises(ValueError, match=r"broken\.model: not a SentencePiece model"):
        vocabularies.load(broken)
    with pytest.raises(ValueError, match="extra_ids=-1"):
        vocabularies.load(task_table.QUICKSTART_VOCABULARY, -1)


def test_other_reserved_ids_are_refused(tmp_path):
    import sentencepiece

    prefix = str(tmp_path / "llama")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 10),
        model_prefix=prefix,
        vocab_size=11,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"pad_id=-1; .* needs pad_id=0"):
        vocabularies.load(f"{prefix}.model")


@pytest.fixture
def small_file(tmp_path) -> pathlib.Path:
    path = tmp_path / "pairs.jsonl"
    lines = (task_table.QUICKSTART / "train.jsonl").read_text().splitlines()[:200]
    path.write_text("\n".join(lines))
    return path


def test_training_is_repeatable(small_file, tmp_path):
    first = pieces.train_vocabulary([small_file], tmp_path / "a.model", 1000)
    again = pieces.train_vocabulary([small_file], tmp_path / "b.model", 1000)
    assert first.size == 1000
    assert first == again == vocabularies.load(tmp_path / "a.model")


def test_training_leaves_the_main_thread_to_ctrl_c(small_file, tmp_path, monkeypatch):
    """In the main thread, C++ would block all signals until training ends."""
    threads = []

    def train(**arguments):
        threads.append(threading.current_thread())
        raise OSError("stop here")

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", train)
    with pytest.raises(ValueError, match="stop here"):
        pieces.train_vocabulary([small_file], tmp_path / "a.model", 1000)
    assert threads[0] is not threading.main_thread()
    assert threads[0].daemon


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (900_000, r"900,000: the texts only fill \d+ pieces; choose .* at most \d+"),
        (50, r"50: the single characters and bytes alone need \d+ pieces"),
    ],
)
def test_impossible_sizes_are_refused_with_the_possible_ones(
    small_file, tmp_path, size, message
):
    output = tmp_path / "out.model"
    with pytest.raises(ValueError, match=message):
        pieces.train_vocabulary([small_file], output, size)
    assert not output.exists()


def test_training_names_the_bad_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"task": "t", "query": "a", "positive": "b"}\n{"task": "t"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: no field 'query'"):
        pieces.train_vocabulary([path], tmp_path / "out.model", 300)


def test_added_tokens_are_cut_out_and_the_rest_read_part_by_part(bundled):
    added = (
        vocabularies.AddedToken("[Q", 8_001),
        vocabularies.AddedToken("[Q]", 8_000),
        vocabularies.AddedToken("geck", 8_002, single_word=True),
        vocabularies.AddedToken("[N]", 8_003, normalized=True),
    )
    extended = vocabularies.Vocabulary(bundled.model_proto, 0, added)
    assert extended.size == bundled.size + 4
    assert extended.fingerprint != bundled.fingerprint
    assert extended != bundled
    assert pickle.loads(pickle.dumps(extended)) == extended

    def plain(text):
        return bundled.encode([text])[0][:-1]

    cases = {
        "a [Q] b": [*plain("a"), 8_000, *plain("b")],
        "[Q][Q a[Q]": [8_000, 8_001, *plain("a"), 8_000],
        "geck, gecko": [8_002, *plain(", gecko")],
        "x [Ｎ] [N]": [*plain("x"), 8_003, 8_003],
        "no such token": plain("no such token"),
    }
    assert extended.encode(list(cases)) == [[*ids, 1] for ids in cases.values()]
    assert extended.encode(["a [Q] b"], 3) == [[*plain("a"), 8_000, 1]]
    assert extended.decode(extended.encode(["a [Q] b"])[0]) == "a [Q] b"
    assert extended.encode(TEXTS) == bundled.encode(TEXTS)


@pytest.mark.parametrize("number", [8_001, 9_000])
def test_added_tokens_must_follow_the_pieces(bundled, number):
    token = vocabularies.AddedToken("[Q]", number)
    with pytest.raises(
        ValueError, match=f"the ids {number}; they must follow the 8,000"
    ):
        vocabularies.Vocabulary(bundled.model_proto, 0, (token,))
    with pytest.raises(ValueError, match="needs a visible character"):
        vocabularies.AddedToken(" ", 8_000)
