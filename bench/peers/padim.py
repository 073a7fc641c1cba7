"""anomalib's PaDiM: untrained ResNet-18, 128 px, `Engine.predict` on a folder, no visualisation.

Untrained, since its weights cannot be had offline; that changes nothing of its speed.
"""

import sys
import warnings
from pathlib import Path

from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Padim

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench.peers import serve

warnings.filterwarnings("ignore")


def main(photographs: Path, work: Path) -> None:
    """Fit on 64 of the photographs, then predict all of them for each "go"."""
    good = work / "padim" / "good"
    good.mkdir(parents=True, exist_ok=True)
    for path in sorted(photographs.iterdir())[:64]:
        link = good / path.name
        if not link.exists():
            link.symlink_to(path.resolve())
    data = Folder(
        name="photographs",
        root=good.parent,
        normal_dir="good",
        num_workers=0,
        val_split_mode="from_train",
    )
    model = Padim(
        backbone="resnet18",
        pre_trained=False,
        pre_processor=Padim.configure_pre_processor(image_size=(128, 128)),
        visualizer=False,
        evaluator=False,
    )
    engine = Engine(
        accelerator="cpu",
        devices=1,
        logger=False,
        default_root_dir=work / "padim-out",
        enable_progress_bar=False,
    )
    engine.fit(model, datamodule=data)
    serve(lambda: engine.predict(model=model, data_path=photographs, return_predictions=True))


main(Path(sys.argv[1]), Path(sys.argv[2]))
