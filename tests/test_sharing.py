"""One detector in many hands: copies, pickles, threads, and processes that are spawned or forked."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import joblib
import numpy as np
import pytest

from folders import smooth_images
from msvae import fit, load
from small import CONFIG

IMAGES = list(smooth_images(6, 30))


@pytest.fixture
def scored(tree_run):
    """A detector of a run that has scored already, and what it said."""
    detector = load(tree_run)
    return detector, detector.score(IMAGES).scores["fused"]


def fused(detector, images):
    """What a worker does."""
    return detector.score(images).scores["fused"]


def test_copies_and_pickles_score_alike(scored):
    """After the first score too; a copy of a loaded one reads its run again."""
    detector, expected = scored
    for copied in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        np.testing.assert_array_equal(fused(copied, IMAGES), expected)
    assert len(pickle.dumps(detector)) < 2_000_000


def test_a_fitted_detector_is_pickled_by_value():
    """It has no folder to be read from."""
    detector = fit(list(smooth_images(30, 5)), config=CONFIG, engine="reference")
    expected = fused(detector, IMAGES)
    copied = pickle.loads(pickle.dumps(detector))
    np.testing.assert_allclose(fused(copied, IMAGES), expected, rtol=1e-6)


def test_spawned_processes_score(scored):
    """A pool of processes that begin anew."""
    detector, expected = scored
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        np.testing.assert_array_equal(pool.submit(fused, detector, IMAGES).result(), expected)


@pytest.mark.parametrize("prefer", ["threads", "processes"])
def test_joblib_scores(scored, prefer):
    """By both of its backends."""
    detector, expected = scored
    parts = joblib.Parallel(2, prefer=prefer)(
        joblib.delayed(fused)(detector, IMAGES[first : first + 4]) for first in (0, 2)
    )
    np.testing.assert_allclose(parts[0], expected[:4], rtol=1e-6)
    np.testing.assert_allclose(parts[1], expected[2:], rtol=1e-6)


def test_threads_share_a_detector(scored):
    """Scores and explanations are those of one thread."""
    detector, expected = scored
    alone = [detector.explain(image) for image in IMAGES]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(detector.explain, IMAGES * 2))
        tables = list(pool.map(lambda _: fused(detector, IMAGES), range(8)))
    for table in tables:
        np.testing.assert_array_equal(table, expected)
    for a, b in zip(alone * 2, together, strict=True):
        for name, values in a.model_maps.items():
            np.testing.assert_allclose(b.model_maps[name], values, rtol=1e-3, atol=1e-4)


FORKED = """
import os, sys, numpy as np, torch
from msvae import load
torch.set_num_threads(2)
run, before = sys.argv[1:]
detector, images = load(run, "reference"), list(np.load(run + "/../images.npy"))
if before == "scored":
    expected = detector.score(images).scores["fused"]
child = os.fork()
if not child:
    detector.score(images)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork processes")
@pytest.mark.parametrize("before", ["scored", "loaded"])
def test_a_forked_child_scores_by_torch(tree_run, before):
    """Whatever its parent did by two threads; OpenVINO's child is told what to do (test_engine)."""
    np.save(tree_run.parent / "images.npy", np.stack(IMAGES))
    command = [sys.executable, "-W", "ignore", "-c", FORKED, tree_run, before]
    assert subprocess.run(command, timeout=600).returncode == 0
