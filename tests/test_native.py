"""The compiled loops against torch in double precision, and against doing without them."""

import ctypes
import importlib.util
import shutil
import sys
import types
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from msvae import lowered, maps, native, scores, structure
from msvae.descent import AdamW, descend
from msvae.evidence import Evidence
from msvae.quiet import quiet

LAST = torch.channels_last
needs_loops = pytest.mark.skipif(
    native.loops() is None, reason="no compiled loops: no compiler, or another processor"
)
needs_tiles = pytest.mark.skipif(not native.has_tiles(), reason="the processor has no AMX")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def low(*shape, scale=1.0, shift=0.0):
    return (scale * torch.randn(shape) + shift).bfloat16().contiguous(memory_format=LAST)


@needs_loops
@pytest.mark.parametrize("shape", [(3, 32, 5, 7), (32, 64, 16, 16), (9, 96, 2, 2), (5, 256, 4, 4)])
def test_norm_and_silu_are_those_of_torch(shape, threads):
    """Forward, running statistics and all gradients, to what bfloat16 resolves."""
    x, above = low(*shape, scale=2, shift=3), low(*shape)
    norm = nn.BatchNorm2d(shape[1])
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    exact = nn.BatchNorm2d(shape[1]).double()
    exact.load_state_dict(norm.state_dict())
    given = x.double().requires_grad_()
    expected = F.silu(exact(given))
    expected.backward(above.double())

    running = norm.running_mean, norm.running_var
    with torch.no_grad():
        out, told = native.norm_silu(x, (norm.weight, norm.bias), running, 0.1, norm.eps)
        below, to_weight, to_bias = native.norm_silu_gradient(x, above, told)

    assert out.is_contiguous(memory_format=LAST)
    close(out, expected, 0.005)
    close(norm.running_mean, exact.running_mean, 1e-5)
    close(norm.running_var, exact.running_var, 1e-5)
    close(below, given.grad, 0.02)
    close(to_weight, exact.weight.grad, 0.005)
    close(to_bias, exact.bias.grad, 0.005)


def close(found, expected, share):
    """To within a share of the greatest."""
    gap = (found.double() - expected).abs().max()
    assert gap <= share * expected.abs().max() + 1e-6, (float(gap), float(expected.abs().max()))


@needs_loops
def test_a_stage_joins_norm_and_silu_only_where_it_trains_in_bfloat16(monkeypatch):
    """Elsewhere the layers run one after the other, and say the same."""
    calls, once = [], native.norm_silu
    monkeypatch.setattr(native, "norm_silu", lambda *a: calls.append(a) or once(*a))
    stage = lowered.Stage(nn.BatchNorm2d(32), nn.SiLU())
    x = low(4, 32, 8, 8)
    told = stage(x)
    assert len(calls) == 1
    stage[0].reset_running_stats()
    monkeypatch.setattr(native, "loops", lambda: None)
    close(told, stage(x).double(), 0.01)
    monkeypatch.undo()
    monkeypatch.setattr(native, "norm_silu", lambda *a: pytest.fail("joined"))
    stage(x.float())
    stage(x.contiguous())
    lowered.Stage(nn.BatchNorm2d(16), nn.SiLU())(low(4, 16, 8, 8))
    lowered.Stage(nn.BatchNorm2d(32, momentum=None), nn.SiLU())(x)
    with torch.no_grad():
        stage(x)
    stage.eval()(x)


@needs_loops
@pytest.mark.parametrize("count", [1, 16, 1000, 70_001])
def test_sums_of_squares(count):
    """Of all weights' gradients together, whatever their number."""
    values = torch.randn(count).bfloat16()
    weights = native.Weights([(values,) * 4] * 2)
    expected = float(2 * values.double().square().sum())
    assert weights.square_sum([values, values]) == pytest.approx(expected, 1e-5)


class Small(nn.Module):
    """Layers of odd sizes, some of which have no low copy."""

    def __init__(self):
        super().__init__()
        self.stage = lowered.Stage(
            lowered.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU()
        )
        self.down = lowered.Conv2d(32, 5, 3, 2, 1, bias=True)
        self.out = lowered.Linear(5 * 4 * 4, 7)

    def forward(self, x):
        """(8, 3, 8, 8) -> (8, 7)."""
        return self.out(self.down(self.stage(x)).flatten(1))


