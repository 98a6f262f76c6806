"""The processes of a run: which one this is, and where it computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Member(NamedTuple):
    """One of the processes of a run: its number of how many, and its device."""

    rank: int
    size: int
    device: torch.device


@contextmanager
def member(device: torch.device) -> Iterator[Member]:
    """This process among those that `torchrun` or `accelerate launch` started; the only one if nobody did.

    Work is shared by files (`run.RunFolder`), so no process ever waits for a message of another, and one that dies
    holds up nobody.

    Args:
        device: where a single process computes; several take a GPU each, by their local rank, or all the CPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Member(0, 1, device)
        return
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    try:
        yield Member(state.process_index, state.num_processes, state.device)
    finally:
        state.destroy_process_group()
