"""serving.worker: whose turn it is, and when there is no room."""

import threading

import pytest

from serving import worker as module
from serving.generation import Job
from serving.protocol import ApiError
from serving.worker import Worker


@pytest.fixture
def held(monkeypatch):
    """A Worker whose first job waits for `gate`, and the order in which jobs were answered."""
    gate, done = threading.Event(), []

    def answer(_, job):
        gate.wait()
        done.append(job.path)
        if job.path == "fails":
            raise ApiError("no")

    monkeypatch.setattr(module, "answer", answer)
    monkeypatch.setattr(Worker, "_model", lambda self, path: None)
    worker = Worker("cpu", 8)
    yield worker, gate, done
    gate.set()
    worker.close()


def job(name, address="a", emit=lambda event: None):
    return Job(name, None, emit, address)


def wait_for(holds):
    while not holds():
        threading.Event().wait(0.01)


def test_addresses_take_turns_and_each_keeps_its_order(held):
    worker, gate, done = held
    worker.submit(job("first"))
    wait_for(lambda: worker.job)
    jobs = [job(f"{address}{n}", address) for address, n in zip("aaabbc", (1, 2, 3, 1, 2, 1), strict=True)]
    for each in jobs:
        worker.submit(each)
    assert [worker.ahead(each) for each in jobs] == [
        3,
        5,
        6,
        3,
        5,
        3,
    ]  # and those of later rounds
    gate.set()
    wait_for(lambda: len(done) == 7)
    assert done == ["first", "a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_full_queue_refuses_and_forgets_what_is_cancelled(held):
    worker, gate, done = held
    worker.submit(job("first"))
    wait_for(lambda: worker.job)
    waiting = [job(str(n)) for n in range(4)]
    for each in waiting:
        worker.submit(each)
    with pytest.raises(ApiError) as error:  # half of the queue is one address's
        worker.submit(job("too much"))
    assert error.value.status == 429
    worker.cancel(waiting[1])
    worker.submit(job("fits"))
    worker.submit(job("other", "b"))
    gate.set()
    wait_for(lambda: len(done) == 6)
    assert done == ["first", "0", "other", "2", "3", "fits"]
    assert not worker.waiting


def test_what_fails_is_told_and_the_next_is_answered(held):
    worker, gate, done = held
    gate.set()
    told = []
    worker.submit(job("fails", emit=told.append))
    worker.submit(job("next"))
    wait_for(lambda: len(done) == 2)
    assert [type(each) for each in told] == [ApiError]


def test_closing_tells_those_who_wait(held):
    worker, gate, _ = held
    told = []
    worker.submit(job("first"))
    wait_for(lambda: worker.job)
    worker.submit(job("second", emit=told.append))
    threading.Timer(0.05, gate.set).start()
    worker.close()
    assert [each.status for each in told] == [503]
    with pytest.raises(ApiError):
        worker.submit(job("late"))
