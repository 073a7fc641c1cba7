"""The compiled loops of kernels.c, where they were built and the processor is made for them.

They are built when the package is (hatch_build.py) and left out where there is no compiler for it:
whoever calls them has a slower way too.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VERSION = 3  # of the functions' arguments, as in kernels.c
LIBRARY = Path(__file__).with_name("kernels.so")
NEEDED = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16")
LINE = 32  # the channels of maps are a multiple of it
TILE = 16  # rows of a tile
DIMENSIONS = 64  # of vectors in `place_distances`

POINTER, COUNT, REAL, FEW = ctypes.c_void_p, ctypes.c_long, ctypes.c_double, ctypes.c_int
ARGUMENTS = {
    "norm_silu": [POINTER, COUNT, COUNT, *[POINTER] * 4, REAL, REAL, *[POINTER] * 3, FEW],
    "norm_silu_gradient": [POINTER, POINTER, COUNT, COUNT, *[POINTER] * 4, FEW],
    "windows": [POINTER, *[COUNT] * 9, POINTER, FEW],
    "adamw": [POINTER, POINTER, POINTER, FEW, POINTER, FEW],
    "square_sum": [POINTER, POINTER, FEW],
    "painted_error": [POINTER, POINTER, COUNT, COUNT, POINTER, FEW],
    "painted_error_gradient": [*[POINTER] * 2, COUNT, COUNT, ctypes.c_float, POINTER, FEW],
    "local_means": [POINTER, COUNT, COUNT, *[POINTER] * 3, COUNT, POINTER, FEW],
    "place_distances": [POINTER, COUNT, COUNT, *[POINTER] * 3, FEW],
    "squared_error": [POINTER, POINTER, COUNT, POINTER, FEW],
    "blur_planes": [POINTER, COUNT, COUNT, POINTER, COUNT, POINTER, FEW],
    "mean_squares": [POINTER, POINTER, COUNT, COUNT, POINTER, FEW],
    "root_deviations": [POINTER, COUNT, COUNT, ctypes.c_float, POINTER, POINTER, FEW],
    "reduce_images": [POINTER, COUNT, COUNT, COUNT, POINTER, FEW],
    "enlarge_planes": [POINTER, COUNT, COUNT, COUNT, POINTER, FEW],
    "greatest_means": [POINTER, COUNT, COUNT, COUNT, POINTER, FEW],
    "band_energies": [POINTER, POINTER, COUNT, COUNT, POINTER, FEW],
    "local_vectors": [*[POINTER] * 4, FEW, COUNT, COUNT, POINTER, FEW],
    "linear": [POINTER, COUNT, COUNT, POINTER, COUNT, FEW, POINTER, FEW],
    "run_layers": [
        *(POINTER, FEW, POINTER, POINTER, COUNT, COUNT, COUNT),
        *(POINTER, POINTER, POINTER, COUNT, COUNT, FEW),
    ],
    "least_distances": [
        *(POINTER, COUNT, COUNT, COUNT, POINTER, POINTER, FEW, COUNT, POINTER, FEW),
    ],
}


@lru_cache(maxsize=1)
def loops() -> Any:
    """The loops, or `None`."""
    told = torch.cpu.get_capabilities()
    if not all(told.get(name) for name in NEEDED) or not LIBRARY.is_file():
        return None
    try:
        found = ctypes.CDLL(str(LIBRARY))
        if found.version() != VERSION:  # built before the sources were changed
            return None
    except (OSError, AttributeError):  # it is another system's, or torch has no OpenMP
        return None
    for name, arguments in ARGUMENTS.items():
        getattr(found, name).argtypes = arguments
    found.square_sum.restype = found.painted_error.restype = REAL
    return found


@lru_cache(maxsize=1)
def has_tiles() -> bool:
    """Whether the loops may use the processor's tiles (AMX)."""
    found = loops()
    told = torch.cpu.get_capabilities()
    return found is not None and bool(told.get("amx_bf16")) and bool(found.may_use_tiles())


