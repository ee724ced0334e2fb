"""Gecko: versatile text embeddings (arXiv 2403.20327), in JAX.

    import gecko_jax

    model = gecko_jax.load("mini")
    queries = model.encode_queries(["what is a lazy import"], task="search result")
    passages = model.encode_passages(["A module that is loaded at first use."])
    scores = queries @ passages.T

The import is light: neither JAX nor TensorFlow is loaded until they are needed.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gecko_jax.parallel import numerics, platforms

if TYPE_CHECKING:
    from gecko_jax import config, losses, models
    from gecko_jax.evaluation.judge import evaluate
    from gecko_jax.inference import vector_index as index
    from gecko_jax.inference.embedding import Gecko, load
    from gecko_jax.training.loop import train

__all__ = [
    "Gecko",
    "__version__",
    "config",
    "evaluate",
    "index",
    "load",
    "losses",
    "models",
    "train",
]

__version__ = "0.1.0"

# Public name -> its module and, unless it is the module itself, its name there.
_MENU = {
    "Gecko": ("inference.embedding", "Gecko"),
    "config": ("config", None),
    "evaluate": ("evaluation.judge", "evaluate"),
    "index": ("inference.vector_index", None),
    "load": ("inference.embedding", "load"),
    "losses": ("losses", None),
    "models": ("models", None),
    "train": ("training.loop", "train"),
}

# Must come before JAX starts its backend, so before anything else of ours.
numerics.set_cpu_flags()
platforms.skip_absent_tpu()


def __getattr__(name: str) -> Any:
    if name not in _MENU:
        raise AttributeError(f"module 'gecko_jax' has no attribute {name!r}")
    module, attribute = _MENU[name]
    imported = importlib.import_module(f"gecko_jax.{module}")
    return imported if attribute is None else getattr(imported, attribute)
