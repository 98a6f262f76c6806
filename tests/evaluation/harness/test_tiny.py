"""`bigain reproduce tiny` as it comes, end to end: whole, killed in the middle, and by two processes at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bigain_kernels.cli.main import main

from .test_reproduce import free_port, numbers, start_member

# 35 seconds of processor time for a run; all three have six minutes.
pytestmark = pytest.mark.slow
SECONDS = 360


def _wait(there: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SECONDS
    while not there():
        assert process.poll() is None, process.communicate()[1].decode()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_tiny_whole_killed_and_shared_has_the_same_numbers(tmp_path: Path) -> None:
    begin, threads = sum(os.times()[:4]), torch.get_num_threads()
    command = ["reproduce", "tiny", "--device", "cpu", "--threads", "1", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    whole = numbers(tmp_path / "whole")
    assert whole["numbers"]["Not run"] == ["CLIP score: no model (--clip)"]
    assert set(whole["numbers"]["Classification"]) == {"none", "L-GTM 50 %", "IE-KVD 2x"}
    assert {"KID", "FID", "FID inf", "IS", "precision", "recall"} <= set(whole["numbers"]["Generation"]["none"])

    # Killed twice without a word: while it classifies, and while it draws.
    out = tmp_path / "killed"
    for pattern, least in (("classify/*/rows/[!.]*.parquet", 4), ("generate/*/done/[!.]*", 2)):
        process = subprocess.Popen(
            [sys.executable, "-m", "bigain_kernels.cli.main", *command, str(out)], stderr=subprocess.PIPE
        )
        try:
            _wait(lambda pattern=pattern, least=least: len(list(out.glob(pattern))) >= least, process)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.communicate()
        assert not (out / "report.md").exists()
    assert main([*command, str(out)]) == 0
    assert numbers(out) == whole

    shared, port = tmp_path / "shared", free_port()
    workers = [start_member(rank, port, "tiny", shared) for rank in range(2)]
    try:
        for worker in workers:
            _, error = worker.communicate(timeout=SECONDS)
            assert worker.returncode == 0, error.decode()[-2000:]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert numbers(shared) == whole
    torch.set_num_threads(threads)
    assert sum(os.times()[:4]) - begin < SECONDS
