"""Training: a Flax GPT-2, data-parallel over the devices that JAX finds.

    import jaxgpt
    training = jaxgpt.Training(model, train, jaxgpt.open_dataset(Path("data/stdlib")), jaxgpt.make_mesh())

docs/training-scripts.md lists the names, docs/examples/train_data_parallel.py is a whole script.

This package never imports torch, jaxgpt_export (but for LLM, where that is asked for) or jaxgpt_bench.
`jaxgpt.shared` and `jaxgpt.generation` import neither JAX nor PyTorch, so that the other packages may use
them anywhere.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgpt_export.llm import LLM  # noqa: TID251 - the one import that goes up

    from jaxgpt.shared.config import ModelConfig, TrainConfig
    from jaxgpt.shared.dataset import open_dataset
    from jaxgpt.shared.errors import UserError
    from jaxgpt.shared.presets import find_preset
    from jaxgpt.training.devices.mesh import make_mesh
    from jaxgpt.training.devices.precision import best_precision
    from jaxgpt.training.run.init_from import open_init_source
    from jaxgpt.training.run.run_folder import RunFolder
    from jaxgpt.training.run.training import Training

__version__ = "0.1.0"

# Public name -> the module that has it; imported when it is first asked for, as JAX takes a second.
_PUBLIC = {
    "LLM": "jaxgpt_export.llm",
    "ModelConfig": "jaxgpt.shared.config",
    "RunFolder": "jaxgpt.training.run.run_folder",
    "TrainConfig": "jaxgpt.shared.config",
    "Training": "jaxgpt.training.run.training",
    "UserError": "jaxgpt.shared.errors",
    "best_precision": "jaxgpt.training.devices.precision",
    "find_preset": "jaxgpt.shared.presets",
    "make_mesh": "jaxgpt.training.devices.mesh",
    "open_dataset": "jaxgpt.shared.dataset.opening",
    "open_init_source": "jaxgpt.training.run.init_from",
}

__all__ = [
    "LLM",
    "ModelConfig",
    "RunFolder",
    "TrainConfig",
    "Training",
    "UserError",
    "best_precision",
    "find_preset",
    "make_mesh",
    "open_dataset",
    "open_init_source",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
