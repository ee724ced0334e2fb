"""The table of tasks and the mixtures: descriptions, rates, files."""

import pytest
import samples

from gecko_jax.data import formatting, mixtures, task_table
from gecko_jax.text import text_formats


def test_descriptions_given_beforehand_stay():
    found = formatting.complete_text_format(
        text_formats.TextFormat(task_descriptions={"snli": "given"}), task_table.TASKS
    )
    assert found.describe("snli") == "given"
    assert found.describe("mnli") == "semantic similarity"
    assert (
        found.describe("docs") == found.describe("quickstart_docs") == "search result"
    )
    assert found.is_symmetric("snli")
    assert not found.is_symmetric("fever")
    (row,) = task_table.from_files(["a", "b"], [{}, {"snli": 3}], found)
    assert (row.files, row.num_examples, row.symmetric) == (("b",), 3, True)
    assert row.task_description == "given"


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_is_a_number_above_zero(temperature):
    with pytest.raises(ValueError, match=rf"temperature {temperature}: must be a"):
        mixtures.Mixture(("a",), temperature=temperature).rates(["a"], [1])


def test_a_task_without_examples_has_no_rate():
    with pytest.raises(ValueError, match=r"task b has the rate 0: .* remove the task"):
        mixtures.Mixture(("a", "b")).rates(["a", "b"], [1, 0])


def test_half_prepared_sets_have_no_files(tmp_path):
    folder = tmp_path / "fever"
    folder.mkdir()
    (folder / "part-00000.jsonl.gz").write_bytes(b"")
    assert not mixtures.locate(samples.TABLE["fever"], tmp_path).files
    (folder / "prepared.json").write_text("{}")
    assert len(mixtures.locate(samples.TABLE["fever"], tmp_path).files) == 1


@pytest.mark.parametrize("name", mixtures.MIXTURES)
def test_every_mixture_has_its_rows_and_rates(name, tmp_path):
    rows, drawn = mixtures.describe(name)
    sizes = [1_000 * (n + 1) for n in range(len(rows))]
    rates = drawn.rates([row.name for row in rows], sizes)
    assert len(rates) == len(rows)
    assert min(rates) > 0
    if not name.startswith("quickstart"):
        with pytest.raises(ValueError, match="not prepared"):
            mixtures.resolve(name, tmp_path)


def test_rates_by_size_are_capped_and_tempered():
    drawn = mixtures.Mixture(("a", "b"), cap=400, temperature=2.0)
    assert drawn.rates(["a", "b"], [100, 10_000]) == [10.0, 20.0]