def steps_of(model, low_copies, count=6, most=0.5, optimiser=None):
    optimiser = optimiser or AdamW([model], 1e-3, 0.1, low_copies)
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for i in range(count):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x.contiguous(memory_format=LAST)).float().square().mean()
        descend(optimiser, loss, 1e-2 / (i + 1), most)
    return optimiser


@needs_loops
@pytest.mark.parametrize("most", [0.01, 1e9])  # gradients cut off, or not
def test_low_copies_train_as_the_weights_do(most, threads):
    """The same training to a rounding; the weights stay float32, as the checkpoints' moments do."""
    torch.manual_seed(3)
    plain, copied = Small(), Small()
    copied.load_state_dict(plain.state_dict())
    start = {k: v.clone() for k, v in plain.state_dict().items()}
    a, b = steps_of(plain, False, most=most), steps_of(copied, True, most=most)
    assert len(b.weights.moved) == 3
    assert not a.weights.moved
    assert a.state_dict()["state"].keys() == b.state_dict()["state"].keys()
    for name, one in plain.state_dict().items():
        other = copied.state_dict()[name]
        assert other.dtype == one.dtype
        if "num_batches" not in name:
            moved = (one - start[name]).abs().max()
            assert (one - other).abs().max() < 0.05 * moved + 1e-6, name
    for weight, *_, copy in b.weights.moved:
        assert torch.equal(copy, weight.bfloat16())
    b.close()
    assert not b.weights.moved
    assert copied.out.low is None


@needs_loops
def test_one_step_of_adamw_is_that_of_torch(threads):
    """Bias correction, decay and clipping, also of counts that fill no vector."""
    for count in (1, 15, 16, 333, 100_000):
        weight, gradient = torch.randn(count), torch.randn(count).bfloat16()
        exact = nn.Parameter(weight.double())
        reference = torch.optim.AdamW([exact], 0.01, weight_decay=0.1)
        mean, square, copy = torch.zeros(count), torch.zeros(count), weight.bfloat16()
        for t in (1, 2, 3):
            exact.grad = 0.5 * (gradient * t).double()
            reference.step()
            factors = [
                0.5,
                1 - 0.001,
                0.9,
                0.999,
                0.01 / (1 - 0.9**t),
                (1 - 0.999**t) ** -0.5,
                1e-8,
            ]
            native.Weights([(weight, mean, square, copy)]).step([gradient * t], factors)
        assert torch.allclose(weight.double(), exact.detach(), atol=2e-6)
        assert torch.equal(copy, weight.bfloat16())


@needs_loops
def test_moments_are_resumed_with_low_copies():
    """A training goes on with the moments that it was stopped with, to the bit."""
    whole, parts = Small(), Small()
    parts.load_state_dict(whole.state_dict())
    optimiser, first = (AdamW([model], 1e-3, 0.1, True) for model in (whole, parts))
    for model, of_it in ((whole, optimiser), (parts, first)):
        steps_of(model, True, 3, optimiser=of_it)
    kept = deepcopy(first.state_dict())
    for moments in kept["state"].values():  # as a file may give them
        moments["exp_avg"] = moments["exp_avg"].contiguous()
    first.close()
    again = AdamW([parts], 1e-3, 0.1, True)
    again.load_state_dict(kept)
    for model, of_it in ((whole, optimiser), (parts, again)):
        steps_of(model, True, 3, optimiser=of_it)
    for name, one in whole.state_dict().items():
        assert torch.equal(one, parts.state_dict()[name]), name


