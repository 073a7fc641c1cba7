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

VERSION = 2  # of the functions' arguments, as in kernels.c
LIBRARY = Path(__file__).with_name("kernels.so")
NEEDED = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16")
LINE = 32  # the channels of maps are a multiple of it
TILE = 16  # rows of a tile: the places in `least_products` are a multiple of four of them
COLUMNS = 64  # of a place there
DIMENSIONS = 64  # of vectors in `place_distances`

POINTER, COUNT, REAL, FEW = ctypes.c_void_p, ctypes.c_long, ctypes.c_double, ctypes.c_int
ARGUMENTS = {
    "norm_silu": [POINTER, COUNT, COUNT, *[POINTER] * 4, REAL, REAL, *[POINTER] * 3, FEW],
    "norm_silu_gradient": [POINTER, POINTER, COUNT, COUNT, *[POINTER] * 4, FEW],
    "adamw": [POINTER, POINTER, POINTER, FEW, POINTER, FEW],
    "square_sum": [POINTER, POINTER, FEW],
    "painted_error": [POINTER, POINTER, COUNT, COUNT, POINTER, FEW],
    "painted_error_gradient": [*[POINTER] * 2, COUNT, COUNT, ctypes.c_float, POINTER, FEW],
    "local_means": [POINTER, COUNT, COUNT, *[POINTER] * 3, COUNT, POINTER, FEW],
    "place_distances": [POINTER, COUNT, COUNT, *[POINTER] * 3, FEW],
    "squared_error": [POINTER, POINTER, COUNT, POINTER, FEW],
    "blur_planes": [POINTER, COUNT, COUNT, POINTER, COUNT, POINTER, FEW],
    "greatest_means": [POINTER, COUNT, COUNT, COUNT, POINTER, FEW],
    "band_energies": [POINTER, POINTER, COUNT, COUNT, POINTER, FEW],
    "to_pixels": [POINTER, COUNT, COUNT, COUNT, *[POINTER] * 3, FEW],
    "mix": [POINTER, COUNT, COUNT, POINTER, POINTER, FEW],
    "least_products": [POINTER, COUNT, COUNT, *[POINTER] * 2, FEW, COUNT, POINTER, FEW],
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
        moved = _pointers([t for each in self.moved for t in each])
        given = (moved, _pointers(gradients), self.counts, self.number, told, threads)
        loops().adamw(*given)

    def square_sum(self, gradients: Sequence[Tensor]) -> float:
        """Σ g² of all gradients."""
        return float(loops().square_sum(_pointers(gradients), self.counts, self.number))


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (POINTER * len(tensors))(*[t.data_ptr() for t in tensors])


def fits(places: int) -> bool:
    """Whether `least_products` takes images of so many places."""
    return places % (4 * TILE) == 0


def packed(places: Tensor) -> Tensor:
    """Places (..., L, 64) in bfloat16 as `least_products` takes them: in another order."""
    groups = places.unflatten(-2, (-1, TILE)).unflatten(-1, (-1, 2))  # (..., L/16, 16, 32, 2)
    return groups.transpose(-3, -2).contiguous()


def least_products(queries: Tensor, banks: Tensor, alike: Tensor) -> Tensor:
    """The least product of each of the queries (B, L, 64) with a place of the banks alike, (B, L).

    All in bfloat16, the products in float32. The `packed` banks (M, L' / 16, 32, 16, 2) are of images,
    of which `alike` (B, A) tells those that count.
    """
    queries, alike = queries.contiguous(), alike.contiguous()
    images, count, columns = queries.shape
    places = banks[0].numel() // COLUMNS
    assert columns == COLUMNS
    assert fits(count)
    assert fits(places)
    least = torch.empty(images, count)
    loops().least_products(
        *(queries.data_ptr(), images, count, banks.data_ptr(), alike.data_ptr(), alike.shape[1]),
        *(places, least.data_ptr(), torch.get_num_threads()),
    )
    return least


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


def mixes(maps: Tensor, mix: Tensor) -> bool:
    """Whether `mixed` takes such maps (B, C, h, w) and such a `mix` (C, D)."""
    fits = maps.shape[1] % LINE == 0 and maps.numel() // maps.shape[1] % TILE == 0
    return fits and mix.shape[1] == DIMENSIONS and suits(maps, torch.bfloat16) and has_tiles()


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest numbers in bfloat16, and what they leave over."""
    high = values.bfloat16()
    return high, (values - high.float()).bfloat16()


def packed_mix(mix: Tensor) -> Tensor:
    """Weights (C, 64) as `mixed` takes them, each of two numbers in bfloat16."""
    both = torch.stack(halves(mix))  # (2, C, 64)
    pieces = both.view(2, -1, TILE, 2, DIMENSIONS // TILE, TILE)  # (2, C/32, 16, 2, 4, 16)
    return pieces.permute(1, 4, 0, 2, 5, 3).contiguous()


def mixed(maps: Tensor, packed: Tensor) -> Tensor:
    """Maps (B, C, h, w) in bfloat16 times a `packed_mix`, (B, h, w, 64), to 16 bits."""
    rows = maps.permute(0, 2, 3, 1).contiguous()
    count, width = rows.numel() // rows.shape[3], rows.shape[3]
    out = torch.empty(*rows.shape[:3], DIMENSIONS)
    loops().mix(
        *(rows.data_ptr(), count, width, packed.data_ptr(), out.data_ptr()),
        torch.get_num_threads(),
    )
    return out


class Painter:
    """The last step of a decoder: a convolution of 3 x 3, pixel shuffle by two, sigmoid.

    Of maps (B, 32, h, w) in bfloat16, w a multiple of 16; the weights keep 16 bits.
    """

    def __init__(self, conv: torch.nn.Conv2d) -> None:
        # (colour, row, column of the 2 x 2 pixels) -> row, column, colour, with room for 16
        order = torch.arange(12).view(3, 2, 2).permute(1, 2, 0).flatten()
        weight = conv.weight.detach().float()[order]
        self.bias = torch.zeros(TILE)
        if conv.bias is not None:
            self.bias[:12] = conv.bias.detach().float()[order]
        taps = weight.new_zeros(9, LINE, TILE)
        taps[:, :, :12] = weight.flatten(2).permute(2, 1, 0)
        both = torch.stack(halves(taps), dim=1)
        self.weights = both.unflatten(2, (-1, 2)).transpose(3, 4).contiguous()

    @staticmethod
    def suits(conv: torch.nn.Conv2d, side: int) -> bool:
        """Whether there is such a step for maps of that side."""
        fits = conv.weight.shape == (12, LINE, 3, 3) and conv.padding == (1, 1)
        return fits and side % TILE == 0 and has_tiles()

    def __call__(self, maps: Tensor) -> Tensor:
        """Images (B, 3, 2 h, 2 w) in (0, 1), channels last in memory."""
        b, _, high, wide = maps.shape
        laid_out = maps.permute(0, 2, 3, 1).contiguous()
        out = torch.empty(b, 2 * high, 2 * wide, 3)
        loops().to_pixels(
            *(laid_out.data_ptr(), b, high, wide, self.weights.data_ptr(), self.bias.data_ptr()),
            *(out.data_ptr(), torch.get_num_threads()),
        )
        return out.permute(0, 3, 1, 2)
