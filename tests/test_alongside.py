"""Two trainings side by side: who does what on how many cores, whichever of them is the faster."""

import time

import pytest
import torch

from msvae.alongside import LAG, alongside
from msvae.config import Config
from msvae.model import VAE, Companion
from msvae.teach import Lesson, Plan, beside_vae, pace
from test_train import SMALL, built

CPU = torch.device("cpu")


class Others:
    """A training of so many steps, each `slow` seconds long, that notes on how many threads."""

    def __init__(self, count, slow=0.0):
        self.count, self.slow, self.threads = count, slow, []

    def step(self):
        """One step, if one is left; whether another is."""
        time.sleep(self.slow)
        if len(self.threads) < self.count:
            self.threads.append(torch.get_num_threads())
        return len(self.threads) < self.count


def both(steps, others, pace, slow=(0.0, 0.0)):
    """Two trainings of so many steps; the number of threads of each step, of either."""
    mine, theirs = [], Others(others, slow[1])
    with alongside(theirs.step, pace, CPU) as reached:
        for at in range(1, steps + 1):
            reached(at)
            time.sleep(slow[0])
            mine.append(torch.get_num_threads())
    return mine, theirs.threads


@pytest.mark.parametrize("slow", [(0.0, 0.0), (0.002, 0.0), (0.0, 0.002)])
def test_what_is_shared_depends_on_the_steps_alone(two_threads, slow):
    """One thread each; once the other has no steps left, both: a few steps later, always the same."""
    mine, theirs = both(steps=40, others=30, pace=2, slow=slow)
    assert theirs == [1] * 30
    assert mine == [1] * (14 + LAG) + [2] * (26 - LAG)  # the last are asked for with step 15
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("pace", [0.3, 1.0, 4.7])
def test_the_other_keeps_its_pace(two_threads, pace):
    """As many steps as belong to the caller's, and no more; the rest is left."""
    mine, theirs = both(steps=40, others=1000, pace=pace)
    assert len(theirs) == int(40 * pace)
    assert set(mine) == set(theirs) == {1}


def test_whoever_goes_on_in_the_middle_waits_for_the_other(two_threads):
    """All that belongs to the steps before is done on the same cores as if they had been taken."""
    others = Others(30)
    with alongside(others.step, 1.0, CPU) as reached:
        reached(50)
        assert others.threads == [1] * 30
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("device, threads", [("cpu", 1), ("meta", 2)])
def test_without_cores_to_share_nothing_is_done(two_threads, device, threads):
    """On a single core, or where the cores do not compute."""
    torch.set_num_threads(threads)
    with alongside(lambda: pytest.fail("done"), 1.0, torch.device(device)) as reached:
        reached(20)
        assert torch.get_num_threads() == threads


def test_an_interruption_does_not_wait(two_threads):
    """Of thousands of steps that were asked for only the present one is ended."""
    others = Others(9999, slow=0.01)

    def interrupted():
        with alongside(others.step, 1000, CPU) as reached:
            reached(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(others.threads) < 100
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("steps", [1, 100])
def test_an_error_of_the_other_reaches_the_caller(two_threads, steps):
    """While the caller goes on, or at the end."""

    def fails():
        raise ValueError("no")

    def together():
        with alongside(fails, 1, CPU) as reached:
            for at in range(1, steps + 1):
                reached(at)

    with pytest.raises(ValueError, match="no"):
        together()
    assert torch.get_num_threads() == 2


def test_a_lesson_is_the_same_in_parts(two_threads):
    """Steps taken beside and the rest of them make as many as all at once."""

    def lesson():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 1)
        return Lesson(layer, lambda: layer(torch.ones(2, 3)).square().mean(), lambda at: 0.1, PLAN)

    at_once, parted = lesson(), lesson()
    while parted.taken < 7:
        assert parted.step()
    assert at_once.rest() == parted.rest()
    assert torch.equal(at_once.network.weight, parted.network.weight)
    assert not parted.step()


PLAN = Plan("something", 20)


def test_without_a_companion_the_vae_has_all_cores(two_threads):
    """There is nothing to be done beside it."""
    with beside_vae(built(SMALL), None) as reached:
        reached(1)
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("side", [32, 64, 128])
def test_the_pace_is_that_of_what_the_maps_hold(side):
    """Counted in the networks at work: the companion takes so many times fewer values."""
    config = Config().replace(image_size=side).model

    def values(network):
        sizes = []
        for module in network.modules():
            if isinstance(module, torch.nn.SiLU):
                module.register_forward_hook(lambda _, given, out: sizes.append(out.numel()))
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, side, side))
        return sum(sizes)

    ratio = values(VAE(config)) / values(Companion(64))
    assert pace(config) == pytest.approx(ratio**0.78, rel=0.1)


@pytest.mark.parametrize(("side", "measured"), [(64, 1.33), (96, 2.40), (128, 3.68), (256, 11.0)])
def test_the_pace_is_what_was_measured(side, measured):
    """In both loops side by side (LOG.md), so that neither waits for the other."""
    assert pace(Config().replace(image_size=side).model) == pytest.approx(measured, rel=0.06)
