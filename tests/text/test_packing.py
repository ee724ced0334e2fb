import numpy as np
import pytest

from gecko_jax.text import packing


def test_the_example_of_the_docstring():
    rows = packing.pack([100, 20, 200])
    assert rows == [packing.Row(256, [2]), packing.Row(128, [0, 1])]


@pytest.mark.parametrize("longest", [10, 128, 129, 700])
def test_every_text_has_one_place_and_fits(longest):
    lengths = np.random.default_rng(0).integers(1, longest + 1, 500).tolist()
    rows = packing.pack(lengths)
    assert sorted(p for row in rows for p in row.positions) == list(range(500))
    for row in rows:
        assert sum(lengths[p] for p in row.positions) <= row.width
        assert len(row.positions) <= row.width // packing.MIN_TEXT
        # A row is not wider than its longest text requires.
        longest_here = max(lengths[p] for p in row.positions)
        assert row.width == 128 or row.width < 2 * longest_here
    widths = [row.width for row in rows]
    assert widths == sorted(widths, reverse=True)


def test_rows_of_one_width_hold_at_most_the_requested_number_of_texts():
    lengths = [30, 1, 1, 2, 17, 32]
    rows = packing.pack(lengths, width=32, max_texts=2)
    assert [row.positions for row in rows] == [[5], [0, 3], [4, 1], [2]]
    assert {row.width for row in rows} == {32}


@pytest.mark.parametrize("multiple", [1, 8])
def test_rounding_up_adds_little_and_gives_few_numbers(multiple):
    rounded = [packing.round_up(n, multiple) for n in range(1, 2_049)]
    for n, found in enumerate(rounded, start=1):
        assert found % multiple == 0
        assert n <= found < n + max(n / 16, n**0.5, multiple)
    assert packing.round_up(993, 1) == 1_024
    assert packing.round_up(992, 1) == 992
    assert len({found for found in rounded if found > 1_024}) <= 16
    # Row counts of the queries and of the passages of 64 examples.
    assert {packing.round_up(n) for n in (5, 6, 7, 8)} == {6, 8}
    assert {packing.round_up(n) for n in range(35, 48)} == {36, 40, 44, 48}


def test_hardly_any_padding_is_left():
    lengths = np.random.default_rng(1).integers(10, 120, 2_000).tolist()
    rows = packing.pack(lengths)
    assert sum(row.width for row in rows) < 1.05 * sum(lengths)


def test_nothing_to_pack():
    assert packing.pack([]) == []
    assert packing.plan_calls([], 2_048) == []


@pytest.mark.parametrize("row_multiple", [1, 8])
def test_calls_hold_all_rows_in_few_shapes(row_multiple):
    shapes = set()
    for count in range(1, 70):
        rows = [packing.Row(256, [0])] * 3 + [packing.Row(128, [0])] * count
        calls = packing.plan_calls(rows, 2_048, row_multiple)
        assert [row for call in calls for row in call.rows] == rows
        for call in calls:
            assert len({row.width for row in call.rows}) == 1
            assert len(call.rows) <= call.num_rows
            assert call.num_rows % row_multiple == 0
            shapes.add((call.num_rows, call.rows[0].width))
    if row_multiple == 1:
        assert shapes == {(16, 128), (4, 128), (1, 128), (8, 256)}
    else:
        assert shapes == {(16, 128), (8, 128), (8, 256)}
