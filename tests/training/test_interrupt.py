"""Ctrl-C: the first waits for the step, the second does not, and what others installed is left alone."""

import signal
import threading

import pytest

from rmprune.training.interrupt import DeferredInterrupt


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), DeferredInterrupt() as deferred:
        signal.raise_signal(signal.SIGINT)
        assert deferred.requested
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_somebody_else_stays() -> None:
    def own(number: int, frame: object) -> None:
        pass

    before = signal.signal(signal.SIGINT, own)
    try:
        with DeferredInterrupt():
            assert signal.getsignal(signal.SIGINT) is own
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_installs_nothing() -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with DeferredInterrupt():
                pass
        except BaseException as error:  # signal.signal raises ValueError outside the main thread
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failed == []