@needs_tiles
@pytest.mark.parametrize("grid", [8, 16, 32])
def test_least_distances_are_those_of_double_precision(grid):
    """By brute force over the same alike images."""
    bank = torch.randn(20, 12, grid, grid)
    fitted = structure.StructureMap.fit(bank)
    found = fitted.distance(
        torch.randn(3, 12, grid, grid, generator=torch.Generator().manual_seed(5))
    )
    asked = torch.randn(3, 12, grid, grid, generator=torch.Generator().manual_seed(5))
    queries = ((asked.flatten(2).transpose(1, 2) - fitted.mean) @ fitted.whiten).double()
    told = (structure.descriptor(asked) - fitted.centre) / fitted.scale
    alike = torch.cdist(told, fitted.descriptors).topk(structure.ALIKE, largest=False).indices
    banks = [fitted.places.double()[i].flatten(0, 1) for i in alike]
    exact = torch.stack([torch.cdist(q, b).amin(1) for q, b in zip(queries, banks, strict=True)])
    assert torch.allclose(found.flatten(1).double(), exact, rtol=0.01, atol=0.01)


@needs_tiles
def test_a_place_is_nowhere_from_itself():
    """A fitted image is at no distance from itself."""
    bank = torch.randn(12, 12, 8, 8)
    assert structure.StructureMap.fit(bank).distance(bank[:2]).max() < 0.05


@needs_loops
@pytest.mark.parametrize("side", [20, 32, 64, 100, 128])
def test_local_means_are_those_of_torch(side, threads):
    """In either layout of memory, also of sides that fill no vector."""
    x = torch.rand(3, 3, side, side)
    x[1] = maps.smooth(x[1], 2.0)
    for images in (x, x.contiguous(memory_format=LAST)):
        close(structure._native_means(images), structure._local_means(images.double()), 1e-6)


@needs_loops
def test_place_distances_are_those_of_torch(threads):
    """Squared Mahalanobis distances of every place."""
    vectors, mean = torch.randn(3, 10, 64), torch.randn(10, 64)
    whiten = torch.randn(10, 64, 64).triu()
    found = native.place_distances(vectors, mean, native.packed_triangles(whiten))
    gap = (vectors - mean).double()
    close(found, torch.einsum("bld,lde->ble", gap, whiten.double()).square().sum(2), 1e-6)


@needs_loops
@pytest.mark.parametrize("side", [2, 5, 16, 33, 64])
@pytest.mark.parametrize("sigma", [0.5, 1.3, 4.0])
def test_blurs_are_products_with_the_matrix(side, sigma, threads):
    """Mirrored at the edges, also where the kernel is as wide as the plane."""
    planes = torch.randn(3, side, side)
    matrix = maps.blurring(side, sigma, planes.device).double()
    close(maps.smooth(planes, sigma), matrix @ planes.double() @ matrix.T, 1e-6)


@needs_loops
def test_means_of_the_greatest(threads):
    """As by sorting: of ties, of negative numbers, of all."""
    values = torch.randn(4, 777)
    values[1] = values[1].round()  # many that are equal
    values[2] = -values[2].abs()
    values[3] = 0.0
    for count in (1, 7, 776, 777):
        expected = values.double().topk(count, dim=1).values.mean(dim=1)
        assert torch.allclose(native.greatest_means(values, count).double(), expected, atol=1e-6)


@needs_loops
@pytest.mark.parametrize("side", [8, 33, 64])
def test_band_energies_and_errors_are_those_of_torch(side, threads, monkeypatch):
    """Statistics and errors that scores are read from, also of odd sides."""
    x, recon = torch.rand(2, 3, 5, 3, side, side)[:, 0]
    nothing = torch.zeros(5, 0)
    e = Evidence(x, recon, nothing, nothing, (), nothing, nothing, nothing)
    found = [f(e) for f in (scores.band_energies, scores.reconstruction, maps.reconstruction_map)]
    monkeypatch.setattr(native, "suits", lambda values: False)
    exact = Evidence(x.double(), recon.double(), nothing, nothing, (), *[nothing] * 3)
    expected = [
        f(exact) for f in (scores.band_energies, scores.reconstruction, maps.reconstruction_map)
    ]
    for one, other in zip(found, expected, strict=True):
        close(one, other, 1e-5)


