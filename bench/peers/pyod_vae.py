"""PyOD's VAE on the pixels of the photographs; it reads no files, so Pillow does, one by one."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from pyod.models.vae import VAE

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench.peers import serve


def read(paths: list[Path], side: int) -> np.ndarray:
    """The photographs at `side` px as rows of numbers."""
    rows = []
    for path in paths:
        with Image.open(path) as image:
            small = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            rows.append(np.asarray(small, dtype=np.float32).ravel() / 255)
    return np.stack(rows)


def main(photographs: Path, side: int) -> None:
    """Fit on the photographs, then read and score them for each "go"."""
    paths = sorted(photographs.iterdir())
    model = VAE(epoch_num=1, batch_size=32, verbose=0)
    model.fit(read(paths, side))
    serve(lambda: model.decision_function(read(paths, side)))


main(Path(sys.argv[1]), int(sys.argv[2]))
