"""Files of torch.save that are not what they claim: told before memory is taken, and never read as something else."""

import io
import pickle
import random
import zipfile
from collections import OrderedDict

import pytest
import torch

from common.archive import Archive, ArchiveError

ROWS = torch.arange(12.0).view(3, 4)
TREE = dict(
    step=7,
    ratio=0.5,
    names=["a", ("b", None, True)],
    rows=ROWS,
    row=ROWS[1],  # shares its storage
    columns=ROWS.T,
    empty=torch.empty(0, 4),
    number=torch.tensor(3.0),
    low=torch.ones(2, dtype=torch.bfloat16),
    bytes=torch.arange(5, dtype=torch.uint8),
    ordered=OrderedDict(weight=torch.ones(2, dtype=torch.int64)),
)


def saved(tree, deflate=False):
    plain = io.BytesIO()
    torch.save(tree, plain)
    return rebuilt(plain.getvalue(), compression=zipfile.ZIP_DEFLATED) if deflate else plain.getvalue()


def rebuilt(data, compression=zipfile.ZIP_STORED, **changes):
    """The same zip with other bytes in some records, `data_pkl` for data.pkl, and CRCs that are right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(made, "w", compression) as target:
        for name in source.namelist():
            change = changes.get(name.split("/", 1)[1].replace(".", "_"))
            target.writestr(name, source.read(name) if change is None else change)
    return made.getvalue()


def read(data):
    archive = Archive(io.BytesIO(data))
    content = archive.fill(archive.content)
    archive.check_rest()
    return content


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


class Storage(tuple):
    """A claim: (type, key, numbers)."""


class Claim:
    """A tensor by its claims: (storage, offset, shape, stride)."""

    def __init__(self, *claims):
        self.claims = claims

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (*self.claims, False, OrderedDict())


def claiming(*claims):
    """A file whose storage "0" has 12 float32 numbers, with one tensor that claims something of it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", value[0], value[1], "cpu", value[2]) if isinstance(value, Storage) else None

    pickled = io.BytesIO()
    Pickler(pickled, protocol=2).dump(Claim(*claims))
    return rebuilt(saved(ROWS), data_pkl=pickled.getvalue())


@pytest.mark.parametrize("deflate", [False, True], ids=["stored", "deflated"])
def test_all_that_was_saved_comes_back(deflate):
    found = read(saved(TREE, deflate))
    assert same(found, TREE)
    assert found["row"].data_ptr() == found["rows"][1].data_ptr()


def test_what_is_not_asked_for_is_not_read_but_compared():
    data = bytearray(saved(TREE))
    archive = Archive(io.BytesIO(data))
    assert same(archive.fill(archive.content["rows"]), ROWS) and list(archive.tensors) == ["archive/data/0"]
    data[data.index(TREE["bytes"].numpy().tobytes())] ^= 1
    archive = Archive(io.BytesIO(data))
    with pytest.raises(ArchiveError, match="CRC of archive/data/4 does not"):
        archive.check_rest()


def test_a_record_that_its_directory_calls_a_folder_is_refused():
    data = saved(TREE)
    places = [i for i in range(len(data)) if data[i : i + 4] == b"PK\1\2"]
    assert len(places) == len(zipfile.ZipFile(io.BytesIO(data)).namelist()) > 8
    for place in places:
        damaged = bytearray(data)
        damaged[place + 38] ^= 0x10  # external attributes: torch.load returns uninitialised memory
        with pytest.raises(ArchiveError, match="is a folder or there twice"):
            read(damaged)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_records_of_one_name_are_refused():
    made = io.BytesIO(saved(TREE))
    with zipfile.ZipFile(made, "a") as target:
        target.writestr("archive/data/0", b"\0" * 48)
    with pytest.raises(ArchiveError, match="archive/data/0 is a folder or there twice"):
        read(made.getvalue())


@pytest.mark.parametrize(
    "claims, message",
    [
        ((Storage((torch.FloatStorage, "0", 1 << 40)), 0, (3, 4), (4, 1)), "has 48 bytes, not 1099511627776 numbers"),
        ((Storage((torch.DoubleStorage, "0", 12)), 0, (3, 4), (4, 1)), "48 bytes, not 12 numbers of torch.float64"),
        ((Storage((torch.FloatStorage, "0", 12)), 0, (3, 5), (5, 1)), r"has 12 numbers, too few for .* \(3, 5\)"),
        ((Storage((torch.FloatStorage, "0", 12)), 1, (3, 4), (4, 1)), "too few"),
        ((Storage((torch.FloatStorage, "0", 12)), 0, (1 << 20, 1 << 20), (0, 0)), "too few"),
        ((Storage((torch.FloatStorage, "0", 12)), 11, (2,), (-1,)), "not the shape of a tensor"),
        ((Storage((torch.FloatStorage, "7", 12)), 0, (3, 4), (4, 1)), "its tensor 7 is not there"),
    ],
)
def test_sizes_that_disagree_are_refused(claims, message):
    with pytest.raises(ArchiveError, match=message):
        read(claiming(*claims))


def test_a_claim_that_is_true_is_read():
    assert torch.equal(read(claiming(Storage((torch.FloatStorage, "0", 12)), 1, (2, 3), (4, 1))), ROWS[:2, 1:])


def test_a_small_file_is_not_blown_up():
    bomb = saved(torch.zeros(40 << 20), deflate=True)  # 160 MB
    assert len(bomb) < 200_000
    with pytest.raises(ArchiveError, match="claim to hold 167,77.*: no checkpoint shrinks that much"):
        Archive(io.BytesIO(bomb))
    leaf = []
    for _ in range(100):  # 2^100 lists when written out, each of which is there once
        leaf = [leaf, leaf]
    found = read(saved(dict(leaf=leaf)))["leaf"]
    assert found[0] is found[1]
    for _ in range(99):
        found = found[0]
    assert found == [[], []]


@pytest.mark.parametrize("deflate", [False, True], ids=["stored", "deflated"])
def test_no_flipped_bit_changes_what_is_read(deflate):
    data, rng = saved(TREE, deflate), random.Random(1)
    harmless = 0
    for _ in range(400):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            assert same(read(damaged), TREE)
            harmless += 1
        except ArchiveError:
            pass
    assert harmless < 200  # padding between records, dates


def test_a_pickle_of_anything_gives_an_error_of_ours_or_builtin_values():
    data, rng = saved(TREE), random.Random(1)
    pickled = zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl")
    for _ in range(300):
        changed = bytearray(pickled)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        try:
            read(rebuilt(data, data_pkl=bytes(changed)))
        except (ArchiveError, RecursionError):
            pass