@needs_tiles
@pytest.mark.parametrize("sides", [(32, 16, 8), (16, 16, 4), (48, 24, 12)])
def test_local_vectors_are_those_of_float32(sides, threads):
    """Weights keep 16 bits, the maps are bfloat16 already; what is averaged is rounded to it again."""
    widths, grid = (32, 64, 224), sides[1]
    features = tuple(low(3, c, s, s) for c, s in zip(widths, sides, strict=True))
    mix = torch.randn(sum(widths), 64)
    assert native.mixes(features, mix, grid)
    nothing = torch.zeros(3, 0)
    x = torch.zeros(3, 3, 4 * grid, 4 * grid)
    e = Evidence(x, x, nothing, nothing, features, nothing, nothing, nothing)
    found = maps.SpatialMap.local(e, mix)
    averaged = tuple(
        F.avg_pool2d(f.double(), 2).bfloat16() if f.shape[-1] > grid else f for f in features
    )
    exact = e._replace(features=tuple(f.double() for f in averaged))
    close(found, maps.SpatialMap.local(exact, mix.double()), 1e-5)


@needs_tiles
def test_other_maps_are_mixed_by_torch():
    """Of other channels, of sides without whole tiles or whole squares, or of too many dimensions."""
    mix, fine = torch.randn(96, 64), (low(1, 32, 16, 16), low(1, 64, 8, 8))
    assert native.mixes(fine, mix, 8)
    assert not native.mixes(fine, mix, 12)
    assert not native.mixes((low(1, 32, 12, 12), fine[1]), mix, 6)
    assert not native.mixes((low(1, 48, 16, 16), fine[1]), mix, 8)
    assert not native.mixes((fine[0].float(), fine[1]), mix, 8)
    assert not native.mixes(fine, mix[:, :32], 8)


@needs_loops
@pytest.mark.parametrize("side", [(16, 16), (3, 5)])
def test_the_error_of_what_is_painted_is_that_of_torch(side, threads):
    """The loss and its gradient, scaled by what is above it."""
    colours = low(4, 12, *side, scale=2).requires_grad_()
    x = torch.rand(4, 3, 2 * side[0], 2 * side[1])
    exact = colours.detach().double().requires_grad_()
    expected = F.mse_loss(F.pixel_shuffle(exact, 2).sigmoid(), x.double())
    (3 * expected).backward()
    for images in (x, x.contiguous(memory_format=LAST)):
        colours.grad = None
        found = lowered.painted_error(colours, images)
        (3 * found).backward()
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
        close(colours.grad, exact.grad, 0.004)


@needs_loops
def test_nothing_native_gets_into_a_trace_or_a_gradient():
    """A graph would keep what the loops gave once; a gradient would be lost."""
    x = torch.rand(1, 8, 8)
    with quiet():
        traced = torch.jit.trace(lambda v: maps.smooth(v, 1.0), (x,), check_trace=False)
    other = torch.rand(1, 8, 8)
    assert torch.allclose(traced(other), maps.smooth(other, 1.0), atol=1e-6)
    wanted = torch.rand(1, 8, 8, requires_grad=True)
    maps.smooth(wanted, 1.0).sum().backward()
    assert wanted.grad is not None
    x, recon = torch.rand(2, 1, 3, 16, 16)
    nothing, recon = torch.zeros(1, 0), recon.requires_grad_()
    e = Evidence(x, recon, nothing, nothing, (), nothing, nothing, nothing)
    for told in (scores.band_energies, scores.reconstruction, maps.reconstruction_map):
        assert torch.autograd.grad(told(e).sum(), recon)[0].abs().sum() > 0
    assert not native.suits(x.double())


@needs_loops
@pytest.mark.parametrize("shape", [(3, 32, 9, 7), (2, 64, 8, 8), (5, 3, 4, 5)])
@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (4, 2, 1), (2, 1, 0)]
)
def test_windows_are_those_of_torch(shape, size, stride, padding, threads, monkeypatch):
    """To the bit, zeros beyond the edges included."""
    x = low(*shape)
    found = lowered.windows(x, size, stride, padding)
    assert torch.equal(found, native.windows(x, size, stride, padding))
    monkeypatch.setattr(native, "suits", lambda *_: False)
    assert torch.equal(found, lowered.windows(x, size, stride, padding))


@needs_loops
@pytest.mark.parametrize(("small", "side"), [(8, 32), (16, 64), (7, 7), (5, 23), (17, 100), (1, 9)])
def test_planes_are_enlarged_as_by_torch(small, side, threads):
    planes = torch.randn(3, small, small)
    expected = F.interpolate(
        planes[:, None].double(), size=(side, side), mode="bilinear", align_corners=False
    )
    close(native.enlarged(planes, side), expected[:, 0], 1e-5)


