"""Parameter trees: all mismatches with a model are listed together."""

import dataclasses

import numpy as np
import pytest

from gecko_jax.formats import parameters


def test_parameters_of_another_size_are_listed_together(small_files):
    params = parameters.flatten(small_files.params)
    kernel = params.pop("encoder/layers_0/attention/query/kernel")
    params["encoder/layers_1/attention/query/kernel"] = kernel
    params["token_embedder/embedding"] = np.zeros((3, 3), np.float32)
    with pytest.raises(ValueError, match=r"set config\.model to the sizes") as error:
        parameters.check(
            parameters.unflatten(params), small_files.encoder_config, source="here"
        )
    lines = str(error.value).splitlines()
    assert "  missing encoder/layers_0/attention/query/kernel (8, 8)" in lines
    assert "  unexpected encoder/layers_1/attention/query/kernel (8, 8)" in lines
    assert any("wrong shape" in line and "(3, 3)" in line for line in lines)


def test_more_layers_than_parameters_are_refused_before_they_are_traced(small_files):
    config = dataclasses.replace(small_files.encoder_config, num_layers=10**9)
    with pytest.raises(ValueError, match=r"num_layers=1,000,000,000, and there"):
        parameters.check(small_files.params, config, source="here")
