"""One thread that generates, one model in memory, and a queue before it that is fair and bounded."""

import sys
import threading
import traceback
from collections import OrderedDict, deque
from contextlib import suppress

from common.config import UserError
from common.runs import file_key
from serving.generation import Job, Loaded, answer, load
from serving.protocol import ApiError


class Worker:
    """Jobs are done in order; of several addresses that wait, one of each in turn. One may fill half of the queue."""

    def __init__(self, device, max_queue: int):
        self.device, self.max_queue = device, max_queue
        self.waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self.job: Job | None = None  # the one that is being answered
        self.loaded: Loaded | None = None
        self.changed, self.closed = threading.Condition(), False
        self.thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Put a job at the end of its address's queue; ApiError 429 where that is full."""
        with self.changed:
            own = len(self.waiting.get(job.address, ()))
            if sum(map(len, self.waiting.values())) >= self.max_queue or own >= max(1, self.max_queue // 2):
                raise ApiError("too many requests are waiting: try again later", 429, code="rate_limit_exceeded")
            if self.closed:
                raise ApiError("the server is stopping", 503)
            self.waiting.setdefault(job.address, deque()).append(job)
            self.changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more: forget it, or end it within a token."""
        with self.changed:
            job.cancelled = True
            queue = self.waiting.get(job.address, ())
            if job in queue:
                queue.remove(job)
                if not queue:
                    del self.waiting[job.address]

    def ahead(self, job: Job) -> int:
        """About how many jobs are done before this one: those of the same address, and as many of each other."""
        with self.changed:
            if job not in self.waiting.get(job.address, ()):
                return 0
            place = self.waiting[job.address].index(job)
            others = (len(queue) for address, queue in self.waiting.items() if address != job.address)
            return place + sum(min(place + 1, n) for n in others) + (self.job is not None)

    def close(self) -> None:
        """End all jobs and the thread."""
        with self.changed:
            self.closed = True
            left = [job for queue in self.waiting.values() for job in queue]
            self.waiting.clear()
            if self.job:
                self.job.cancelled = True
            self.changed.notify()
        for job in left:
            job.emit(ApiError("the server is stopping", 503))
        self.thread.join()

    def _next(self) -> Job | None:
        with self.changed:
            self.job = None
            self.changed.wait_for(lambda: self.closed or self.waiting)
            if self.closed:
                return None
            address, queue = self.waiting.popitem(last=False)
            self.job = queue.popleft()
            if queue:
                self.waiting[address] = queue  # at the end: the others' turn
            return self.job

    def _run(self) -> None:
        while job := self._next():
            try:
                answer(self._model(job.path), job)
            except ApiError as error:
                job.emit(error)
            except (UserError, OSError) as error:
                job.emit(ApiError(f"{job.wanted.model} cannot be used: {error}", 500))
            except Exception:  # one job's; the others must be answered
                traceback.print_exc(file=sys.stderr)
                with suppress(RuntimeError):  # of an event loop that is gone
                    job.emit(ApiError("internal error, of which the server's terminal tells more", 500))
            del job  # or it would stay in memory while nothing waits

    def _model(self, path) -> Loaded:
        key = file_key(path)
        if self.loaded is None or self.loaded.key != key:
            self.loaded = None  # never two in memory
            self.loaded = load(path, self.device)
        return self.loaded
