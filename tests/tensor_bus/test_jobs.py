"""What runs beside the loop, as it ends."""

from __future__ import annotations

import threading

from etha_ray.tensor_bus.jobs import Cancellation, Job, Jobs


def test_what_results_begin_while_it_closes_is_waited_for() -> None:
    """Also where the last thread ends, and leaves its result, while another result is being taken."""
    jobs = Jobs(lambda: None)
    second_may, taken, over = threading.Event(), threading.Event(), []

    def first_over(_: Job[None]) -> None:
        second_may.set()
        while any(thread.is_alive() for thread in list(jobs._threads)):
            taken.wait(0.01)

    def second(_: Cancellation) -> None:
        second_may.wait()

    jobs.start("first", lambda _: None, first_over)
    jobs.start("second", second, lambda _: jobs.start("third", lambda _: None, lambda _: over.append("third")))
    jobs.close()
    assert over == ["third"]
