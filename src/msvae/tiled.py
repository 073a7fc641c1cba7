"""Frozen convolutions by the processor's tiles (AMX): each image through all layers at once.

torch computes a layer of the whole batch before the next one, and writes maps that no cache holds.
Here those of an image or two lie in planes that are used again and again, and are finished (bias,
SiLU, what is added) while the tiles are multiplied.
"""

from __future__ import annotations

import ctypes
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msvae import native
from msvae.native import LINE, TILE

Convolution = nn.Conv2d | nn.ConvTranspose2d

# Of a transposed convolution of 4 x 4 by two: for output rows (and columns) that are even and odd, the
# row of the kernel and the row of the plane that it meets, counted from the one above.
UP = (((1, 1), (3, 0)), ((2, 1), (0, 2)))
GAP = 512  # numbers behind an image's plane, zeros that a tile may read as pixels
BEYOND = 32  # places that a tile may read beyond the last plane's end, at most


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, native.POINTER) for name in ("weights", "bias", "taps", "starts", "at", "told")),
        *((name, native.COUNT) for name in ("n_taps", "chunks", "blocks", "step", "width")),
        *((name, native.COUNT) for name in ("above", "below", "added", "kept", "silu", "paints")),
    )


class _Plane(ctypes.Structure):
    _fields_ = (("at", native.COUNT), ("size", native.COUNT))


