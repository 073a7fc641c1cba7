"""The β-VAE: encoder, latent Gaussian, decoder.

x (B,3,H,W) ─ stages ─► (B,C,h,w) ─► mu, logvar (B,Z) ─ z ─► (B,C,h,w) ─ ups ─► recon (B,3,H,W)
"""

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from msvae.core.config import ModelConfig
from msvae.networks.blocks import stage, stage_up

LOGVAR_RANGE = (-12.0, 8.0)


class VAEOutput(NamedTuple):
    """What the VAE makes of B images, Z latents."""

    recon: Tensor  # (B, 3, H, W) decoder mean, in (0, 1)
    mu: Tensor  # (B, Z) posterior mean
    logvar: Tensor  # (B, Z) posterior log-variance
    features: tuple[Tensor, ...]  # (B, C_i, H_i, W_i) encoder maps, fine to coarse


class VAE(nn.Module):
    """A convolutional β-VAE (Kingma & Welling 2014; Higgins et al. 2017)."""

    def __init__(self, config: ModelConfig) -> None:
        """For images of `config.image_size` px."""
        super().__init__()
        widths, norm = config.hidden_dims, config.batch_norm
        strides = [a // b for a, b in pairwise((config.image_size, *config.sides))]
        self.side, self.sigma_vae = config.sides[-1], config.sigma_vae
        self.stages = nn.ModuleList()
        for width_in, width, stride in zip((3, *widths), widths, strides, strict=False):
            self.stages.append(stage(width_in, width, stride, norm))
        flat = widths[-1] * self.side**2
        self.dropout = nn.Dropout(config.dropout)
        self.to_mu = nn.Linear(flat, config.latent_dim)
        self.to_logvar = nn.Linear(flat, config.latent_dim)
        self.from_latent = nn.Linear(config.latent_dim, flat)
        mirrored = widths[::-1][: strides.count(2)]
        self.ups = nn.Sequential(*[stage_up(a, b, norm) for a, b in pairwise(mirrored)])
        # The last step to full size is a sub-pixel convolution (Shi et al. 2016): wide maps at
        # full resolution would cost more than all the rest together.
        self.to_pixels = nn.Sequential(
            nn.Conv2d(mirrored[-1], 12, 3, padding=1), nn.PixelShuffle(2)
        )

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps of every stage, fine to coarse, of images (B, 3, H, W) in [0, 1]."""
        features, h = [], x - 0.5
        for layers in self.stages:
            h = layers(h)
            features.append(h)
        return tuple(features)

    def posterior(self, top: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar, (B, Z) each, from the coarsest map (B, C, h, w)."""
        flat = self.dropout(top.permute(0, 2, 3, 1).flatten(1))
        return self.to_mu(flat), self.to_logvar(flat).clamp(*LOGVAR_RANGE)

    def decode(self, z: Tensor) -> Tensor:
        """The decoder mean (B, 3, H, W), in (0, 1), of latents (B, Z)."""
        h = self.dropout(self.from_latent(z)).unflatten(1, (self.side, self.side, -1))
        recon: Tensor = self.to_pixels(self.ups(h.permute(0, 3, 1, 2))).float().sigmoid()
        return recon

    def forward(self, x: Tensor, noise: Tensor | None = None) -> VAEOutput:
        """One pass; `noise` (B, Z) samples the posterior, without it the mean is decoded."""
        features = self.encode(x)
        mu, logvar = self.posterior(features[-1])
        z = mu if noise is None else mu + noise * (0.5 * logvar).exp()
        return VAEOutput(self.decode(z), mu, logvar, features)
