"""`bigain generate --prompts`: an image of each line of a file, by any number of processes at any time."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from . import options as opt
from .text import counted, say, say_lines

if TYPE_CHECKING:
    import torch

    from ..evaluation.generate import GenerateConfig
    from ..methods import CompressionConfig, MixedConfig

_OURS = {"settings.json", "prompts", "images", "done", "claims"}


def draw_prompts(
    path: Path,
    limit: int | None,
    out: Path,
    checkpoint: str | Path,
    config: GenerateConfig,
    compression: CompressionConfig | MixedConfig | None,
    share_plan: bool,
    device: torch.device,
    dtype: torch.dtype,
    as_json: bool,
) -> None:
    """See `bigain generate`; `limit`: lines of the file."""
    from ..evaluation.checkpoints import load_checkpoint
    from ..evaluation.compression import settings_of
    from ..evaluation.harness.deciding import digest, machine
    from ..evaluation.harness.drawing import check_files, draw_shards, image_file
    from ..evaluation.harness.processes import member
    from ..evaluation.harness.run import RunFolder, shard_slices
    from ..evaluation.prompts import read_prompts

    lines = read_prompts(path)[:limit]
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: got {out}, a file, expected a folder")
    present = {each.name for each in out.iterdir() if not each.name.startswith(".")} if out.exists() else set()
    if present - _OURS or ("images" in present and not (out / "settings.json").exists()):
        raise ValueError(f"out: got {out} with files in it, expected an empty folder or one of this command")
    texts = list(dict.fromkeys(text for _, text in lines))
    names = [name for name, _ in lines]
    check_files(names)
    with member(device) as self:
        loaded = load_checkpoint(
            checkpoint,
            class_names=texts,
            template="{}",
            device=self.device,
            dtype=dtype,
            prompt_cache=out / "prompts",
        )
        labels = [loaded.label_of(text, "prompts") for _, text in lines]
        settings = {
            **asdict(config),
            "weights": loaded.fingerprint(),
            "dtype": str(dtype),
            "compression": settings_of(compression),
            "share_plan": share_plan,
            "prompts": digest({"lines": lines}),
            **machine(self.device),
        }
        folder = RunFolder(out, settings, len(shard_slices(len(lines), config.batch_size)), "done/{:06d}")
        slices = shard_slices(len(lines), config.batch_size)
        done = sum(s.stop - s.start for i, s in enumerate(slices) if folder.rows_of(i).exists())
        with opt.progress_bar() as bar:
            task = bar.add_task("generating", total=len(lines), completed=done)
            draw_shards(
                folder,
                names,
                labels,
                loaded,
                config,
                compression,
                share_plan=share_plan,
                rank=self.rank,
                record=lambda count: bar.update(task, advance=count),
            )
        if self.rank == 0:
            files = [str(image_file(out, name)) for name in names]
            if as_json:
                say_lines(json.dumps({"out": str(out), "files": files, **folder.settings}, indent=2))
            else:
                say(f"{counted(len(files), 'image')} in {out / 'images'}")
