"""Errors for the fields of JSON objects."""

import re

import pytest

from gecko_jax.io import field_rules as rules

INNER = {"count": rules.COUNT, "name": rules.optional(rules.NAME)}
KINDS = {
    "one": rules.object_of(INNER, only=True),
    "many": rules.list_of(rules.object_of(INNER)),
    "maps": rules.optional(rules.map_of(rules.COUNT)),
}
GOOD = {"one": {"count": 0}, "many": [{"count": 1, "name": "a"}], "maps": {"a": 2}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"one": 5}, "one must be an object with count, name, not 5"),
        ({"one": {}}, "one: no count"),
        ({"one": {"count": -1}}, "one: count must be a whole number from 0, not -1"),
        ({"one": {"count": 1, "x": 1}}, "one: unknown field 'x'"),
        (
            {"many": [{"count": 1}, {"count": "1"}]},
            'many: [1]: count must be a whole number from 0, not "1"',
        ),
        (
            {"maps": {"a": 1, "b": -1}},
            'maps: ["b"] must be a whole number from 0, not -1',
        ),
        (
            {"maps": []},
            "maps must be an object of a whole number from 0 or null, not a",
        ),
    ],
)
def test_an_error_names_the_field_inside_an_object_or_list(change, message):
    assert rules.check("f", GOOD, KINDS, "copy it") == GOOD
    pattern = rf"^f: {re.escape(message)}.*; copy it$"
    with pytest.raises(ValueError, match=pattern):
        rules.check("f", GOOD | change, KINDS, "copy it")


def test_an_error_lists_few_faults_of_a_long_list():
    with pytest.raises(ValueError, match=r"n: \[0\] must be") as error:
        rules.check("f", {"n": [-1] * 10**5}, {"n": rules.list_of(rules.COUNT)}, "x")
    assert str(error.value).count("must be") == 3
