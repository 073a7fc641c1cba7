"""The pretext network: in which channel order, and by how many quarter turns, is an image shown?

transformed x ─ stem ─► embedding (B,E) ─► order (B,6), turn (B,4) log-probabilities
"""

from itertools import pairwise, permutations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msvae.networks.blocks import Residual, stage
from msvae.ops.filters import area_downsample

ORDERS = tuple(permutations(range(3)))  # ORDERS[0] leaves the channels as they are
TURNS = (0, 1, 2, 3)  # quarter turns


class PretextNet(nn.Module):
    """Tells in which channel order and by how many quarter turns an image is shown.

    Self-supervision after Gidaris et al. 2018 and Golan & El-Yaniv 2018. It has an encoder of its
    own: sharing the VAE's cost it 0.06 AUROC and saved no time, as the transformed images need a
    pass of their own anyway (LOG.md). It looks at no more than 32 px: orders and turns show there.
    """

    SIDE = 32
    WIDTHS = (32, 64, 128, 256)

    def __init__(self) -> None:
        """For images of any size."""
        super().__init__()
        self.stem = nn.Sequential(stage(3, self.WIDTHS[0], 1))
        for wide, narrow in pairwise(self.WIDTHS):
            self.stem.append(nn.Sequential(stage(wide, narrow, 2), Residual(narrow)))
        self.head = nn.Linear(self.WIDTHS[-1], len(ORDERS) + len(TURNS))

    def downsample(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) at the size that the network looks at."""
        return area_downsample(x, self.SIDE) if x.shape[-1] > self.SIDE else x

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] -> (B, E)."""
        h = self.stem(self.downsample(x) - 0.5)
        # Its gradient lies as the maps do in memory; that of `mean` does not, and is copied about.
        return F.avg_pool2d(h, int(h.shape[-1])).flatten(1).float()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the orders (B, 6) and of the turns (B, 4) of images (B, 3, S, S)."""
        return self.classify(self.embed(x))

    def classify(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the orders (B, 6) and of the turns (B, 4) of embeddings (B, E)."""
        order, turn = self.head(embedding).split((len(ORDERS), len(TURNS)), dim=1)
        return order.log_softmax(dim=1), turn.log_softmax(dim=1)

    def pretext_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding (B, E) of images as they are, and -log p of their order and turn, (B, 2), nats.

        Shown in other ways too they are ranked no better that is worth the time (LOG.md).
        """
        embedding = self.embed(x)
        order, turn = self.classify(embedding)
        return embedding, -torch.stack([order[:, 0], turn[:, 0]], dim=1).float()


def transform(x: Tensor, orders: Tensor, turns: Tensor) -> Tensor:
    """Each image with its channels in the k-th order and turned by its number of quarter turns.

    One gather does both; the result has its channels last in memory.
    """
    b, c, side, _ = x.shape
    grid = torch.arange(side**2, device=x.device).view(side, side)
    places = torch.stack([grid.rot90(k).flatten() for k in TURNS])[turns]
    channels = torch.tensor(ORDERS, device=x.device)[orders]
    at = c * places[:, :, None] + channels[:, None, :]  # (B, S², 3)
    values = x.permute(0, 2, 3, 1).reshape(b, -1).gather(1, at.flatten(1))
    return values.view(b, side, side, c).permute(0, 3, 1, 2)


def pretext_loss(pretext: PretextNet, x: Tensor, orders: Tensor, turns: Tensor) -> Tensor:
    """The cross-entropies of orders and turns (B,) of images (B, 3, s, s), their sum, nats."""
    order, turn = pretext(transform(x, orders, turns))
    return F.nll_loss(order.float(), orders) + F.nll_loss(turn.float(), turns)
