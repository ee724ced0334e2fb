"""Gecko: versatile text embeddings (arXiv 2403.20327), in JAX.

    import gecko_jax

    model = gecko_jax.load("mini")
    queries = model.encode_queries(["what is a lazy import"], task="search result")
    passages = model.encode_passages(["A module that is loaded at first use."])
    scores = queries @ passages.T

The import is light: neither JAX nor TensorFlow is loaded until they are needed.
"""

from typing import TYPE_CHECKING, Any

from gecko_jax import numerics, platforms

if TYPE_CHECKING:
    from gecko_jax.embedding import load

__all__ = ["__version__", "load"]

__version__ = "0.1.0"

# Must come before JAX starts its backend, so before anything else of ours.
numerics.set_cpu_flags()
platforms.skip_absent_tpu()


def __getattr__(name: str) -> Any:
    if name == "load":
        from gecko_jax import embedding

        return embedding.load
    raise AttributeError(f"module 'gecko_jax' has no attribute {name!r}")
