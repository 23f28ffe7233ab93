"""The user's layer: from a configuration to a trained model, its report, and a resumed run."""

from ..extras import check_installed

PACKAGES = (
    *("jsonargparse", "yaml", "torchvision", "pandas", "PIL", "matplotlib", "sklearn", "tabulate", "jinja2"),
    *("filelock", "psutil", "safetensors", "numpy", "optuna"),
)
check_installed("cli", *PACKAGES)
