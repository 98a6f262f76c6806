"""Without Triton there is nothing to check its kernels with."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["interpreted"]
