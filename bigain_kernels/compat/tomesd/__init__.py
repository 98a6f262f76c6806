"""The calls of the `tomesd` package over this package's kernels: change the import and keep the calls.

    import bigain_kernels.compat.tomesd as tomesd
    tomesd.apply_patch(pipe, ratio=0.5)

docs/migration.md has a table of what differs and why.
"""

from . import merge, patch
from .patch import apply_patch, remove_patch

__all__ = ["apply_patch", "merge", "patch", "remove_patch"]
