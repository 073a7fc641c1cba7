"""The β-VAE, whole: encoder, latent Gaussian, decoder; and its companion and inspector.

x (B,3,H,W) ─ stages ─► (B,C,h,w) ─► mu, logvar (B,Z) ─ z ─► (B,C,h,w) ─ ups ─► recon (B,3,H,W)
transformed x ─ companion ─► embedding (B,E) ─► order (B,6), turn (B,4) log-probabilities
x with imagined defects ─ inspector ─► log-odds of a defect at each pixel (B,H,W)
"""

from collections.abc import Callable
from copy import deepcopy
from inspect import ismethod
from itertools import pairwise, permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from msvae import lowered, native
from msvae.config import ModelConfig
from msvae.evidence import Evidence, Verdicts
from msvae.graphs import SHARED, Graphs
from msvae.maps import enlarge
from msvae.packed import can_pack, pack
from msvae.tiled import Linear, Network, fits, paints, tells

ORDERS = tuple(permutations(range(3)))  # ORDERS[0] leaves the channels as they are
TURNS = (0, 1, 2, 3)  # quarter turns
# How an image is shown to the companion when it is scored, (order, turn) each: as it is, and upside
# down with its channels moved on by one. All 24 ways rank no better (LOG.md).
SHOWN = ((0, 0), (4, 2))
# Images that the companion looks at together, at most, unless by tiles: the cache holds their maps.
TOGETHER = 32

LOGVAR_RANGE = (-12.0, 8.0)
EXACT = ("to_mu", "to_logvar", "to_pixels.0", "companion.head")  # layers kept in float32


def _stage(width_in: int, width: int, stride: int, batch_norm: bool) -> nn.Sequential:
    norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
    conv = lowered.Conv2d(width_in, width, 3, stride, padding=1, bias=not batch_norm)
    return lowered.Stage(conv, norm, nn.SiLU())


def _stage_up(width_in: int, width: int, batch_norm: bool) -> nn.Sequential:
    norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
    conv = lowered.ConvTranspose2d(width_in, width, 4, 2, padding=1, bias=not batch_norm)
    return lowered.Stage(conv, norm, nn.SiLU())


class Residual(nn.Module):
    """h + f(h) with one convolution: depth where the maps are small and cheap."""

    def __init__(self, width: int, batch_norm: bool) -> None:
        super().__init__()
        self.branch = _stage(width, width, 1, batch_norm)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        out: Tensor = h + self.branch(h)
        return out