@needs_loops
@pytest.mark.parametrize("side", [16, 21])
def test_residual_maps_are_those_of_torch(side, threads):
    """In deviations from what is usual at each place, by torch where a gradient is wanted."""
    x, recon = (torch.rand(3, 3, side, side).contiguous(memory_format=LAST) for _ in range(2))
    nothing = torch.zeros(3, 0)
    e = Evidence(x, recon, nothing, nothing, (), nothing, nothing, nothing)
    fitted = maps.ResidualMap(torch.rand(side, side), 0.1 + torch.rand(side, side))
    exact = e._replace(x=x.double(), recon=recon.double())
    expected = (maps.ResidualMap.raw(exact) - fitted.mean) / fitted.std
    close(fitted(e), expected, 1e-5)
    wanted = e._replace(recon=recon.clone().requires_grad_())
    fitted(wanted).sum().backward()
    assert wanted.recon.grad.abs().sum() > 0


@needs_loops
@pytest.mark.parametrize(("side", "small"), [(64, 32), (128, 32), (21, 7), (40, 8)])
def test_images_are_reduced_to_means_of_squares(side, small, threads):
    x = torch.rand(3, 3, side, side)
    expected = F.avg_pool2d(x.double(), side // small)
    for images in (x, x.contiguous(memory_format=LAST)):
        close(native.reduced(images, small), expected, 1e-6)


@pytest.fixture
def looked_for_anew(monkeypatch):
    """The loops are looked for as the test would have it, and after it once more."""
    for found in (native.loops, native.has_tiles):
        found.cache_clear()
    yield
    monkeypatch.undo()
    for found in (native.loops, native.has_tiles):
        found.cache_clear()


def test_on_another_processor_there_are_no_loops(monkeypatch, looked_for_anew):
    """What runs then is torch alone."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert native.loops() is None
    assert not native.has_tiles()
    assert not native.suits(torch.zeros(1))
    assert not AdamW([nn.Linear(2, 2)], 0.1, 0.0, low=True).lowered


def test_a_library_that_cannot_be_loaded_is_done_without(monkeypatch, tmp_path, looked_for_anew):
    """A broken file, or one of another system, stops nobody."""
    everything = dict.fromkeys(native.NEEDED, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: everything)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "kernels.so")
    (tmp_path / "kernels.so").write_bytes(b"not a library")
    assert native.loops() is None


@needs_loops
def test_a_library_of_older_sources_is_done_without(monkeypatch, looked_for_anew):
    """Called with other arguments it would write where it should not."""
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    assert native.loops() is None


def hook(monkeypatch):
    """The build hook, without hatchling, which only builds have."""
    plugin = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    plugin.BuildHookInterface = type("Hook", (), {"__class_getitem__": lambda cls, kind: cls})
    names = plugin.__name__.split(".")
    for i, _ in enumerate(names[:-1], 1):
        monkeypatch.setitem(sys.modules, ".".join(names[:i]), types.ModuleType("stub"))
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    source = Path(__file__).parents[1] / "hatch_build.py"
    spec = importlib.util.spec_from_file_location("hatch_build", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_build_makes_the_library_or_says_why_not(monkeypatch, tmp_path):
    """Without a compiler nothing is left behind, and installation goes on."""
    build, source = hook(monkeypatch), native.LIBRARY.with_name("kernels.c")
    built = tmp_path / "kernels.so"
    for compiler, reason in (("no-such-compiler", "no C compiler"), ("false", "false failed")):
        monkeypatch.setenv("CC", compiler)
        assert reason in build._compiled(source, built)
        assert not list(tmp_path.iterdir())
    monkeypatch.delenv("CC")
    if native.loops() is None or shutil.which("cc") is None:
        pytest.skip("no C compiler, or another processor")
    assert build._compiled(source, built) == ""
    assert ctypes.CDLL(str(built)).version() == native.VERSION
    assert list(tmp_path.iterdir()) == [built]
