"""The lock of a backbone is fair, and its thread may take it again."""

from __future__ import annotations

import threading
import time

from slq_embed.backbone.lock import FairLock


def test_a_thread_that_waits_comes_before_the_one_that_held_it():
    lock, held = FairLock(), []
    waits = []

    def corpus() -> None:
        for number in range(100):
            with lock:
                held.append(number)
                end = time.perf_counter() + 0.002
                while time.perf_counter() < end:  # as Python code that does not wait: a plain lock comes back to it
                    pass

    other = threading.Thread(target=corpus)
    other.start()
    while not held:
        time.sleep(0.001)
    while other.is_alive():
        before = len(held)
        with lock:
            waits.append(len(held) - before)
        time.sleep(0.001)
    other.join()
    assert max(waits) <= 2, "a lock of threading is held by the same thread up to 100 times"


def test_the_thread_that_holds_it_may_take_it_again_while_others_wait():
    lock, order = FairLock(), []

    def wait() -> None:
        with lock:
            order.append("other")

    with lock:
        other = threading.Thread(target=wait)
        other.start()
        time.sleep(0.05)
        with lock:
            order.append("again")
        order.append("still")
    other.join()
    assert order == ["again", "still", "other"]
