"""Keeps the checks of the kernels out of processes that neither interpret nor have a GPU."""

import os

import torch

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["interpreted"]
