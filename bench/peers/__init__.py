"""Other programs, each in a process of its own, in an environment of their own.

A peer says when it has set itself up, and something about itself; each "go" on its stdin it answers
with the seconds that its work took.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.rows import Once

HERE = Path(__file__).parent
SCRIPTS = {"padim": "padim.py", "pyod": "pyod_vae.py", "pythae": "pythae_vae.py"}


class Peer:
    """One peer's script, run by the python of its environment, with `variables` of its own."""

    def __init__(
        self, python: Path, script: Path, log: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        self.python, self.script, self.log = python, script, log
        self.variables = dict(variables or {})
        self.process: subprocess.Popen[str] | None = None
        self.greeting = ""

    def start(self, *arguments: str) -> Once:
        """Start it; the function that has it do its work once. Raises `RuntimeError` if it ends."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own script
                [str(self.python), str(self.script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **self.variables},
            )
        self.greeting = self._answer()
        return self.once

    def once(self) -> float:
        """Seconds of its work, done once more."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        """The next line that is meant for us: a peer prints much else."""
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("bench "):
                return line.removeprefix("bench ").strip()
        self.stop()
        raise RuntimeError(f"{self.script.name} ended early: {self.log} says why")

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            with self.process:  # waits for it and closes its pipes
                self.process.kill()
            self.process = None


Peers = dict[str, Peer | None]  # by name; None: could not be installed, as its rows say


def install(environment: Path, say: Callable[[str], None]) -> Peers:
    """The peers, with an environment made for them; None for each where it cannot be made.

    They do not install beside our pins: anomalib needs torchvision, which must fit its torch.
    """
    python = environment / "bin" / "python"
    ready = environment / ".ready"
    if not ready.is_file():
        say(f"peers: installing anomalib, PyOD and pythae into {environment} (some minutes)")
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        try:
            subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)  # noqa: S603
            subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)  # noqa: S603
            ready.touch()
        except (OSError, subprocess.CalledProcessError) as error:
            say(f"peers: cannot be installed ({error}): their rows stay empty")
            return dict.fromkeys(SCRIPTS)
    log = environment / "peers.log"
    return {name: Peer(python, HERE / script, log) for name, script in SCRIPTS.items()}


def serve(work: Callable[[], object]) -> None:
    """The peer's side: do the work for each "go", answer with its seconds."""
    import time

    print("bench ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        work()
        print(f"bench {time.perf_counter() - began}", flush=True)
