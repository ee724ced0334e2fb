"""Words of scripts with spaces and without."""

import pytest

from gecko_jax.text import word_rule

# "Geckos walk on walls" in each script without spaces.
SENTENCES = {
    "Chinese": "壁虎可以在光滑的墙壁和天花板上行走",
    "Japanese": "ヤモリは壁や天井を歩くことができる",
    "Thai": "ตุ๊กแกสามารถเดินบนกำแพงและเพดานได้",
    "Lao": "ກັບແກ້ສາມາດຍ່າງເທິງຝາແລະເພດານໄດ້",
    "Khmer": "តុកកែអាចដើរលើជញ្ជាំងនិងពិដាន",
    "Burmese": "အိမ်မြှောင်သည်နံရံနှင့်မျက်နှာကြက်ပေါ်တွင်လမ်းလျှောက်နိုင်သည်",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C++ or R, 5_a", ["c", "or", "r", "5_a"]),
        ("Don't", ["don", "t"]),
        ("東京2塔 Tower", ["東", "京", "2", "塔", "tower"]),
        ("ﬁne Ｇecko", ["fine", "gecko"]),
        # Vowel signs are part of a word, in Hindi and in Thai.
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("한국어 검색", ["한국어", "검색"]),
        ("e\u0301te\u0301 \u0301", ["été"]),
        ("?! 。、", []),
        ("", []),
    ],
)
def test_words(text, expected):
    assert word_rule.words(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C++ 5", ["c", "5"]),
        ("東京タワー", ["東", "京", "東京", "京タ", "タワ", "ワー"]),
        ("カ 猫 ที่นี่", ["カ", "猫", "ที่นี่"]),
        # Only letters without punctuation between them form a bigram.
        ("東、京", ["東", "京"]),
        ("Tower東京", ["tower", "東", "京", "東京"]),
    ],
)
def test_terms(text, expected):
    assert word_rule.terms(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("one two 3", 3), ("東京", 2), ("タワー", 2), ("タワー ab", 3), ("", 0)],
)
def test_count(text, expected):
    assert word_rule.count(word_rule.words(text)) == expected


@pytest.mark.parametrize("name", SENTENCES)
def test_a_sentence_has_about_as_many_words_as_in_english(name):
    found = word_rule.words(SENTENCES[name])
    assert 5 <= word_rule.count(found) <= 20
    assert len(word_rule.terms(SENTENCES[name])) >= len(found) - 1
    assert "".join(found) == "".join(word_rule.words("".join(found)))
