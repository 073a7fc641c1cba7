"""pythae's BaseTrainer on our networks: the same layers, the same losses, its own loop."""

import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from pythae.data.datasets import BaseDataset
from pythae.models import BaseAE, BaseAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.trainers import BaseTrainer, BaseTrainerConfig

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
from bench.peers import serve
from bench.training import settings, textbook_loss
from msvae.networks.model import Networks

logging.disable(logging.INFO)


class Ours(BaseAE):
    """Our networks as pythae wants them."""

    def __init__(self, side: int) -> None:
        super().__init__(BaseAEConfig(input_dim=(3, side, side), latent_dim=128))
        self.model_name = "ours"
        torch.manual_seed(0)
        self.net = Networks(settings(side).model)

    def forward(self, inputs: BaseDataset, **_: object) -> ModelOutput:
        """The loss of a batch."""
        return ModelOutput(loss=textbook_loss(self.net, inputs["data"]))

    def save(self, dir_path: str) -> None:
        """Only the weights: pythae would pickle the whole."""
        torch.save(self.state_dict(), Path(dir_path) / "model.pt")


def main(side: int, pixels: Path) -> None:
    """One epoch over the images for each "go"."""
    images = torch.from_numpy(np.load(pixels)).permute(0, 3, 1, 2).float() / 255
    data = BaseDataset(images, torch.zeros(len(images)))
    out = tempfile.mkdtemp()
    config = BaseTrainerConfig(
        output_dir=out,
        num_epochs=1,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        optimizer_cls="AdamW",
        no_cuda=True,
    )
    model = Ours(side)
    serve(lambda: BaseTrainer(model=model, train_dataset=data, training_config=config).train())


main(int(sys.argv[1]), Path(sys.argv[2]))
