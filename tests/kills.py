"""A process that is killed at a file operation, played in this one."""

import os
from contextlib import contextmanager

import pytest

OPERATIONS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")


class Killed(BaseException):
    """The process is gone: nothing that it would have done comes to pass."""


@contextmanager
def killed_at(count):
    """Let `count` file operations happen and no more; a list that is filled with their names.

    What the next one would have put on the disk is there by half.
    """
    done = []

    def operation(name, real):
        def called(*arguments, **more):
            if len(done) == count and name == "fsync":
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            if len(done) >= count:
                raise Killed
            done.append(name)
            return real(*arguments, **more)

        return called

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, operation(name, getattr(os, name)))
        yield done


def every_kill(prepare, work):
    """Kill `work` at each of its file operations, each time after `prepare`; the counts, one by one.

    The last is the one that it survives.
    """
    for count in range(1000):
        prepare()
        try:
            with killed_at(count):
                work()
        except Killed:
            yield count
        else:
            yield count
            return
