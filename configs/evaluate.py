r"""Evaluation on MTEB and on local sets, at every dim from one encoding.

    gecko evaluate --config=configs/evaluate.py:local --model=runs/finetune \
        --output=results
    gecko evaluate --config=configs/evaluate.py:v1,v2 --model=runs/finetune \
        --output=results --config.dims='(256,768)'
    gecko evaluate --config=configs/evaluate.py:none --model=runs/finetune \
        --output=results --config.tasks="('SciFact','STS12')"

Arguments: `v1` and `v2`, MTEB(eng, v1) of the paper and its successor; `nano`,
NanoBEIR; `miracl`, MIRACL in 18 languages; `none`, no suite; `local`, only the bundled
retrieval set, which takes less than a minute on a laptop CPU and needs no network.
Commas join several; the default is `v1`. Needs gecko-jax[eval]. The data sets are
downloaded from the Hugging Face hub.
"""

import ml_collections

import gecko_jax.config


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Returns the config; see the file's docstring for `arg`."""
    arg = gecko_jax.config.parse_arg(
        arg, v1=False, v2=False, nano=False, miracl=False, none=False, local=False
    )
    suites = {
        "MTEB(eng, v1)": arg.v1 or not any(arg.values()),
        "MTEB(eng, v2)": arg.v2,
        "NanoBEIR": arg.nano,
        "MIRACL": arg.miracl,
    }
    # Every key with its default and unit: gecko_jax/config/keys.py.
    config = gecko_jax.config.defaults(gecko_jax.config.EVALUATION)
    config.suites = tuple(name for name, is_chosen in suites.items() if is_chosen)
    if arg.local:
        config.folders = ("quickstart",)
    return config
