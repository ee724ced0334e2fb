"""Checks of whole configs: every key by its rule, then the keys that must agree."""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from flax import traverse_util

from gecko_jax.config import keys, rules
from gecko_jax.models import families

SCHEMA = {name: key.rule for name, key in keys.TRAINING.items()}


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a ValueError that lists every error in a training config."""
    flat = flatten(config)
    rules.refuse(rules.find_errors(flat, SCHEMA) or _find_errors_between_keys(flat))


def check_evaluation(config: ml_collections.ConfigDict) -> None:
    """Checks every key of `configs/evaluate.py`; raises as `check` does."""
    flat = flatten(config)
    schema = {name: key.rule for name, key in keys.EVALUATION.items()}
    rules.refuse(rules.find_errors(flat, schema))
    errors = _find_mesh_errors(flat)
    if not (flat["suites"] or flat["tasks"] or flat["folders"]):
        errors.append("suites, tasks, folders: all are empty; set at least one")
    rules.refuse(errors)


def flatten(
    config: Mapping[str, Any] | ml_collections.ConfigDict, prefix: str = ""
) -> dict[str, Any]:
    """Returns {"group.key": value}, with references resolved and lists as tuples."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat


def _find_errors_between_keys(flat: Mapping[str, Any]) -> Iterator[str]:
    dims, weights = flat["loss.mrl_dims"], flat["loss.mrl_weights"]
    width = flat["model.embedding_dim"]
    if dims[-1] > width:
        yield (
            f"loss.mrl_dims={dims}: no dim may exceed model.embedding_dim={width}; "
            f"drop {dims[-1]} or widen the projection"
        )
    if flat["model.scan_layers"] and not flat["model.num_layers"]:
        yield (
            "model.scan_layers=True: model.num_layers=0 has no layers to scan; set it "
            "to False"
        )
    if flat["model.attention"] == "cudnn":
        for key, needed in (("model.dtype", "bfloat16"), ("model.dropout_rate", 0.0)):
            if flat[key] != needed:
                yield (
                    f"model.attention='cudnn': needs {key}={needed!r}, not "
                    f"{flat[key]!r}; set it, or set model.attention='xla'"
                )
    fields = traverse_util.unflatten_dict(flat, sep=".")["model"]
    yield from families.find_errors(fields, "model.")
    for key, off, fresh in (
        ("init.token_weights", "none", "fresh token embeddings"),
        ("init.align_steps", 0, "a fresh projection"),
    ):
        if flat[key] != off and not flat["model.projection"]:
            yield f"{key}={flat[key]!r}: needs model.projection=True"
        if flat[key] != off and flat["init.checkpoint"]:
            yield (
                f"{key}={flat[key]!r}: applies to {fresh}, but init.checkpoint is set; "
                f"set it to {off}"
            )
    if len(weights) != len(dims):
        yield (
            f"loss.mrl_weights={weights}: needs one weight for each of "
            f"loss.mrl_dims={dims}"
        )
    elif not any(weights):
        yield f"loss.mrl_weights={weights}: one must be above 0"
    if flat["optimizer.warmup_steps"] > flat["train.num_steps"]:
        yield (
            f"optimizer.warmup_steps={flat['optimizer.warmup_steps']}: must not exceed "
            f"train.num_steps={flat['train.num_steps']}; lower it (0 for none)"
        )
    yield from _find_mesh_errors(flat)
    microbatch_size, batch_size = flat["train.microbatch_size"], flat["data.batch_size"]
    if microbatch_size > batch_size:
        yield (
            f"train.microbatch_size={microbatch_size}: must not exceed "
            f"data.batch_size={batch_size}; lower it, or set 0 for no microbatches"
        )
    for key, off in (
        ("loss.all_hard_negatives", "False"),
        ("loss.hardness", "0"),
        ("loss.kl_weight", "0"),
    ):
        if flat[key] and not flat["data.num_negatives"]:
            yield (
                f"{key}={flat[key]}: data.num_negatives=0 leaves no hard negatives; "
                f"set it to {off}"
            )
    teacher, dim = flat["data.teacher"], flat["data.teacher_dim"]
    weight = flat["loss.matching_weight"]
    if not bool(teacher) == bool(dim) == bool(weight):
        yield (
            f"loss.matching_weight={weight}, data.teacher={teacher!r}, "
            f"data.teacher_dim={dim}: embedding matching needs all three; set all of "
            "them or none"
        )
    if teacher and flat["data.unique_ids"]:
        yield (
            f"data.unique_ids=True, data.teacher={teacher!r}: a teacher's vectors "
            "belong to texts without ids; turn one of them off"
        )
    if dim > width:
        yield (
            f"data.teacher_dim={dim}: must not exceed model.embedding_dim={width}; "
            f"make narrower vectors with `gecko data teach --dim={width}`"
        )


def _find_mesh_errors(flat: Mapping[str, Any]) -> list[str]:
    return [
        f"mesh: at most one of {', '.join(axes)} may be -1"
        for axes in (("data", "fsdp", "tensor"), ("dcn_data", "dcn_fsdp"))
        if [flat.get(f"mesh.{axis}") for axis in axes].count(-1) > 1
    ]
