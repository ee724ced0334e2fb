"""The table of names has every parameter once."""

import dataclasses

import pytest

from gecko_jax.formats import names, parameters
from gecko_jax.models import dual_encoder

CONFIG = dual_encoder.EncoderConfig(
    vocab_size=8,
    model_dim=4,
    num_layers=2,
    num_heads=1,
    head_dim=4,
    mlp_dim=8,
    embedding_dim=4,
)


@pytest.mark.parametrize("activations", [("gelu", "linear"), ("relu",)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("projection", [True, False])
def test_every_parameter_has_one_name_there(activations, shared, projection):
    config = dataclasses.replace(
        CONFIG,
        mlp_activations=activations,
        shared_relative_bias=shared,
        projection=projection,
    )
    shapes = parameters.flatten(dual_encoder.abstract_params(config)[0])
    assert (names.PROJECTION in shapes) == projection
    table = names.hugging_face_names(config)
    assert table.keys() == shapes.keys() - {names.PROJECTION}
    assert len({there.name for there in table.values()}) == len(table)
