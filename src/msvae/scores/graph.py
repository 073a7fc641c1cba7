"""All that one pass tells of a batch: pixels -> numbers and maps; the only thing that is traced."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from msvae.core.evidence import Evidence
from msvae.core.state import Arrays, as_array, flatten, to_device
from msvae.networks.model import Networks
from msvae.ops.filters import gaussian_blur, top_mean
from msvae.scores import formulas, maps
from msvae.scores.catalog import GRAPH_SCORES, MAP_SCORES, MAPS
from msvae.scores.latent import Mahalanobis, Neighbours
from msvae.scores.maps import Rarity, ResidualMap, SpatialMap, at_size
from msvae.scores.structure import StructureMap

Maps = dict[str, Tensor]  # each (B, S, S)


@dataclass(frozen=True)
class PlaceMaps:
    """The maps that are fitted to normal images."""

    residual: ResidualMap
    spatial: SpatialMap
    structure: StructureMap

    def __call__(self, e: Evidence, leave_out: bool = False) -> Maps:
        """The maps `MAP_SCORES`; `leave_out` for the images that they were fitted to."""
        side = int(e.x.shape[-1])
        return {
            "residual": self.residual(e),
            "spatial": self.spatial.drawn(e, leave_out),
            "structure": at_size(self.structure(e.x, leave_out), side),
            "inspection": maps.inspection(e),
        }


@dataclass(frozen=True)
class GraphParts:
    """All that the graph needs besides the networks; fitted to normal images, then frozen."""

    mahalanobis: Mahalanobis
    neighbours: Neighbours
    places: PlaceMaps
    shares: Tensor  # (4,) of the places that make the score of each of `MAP_SCORES`
    rarity: Rarity  # of the values of each of them
    weights: Tensor  # (4,) of each of them in the fused map


class ScoringGraph(nn.Module):
    """Pixels (B, S, S, 3) uint8 -> numbers (B, K), columns `catalog.NUMBERS`, and maps (B, M, S, S).

    The maps are those of `catalog.MAPS`, at the model's resolution. Decoding and resizing stay outside.
    """

    def __init__(self, networks: Networks, parts: GraphParts) -> None:
        """Both frozen; the parts are moved to where the networks are."""
        super().__init__()
        self.networks = networks.eval()
        self.parts = to_device(parts, next(networks.parameters()).device)
        self.shares = parts.shares.tolist()  # numbers of places are no tensors

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and maps of pixels."""
        e = self.networks(to_images(pixels))
        found = self.maps(e)
        return self.numbers(e, found), torch.stack([found[name] for name in MAPS], dim=1)

    def maps(self, e: Evidence) -> Maps:
        """Every map of `catalog.MAPS`."""
        places = self.parts.places(e)
        return {
            "reconstruction": maps.reconstruction_map(e),
            **places,
            "fused": self.fused_map(places),
        }

    def fused_map(self, places: Maps) -> Tensor:
        """Σ w r of the maps `MAP_SCORES`, r how rare their values are, (B, S, S), nats.

        w as in the fusion: little where the training images do not tell what is ordinary, or where
        imagined defects are not found.
        """
        each = torch.stack([places[name] for name in MAP_SCORES], dim=1)
        nats = (self.parts.rarity(each) * self.parts.weights.view(1, -1, 1, 1)).sum(dim=1)
        return gaussian_blur(nats, max(int(nats.shape[-1]) / 64, 0.5))

    def numbers_of(self, x: Tensor) -> Tensor:
        """Numbers (B, K) of images (B, 3, S, S) in [0, 1]."""
        e = self.networks(x)
        return self.numbers(e, self.parts.places(e))

    def numbers(self, e: Evidence, places: Maps) -> Tensor:
        """The scores of `catalog.GRAPH_SCORES`, then the statistics, (B, K)."""
        distance = self.parts.mahalanobis(e)
        scores = {
            "reconstruction": formulas.reconstruction(e),
            "mahalanobis": distance,
            "kl": formulas.kl(e),
            "spread": formulas.spread(e),
            "order": formulas.order(e),
            "turn": formulas.turn(e),
            "neighbours": self.parts.neighbours(e),
        }
        for name, share in zip(MAP_SCORES, self.shares, strict=True):
            scores[name] = top_mean(places[name], share)
        columns = torch.stack([scores[name] for name in GRAPH_SCORES], dim=1)
        return torch.cat([columns, formulas.statistics(e, distance)], dim=1)

    def unlearned(self, seed: int) -> "ScoringGraph":
        """The same parts on networks of the same shape with their first random weights."""
        device = next(self.networks.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks = Networks(self.networks.config)
        return ScoringGraph(networks.to(device), self.parts)

    def arrays(self) -> Arrays:
        """Every tensor of the networks and the parts by name, as a run keeps them."""
        named = {f"networks.{k}": as_array(v) for k, v in self.networks.state_dict().items()}
        return named | flatten(self.parts, "parts.")


def to_images(pixels: Tensor) -> Tensor:
    """Pixels (B, S, S, 3) uint8 as images (B, 3, S, S) in [0, 1], channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float() / 255
