"""Documents between raw text and the artifacts: every unit of input becomes a folder, which a later pass merges.

A folder holds a raw file per stream (tokens, loss_mask, ...), all documents end to end, and index.npz: the length of
each document in each stream and columns such as its hash. It takes its name only once it is complete, so that a run
that was killed goes on with the units that are missing.
"""

import functools
import hashlib
import heapq
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

import numpy as np

from common.config import UserError
from common.progress import Progress
from corpora.encodings import reading
from dataset.formats import OURS, DataError, writable

BLOCK = 1 << 20  # bytes that are hashed at once
SAMPLES = 20  # dropped records kept of each reason, to look at
SHOWN = 500  # characters of a sample
SHARD_FORMAT = 4  # of a shard folder: those of another are made again
NAMED = 20  # distinct values that reasons of these kinds name, as a corpus may hold any number of them
NAMING = ("unknown role",)


class Outcomes:
    """What became of the records of a source: how many were kept, why others were dropped, with samples of those.

    `lost` counts the answer tokens that no example has, for want of room in max_seq_len.
    """

    def __init__(self, kept=0, dropped=(), remarks=(), samples=None, lost=0):
        self.kept, self.dropped, self.remarks, self.lost = kept, Counter(dropped), Counter(remarks), lost
        self.samples = {why: [tuple(sample) for sample in found] for why, found in (samples or {}).items()}

    @property
    def read(self):
        return self.kept + self.dropped.total()

    def remark(self, what):
        """Count a remark, or several with "; " between them."""
        if what:
            self.remarks.update(what.split("; "))

    def bounded(self, why):
        """The reason, without the value that it names if NAMED others are counted already."""
        kind = next((kind for kind in NAMING if why.startswith(f"{kind} ")), None)
        if kind is None or why in self.dropped or sum(known.startswith(f"{kind} ") for known in self.dropped) < NAMED:
            return why
        return kind

    def drop(self, why, rank, place, text=""):
        """Count a dropped record and maybe keep it as a sample."""
        why = self.bounded(why)
        self.dropped[why] += 1
        self.sample(why, rank, place, text)

    def move(self, why, n):
        """Count n records as dropped that were counted as kept."""
        self.kept -= n
        self.dropped += Counter({why: n})

    def sample(self, why, rank, place, text):
        """Samples are the records of the lowest `rank`, a hash of them: a fair choice that no order changes."""
        found = self.samples.setdefault(why, [])
        if self.wants(why, rank):
            self.samples[why] = heapq.nsmallest(SAMPLES, [*found, (rank, writable(place), writable(text[:SHOWN]))])

    def wants(self, why, rank):
        """Whether a record of this rank may be one of the samples."""
        found = self.samples.get(why, [])
        return len(found) < SAMPLES or rank <= max(found)[0]

    def add(self, other):
        self.kept += other.kept
        self.remarks += other.remarks
        self.lost += other.lost
        for why, n in other.dropped.items():
            self.dropped[self.bounded(why)] += n
        for why, found in other.samples.items():
            for sample in found:
                self.sample(self.bounded(why), *sample)

    def counts(self):
        """{read, kept, dropped: {why: count}, remarks: {what: count}, answer_tokens_lost} for meta.json.

        read = kept + dropped
        """
        dropped, remarks = (dict(counter.most_common()) for counter in (self.dropped, self.remarks))
        return dict(read=self.read, kept=self.kept, dropped=dropped, remarks=remarks, answer_tokens_lost=self.lost)


def unfinished(folder):
    """Folders in which a shard is being filled, or was by a process that was killed; each has a name of its own."""
    return list(Path(folder).parent.glob(f"{Path(folder).name}.*.{OURS}"))


def temporary_folder(folder):
    """A name for a shard folder that is not complete yet, or no longer."""
    return folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.{OURS}")


def is_shard(folder):
    """Whether a folder is a complete shard and holds nothing else."""
    names = {path.name for path in folder.glob("*") if path.suffix != ".bin"}
    return names == {"index.npz", "done.json"} and "fingerprint" in (read_done(folder) or {})


