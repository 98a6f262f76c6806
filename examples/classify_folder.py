"""A DiT classifies a folder of pictures, a subfolder for each class: which class explains the picture best.

python examples/classify_folder.py [FOLDER [CHECKPOINT]]; without a folder, some test digits are written to one.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from bigain_kernels.cli.main import main
from bigain_kernels.evaluation.data import load_digits
from bigain_kernels.evaluation.generate import to_pixels


def write_digits(folder: Path, count: int = 6) -> None:
    digits = load_digits("test")
    pixels = to_pixels(digits.images[:count])
    for index, label in enumerate(digits.labels[:count].tolist()):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(folder / str(label) / f"{index}.png")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary) / "digits"
        if len(sys.argv) < 2:
            write_digits(images)
        options = ["--method", "lgtm", "--ratio", "0.5", "--share-plan", "--out", str(Path(temporary) / "classified")]
        checkpoint = ["--checkpoint", sys.argv[2]] if len(sys.argv) > 2 else []
        sys.exit(main(["classify", "--images", str(images), *options, *checkpoint]))
