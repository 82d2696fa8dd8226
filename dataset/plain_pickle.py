"""A pickle of plain values and numpy arrays, read without the pickle machine: nothing in it can run, or crash us.

`pickletools` only tells the instructions of a pickle apart. Those that put numbers, text, lists, dicts and arrays
together are followed here; no function that the file names is imported or called. Bytes that are damaged or forged
so reach neither the C code of pickle nor numpy's __setstate__, which trust what they are given.
"""

import os
import pickletools
import re
from pickle import UnpicklingError

import numpy as np

VALUES = set(
    """
    INT LONG LONG1 LONG4 BININT BININT1 BININT2 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8
    """.split()
)  # instructions whose argument is a value
PUT = "MEMOIZE PUT BINPUT LONG_BINPUT".split()
GET = "GET BINGET LONG_BINGET".split()
SMALL = 1 << 16  # bytes that may be asked for in vain
DTYPES = {code: np.dtype(f"<{code}") for code in "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split()}
NUMPY = re.compile(r"numpy(?:\._?core\.(?:multiarray|numeric))?\.(_frombuffer|_reconstruct|scalar|dtype|ndarray)")


class _Unbuilt:
    """An array of which the older protocols tell the content only after it may have been referred to."""

    array = None


class _Bounded:
    """A file that is asked for no more bytes than it has, lest a forged size takes memory."""

    def __init__(self, file):
        self.size, self.file, self.readline = os.fstat(file.fileno()).st_size, file, file.readline

    def read(self, n):
        if n > SMALL and n > self.size - self.file.tell():
            raise EOFError("it breaks off")
        return self.file.read(n)


def read_pickle(file):
    """The value in an open file; UnpicklingError names what is not allowed, another Exception says it is damaged."""
    stack, outer, memo = [], [], {}
    for opcode, argument, _ in pickletools.genops(_Bounded(file)):
        name, needs = opcode.name, opcode.stack_before
        if pickletools.markobject in needs:  # all since the mark, and what it is to be added to
            items, stack = stack, outer.pop()
            items = [stack.pop() for _ in needs[:-2]] + items
        else:
            items = [stack.pop() for _ in needs][::-1]
        if name in VALUES:
            stack.append(argument)
        elif name == "MARK":
            outer.append(stack)
            stack = []
        elif name in PUT:
            stack += items
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in GET:
            value = memo[argument]
            stack.append(value.array if isinstance(value, _Unbuilt) else value)
        elif name == "GLOBAL":
            stack.append(_function(*argument.split(" ")))
        elif name in MAKE:
            stack.append(MAKE[name](*items))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise UnpicklingError(f"{name} is not allowed in a data file, which holds plain arrays only")
    return items[0]


def _extended(target, *items):
    list.extend(target, items)
    return target


def _updated(target, *items):
    if not all(isinstance(key, str) for key in items[::2]):  # hashing tuples in tuples can exhaust the C stack
        raise ValueError("a key that is no text")
    dict.update(target, zip(items[::2], items[1::2], strict=True))
    return target


def _function(module, name):
    """The name of a function of numpy that pickled arrays and scalars ask for."""
    if not (found := NUMPY.fullmatch(full := f"{module}.{name}")):
        raise UnpicklingError(f"{ascii(full)[1:-1]:.80} is not allowed in a data file, which holds plain arrays only")
    return found[1]


def _called(function, arguments):
    """What that function of numpy would make of plain parts."""
    if function == "dtype":
        if arguments[0] not in DTYPES:  # an object array could hold forged pointers
            raise UnpicklingError(f"dtype {arguments[0]!a:.80} is not allowed in a data file, which holds numbers only")
        return DTYPES[arguments[0]]
    if function == "_reconstruct":
        return _Unbuilt()
    if function == "_frombuffer":
        buffer, dtype, shape, order = arguments
        return np.frombuffer(buffer, _checked(dtype)).reshape(shape, order=order)
    if function == "scalar":
        dtype, content = arguments
        return np.frombuffer(content, _checked(dtype))[0]
    raise UnpicklingError("a call of numpy.ndarray is not allowed in a data file")


def _with_state(value, state):
    """The array or dtype whose __setstate__ would be called with that."""
    if isinstance(value, _Unbuilt):
        _, shape, dtype, by_columns, content = state
        value.array = np.frombuffer(content, _checked(dtype)).reshape(shape, order="F" if by_columns else "C")
        return value.array
    if state[1] not in ("<", "|"):
        raise UnpicklingError(f"byte order {state[1]!a:.9} is not allowed in a data file: the lowest byte comes first")
    return _checked(value)


def _checked(dtype):
    if not isinstance(dtype, np.dtype):
        raise ValueError("something else in the place of a dtype")
    return dtype


# what the other instructions make of the values before them
MAKE = dict(NONE=lambda: None, NEWTRUE=lambda: True, NEWFALSE=lambda: False)
MAKE |= dict.fromkeys(("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), lambda *items: items)
MAKE |= dict.fromkeys(("EMPTY_LIST", "LIST"), lambda *items: list(items)) | dict(APPEND=_extended, APPENDS=_extended)
MAKE |= dict.fromkeys(("EMPTY_DICT", "DICT"), lambda *items: _updated({}, *items))
MAKE |= dict(SETITEM=_updated, SETITEMS=_updated, STACK_GLOBAL=_function, REDUCE=_called, BUILD=_with_state)
