"""The checkpoint of a training: written as often as it can afford, and read to go on."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from msvae.core import files
from msvae.core.errors import RunError
from msvae.core.state import as_array, as_tensor
from msvae.run import schema, store
from msvae.training.vae import State

CHECKPOINT_SHARE = 0.02  # of the training time goes into checkpoints
FIRST_CHECKPOINT = 30.0  # seconds: what a killed process may lose that had no time to write


class CheckpointWriter:
    """Writes the checkpoint of a training: often enough, and no more often than it can afford.

    What is written holds all weights three times; after every short epoch it would take as long as
    the training. An interrupted training writes the last epoch on its way out.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self.due = time.monotonic() + FIRST_CHECKPOINT
        self.latest, self.written = State(), 0

    def __call__(self, now: State) -> None:
        """Take the state after an epoch."""
        self.latest = replace(now, history=list(now.history))
        if not store.is_run(self.folder):  # one that is being replaced stays whole until the end
            files.write_rows(self.folder / "history.csv", now.history)
        if time.monotonic() >= self.due:
            began = time.monotonic()
            self.flush()
            self.due = time.monotonic() + (time.monotonic() - began) / CHECKPOINT_SHARE

    def flush(self) -> None:
        """Write the latest state, unless that was done."""
        if self.latest.epoch > self.written:
            numbers = {k: v for k, v in vars(self.latest).items() if k != "tensors"}
            facts = {"identity": self.identity, "state": numbers}
            arrays = {k: as_array(v) for k, v in self.latest.tensors.items()}
            store.write_checkpoint(self.folder, arrays, facts)
            self.written = self.latest.epoch


def resumed(folder: Path, identity: dict[str, Any]) -> State:
    """The state to go on from; `RunError` where it was begun with other images or settings."""
    tensors, facts = store.read_checkpoint(folder)
    if facts.get("identity") != _plain(identity):
        raise RunError(
            f"{folder}: was begun with other images or settings: resume with the same ones"
        )
    schema.check_state(folder / store.CHECKPOINT, facts.get("state"))
    return State(**facts["state"], tensors={k: as_tensor(v) for k, v in tensors.items()})


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples become lists."""
    return store.unpack(store.pack(value))
