"""Words: the units by which texts are searched, counted and compared.

    words("C++ is fun")        ["c", "is", "fun"]
    words("東京タワー 5階")      ["東", "京", "タ", "ワ", "ー", "5", "階"]
    terms("東京タワー 5階")      ["東", "京", "東京", "京タ", "タワ", "ワー", "5", "階"]

In scripts with spaces, a word is a run of letters, digits and their marks. Chinese,
Japanese, Thai, Lao, Khmer and Burmese have no spaces between words. There `words`
returns each letter with its marks, and `count` weighs it by the average number of
letters in a word. Search uses pairs of neighbouring letters, as Lucene's CJK analyzer
does.
"""

import functools
import itertools
import math
import re
import unicodedata
from collections.abc import Sequence

# Letters of scripts without spaces, and letters per word: 2 in Japanese kana, at least
# 3 in South-East Asian scripts. Chinese has 1.6; it counts as 1, because the runs of 13
# words in `overlap` would otherwise become longer than before.
_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3031-\u3035\u3041-\u30ff\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff"
# Thai and Lao, Burmese, Khmer, Tai Le and New Tai Lue, Tai Tham, Tai Viet.
_SOUTH_EAST = (
    "\u0e01-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff\u1950-\u19df"
    "\u1a20-\u1aaf\uaa80-\uaadf"
)
_LETTERS_PER_WORD = ((_HAN, 1), (_KANA, 2), (_SOUTH_EAST, 3))
_NO_SPACES = _HAN + _KANA + _SOUTH_EAST

# The unit of `units`: a common multiple of the numbers of letters above.
UNITS_PER_WORD = 6


def words(content: str) -> list[str]:
    """Returns the words of a text, normalized (NFKC) and in lower case."""
    return _patterns()[0].findall(_normalize(content))


def count(entries: Sequence[str]) -> int:
    """Returns the number of words that entries of `words` stand for, rounded up."""
    return math.ceil(sum(map(units, entries)) / UNITS_PER_WORD)


def units(word: str) -> int:
    """Returns the share of a word that an entry of `words` stands for, in sixths."""
    return UNITS_PER_WORD if word.isascii() else _units(word[0])


@functools.lru_cache(maxsize=1 << 16)
def _units(letter: str) -> int:
    for letters, per_word in _LETTERS_PER_WORD:
        if re.match(f"[{letters}]", letter):
            return UNITS_PER_WORD // per_word
    return UNITS_PER_WORD


def terms(content: str) -> list[str]:
    """Returns the search terms of a text: words, and pairs of letters without spaces.

    A Han character is also a term of its own, and so is a letter without a neighbour.
    """
    single, run = _patterns()
    entries: list[str] = []
    for match in run.finditer(_normalize(content)):
        if match.lastgroup is None:
            entries.append(match[0])
            continue
        letters = single.findall(match[0])
        for letter in letters:
            if len(letters) == 1 or _units(letter[0]) == UNITS_PER_WORD:
                entries.append(letter)
        entries += map("".join, itertools.pairwise(letters))
    return entries


def _normalize(content: str) -> str:
    return unicodedata.normalize("NFKC", content).lower()


@functools.cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Returns patterns of an entry of `words`, and of a word or a run of letters."""
    # `\w` matches neither marks, such as the vowel signs of Hindi and Thai, nor the
    # joiners of Indic scripts.
    is_mark = [
        unicodedata.category(chr(code)) in ("Mn", "Mc", "Me") for code in range(0x20000)
    ]
    edges = [code for code in range(1, 0x20000) if is_mark[code] != is_mark[code - 1]]
    marks = "\u200c\u200d\U000e0100-\U000e01ef" + "".join(
        f"{chr(first)}-{chr(after - 1)}"
        for first, after in zip(edges[::2], edges[1::2], strict=True)
    )
    letter = rf"(?=\w)[{_NO_SPACES}][{marks}]*"
    word = rf"[^\W{_NO_SPACES}]+(?:[{marks}]+[^\W{_NO_SPACES}]*)*"
    return re.compile(f"{letter}|{word}"), re.compile(f"(?P<run>(?:{letter})+)|{word}")