class Companion(nn.Module):
    """Tells in which channel order and by how many quarter turns an image is shown.

    Self-supervision after Gidaris et al. 2018 and Golan & El-Yaniv 2018. It has an encoder of its
    own: sharing the VAE's cost it 0.06 AUROC and saved no time, as the transformed images need a
    pass of their own anyway (LOG.md). It looks at no more than 32 px: orders and turns show there.
    """

    SIDE = 32
    WIDTHS = (32, 64, 128, 256)

    def __init__(self, side: int) -> None:
        """For images of that side."""
        super().__init__()
        self.side = side
        self.stem = nn.ModuleList([_stage(3, self.WIDTHS[0], 1, True)])
        for wide, narrow in pairwise(self.WIDTHS):
            self.stem.append(nn.Sequential(_stage(wide, narrow, 2, True), Residual(narrow, True)))
        self.head = nn.Linear(self.WIDTHS[-1], len(ORDERS) + len(TURNS))
        self.tiles: Network | None = None  # of a frozen copy

    def by_tiles(self) -> Network | None:
        """Its folded layers by the processor's tiles, where it has any."""
        if not fits(*_convs(self.stem)):
            return None
        net = Network(min(self.side, self.SIDE), together=8)
        h = net.conv(0, *_convs(self.stem[0]), parted=True)
        for i, stage in enumerate(self.stem[1:], 2):
            down, branch = _convs(stage)
            h, last = net.conv(h, down), i == len(self.stem)
            h = net.conv(h, branch, added=h, parted=not last, kept=last, last=last)
        return net

    def reduced(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) at the size that it looks at."""
        side, small = x.shape[-1], self.SIDE
        if side <= small:
            return x
        if side % small:
            return F.interpolate(x, size=(small, small), mode="area")
        if self.tiles is not None and native.suits(x):
            return native.reduced(x, small)
        # The same for whole blocks of pixels, in half the time: rows, then columns.
        blocks = x.permute(0, 2, 3, 1).unflatten(1, (small, -1)).flatten(3).sum(dim=2)
        columns = blocks.unflatten(2, (small, -1, x.shape[1])).unbind(dim=3)
        return sum(columns[1:], columns[0]).div_((side // small) ** 2).permute(0, 3, 1, 2)

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) in [0, 1] -> (B, E)."""
        x = self.reduced(x)
        if self.tiles is not None and native.suits(x):
            (h,) = self.tiles(x)
        else:
            h = _cast(x - 0.5, self)
            for stage in self.stem:
                h = stage(h)
        # Its gradient lies as the maps do in memory; that of `mean` does not, and is copied about.
        return F.avg_pool2d(h, h.shape[-1]).flatten(1).float()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the orders (B, 6) and of the turns (B, 4)."""
        return self.tell(self.embed(x))

    def tell(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The same from an embedding (B, E)."""
        order, turn = self.head(embedding).split((len(ORDERS), len(TURNS)), dim=1)
        return order.log_softmax(dim=1), turn.log_softmax(dim=1)

    def verdicts(self, x: Tensor) -> Verdicts:
        """The embedding (B, E) of untouched images, -log p of the `SHOWN` orders and turns, nats."""
        x = self.reduced(x)
        shown = [x[:, ORDERS[k]].rot90(t, dims=(2, 3)) for k, t in SHOWN]
        if self.tiles is not None or len(x) * len(SHOWN) <= TOGETHER:
            shown = [torch.cat(shown)]
        embedding = torch.cat([self.embed(images) for images in shown])
        told = zip(SHOWN, *(part.chunk(len(SHOWN)) for part in self.tell(embedding)), strict=True)
        right = ((order[:, k], turn[:, t]) for (k, t), order, turn in told)
        orders, turns = zip(*right, strict=True)
        pretext = -torch.stack([*orders, *turns], dim=1).float()
        return {"embedding": embedding[: len(x)], "pretext": pretext}


