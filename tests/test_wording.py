from gecko_jax import wording


def test_one_is_no_plural():
    counts = {0: "0 pairs", 1: "1 pair", 2: "2 pairs", 2_000: "2,000 pairs"}
    assert {n: wording.counted(n, "pair") for n in counts} == counts


def test_control_characters_do_not_reach_the_terminal():
    assert (
        wording.printable("a\x1b[31m b\x00\x9b é 🦎")
        == "a\ufffd[31m b\ufffd\ufffd é 🦎"
    )
