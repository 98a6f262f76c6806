"""Keeps the interpreted checks out of processes that do not interpret."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