@dataclass(frozen=True)
class _Maps:
    """Maps of an image: their side and channels, and how they lie in a plane with a border.

    `parted`: every other row and column by itself, so that what a stride of two reads lies together.
    """

    side: int
    width: int
    parted: bool = False
    dtype: torch.dtype = torch.bfloat16  # of what is kept

    @property
    def line(self) -> int:
        """Places from one row of their plane to the next."""
        return (self.side + 3) // 2 if self.parted else self.side + 2

    @property
    def size(self) -> int:
        """Numbers of their plane."""
        return self.line**2 * (4 if self.parted else 1) * self.width + GAP

    @property
    def bytes(self) -> int:
        """Of an image's maps that are kept."""
        return self.side**2 * self.width * self.dtype.itemsize

    def at(self, y: Tensor, x: Tensor) -> Tensor:
        """The place in the plane of a row and a column, counted from those of the border."""
        if not self.parted:
            return y * self.line + x
        part = y % 2 * 2 + x % 2
        return (part * self.line + y // 2) * self.line + x // 2


@dataclass(frozen=True)
class _Pass:
    """A convolution as sums over taps: for a transposed one, of every other row and column."""

    weights: Tensor  # (taps, width, K)
    taps: list[tuple[int, int]]  # row and column beneath the kernel, from where a place starts
    side: int  # places that are computed in a row
    step: int  # rows and columns of the maps above from one to the next
    scale: int = 1  # places in the plane below from one to the next
    shift: tuple[int, int] = (0, 0)  # and row and column of the first


class Network:
    """Layers one after the other, of images (B, 3, S, S) or maps (B, C, S, S) in bfloat16."""

    def __init__(self, side: int, width: int = 3, together: int = 1) -> None:
        """For images of that side, of which so many go through a layer before the next one.

        More than one where weights are large and maps are small.
        """
        self.together = together
        self.planes = [_Maps(side, width)]
        self.kept: list[_Maps] = []
        self.layers: list[_Layer] = []
        self._held: list[tuple[Tensor, ...]] = []  # what the layers point to
        self._rooms = deque[Tensor]()  # for as many threads as have been at work at once

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        return self  # nothing in it changes once it is in use, and layers point to what it holds

    def conv(
        self,
        above: int,
        conv: Convolution,
        *,
        silu: bool = True,
        added: int | None = None,
        parted: bool = False,
        kept: bool = False,
        last: bool = False,
        told: nn.Conv2d | None = None,
    ) -> int:
        """One more layer, on the maps `above` (0 is what is given); returns the number of its maps.

        `added` to it are other maps, enlarged to its size by repetition. What is `kept` is given out
        in the order of these calls; or else what a convolution of 32 channels to one has `told` of it,
        in float32. The `last` is read by no layer; by none but those with a stride of two if `parted`.
        """
        given = self.planes[above]
        maps = _Maps(_side_of(conv, given.side), conv.out_channels, parted)
        bias = conv.weight.new_zeros(maps.width) if conv.bias is None else conv.bias
        tell = torch.empty(0)
        if told is not None:
            assert tells(told)
            assert told.bias is not None
            tell = torch.cat([told.weight.detach().flatten(), told.bias.detach()]).float()
        if kept or told is not None:
            self.kept.append(maps if told is None else _Maps(maps.side, 1, dtype=torch.float32))
        if not last:
            self.planes.append(maps)
        numbers = (
            *(above, -1 if last else len(self.planes) - 1, -1 if added is None else added),
            *(len(self.kept) - 1 if kept or told is not None else -1, int(silu), 0),
        )
        more = maps if added is None else self.planes[added]
        for each in _passes(conv, given, maps):
            step = 1 if given.parted else each.step
            starts, places = _blocks(each.side, given.line, step)
            rows, columns = (torch.tensor(part) for part in zip(*each.taps, strict=True))
            tables = (
                _packed(each.weights),
                bias.detach().float().contiguous(),
                (given.at(rows, columns) * given.width).int(),
                (starts * given.width).int(),
                _targets(places, each, maps, more),
                tell,
            )
            count, taps, chunks = len(starts), len(each.taps), each.weights.shape[2] // LINE
            shape = (taps, chunks, count, step * given.width, maps.width)
            pointers = (t.data_ptr() if t.numel() else None for t in tables)
            self.layers.append(_Layer(*pointers, *shape, *numbers))
            self._held.append(tables)
        return -1 if last else len(self.planes) - 1

    def paint(self, above: int, conv: nn.Conv2d) -> None:
        """The last layer of a decoder: a convolution of 3 x 3, pixel shuffle by two, sigmoid.

        Kept are images (B, 3, 2 S, 2 S) in float32; the weights keep 16 bits.
        """
        # (colour, row, column of the 2 x 2 pixels) -> row, column, colour, with room for 16
        order = torch.arange(12).view(3, 2, 2).permute(1, 2, 0).flatten()
        weight, bias = conv.weight.detach().float()[order], torch.zeros(TILE)
        if conv.bias is not None:
            bias[:12] = conv.bias.detach().float()[order]
        taps = weight.new_zeros(9, LINE, TILE)
        taps[:, :, :12] = weight.flatten(2).permute(2, 1, 0)
        both = torch.stack(native.halves(taps), dim=1)
        tables = (both.unflatten(2, (-1, 2)).transpose(3, 4).contiguous(), bias)
        side = self.planes[above].side
        self.kept.append(_Maps(2 * side, 3, dtype=torch.float32))
        self.layers.append(
            _Layer(
                *(t.data_ptr() for t in tables),
                above=above,
                below=-1,
                added=-1,
                kept=len(self.kept) - 1,
                paints=side,
            )
        )
        self._held.append(tables)

    @cached_property
    def _laid_out(self) -> tuple[Any, Any, Any, int]:
        """The layers, the planes, the bytes of an image's kept maps, and the numbers of all planes."""
        planes, at, free = [], 0, list[tuple[int, _Maps, int]]()
        for i, maps in enumerate(self.planes):
            first, last = self._used(i)
            # One like it that no layer reads any more: its border is zero already.
            again = [f for f in free if f[1] == maps and f[0] < first]
            if again:
                free.remove(again[0])
            place = again[0][2] if again else at
            free.append((last, maps, place))
            planes.append(_Plane(place, maps.size))
            at = max(at, place + maps.size * self.together)
        kept = [maps.bytes for maps in self.kept]
        layers = (_Layer * len(self.layers))(*self.layers)
        at += BEYOND * max(maps.width for maps in self.planes)
        return layers, (_Plane * len(planes))(*planes), (native.COUNT * len(kept))(*kept), at

    def _used(self, plane: int) -> tuple[int, int]:
        """The first layer that writes or reads it, and the last."""
        at = [k for k, one in enumerate(self.layers) if plane in (one.above, one.below, one.added)]
        return min(at), max(at)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """What is kept, (B, C, h, w), channels last in memory."""
        layers, planes, sizes, size = self._laid_out
        given, threads = self.planes[0], torch.get_num_threads()
        assert x.shape[1:] == (given.width, given.side, given.side)
        assert x.dtype == (torch.float32 if given.width == 3 else torch.bfloat16)
        rows = x.permute(0, 2, 3, 1).contiguous()
        out = [
            torch.empty(len(x), maps.side, maps.side, maps.width, dtype=maps.dtype)
            for maps in self.kept
        ]
        room = self._room(threads, size)
        native.loops().run_layers(
            *(layers, len(layers), planes, rows.data_ptr(), len(x), given.side, given.width),
            *(native.pointers(out), sizes, room.data_ptr(), size, self.together, threads),
        )
        self._rooms.append(room)
        return [maps.permute(0, 3, 1, 2) for maps in out]

    def _room(self, threads: int, size: int) -> Tensor:
        try:
            room = self._rooms.pop()
        except IndexError:
            return torch.zeros(threads, size, dtype=torch.bfloat16)
        return room if len(room) >= threads else room.new_zeros(threads, size)


class Linear:
    """Linear layers side by side, of rows (B, K) in bfloat16.

    Weights in float32 keep 16 bits.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers])  # (N, K)
        self.widths = [layer.out_features for layer in layers]
        self.bias = torch.cat([layer.bias.detach().float() for layer in layers])
        low = weight.dtype == torch.bfloat16
        parts = torch.stack([weight.T] if low else native.halves(weight.T))  # (1 or 2, K, N)
        self.parts = len(parts)
        pieces = parts.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE, 2))
        self.weights = pieces.permute(1, 4, 0, 2, 5, 3).contiguous()

    @staticmethod
    def fits(*layers: nn.Linear) -> bool:
        """Whether there are tiles, and they take such layers."""
        lines = all(m.out_features % LINE == m.in_features % LINE == 0 for m in layers)
        return lines and native.has_tiles()

    def __call__(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What each layer makes of them, (B, N) in float32."""
        rows = rows.contiguous()
        assert rows.dtype == torch.bfloat16
        out = torch.empty(len(rows), len(self.bias))
        native.loops().linear(
            *(rows.data_ptr(), *rows.shape, self.weights.data_ptr(), len(self.bias), self.parts),
            *(out.data_ptr(), torch.get_num_threads()),
        )
        return out.add_(self.bias).split(self.widths, dim=1)


def fits(*convs: Convolution) -> bool:
    """Whether there are tiles, and a `Network` takes such convolutions."""
    return all(map(_fits, convs)) and native.has_tiles()


def _fits(conv: Convolution) -> bool:
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    square = all(len({*pair}) == 1 for pair in (kernel, stride, padding) if len(pair) == 2)
    plain = conv.groups == 1 and {*conv.dilation} == {1} and padding[0] in (0, 1)
    narrow = conv.in_channels == 3 and 3 * kernel[0] <= LINE and padding[0] == 1
    lines = conv.in_channels % LINE == conv.out_channels % LINE == 0
    if isinstance(conv, nn.ConvTranspose2d):
        fits = lines and (kernel[0], stride[0], padding[0]) == (4, 2, 1)
        return fits and square and plain and {*conv.output_padding} == {0}
    return square and plain and (lines or (narrow and conv.out_channels % LINE == 0))


def tells(conv: nn.Conv2d) -> bool:
    """Whether a layer of a `Network` can be `told` of by it."""
    return conv.weight.shape == (1, LINE, 1, 1) and conv.bias is not None


def paints(conv: nn.Conv2d, side: int) -> bool:
    """Whether a `Network` can `paint` by it, of maps of that side."""
    return conv.weight.shape == (12, LINE, 3, 3) and conv.padding == (1, 1) and side >= TILE


def _side_of(conv: Convolution, side: int) -> int:
    if isinstance(conv, nn.ConvTranspose2d):
        return 2 * side
    (kernel, _), (stride, _) = conv.kernel_size, conv.stride
    return (side + 2 * int(conv.padding[0]) - kernel) // stride + 1


def _passes(conv: Convolution, given: _Maps, maps: _Maps) -> list[_Pass]:
    weight, kernel = conv.weight.detach().float(), conv.kernel_size[0]
    if isinstance(conv, nn.ConvTranspose2d):
        found = []
        for row, rows in enumerate(UP):
            for column, columns in enumerate(UP):
                taps = [(y, x) for _, y in rows for _, x in columns]
                each = [weight[:, :, ky, kx].T for ky, _ in rows for kx, _ in columns]
                found.append(_Pass(torch.stack(each), taps, given.side, 1, 2, (row, column)))
        return found
    off, step = 1 - int(conv.padding[0]), conv.stride[0]
    if given.width == 3:  # a row of the kernel is one tap
        each_row = weight.permute(2, 0, 3, 1).flatten(2)
        each_row = F.pad(each_row, (0, LINE - each_row.shape[2]))
        return [_Pass(each_row, [(k, 0) for k in range(kernel)], maps.side, step)]
    taps = [(y + off, x + off) for y in range(kernel) for x in range(kernel)]
    return [_Pass(weight.permute(2, 3, 0, 1).flatten(0, 1), taps, maps.side, step)]


def _packed(weights: Tensor) -> Tensor:
    """Weights (taps, width, K) as the tiles take them, (width / 32, taps, K / 32, 2, 16, 16, 2)."""
    pairs = weights.unflatten(2, (-1, TILE, 2)).unflatten(1, (-1, 2, TILE))
    return pairs.permute(1, 0, 4, 2, 5, 3, 6).bfloat16().contiguous()


def _blocks(side: int, line: int, step: int) -> tuple[Tensor, Tensor]:
    """Blocks of 16 places: where each starts in the plane above, (N,), its places, (N, 16), or -1.

    In rows, the last of which begin again what others have done; where rows are shorter, along the
    plane with its borders, or by the row where places are skipped.
    """
    along = torch.arange(TILE)
    if side >= TILE:
        firsts = torch.tensor(sorted({*range(0, side - TILE + 1, TILE), side - TILE}))
        y = torch.arange(side).repeat_interleave(len(firsts))
        x = firsts.repeat(side)
        return (y * line + x) * step, (y * side + x)[:, None] + along
    if step == 1:
        starts = torch.arange(0, (side - 1) * line + side, TILE)
        y, x = (starts[:, None] + along) // line, (starts[:, None] + along) % line
        return starts, torch.where((y < side) & (x < side), y * side + x, -1)
    y = torch.arange(side)
    return y * line * step, torch.where(along < side, y[:, None] * side + along, -1)


def _targets(places: Tensor, each: _Pass, maps: _Maps, added: _Maps) -> Tensor:
    """Where places (N, 16) go: in the plane below, in kept maps, and what is added, (N, 3, 16)."""
    y, x = places // each.side, places % each.side
    y, x = each.scale * y + each.shift[0], each.scale * x + each.shift[1]
    down, right = y * added.side // maps.side, x * added.side // maps.side
    found = (maps.at(y + 1, x + 1), y * maps.side + x, added.at(down + 1, right + 1))
    return torch.stack(found, dim=1).masked_fill((places < 0)[:, None], -1).int().contiguous()
