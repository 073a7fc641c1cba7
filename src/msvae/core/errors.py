"""The few errors that a user can meet; each message is one line and names the remedy."""


class MsvaeError(Exception):
    """Any mistake that the user can mend: the command line prints it and exits with 2."""


class ConfigError(MsvaeError):
    """A setting that does not exist, has the wrong type, or contradicts another."""


class DataError(MsvaeError):
    """A folder, list or data set that cannot serve: empty, too small, or laid out otherwise."""


class ImageError(DataError):
    """One image that cannot be used; `reason` goes into the quarantine file."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class RateError(MsvaeError):
    """A false-alarm rate that the number of calibration images cannot keep."""


class RunError(MsvaeError):
    """A run folder that is missing, torn, altered, or of a newer format."""


class OutputError(MsvaeError):
    """A file that cannot be written: a full disk, a folder without permission."""


class TrainingError(MsvaeError):
    """Training that cannot go on: a loss that is not finite, a checkpoint of another set-up."""


class EngineError(MsvaeError):
    """An engine that cannot run a graph here."""
