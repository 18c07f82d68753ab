"""A signal is a request to stop, which the run answers when it can."""

import os
import signal
import threading

import pytest

from clipkit.core import PREEMPTED, StopRequest
from clipkit.core.launcher import SIGNALS


def test_a_signal_is_a_request_to_stop():
    assert PREEMPTED == os.EX_TEMPFAIL
    before = [signal.getsignal(number) for number in SIGNALS]
    for number in SIGNALS:
        with StopRequest() as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
            assert stop.signal == signal.Signals(number).name
        assert [signal.getsignal(number) for number in SIGNALS] == before


def test_who_interrupts_twice_does_not_wait():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_nobody_asks():
    found = []

    def body():
        with StopRequest() as stop:
            found.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [(False, signal.getsignal(signal.SIGTERM))]
