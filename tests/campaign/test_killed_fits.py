"""Fits that are killed at any moment, and go on: to the same bits, with nothing left behind."""

import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from folders import smooth_images, write
from small import SAME_BITS

TESTS = Path(__file__).parents[1]
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from msvae import fit
from small import CONFIG
from msvae.run.store import CHECKPOINT, is_run
from pathlib import Path
images, run = Path(sys.argv[2]), Path(sys.argv[3])
print("ready", flush=True)
if not is_run(run):
    fit(images, run, config=CONFIG.replace(epochs=3), resume=(run / CHECKPOINT).is_file())
"""


def begun(*arguments):
    """A process that has imported everything."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, TESTS, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


def weights(run):
    """The sum of the run's tensors' file."""
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


@SAME_BITS
@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
def test_killed_fits_go_on_to_the_same_bits(tmp_path, tries, say):
    """Kill -9 between the first moment and the last, then the same command again."""
    images, chance = write(tmp_path / "images", smooth_images(40, 0)), random.Random(0)
    began = time.monotonic()
    assert begun(images, tmp_path / "whole").wait() == 0
    whole, takes = weights(tmp_path / "whole"), time.monotonic() - began
    kills = tries(60, 1)
    for i in range(kills):
        run = tmp_path / f"run-{i}"
        process = begun(images, run)
        time.sleep(chance.random() * takes)
        process.kill()
        process.communicate()
        again = begun(images, run)
        assert again.communicate()[1] == b""
        assert again.returncode == 0
        assert weights(run) == whole, f"kill {i}"
        left = [
            p.name
            for p in run.iterdir()
            if p.name.startswith(".") or p.name == "checkpoint.safetensors"
        ]
        assert left == []
    say(f"killed fits: {kills} tried, {kills} held, 0 failed")