def remove(shard):
    """Remove a shard folder; after a kill meanwhile none is left that looks complete."""
    temporary = temporary_folder(shard)
    os.rename(shard, temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def discard(folder):
    """Remove what there is of an unfinished shard, and the folders above it as far as they are empty."""
    for left in unfinished(folder):
        shutil.rmtree(left, ignore_errors=True)
    with suppress(OSError):
        os.removedirs(Path(folder).parent)


def remove_all(folder):
    """Remove the shards in a folder, unfinished ones too, and no other file."""
    for path in Path(folder).glob("*/done.json"):
        if is_shard(path.parent):
            remove(path.parent)
    for left in Path(folder).glob(f"*.{OURS}"):
        shutil.rmtree(left, ignore_errors=True)
    with suppress(OSError):  # something else is in it
        Path(folder).rmdir()


class ShardWriter:
    """Fill a shard folder with batches of documents; leaving the `with` block with an error leaves no folder."""

    def __init__(self, folder, dtypes):
        self.folder, self.dtypes = Path(folder), dtypes  # {stream: dtype}
        self.temporary = temporary_folder(self.folder)
        self.lengths = {stream: [] for stream in dtypes}
        self.columns = {}

    def __enter__(self):
        if self.folder.exists() and not is_shard(self.folder):
            raise UserError(f"{self.folder} holds something else than a shard: move it away, or choose another --out")
        for left in unfinished(self.folder):  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        self.files = {stream: open(self.temporary / f"{stream}.bin", "wb") for stream in self.dtypes}
        return self

    def write(self, streams, columns):
        """A batch: {stream: one array a document}, {column: one value a document}; unknown tokens are counted here."""
        unknown = 0
        for stream, rows in streams.items():
            lengths = np.fromiter(map(len, rows), np.uint32, len(rows))
            self.lengths[stream].append(lengths)
            items = np.concatenate(rows) if rows else np.empty(0)
            self.files[stream].write(items.astype(self.dtypes[stream]).tobytes())
            if stream.endswith("tokens"):  # text never gives the pad id, which is also that of unknown characters
                owners = np.searchsorted(np.cumsum(lengths), np.flatnonzero(items == 0), "right")
                unknown = unknown + np.bincount(owners, minlength=len(rows))
        columns = columns | dict(unknown=np.broadcast_to(unknown, len(lengths)).astype(np.uint32))
        for name, values in columns.items():
            self.columns.setdefault(name, []).append(values)

    def finish(self, facts):
        """Take the folder's name; facts become its done.json."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()  # Windows renames no folder with an open file in it
        columns = {name: np.concatenate(batches) for name, batches in self.columns.items()}
        lengths = {f"{stream}_lengths": np.concatenate(batches) for stream, batches in self.lengths.items()}
        with open(self.temporary / "index.npz", "wb") as file:
            np.savez(file, **columns, **lengths)
            os.fsync(file.fileno())
        with open(self.temporary / "done.json", "w", encoding="utf-8") as file:
            json.dump(facts, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        if self.folder.exists():  # one that was made from something else
            remove(self.folder)
        os.rename(self.temporary, self.folder)

    def __exit__(self, *error):
        for file in self.files.values():
            file.close()
        if error[0]:
            discard(self.folder)


class Shard:
    """A complete shard folder, opened for reading; `source` is the label of what it was made from."""

    def __init__(self, folder, source, dtypes):
        self.folder, self.source, self.dtypes = Path(folder), source, dtypes
        self.outcomes = Outcomes(**read_done(folder)["outcomes"])

    def columns(self):
        """{column: array}, a value a document; read anew each time, as a corpus has more than memory should hold."""
        with np.load(self.folder / "index.npz") as index:
            return dict(index)

    def tokens(self, columns):
        """Tokens of each document (N,), both sides of a pair together."""
        lengths = [columns[f"{s}_lengths"].astype(np.int64) for s in self.dtypes if s.endswith("tokens")]
        return sum(lengths, np.zeros(len(columns["content"]), np.int64))

    def read(self, stream, lengths, *masks, at_once=1 << 20):
        """One stream in pieces of about `at_once` items: of each piece a list of what each mask (N,) leaves."""
        path, ends = self.folder / f"{stream}.bin", np.cumsum(lengths, dtype=np.int64)
        with open(path, "rb") as file:
            first = done = 0
            while first < len(ends):
                last = max(first + 1, int(np.searchsorted(ends, done + at_once, "right")))
                items = np.fromfile(file, self.dtypes[stream], int(ends[last - 1]) - done)
                if len(items) != ends[last - 1] - done:
                    raise DataError(f"{path} is shorter than its index says: remove {self.folder} and run again")
                yield [items[np.repeat(mask[first:last], lengths[first:last])] for mask in masks]
                first, done = last, int(ends[last - 1])

    def document(self, stream, lengths, i):
        """One document's part of a stream."""
        dtype = np.dtype(self.dtypes[stream])
        start = int(lengths[:i].sum(dtype=np.int64)) * dtype.itemsize
        return np.fromfile(self.folder / f"{stream}.bin", dtype, int(lengths[i]), offset=start)


def read_done(folder):
    """The done.json of a shard folder; None where there is no complete one."""
    try:
        done = json.loads((Path(folder) / "done.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return done if isinstance(done, dict) else None


def content_mark(path, start=0, stop=0, whole=1 << 30, size=1 << 16):
    """What tells a changed input file: its size, and a hash of the range, in files above 1 GB that of 64 blocks of it.

    When it was written is no sign: copies on several machines must count as the same.
    """
    if not os.path.isfile(path):
        return [0, ""]  # a hub data set: its rows are only known once they are read
    with reading(path), open(path, "rb") as file:
        total, digest = os.fstat(file.fileno()).st_size, hashlib.sha256()
        length = min(stop or total, total) - start
        if total > whole and length > 64 * size:
            blocks = [(start + int(at), size) for at in np.linspace(0, length - size, 64)]
        else:
            blocks = [(at, min(BLOCK, start + length - at)) for at in range(start, start + max(0, length), BLOCK)]
        for position, n in blocks:
            file.seek(position)
            digest.update(file.read(n))
    return [total, digest.hexdigest()]


def _whole_mark(path):
    """content_mark of a file that many units may be of: computed once, unless it was written to since."""
    return _mark_at(path, os.stat(path).st_mtime_ns if os.path.isfile(path) else 0)


@functools.lru_cache(maxsize=64)
def _mark_at(path, changed):
    return content_mark(path)


def unit_mark(unit):
    """What tells a changed unit: a hash of the shard's format, of how its files are read and of their content marks."""
    facts = [SHARD_FORMAT]
    for part in unit.parts or [unit]:
        read_as = [part.layout, part.kind, part.start, part.stop, part.encoding, part.characters, part.revision]
        by_bytes = part.kind in ("lines", "plain")  # start and stop of others, such as row groups, count no bytes
        facts.append(read_as + (content_mark(part.path, part.start, part.stop) if by_bytes else _whole_mark(part.path)))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def usable_cpus():
    """How many CPUs this process may use: fewer than there are in a container or under Slurm."""
    if hasattr(os, "process_cpu_count"):  # since Python 3.13
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def unmade(jobs):
    """The jobs whose shard is missing or was made from something else."""
    return [job for job in jobs if (read_done(job.folder) or {}).get("fingerprint") != job.fingerprint]


def make_missing(jobs, make, workers, desc, counted):
    """Call make(job) for the unmade jobs on `workers` processes, 0 = one a usable CPU; it returns how many tokens
    (`counted`) it wrote."""
    missing, workers = unmade(jobs), workers or usable_cpus()
    if sys.platform == "win32":
        workers = min(workers, 61)  # what Windows can wait for
    if len(missing) < len(jobs):
        print(f"{desc}: {len(jobs) - len(missing)} of {len(jobs)} are done already")
    progress = Progress(len(missing), desc=desc, counted=counted)
    if min(workers, len(missing)) <= 1:
        for done, job in enumerate(missing, 1):
            progress.update(done, make(job))
    else:
        make_in_parallel(missing, make, workers, progress)
    progress.close()


def follow_parent():
    """Leave Ctrl-C to the parent, which stops its workers, and end when it does, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def make_in_parallel(jobs, make, workers, progress):
    with ProcessPoolExecutor(min(workers, len(jobs)), initializer=follow_parent) as pool:
        try:
            for done, future in enumerate(as_completed([pool.submit(make, job) for job in jobs]), 1):
                progress.update(done, future.result())
        except BrokenProcessPool:
            raise UserError("a worker was killed, perhaps for want of memory: run again with fewer --workers") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
                worker.join()
            for job in jobs:
                discard(job.folder)
            raise
