"""Installs torch_hypergrad. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "torch_hypergrad/__init__.py").read_text())
search = ["numpy>=1.26", "optuna>=4.9", "cmaes>=0.10"]
bilevel = ["numpy>=1.26", "scipy>=1.11", "scikit-learn>=1.4"]
cli = [
    "torchvision>=0.21",
    "pandas>=2.2",
    "pillow>=10",
    "matplotlib>=3.8",
    "tabulate>=0.9",
    "jsonargparse[signatures]>=4.51",
    "pyyaml>=6",
    "tensorboard>=2.16",
    "jinja2>=3.1",
    "filelock>=3.12",
    "psutil>=5.9",
    "safetensors>=0.4",
    *search,
    *bilevel,
]
examples = ["arch>=7", *cli]
test = ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "pyarrow>=16", *examples]
bench = ["torchopt>=0.7.3"]
docs = [
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.7",
    "mkdocstrings-python>=2",
    "jupytext>=1.16",
    "nbconvert>=7.16",
    "nbclient>=0.10",
    "ipykernel>=6.29",
    "latex2mathml>=3.77",
    "ruff>=0.6",
    *cli,
]

setup(
    name="torch-hypergrad",
    version=version[1] if version else "0",
    description="Gradient-based hyperparameter optimization for PyTorch",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["torch_hypergrad", "torch_hypergrad.*"]),
    package_data={"torch_hypergrad": ["py.typed"], "torch_hypergrad.experiment.report": ["*.j2"]},
    entry_points={"console_scripts": ["torch-hypergrad = torch_hypergrad.__main__:main"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "higher>=0.2.1", "tqdm>=4.66"],
    extras_require={
        "cli": cli,
        "search": search,
        "bilevel": bilevel,
        "onnx": ["onnx>=1.16", "onnxscript>=0.2"],
        "parquet": ["pyarrow>=16"],
        "wandb": ["wandb>=0.17"],
        "mlflow": ["mlflow>=2.14"],
        "examples": examples,
        "test": test,
        "bench": bench,
        "docs": docs,
        "dev": [*test, *bench, *docs, "ruff>=0.6", "mypy>=1.11"],
    },
)
