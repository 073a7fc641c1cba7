"""The textbook's training script: a process of its own, as such scripts are."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
from bench.peers import serve
from bench.training import textbook

serve(textbook(tuple(map(Path, sys.argv[3:])), int(sys.argv[1]), int(sys.argv[2])))
