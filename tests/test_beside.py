"""Parts of one image side by side: `beside`."""

import threading

import pytest
import torch

from msvae.beside import ahead, spread

CPU = torch.device("cpu")


def begun(task):
    """The result of a task of one image, asked for once it has begun in the background."""
    started = threading.Event()

    def told():
        started.set()
        return task()

    result = ahead(told)
    assert started.wait(10)
    return result()


def here_and_threads() -> tuple[str, int]:
    return threading.current_thread().name, torch.get_num_threads()


def where(images: int) -> tuple[str, int]:
    """In which thread a task of so many images is done, and on how many threads there."""
    with spread(images, CPU):
        return ahead(here_and_threads)() if images > 1 else begun(here_and_threads)


def test_one_image_is_shared_out_and_several_are_not(two_threads):
    """In the background on one thread; the caller's number of threads is what it was."""
    here = threading.current_thread().name
    name, threads = where(1)
    assert name != here
    assert threads == 1
    assert torch.get_num_threads() == 2
    assert where(2) == (here, 2)
    assert ahead(lambda: threading.current_thread().name)() == here


def test_on_one_core_nothing_is_shared_out(two_threads):
    """There is nothing to gain."""
    torch.set_num_threads(1)
    with spread(1, CPU):
        assert ahead(here_and_threads)() == (threading.current_thread().name, 1)


def test_a_task_begins_before_it_is_asked_for(two_threads):
    """While the caller does something else."""
    begun = threading.Event()
    with spread(1, CPU):
        result = ahead(begun.set)
        assert begun.wait(10)
        result()


def test_a_task_that_nobody_has_begun_is_done_by_who_asks(two_threads):
    """Once, and by nobody else afterwards."""
    go_on, done = threading.Event(), []
    with spread(1, CPU):
        busy = ahead(lambda: go_on.wait(10))
        waiting = ahead(lambda: done.append(threading.current_thread().name))
        waiting()
        assert done == [threading.current_thread().name]
        go_on.set()
        assert busy()
        begun(lambda: None)
    assert len(done) == 1


@pytest.mark.parametrize("inferring", [True, False])
def test_a_task_is_in_the_mode_of_its_caller(two_threads, inferring):
    """Tensors of inference mode cannot be used for gradients later."""
    with spread(1, CPU), torch.inference_mode(inferring):
        assert begun(lambda: torch.ones(1)).is_inference() == inferring


def test_an_error_reaches_the_caller(two_threads):
    """And the threads are as before, ready for the next image."""

    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), spread(1, CPU):
        begun(fails)
    assert torch.get_num_threads() == 2
    assert where(1)[1] == 1
