"""Where the golden results are: the full set beside the repository, or the small copy beside the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

SMALL_COPY = Path(__file__).parent / "goldens"
_FULL_SET = Path(__file__).parents[2] / "shared" / "goldens"


def golden_root() -> Path:
    """The folder of the full golden set where it is at hand, of the small copy everywhere else."""
    return _FULL_SET if (_FULL_SET / "index.json").exists() else SMALL_COPY


def golden_path(name: str) -> Path:
    """The golden file `name`, a relative path such as "lgtm/inputs_00.npz".

    Raises:
        FileNotFoundError: the golden set in use does not have it.
    """
    path = golden_root() / name
    if not path.exists():
        raise FileNotFoundError(f"name: got {name!r}, expected a file of {golden_root()}")
    return path


def golden_models() -> list[str]:
    """The whole models of the golden set in use; the small copy has the DiT alone."""
    return sorted(path.name.removesuffix("_config.json") for path in (golden_root() / "e2e").glob("*_config.json"))


def load_golden_model(name: str, root: Path | None = None) -> dict[str, Any]:
    """`state_dict`, `inputs` and `outputs` of a whole model, from its .pt (full set) or .npz (small copy)."""
    folder = (root or golden_root()) / "e2e"
    if (folder / f"{name}.pt").exists():
        return torch.load(folder / f"{name}.pt", weights_only=True)
    tree: dict[str, Any] = {}
    with np.load(folder / f"{name}.npz") as file:
        for key, value in file.items():
            *parents, leaf = key.split("/")
            branch = tree
            for parent in parents:
                branch = branch.setdefault(parent, {})
            branch[leaf] = torch.from_numpy(value)
    return tree
