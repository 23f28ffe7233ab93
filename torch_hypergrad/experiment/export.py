"""The network of a run in other formats, by torch's own exporters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ..extras import check_installed
from .config import ConfigError
from .messages import one_line
from .trained import TrainedModel, load_run

BATCH = 2  # of the example that is traced


def export(run: Path, to: str, out: Path | None) -> Path:
    """Writes the network with its preprocessing (its weights alone as ``state_dict``) and returns the file.

    Args:
        run: folder of a finished run.
        to: ``"onnx"``, ``"torchscript"`` or ``"state_dict"``.
        out: the file. None takes ``exported`` with the format's ending, in the folder of the run.

    Raises:
        ConfigError: for a run that cannot be used, or a network that the format cannot hold.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to must be one of {', '.join(FORMATS)}, got {to}.")
    write, ending = FORMATS[to]
    file = run / f"exported{ending}" if out is None else out
    model = load_run(run)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(model, file)
    except (ConfigError, ModuleNotFoundError):
        raise
    except Exception as error:  # exporters fail in many ways
        raise ConfigError(
            f"The network of {run} could not be exported to {to}: {one_line(error)[:500]}"
        ) from error
    return file


def _state_dict(model: TrainedModel, file: Path) -> None:
    torch.save(model.network.state_dict(), file)


def _torchscript(model: TrainedModel, file: Path) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that it is no longer developed
        traced = torch.jit.trace(model, model.example(BATCH))
        traced.save(str(file))
        again = torch.jit.load(str(file))(model.example(3))
    _check_same(model, again)


def _onnx(model: TrainedModel, file: Path) -> None:
    check_installed("onnx", "onnx", "onnxscript")
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (model.example(BATCH),),
            str(file),
            dynamo=True,
            input_names=["inputs"],
            output_names=["outputs"],
            dynamic_shapes=({0: batch},),
            external_data=False,
            verbose=False,
        )


def _check_same(model: TrainedModel, outputs: torch.Tensor) -> None:
    """On a batch of another size: a network whose trace holds the size of the example's is refused."""
    with torch.no_grad():
        expected = model(model.example(3))
    if outputs.shape != expected.shape or not torch.allclose(outputs, expected, rtol=1e-4, atol=1e-5):
        raise ConfigError(
            "The traced network gives other outputs: what it does depends on its inputs. Take onnx."
        )


FORMATS: dict[str, tuple[Callable[[TrainedModel, Path], None], str]] = {
    "onnx": (_onnx, ".onnx"),
    "torchscript": (_torchscript, ".ts"),
    "state_dict": (_state_dict, ".pt"),
}
