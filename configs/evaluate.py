r"""Evaluation on MTEB and on local sets, at every dim from one encoding.

    gecko evaluate --config=configs/evaluate.py:local --model=runs/finetune \
        --output=results
    gecko evaluate --config=configs/evaluate.py:v1,v2 --model=runs/finetune \
        --output=results --config.dims='(256,768)'
    gecko evaluate --config=configs/evaluate.py:none --model=runs/finetune \
        --output=results --config.tasks="('SciFact','STS12')"

Arguments: `v1` and `v2`, MTEB(eng, v1) of the paper and its successor; `nano`,
NanoBEIR; `miracl`, MIRACL in 18 languages; `none`, no suite; `local`, the bundled
retrieval set alone, which takes less than a minute on a laptop CPU and needs no
network. They can be joined with commas; without any it is `v1`. Needs gecko-jax[eval].
The data sets come from the Hugging Face hub; nothing else here needs the network.
"""

import ml_collections

from gecko_jax.config import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; see the file's docstring for `arg`."""
    arg = parse_arg(
        arg, v1=False, v2=False, nano=False, miracl=False, none=False, local=False
    )
    config = ml_collections.ConfigDict()
    suites = {
        "MTEB(eng, v1)": arg.v1 or not any(arg.values()),
        "MTEB(eng, v2)": arg.v2,
        "NanoBEIR": arg.nano,
        "MIRACL": arg.miracl,
    }
    config.suites = tuple(name for name, wanted in suites.items() if wanted)
    config.tasks = ()  # names of mteb's tasks
    config.folders = ("quickstart",) if arg.local else ()  # as for gecko evaluate
    config.dims = ()  # some that were trained; empty for all
    config.name = ""  # organization/model; empty for gecko-jax/FOLDER

    config.query_length = 0  # tokens; 0 for the length of training
    config.passage_length = 0  # tokens; 0 for the length of training

    config.cache = ml_collections.ConfigDict()
    config.cache.folder = "~/.cache/gecko_jax/vectors"  # by content
    config.cache.max_gib = 50.0  # kept after a run, over all models

    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # the devices that are left
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    return config
