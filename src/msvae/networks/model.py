"""All networks of a run, and what one pass of them tells of a batch."""

from torch import Tensor, nn

from msvae.core.config import ModelConfig
from msvae.core.evidence import Evidence
from msvae.networks.pretext import PretextNet
from msvae.networks.segmenter import DefectSegmenter
from msvae.networks.vae import VAE


class Networks(nn.Module):
    """The VAE, and the pretext network and the defect segmenter where the settings want them."""

    def __init__(self, config: ModelConfig) -> None:
        """For images of `config.image_size` px, with random weights."""
        super().__init__()
        self.config = config
        self.vae = VAE(config)
        self.pretext = PretextNet() if config.pretext else None
        self.segmenter = DefectSegmenter() if config.segmenter else None

    def forward(self, x: Tensor) -> Evidence:
        """All that the scores read of images (B, 3, S, S) in [0, 1]."""
        e = self.with_segmentation(x)
        if self.pretext is None:
            return e
        embedding, pretext = self.pretext.pretext_scores(x)
        return e._replace(embedding=embedding, pretext=pretext)

    def with_segmentation(self, x: Tensor) -> Evidence:
        """All that the maps read of images (B, 3, S, S): the pretext network is not asked."""
        e = self.forward_mean(x)
        return e if self.segmenter is None else e._replace(segmentation=self.segmenter(x))

    def forward_mean(self, x: Tensor) -> Evidence:
        """The VAE's pass of images (B, 3, S, S), its posterior mean decoded."""
        recon, mu, logvar, features = self.vae(x)
        embedding = features[-1].mean(dim=(2, 3)).float()
        segmentation, pretext = x.new_zeros(x.shape[0], 0, 0), x.new_zeros(x.shape[0], 0)
        return Evidence(x, recon, mu, logvar, features, embedding, segmentation, pretext)