class Inspector(nn.Module):
    """Marks defects: a small U-Net (Ronneberger et al. 2015) from half the resolution downwards.

    It never saw a real one: it learns to find those that `imagine` paints on normal images.
    """

    WIDTHS = (32, 64, 96, 128)
    SIDEWAYS = (32, 64, 96, 96)  # channels on the way back up

    def __init__(self, side: int) -> None:
        """For images of that side."""
        super().__init__()
        self.side = side
        first = nn.Conv2d(3, self.WIDTHS[0], 4, 2, padding=1, bias=False)
        stem = lowered.Stage(
            first, nn.BatchNorm2d(self.WIDTHS[0]), nn.SiLU(), _stage(32, self.WIDTHS[0], 1, True)
        )
        self.downs = nn.ModuleList([stem])
        for wide, narrow in pairwise(self.WIDTHS):
            down = nn.Sequential(_stage(wide, narrow, 2, True), _stage(narrow, narrow, 1, True))
            self.downs.append(down)
        sides = list(zip(self.WIDTHS, self.SIDEWAYS, strict=True))
        self.across = nn.ModuleList([nn.Conv2d(a, b, 1) for a, b in sides])
        self.merge = nn.ModuleList([nn.Conv2d(b, a, 1) for a, b in pairwise(self.SIDEWAYS)])
        self.ups = nn.ModuleList([_stage(a, a, 1, True) for a in self.SIDEWAYS[:-1]])
        self.to_odds = nn.Conv2d(self.SIDEWAYS[0], 1, 1)
        self.tiles: Network | None = None  # of a frozen copy

    def by_tiles(self) -> Network | None:
        """Its folded layers by the processor's tiles, where it has any."""
        convs = [conv for conv in _convs(self) if conv is not self.to_odds]
        if not fits(*convs) or not tells(self.to_odds):
            return None
        net, h, maps = Network(self.side), 0, list[int]()
        across, merge = _convs(self.across), _convs(self.merge)
        for down in self.downs:
            for conv in _convs(down):
                h = net.conv(h, conv)
            maps.append(h)
        h = net.conv(h, across[-1], silu=False)
        for i in reversed(range(len(self.ups))):
            wide = net.conv(h, merge[i], silu=False)
            both = net.conv(maps[i], across[i], silu=False, added=wide)
            told = None if i else self.to_odds
            h = net.conv(both, *_convs(self.ups[i]), told=told, last=not i)
        return net

    def forward(self, x: Tensor) -> Tensor:
        """Log-odds of a defect at each pixel, (B, S, S), of images (B, 3, S, S) in [0, 1]."""
        if self.tiles is not None and native.suits(x):
            (odds,) = self.tiles(x)
            return enlarge(odds[:, 0], x.shape[-1])
        wide = F.interpolate(self._odds(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return wide[:, 0]

    def _odds(self, x: Tensor) -> Tensor:
        """Of every other pixel, (B, 1, S / 2, S / 2)."""
        h, maps = _cast(x - 0.5, self), []
        for down in self.downs:
            h = down(h)
            maps.append(h)
        h = self.across[-1](h)
        for i in reversed(range(len(self.ups))):
            wide = F.interpolate(self.merge[i](h), size=maps[i].shape[-2:], mode="nearest")
            h = self.ups[i](wide + self.across[i](maps[i]))
        odds: Tensor = self.to_odds(h).float()
        return odds


class VAE(nn.Module):
    """A convolutional β-VAE (Kingma & Welling 2014; Higgins et al. 2017)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths, norm = config.hidden_dims, config.batch_norm
        strides = [a // b for a, b in pairwise((config.image_size, *config.sides))]
        self.config, self.side = config, config.sides[-1]
        self.stages = nn.ModuleList()
        for width_in, width, stride in zip((3, *widths), widths, strides, strict=False):
            self.stages.append(_stage(width_in, width, stride, norm))
        flat = widths[-1] * self.side**2
        self.dropout = nn.Dropout(config.dropout)
        self.to_mu = lowered.Linear(flat, config.latent_dim)
        self.to_logvar = lowered.Linear(flat, config.latent_dim)
        self.from_latent = lowered.Linear(config.latent_dim, flat)
        mirrored = widths[::-1][: strides.count(2)]
        self.ups = nn.Sequential(*[_stage_up(a, b, norm) for a, b in pairwise(mirrored)])
        # The last step to full size is a sub-pixel convolution (Shi et al. 2016): wide maps at
        # full resolution would cost more than all the rest together.
        self.to_pixels = nn.Sequential(
            nn.Conv2d(mirrored[-1], 12, 3, padding=1), nn.PixelShuffle(2)
        )
        self.companion = Companion(config.image_size) if config.companion else None
        self.inspector = Inspector(config.image_size) if config.inspector else None
        self.graphs: Graphs | None = None  # of a frozen copy, as what follows
        self.tiles: Tiles | None = None

    def by_tiles(self) -> "Tiles | None":
        """Its folded layers by the processor's tiles, where it has any."""
        stages, ups, side = _convs(self.stages), _convs(self.ups), self.config.image_size
        heads, (painter,) = (self.to_mu, self.to_logvar), _convs(self.to_pixels)
        if not fits(*stages, *ups) or not Linear.fits(*heads, self.from_latent):
            return None
        encoder, h = Network(side), 0
        for conv, below in zip(stages, [*stages[1:], None], strict=True):
            parted = below is not None and below.stride[0] == 2
            h = encoder.conv(h, conv, parted=parted, kept=True, last=below is None)
        decoder, h = Network(self.side, stages[-1].out_channels, together=2), 0
        painted = paints(painter, side // 2)
        for i, conv in enumerate(ups, 1):
            last = i == len(ups) and not painted
            h = decoder.conv(h, conv, kept=last, last=last)
        if painted:
            decoder.paint(h, painter)
        return Tiles(encoder, Linear(*heads), Linear(self.from_latent), decoder, painted)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps of every stage, fine to coarse, of images (B, 3, H, W) in [0, 1]."""
        if self.tiles is not None and native.suits(x):
            return tuple(self.tiles.encoder(x))
        maps = []
        h = _cast(x - 0.5, self.stages)
        for stage in self.stages:
            h = stage(h)
            maps.append(h)
        return tuple(maps)

    def posterior(self, top: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar, (B, Z) each, from the coarsest map."""
        flat = self.dropout(top.permute(0, 2, 3, 1).flatten(1))
        if self.tiles is not None and native.suits(flat, torch.bfloat16):
            mu, logvar = self.tiles.latents(flat)
            return mu, logvar.clamp(*LOGVAR_RANGE)
        flat = _cast(flat, self.to_mu)
        return self.to_mu(flat), self.to_logvar(flat).clamp(*LOGVAR_RANGE)

    def drawn(self, z: Tensor) -> Tensor:
        """The decoder's last maps (B, C, H / 2, W / 2) of latents (B, Z)."""
        out: Tensor = self.ups(self._unfolded(z))
        return out

    def _unfolded(self, z: Tensor) -> Tensor:
        """The decoder's first maps of latents."""
        if self.tiles is not None and native.suits(z):
            (flat,) = self.tiles.first(z.bfloat16())
            h = flat.bfloat16()
        else:
            h = self.dropout(self.from_latent(_cast(z, self.from_latent)))
        return h.unflatten(1, (self.side, self.side, -1)).permute(0, 3, 1, 2)  # channels last

    def painted(self, maps: Tensor) -> Tensor:
        """The decoder mean (B, 3, H, W) of its last maps."""
        recon: Tensor = self.to_pixels(_cast(maps, self.to_pixels)).float().sigmoid()
        return recon

    def painted_error(self, maps: Tensor, x: Tensor) -> Tensor:
        """Mean squared error of what the decoder makes of its last maps, ()."""
        return lowered.painted_error(self.to_pixels[0](_cast(maps, self.to_pixels)), x)

    def decode(self, z: Tensor) -> Tensor:
        """The decoder mean (B, 3, H, W) of latents (B, Z)."""
        if self.tiles is not None and native.suits(z):
            (out,) = self.tiles.decoder(self._unfolded(z))
            return out if self.tiles.painted else self.painted(out)
        return self.painted(self.drawn(z))

    def unpainted(self, x: Tensor, noise: Tensor | None = None) -> Evidence:
        """The VAE's pass, with the decoder's last maps for a reconstruction."""
        return self._pass(x, noise, self.drawn)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Evidence:
        """The VAE alone; `noise` (B, Z) samples the posterior, without it the mean is decoded."""
        return self._pass(x, noise, self.decode)

    def _pass(
        self, x: Tensor, noise: Tensor | None, decode: Callable[[Tensor], Tensor]
    ) -> Evidence:
        features = self.encode(x)
        mu, logvar = self.posterior(features[-1])
        z = mu if noise is None else mu + noise * (0.5 * logvar).exp()
        embedding = features[-1].mean(dim=(2, 3)).float()
        b = len(x)
        inspection, pretext = x.new_zeros(b, 0, 0), x.new_zeros(b, 0)
        return Evidence(x, decode(z), mu, logvar, features, embedding, inspection, pretext)

    def reconstructed(self, x: Tensor) -> Evidence:
        """The VAE's pass, of the posterior mean."""
        return Evidence(*self.by_graph(self.forward, x))

    def inspection(self, x: Tensor) -> Tensor:
        """What the inspector says of images, (B, S, S); (B, 0, 0) without one."""
        if self.inspector is None:
            return x.new_zeros(len(x), 0, 0)
        odds: Tensor = self.by_graph(self.inspector.forward, x)
        return odds

    def inspected(self, x: Tensor) -> Evidence:
        """The VAE's pass and the inspector's: all that the maps read."""
        return self.reconstructed(x)._replace(inspection=self.inspection(x))

    def evidence(self, x: Tensor) -> Evidence:
        """All that the scores read: the VAE's pass, the inspector's and the companion's verdicts."""
        return self.inspected(x)._replace(**self.verdicts(x))

    def verdicts(self, x: Tensor) -> Verdicts:
        """What the companion says of images; nothing without one."""
        if self.companion is None:
            return {}
        verdicts: Verdicts = self.by_graph(self.companion.verdicts, x)
        return verdicts

    def by_graph(self, work: Callable[..., Any], *given: Tensor) -> Any:
        """What a function gives for tensors (B, ...), by a graph where there is one.

        What goes by tiles hardly asks Python for anything: that needs no graph.
        """
        if self.graphs is None or getattr(getattr(work, "__self__", None), "tiles", None):
            return work(*given)
        return (self.graphs if ismethod(work) else SHARED)(work, *given)

    def frozen(self, dtype: torch.dtype, tiles: bool = True) -> "VAE":
        """A copy for scoring, in `dtype`: batch norms folded into their convolutions, no gradients.

        What becomes a number at once (latents, log-probabilities) stays in float32. On a CPU the
        convolutions go by its `tiles`, where it has any; the others are packed.
        """
        copy = deepcopy(self).eval().requires_grad_(False)
        for part in copy.modules():
            if isinstance(part, lowered.Lowered):
                part.low = None  # of a training that was broken off
        for block in _sequences(copy):
            _fold(block)
        for name, part in copy.named_modules():
            if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and name not in EXACT:
                part.to(dtype)
        copy = copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if can_pack(next(copy.parameters()).device):
            copy.graphs = Graphs()
            for net, parts in copy._networks():
                net.tiles = net.by_tiles() if tiles and dtype == torch.bfloat16 else None
                for block in _sequences(*parts) if net.tiles is None else ():
                    pack(block)
        return copy

    def _networks(self) -> list[tuple[Any, list[nn.Module]]]:
        """The networks that score, and where their convolutions are."""
        found: list[tuple[Any, list[nn.Module]]] = [(self, [self.stages, self.ups])]
        return found + [(net, [net]) for net in (self.companion, self.inspector) if net]


class Tiles(NamedTuple):
    """The parts of a frozen VAE by the processor's tiles."""

    encoder: Network
    latents: Linear  # mean and log variance
    first: Linear  # of the decoder
    decoder: Network
    painted: bool  # whether the decoder's last step to full size is in it


def _sequences(*parts: nn.Module) -> list[nn.Sequential]:
    return [m for part in parts for m in part.modules() if isinstance(m, nn.Sequential)]


def _convs(block: nn.Module) -> list[Any]:
    return [m for m in block.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]


def of_autoencoder(name: str) -> bool:
    """Whether a weight of that name is the VAE's own, not the companion's or the inspector's."""
    return name.split(".")[0] not in ("companion", "inspector")


def _fold(block: nn.Sequential) -> None:
    """Take a batch norm behind a convolution into its weights."""
    for i, (conv, norm) in enumerate(pairwise(list(block))):
        if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
            up = isinstance(conv, nn.ConvTranspose2d)
            block[i] = fuse_conv_bn_eval(conv, norm, transpose=up)
            block[i + 1] = nn.Identity()


def _cast(h: Tensor, module: nn.Module) -> Tensor:
    """In what the module computes in: the type of its first weights, or what autocast makes of it."""
    kind = h.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return h  # there and back again would be two copies
    return h.to(next(module.parameters()).dtype)