def norm_silu(
    x: Tensor,
    affine: tuple[Tensor, Tensor],
    running: tuple[Tensor, Tensor],
    momentum: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """SiLU of the batch norm of maps (B, C, h, w) in bfloat16, channels last in memory.

    `affine` is its weight and bias (C,); `running` mean and variance (C,) follow those of the batch.
    Returns the maps, and what the gradient needs.
    """
    width, threads = x.shape[1], torch.get_num_threads()
    out, told, work = torch.empty_like(x), torch.empty(6, width), _room(threads, width)
    vectors = (t.data_ptr() for t in (*affine, *running))
    loops().norm_silu(
        *(x.data_ptr(), x.numel() // width, width, *vectors, momentum, epsilon),
        *(out.data_ptr(), told.data_ptr(), work.data_ptr(), threads),
    )
    return out, told


def norm_silu_gradient(x: Tensor, above: Tensor, told: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the maps (B, C, h, w), of weight and of bias (C,) from that `above`.

    All maps alike in memory.
    """
    width, threads = x.shape[1], torch.get_num_threads()
    below, both, work = torch.empty_like(x), torch.empty(2, width), _room(threads, width)
    loops().norm_silu_gradient(
        *(x.data_ptr(), above.data_ptr(), x.numel() // width, width, told.data_ptr()),
        *(below.data_ptr(), both.data_ptr(), work.data_ptr(), threads),
    )
    return below, both[0], both[1]


def _room(threads: int, width: int) -> Tensor:
    return torch.empty(threads, 2, width, dtype=torch.double)


def windows(maps: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """What of maps (B, C, h, w) in bfloat16 lies beneath a kernel, place by place.

    (B h' w', size² C), zeros where it reaches beyond them.
    """
    rows = maps.permute(0, 2, 3, 1).contiguous()
    b, high, wide, c = rows.shape
    down, across = ((side + 2 * padding - size) // stride + 1 for side in (high, wide))
    out = rows.new_empty(b * down * across, size * size * c)
    loops().windows(
        *(rows.data_ptr(), b, high, wide, c, size, stride, padding, down, across),
        *(out.data_ptr(), torch.get_num_threads()),
    )
    return out


def painted_error(colours: Tensor, x: Tensor) -> Tensor:
    """Mean of (sigmoid(pixel shuffle of the colours) - x)², ().

    Of maps (B, 12, h, w) in bfloat16 and images (B, 3, 2 h, 2 w), both channels last in memory.
    """
    b, _, high, wide = colours.shape
    assert x.shape == (b, 3, 2 * high, 2 * wide)
    threads = torch.get_num_threads()
    sums = torch.empty(threads, dtype=torch.double)
    given = (colours.data_ptr(), x.data_ptr(), b * high, wide, sums.data_ptr(), threads)
    return torch.tensor(loops().painted_error(*given) / x.numel())


def painted_error_gradient(colours: Tensor, x: Tensor, scale: float) -> Tensor:
    """Its gradient (B, 12, h, w) times the scale."""
    b, _, high, wide = colours.shape
    out = torch.empty_like(colours)
    loops().painted_error_gradient(
        *(colours.data_ptr(), x.data_ptr(), b * high, wide, scale / x.numel()),
        *(out.data_ptr(), torch.get_num_threads()),
    )
    return out


class Weights:
    """Weights whose copies in bfloat16 are trained: what the loops need to know of all of them.

    Each with its moments (float32) and its copy, all alike in memory, without gaps.
    """

    def __init__(self, moved: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
        self.moved, self.number = moved, len(moved)
        self.counts = (COUNT * self.number)(*[each[0].numel() for each in moved])

    def step(self, gradients: Sequence[Tensor], factors: Sequence[float]) -> None:
        """One step of AdamW down gradients alike in memory; the `factors` (7) are those of kernels.c."""
        told = (ctypes.c_float * len(factors))(*factors)
        threads = torch.get_num_threads()
        moved = pointers([t for each in self.moved for t in each])
        given = (moved, pointers(gradients), self.counts, self.number, told, threads)
        loops().adamw(*given)

    def square_sum(self, gradients: Sequence[Tensor]) -> float:
        """Σ g² of all gradients."""
        return float(loops().square_sum(pointers(gradients), self.counts, self.number))


def pointers(tensors: Sequence[Tensor]) -> Any:
    """Where tensors begin, for the loops."""
    return (POINTER * len(tensors))(*[t.data_ptr() for t in tensors])


def fits(dims: int, places: int) -> bool:
    """Whether `least_distances` takes images of so many places, of so many numbers each."""
    return places % (2 * TILE) == 0 and 0 <= _room_for(dims) <= dims and has_tiles()


def _room_for(dims: int) -> int:
    """Dimensions of which there are three columns of the 32 instead of two."""
    return LINE - 3 - 2 * dims


def packed_places(places: Tensor) -> Tensor:
    """Places b (..., L, D) as columns (..., L, 32) in bfloat16, for `least_distances`.

    |q - b|² = |q|² + (q, q', 1, q) · (-2 b, -2 b, n, -2 b'), with q' and b' what bfloat16 leaves over of
    q and b. n, a sum of three, is such that a place is at no distance from itself. There is room for b'
    of the last dimensions only: of the others b is rounded, which moves no distance by more than that.
    """
    high, rest = halves(places.float())
    more = rest[..., places.shape[-1] - _room_for(places.shape[-1]) :]
    own, left, kept = high.double(), rest.double(), more.double()
    itself = ((own + left) * own).sum(dim=-1) + (own[..., -kept.shape[-1] :] * kept).sum(dim=-1)
    told = parts(2 * itself - (own + left).square().sum(dim=-1))
    return torch.cat([-2 * high.repeat_interleave(2, dim=-1), told, -2 * more], dim=-1).contiguous()


def parts(values: Tensor) -> Tensor:
    """Three numbers in bfloat16 whose sum each of the values (...) is, (..., 3)."""
    found = []
    for _ in range(3):
        found.append(values.bfloat16())
        values = values - found[-1].to(values.dtype)
    return torch.stack(found, dim=-1)


def least_distances(queries: Tensor, banks: Tensor, alike: Tensor) -> Tensor:
    """The squared distance of each of the queries (B, D, L) to a place of the banks alike, (B, L).

    The `packed_places` (M, L', 32) are of images, of which `alike` (B, A) tells those that count.
    """
    queries, alike = queries.contiguous(), alike.contiguous()
    images, dims, count = queries.shape
    assert fits(dims, count)
    assert fits(dims, banks.shape[1])
    out = torch.empty(images, count)
    loops().least_distances(
        *(queries.data_ptr(), images, dims, count, banks.data_ptr(), alike.data_ptr()),
        *(alike.shape[1], banks.shape[1], out.data_ptr(), torch.get_num_threads()),
    )
    return out


def local_means(x: Tensor, kernels: Tensor, radii: Tensor, at: Tensor) -> Tensor:
    """Local means (B, 13, g, g) of images (B, 3, S, S), as `structure` wants them.

    Given are the kernels of the window and of three bands, one after the other, their radii (4,),
    and the places (g,) of the grid.
    """
    pixels = x.detach().permute(0, 2, 3, 1).float().contiguous()
    out = torch.empty(len(x), 13, len(at), len(at))
    loops().local_means(
        *(pixels.data_ptr(), len(x), x.shape[-1], kernels.data_ptr(), radii.data_ptr()),
        *(at.data_ptr(), len(at), out.data_ptr(), torch.get_num_threads()),
    )
    return out


def packed_triangles(whiten: Tensor) -> Tensor:
    """Upper triangular matrices (L, 64, 64) without the blocks of 16 columns that are zero."""
    starts = range(0, DIMENSIONS, TILE)
    parts = [whiten[:, first : first + TILE, first:].flatten(1) for first in starts]
    return torch.cat(parts, dim=1)


def place_distances(vectors: Tensor, mean: Tensor, triangles: Tensor) -> Tensor:
    """|(v - mean) W|², (B, L), of vectors (B, L, 64) at L places, W the `packed_triangles`."""
    vectors = vectors.contiguous()
    assert vectors.shape[1:] == mean.shape
    assert len(triangles) == len(mean)
    out = vectors.new_empty(vectors.shape[:2])
    loops().place_distances(
        *(vectors.data_ptr(), *vectors.shape[:2], mean.data_ptr(), triangles.data_ptr()),
        *(out.data_ptr(), torch.get_num_threads()),
    )
    return out


def blur(planes: Tensor, kernel: Tensor) -> Tensor:
    """Planes (B, S, S) blurred by a kernel (2 r + 1,) in both directions, mirrored at the edges."""
    planes = planes.contiguous()
    out, side, threads = torch.empty_like(planes), planes.shape[-1], torch.get_num_threads()
    loops().blur_planes(
        *(planes.data_ptr(), planes.numel() // side**2, side, kernel.data_ptr(), len(kernel) // 2),
        *(out.data_ptr(), threads),
    )
    return out


def enlarged(planes: Tensor, side: int) -> Tensor:
    """Planes (B, s, s) at S x S places, s no more than S, bilinear."""
    planes = planes.contiguous()
    out = planes.new_empty(len(planes), side, side)
    loops().enlarge_planes(
        *(planes.data_ptr(), len(planes), planes.shape[-1], side, out.data_ptr()),
        torch.get_num_threads(),
    )
    return out


def root_deviations(planes: Tensor, floor: float, mean: Tensor, std: Tensor) -> Tensor:
    """(√(v + floor) - mean) / std of planes v (B, S, S), which are overwritten; both (S, S)."""
    assert planes.is_contiguous()
    assert planes.shape[1:] == mean.shape == std.shape
    mean, std = mean.contiguous(), std.contiguous()
    loops().root_deviations(
        *(planes.data_ptr(), len(planes), mean.numel(), floor, mean.data_ptr(), std.data_ptr()),
        torch.get_num_threads(),
    )
    return planes


def reduced(x: Tensor, small: int) -> Tensor:
    """Images (B, 3, S, S) at s x s places, the means of whole squares: s divides S."""
    rows = x.permute(0, 2, 3, 1).contiguous()
    out = rows.new_empty(len(rows), small, small, 3)
    loops().reduce_images(
        *(rows.data_ptr(), len(rows), rows.shape[1], small, out.data_ptr()),
        torch.get_num_threads(),
    )
    return out.permute(0, 3, 1, 2)


def greatest_means(values: Tensor, count: int) -> Tensor:
    """The mean of the `count` greatest of each row of values (B, N), (B,)."""
    values = values.contiguous()
    out = values.new_empty(len(values))
    loops().greatest_means(
        *(values.data_ptr(), *values.shape, count, out.data_ptr(), torch.get_num_threads())
    )
    return out


def suits(values: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the loops can take values: on the CPU, without gradients, and not in a trace.

    A trace would take down what they gave as if it were always so.
    """
    here = values.device.type == "cpu" and values.dtype == dtype
    jit: Any = torch.jit
    wanted = torch.is_grad_enabled() and values.requires_grad
    return here and not wanted and not jit.is_tracing() and loops() is not None


def squared_error(x: Tensor, recon: Tensor) -> Tensor:
    """Mean over the channels of (x - x̂)², (B, S, S)."""
    assert x.shape == recon.shape
    own, other = (t.permute(0, 2, 3, 1).contiguous() for t in (x, recon))
    out = own.new_empty(own.shape[:3])
    loops().squared_error(
        *(own.data_ptr(), other.data_ptr(), out.numel(), out.data_ptr(), torch.get_num_threads())
    )
    return out


def mean_squares(x: Tensor, recon: Tensor) -> Tensor:
    """Mean of (x - x̂)², (B,)."""
    assert x.shape == recon.shape
    own, other = (t.permute(0, 2, 3, 1).contiguous() for t in (x, recon))
    out = own.new_empty(len(own))
    loops().mean_squares(
        *(own.data_ptr(), other.data_ptr(), len(own), own[0].numel(), out.data_ptr()),
        torch.get_num_threads(),
    )
    return out


def band_energies(x: Tensor, recon: Tensor) -> Tensor:
    """Energies by Haar band, luma and colour, of x - x̂ and of x - 1/2, (B, 2, 4, 2)."""
    assert x.shape == recon.shape
    own, other = (t.permute(0, 2, 3, 1).contiguous() for t in (x, recon))
    out = x.new_empty(len(x), 2, 4, 2)
    loops().band_energies(
        *(own.data_ptr(), other.data_ptr(), len(x), x.shape[-1], out.data_ptr()),
        torch.get_num_threads(),
    )
    return out


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest numbers in bfloat16, and what they leave over."""
    high = values.bfloat16()
    return high, (values - high.float()).bfloat16()


def packed_mix(mix: Tensor) -> Tensor:
    """Weights (C, 64) as `local_vectors` takes them, each of two numbers in bfloat16."""
    both = torch.stack(halves(mix))  # (2, C, 64)
    pieces = both.view(2, -1, TILE, 2, DIMENSIONS // TILE, TILE)  # (2, C/32, 16, 2, 4, 16)
    return pieces.permute(1, 4, 0, 2, 5, 3).contiguous()


def mixes(maps: Sequence[Tensor], mix: Tensor, grid: int) -> bool:
    """Whether `local_vectors` takes such maps (B, C, h, w) and such a `mix` (C, D)."""
    sides = [f.shape[-1] for f in maps]
    lines = all(f.shape[1] % LINE == 0 and suits(f, torch.bfloat16) for f in maps)
    squares = all(side**2 % TILE == 0 for side in (*sides, grid))
    finer = all(side % grid == 0 for side in sides if side > grid) and sides[0] >= grid
    return lines and squares and finer and mix.shape[1] == DIMENSIONS and has_tiles()


def local_vectors(maps: Sequence[Tensor], packed: Sequence[Tensor], grid: int) -> Tensor:
    """The sum of maps (B, C, h, h) in bfloat16, each times its `packed_mix`, at g x g places.

    (B, g², 64), to 16 bits: the average of finer maps, coarser ones enlarged (bilinear). The first is
    not a coarser one.
    """
    rows = [f.permute(0, 2, 3, 1).contiguous() for f in maps]
    sides, widths = ((COUNT * len(rows))(*[f.shape[k] for f in rows]) for k in (1, 3))
    out = torch.empty(len(rows[0]), grid**2, DIMENSIONS)
    loops().local_vectors(
        *(pointers(rows), pointers(packed), sides, widths, len(rows), len(out), grid),
        *(out.data_ptr(), torch.get_num_threads()),
    )
    return out
