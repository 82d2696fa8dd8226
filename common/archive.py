"""What torch.save wrote, read without trusting it: no code of the file runs, and sizes agree before memory is taken.

The file is a zip. Its record <root>/data.pkl is a pickle of everything but numbers, <root>/data/<key> are the bytes of
a tensor. torch.load believes what these say of their sizes and compares no CRC: with one bit of the zip's directory
flipped a record counts as a folder, and the tensor is whatever stood in memory.
"""

import errno
import io
import math
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from typing import NamedTuple

import torch

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# A quantized checkpoint shrinks to a quarter by deflate at most (int4 in groups that are mostly padding); what grows
# far beyond its file was made to fill the memory.
LARGEST_GROWTH, FREE_GROWTH = 20, 1 << 26  # times; bytes
CHUNK = 1 << 20  # bytes
FOLDER, ENCRYPTED = 0x10, 0x1  # bits of external_attr (MS-DOS) and of flag_bits, PKWARE's APPNOTE.TXT 4.4


class ArchiveError(Exception):
    """Why a file is not read; `damaged` unless it is what somebody wrote, so that an older one may be whole."""

    def __init__(self, message, damaged=True):
        super().__init__(message)
        self.damaged = damaged


class Stored(NamedTuple):
    """A tensor whose numbers are still in the file."""

    record: zipfile.ZipInfo
    dtype: torch.dtype
    offset: int
    shape: tuple
    stride: tuple


class _Unpickler(pickle._Unpickler):  # in Python: that in C lets a file of a few bytes ask for any memory
    """Gives builtin values, and tensors as Stored."""

    def __init__(self, file, records, root):
        super().__init__(file)
        self.records, self.root = records, root

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise ArchiveError(f"it holds {module}.{name}, not only tensors and plain values", damaged=False)

    def persistent_load(self, pid):
        kind, dtype, key, _, n = pid
        record = self.records.get(f"{self.root}data/{key}")
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(n) is not int or record is None:
            raise ArchiveError(f"its tensor {key} is not there")
        if n < 0 or record.file_size != n * dtype.itemsize:
            raise ArchiveError(f"{record.filename} has {record.file_size} bytes, not {n} numbers of {dtype}")
        return record, dtype, n

    def rebuild(self, storage, offset, shape, stride, *_):
        record, dtype, n = storage
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(type(x) is int and 0 <= x < 1 << 62 for x in numbers):
            raise ArchiveError(f"{record.filename}: not the shape of a tensor")
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if math.prod(shape) > n or (0 not in shape and last >= n):
            raise ArchiveError(f"{record.filename} has {n} numbers, too few for a tensor of {tuple(shape)}")
        return Stored(record, dtype, offset, tuple(shape), tuple(stride))


class Archive:
    """An open file of torch.save: `content` is what was saved, with Stored for each tensor; `fill` reads those."""

    def __init__(self, file):
        try:
            self.zip = zipfile.ZipFile(file)
            self.records = _checked_records(self.zip, file.seek(0, os.SEEK_END))
            (pickled,) = (name for name in self.records if name.count("/") == 1 and name.endswith("/data.pkl"))
            root = pickled.removesuffix("data.pkl")
            if (order := self.records.get(f"{root}byteorder")) and self.zip.read(order).decode() != sys.byteorder:
                raise ArchiveError(f"its numbers are not {sys.byteorder}-endian", damaged=False)
            self.content = _Unpickler(io.BytesIO(self.zip.read(pickled)), self.records, root).load()
        except ArchiveError:
            raise
        except Exception as error:  # a malformed archive or pickle can raise anything
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that of a seek to nowhere
                raise
            raise ArchiveError("cut short or not a checkpoint") from error
        self.tensors, self.made = {}, {}

    def fill(self, value):
        """`value`, a part of `content`, with tensors on the CPU in place of each Stored."""
        if id(value) not in self.made:  # what is there twice is made once, or a small file could be a tree without end
            if isinstance(value, Stored):
                numbers = self._numbers(value.record).view(value.dtype)
                made = numbers.as_strided(value.shape, value.stride, value.offset)
            elif isinstance(value, dict):
                made = {key: self.fill(inner) for key, inner in value.items()}
            elif isinstance(value, list | tuple):
                made = type(value)(self.fill(inner) for inner in value)
            else:
                return value
            self.made[id(value)] = made
        return self.made[id(value)]

    def check_rest(self):
        """Compare the CRC of what was not filled, in little memory."""
        for record in self.records.values():
            if record.filename not in self.tensors:
                self._copy(record, memoryview(bytearray(min(record.file_size, CHUNK))))

    def _numbers(self, record):
        if record.filename not in self.tensors:
            raw = torch.empty(record.file_size, dtype=torch.uint8)
            self._copy(record, memoryview(raw.numpy()))
            self.tensors[record.filename] = raw
        return self.tensors[record.filename]

    def _copy(self, record, target):
        """A record into `target`, over and over where that is smaller; its end compares the CRC."""
        try:
            with self.zip.open(record) as stream:
                for start in range(0, record.file_size, CHUNK):
                    size = min(CHUNK, record.file_size - start)
                    at = start if len(target) == record.file_size else 0
                    if stream.readinto(target[at : at + size]) != size:
                        raise EOFError
        except OSError:
            raise
        except Exception:  # damaged bytes can raise anything
            raise ArchiveError(f"damaged, the CRC of {record.filename} does not match its bytes") from None


def _checked_records(archive, size):
    """{name: ZipInfo} of all records, if each is a file of its own and together they are not far larger than theirs."""
    records = {}
    for info in archive.infolist():
        if info.filename in records or info.filename.endswith("/") or info.external_attr & FOLDER:
            raise ArchiveError(f"damaged, {info.filename} is a folder or there twice")
        if info.flag_bits & ENCRYPTED or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveError(f"damaged, {info.filename} is packed in an unknown way")
        records[info.filename] = info
    total = sum(info.file_size for info in records.values())
    if total > LARGEST_GROWTH * size + FREE_GROWTH:
        raise ArchiveError(f"its {size:,} bytes claim to hold {total:,}: no checkpoint shrinks that much")
    return records
