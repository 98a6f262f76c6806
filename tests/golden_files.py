"""Where the golden results are: the full set beside the repository, or the small copy beside the tests."""

from __future__ import annotations

from pathlib import Path

SMALL_COPY = Path(__file__).parent / "goldens"
_FULL_SET = Path(__file__).parents[2] / "shared" / "goldens"


def golden_root() -> Path:
    """The folder of the full golden set where it is at hand, of the small copy everywhere else."""
    return _FULL_SET if (_FULL_SET / "index.json").exists() else SMALL_COPY


def golden_path(name: str) -> Path:
    """The golden file `name`, a relative path such as "e2e/dit_tiny.pt".

    Raises:
        FileNotFoundError: the golden set in use does not have it.
    """
    path = golden_root() / name
    if not path.exists():
        raise FileNotFoundError(f"name: got {name!r}, expected a file of {golden_root()}")
    return path
