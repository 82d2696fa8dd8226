"""Rows of files with columns: .csv .tsv .parquet .arrow."""

import csv
import io
import itertools
import os
import re
from contextlib import contextmanager

from corpora.encodings import BLOCK, ENCODINGS, escaped, is_clean, lines_of, open_text
from corpora.kinds import suffix_of
from dataset.formats import DataError

CSV_FIELD = 16 << 20  # characters; a quote that is never closed must not fill the memory
BATCH = 256  # rows of a Parquet file at once: documents can be long
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow's


_SEPARATOR = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)  # a line that Excel reads, and some write for it
_BACKSLASH = re.compile(r'\\(?!")')  # before anything but a quote
_BARE_BACKSLASH = re.compile(r'(?<!\\)(?:\\\\)*\\(?![\\"])')  # one that escapes neither a quote nor a backslash


def read_csv(unit):
    """A header, then the rows."""
    wrong, header = f"not {ENCODINGS[unit.encoding]}", None
    for place, row, remark, ended in csv_records(unit):
        if row is not None and not "".join(row).strip():
            yield place, None, "blank"
        elif not ended and (row is None or len(row) < len(header or ()) or not is_clean("".join(row))):
            raise DataError(f"{place}: breaks off, as after a partial download")
        elif row is None:
            yield place, None, remark
        elif header is None:
            header = names_of(row)
            refuse_twins(header, place)
        elif row[0].strip() in header and sorted(names_of(row)) == sorted(header):
            # of files joined to one, each may have its own order
            header = names_of(row)
            yield place, None, "header once more"
        elif len(row) != len(header) or "".join(row[named_columns(header) :]).strip():  # a bare comma in a text
            yield place, None, "wrong number of columns"
        else:
            clean = is_clean("".join(row))
            fields = {name: value for name, value in zip(header, row, strict=True) if name or value}
            yield place, fields if clean else None, remark if clean else wrong


def names_of(row):
    return [name.strip() for name in row]


def named_columns(header):
    """How many columns there are up to the last that has a name."""
    return max((i for i, name in enumerate(header, 1) if name), default=len(header))


def refuse_twins(names, place):
    """DataError if two columns have one name, as a row would lose one of them."""
    if twin := next((name for i, name in enumerate(names) if name and name in names[:i]), None):
        raise DataError(f"{place}: two columns are named {escaped(twin[:40])}; rename one")


FEW_LINES = 5  # of a record that looks as if it held rows: a short poem, which may have a comma in each line


def csv_records(unit):
    """(place, fields or None, remark or the reason for None, whether a line break ends it) of every record.

    DataError where a quote is not closed: what follows it would be lost.
    """
    csv.field_size_limit(CSV_FIELD)
    name, taken = escaped(unit.path), []  # the lines of a record
    before, style, options = csv_dialect(unit)

    def lines():
        for line, size in itertools.islice(lines_of(file), before, None):
            if line is None:
                raise DataError(f"{name}: a line of {size:,} characters is no row of a table")
            taken.append(line.removeprefix("\ufeff"))  # of files joined to one, each may have its own
            yield taken[-1]

    with open_text(unit.path, unit.encoding) as file:
        records, separator = csv_reader(lines(), style, options), options["delimiter"]
        columns, named, number, habits = 0, 0, 1 + before, Habits(separator)
        while True:
            place, remark = f"{name}:{number}", None
            try:
                if (row := next(records, None)) is None:
                    return
            except csv.Error as error:
                if len(taken) > 1 or "unexpected end" in str(error):
                    why = "a quote that opens in this row is not closed, or the file breaks off"
                    raise DataError(f"{place}: {error}: {why}") from None
                # written without regard to quotes, which belong to the text if the line has the right columns
                row = fitted(taken[0].rstrip("\r\n").split(separator), named, columns)
                row, remark = row if len(row) == columns else None, "quotes that are not CSV's"
            if columns and row:
                row = fitted(row, named, columns)
                fits, within = len(row) == columns, taken[1:-1] if columns > 1 else taken
                if len(taken) > 1 and habits.rows_within(within, fits):
                    if columns > 1 and not (fits and len(taken) <= FEW_LINES):
                        raise DataError(f"{place}: a quote that opens in this row is closed only after other rows")
                    remark = "lines between quotes that look like rows"
                if fits:
                    habits.learn(row, taken)
            elif row and "".join(row).strip():
                columns, named = len(row), max(i for i, cell in enumerate(row, 1) if cell.strip())
            yield place, row, remark, taken[-1].endswith(("\n", "\r"))
            number = records.line_num + 1 + before
            taken.clear()


def csv_dialect(unit):
    """(lines before the header, what `backslashes` finds, options of csv.reader), by the first megabyte of a file."""
    with open_text(unit.path, unit.encoding) as file:
        head = file.read(BLOCK).removeprefix("\ufeff")
        if file.read(1):
            head = head[: max(head.rfind("\n"), head.rfind("\r")) + 1]
    first = io.StringIO(head, "").readline()
    if said := _SEPARATOR.fullmatch(first):
        head = head[len(first) :]
        first = io.StringIO(head, "").readline()
    separators = "\t,;|" if suffix_of(unit.path) == ".tsv" else ",\t;|"
    separator = said[1] if said else max(separators, key=first.count)
    options = dict(delimiter=separator, skipinitialspace=f'{separator} "' in first, strict=True)
    return int(said is not None), backslashes(head, options), options


def fitted(row, named, columns):
    """A row with as many fields as the header where it differs by empty ones at its end, which spreadsheets write; the
    first `named` of the columns end with the last that has a name."""
    if named <= len(row) < columns:
        return row + [""] * (columns - len(row))
    return row if "".join(row[columns:]).strip() else row[:columns]


# backslashes before quotes


def csv_reader(lines, style, options):
    """csv.reader; `style` is what `backslashes` found."""
    if style == "some":
        lines = (_BACKSLASH.sub(r"\\\\", line) for line in lines)
    return csv.reader(lines, escapechar="\\" if style else None, **options)


def backslashes(head, options):
    """What a backslash stands before in the first megabyte of a file: "all" that is special, or "some" of it, quotes;
    None if it is text like any other, as that reads well, or does not read as anything else either."""
    if '\\"' not in head or reads_well(head, None, options):
        return None
    style = "some" if _BARE_BACKSLASH.search(head) else "all"
    return style if reads_well(head, style, options) else None


def reads_well(head, style, options):
    """Whether all rows have the columns of the first one."""
    try:
        widths = {len(row) for row in csv_reader(io.StringIO(head, ""), style, options) if "".join(row).strip()}
    except csv.Error as error:
        return "unexpected end" in str(error) and len(head) > BLOCK // 2  # cut in a row
    return len(widths) == 1


class Habits:
    """What the rows of a file look like, to find those that a stray quote swallowed on the way to another quote."""

    def __init__(self, separator):
        self.separator = separator
        self.least, self.most = [], []  # characters of each column
        self.styles = set()  # what stands around separators
        self.rows = self.characters = 0  # of the rows that take one line
        self.quoted = 0  # rows that need their quotes: who writes these hardly leaves stray ones

    def learn(self, row, lines):
        if len(lines) > 1 or lines[0].count(self.separator) >= len(row):
            self.quoted += 1
            return
        sizes = list(map(len, row))
        self.least = list(map(min, self.least or sizes, sizes))
        self.most = list(map(max, self.most or sizes, sizes))
        self.styles.add(style(row))
        self.rows, self.characters = self.rows + 1, self.characters + sum(sizes)

    def is_row(self, cells):
        """Whether they have the columns of the rows before, and ends like theirs; if some were quoted, as long ones."""
        if len(cells) != len(self.most) or style(cells) not in self.styles:
            return False
        sizes = zip(self.least, map(len, cells), self.most, strict=True)
        return not self.quoted or all(least <= 2 * size <= 4 * most for least, size, most in sizes)

    def rows_within(self, lines, fits):
        """Whether most lines within a record are rows, not shorter by half than those before; `fits` tells if the
        record itself has the right columns."""
        rows = sum(self.is_row(line.rstrip("\r\n").split(self.separator)) for line in lines)
        enough = 1 if not fits else 3 if self.quoted else 2
        long = 2 * self.rows * sum(map(len, lines)) >= len(lines) * self.characters
        return bool(self.most) and rows >= max(0.8 * len(lines), enough) and long


def style(cells):
    """First and last character of each cell, as far as it matters: a digit, a blank or another."""
    return tuple(re.sub(r"\d", "0", re.sub(r"[^\d\s]", "x", cell[:1] + cell[-1:])) for cell in cells)


@contextmanager
def parquet_file(path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{escaped(path)}: reading Parquet needs pyarrow (pip install pyarrow)") from None
    try:
        # opened here, as Arrow takes no name that is not UTF-8
        with (
            open(path, "rb") as file,
            pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK) as parquet,
        ):
            yield parquet
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{escaped(path)}: damaged or not fully downloaded: {error}") from None


def cut_row_groups(path, unit_bytes):
    """Runs (start, stop) of row groups of about unit_bytes."""
    with parquet_file(path) as parquet:
        sizes = [parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)]
    runs, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        total += size
        if total >= unit_bytes or i == len(sizes) - 1:
            runs.append((start, i + 1))
            start, total = i + 1, 0
    return runs


def read_parquet(unit):
    with parquet_file(unit.path) as parquet:
        first = 1 + sum(parquet.metadata.row_group(i).num_rows for i in range(unit.start))
        batches = parquet.iter_batches(batch_size=BATCH, row_groups=range(unit.start, unit.stop))
        yield from number_rows(unit.path, batches, first)


def read_arrow(unit):
    """What `save_to_disk` of `datasets` writes, a stream, or an Arrow file."""
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{escaped(unit.path)}: reading Arrow needs pyarrow (pip install pyarrow)") from None
    try:
        with open(unit.path, "rb") as file:
            if file.peek(6).startswith(b"ARROW1"):
                reader = pyarrow.ipc.open_file(file)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                file.seek(-len(END_OF_STREAM), os.SEEK_END)
                if file.read() != END_OF_STREAM:
                    raise DataError(f"{escaped(unit.path)}: breaks off, as after a partial download")
                file.seek(0)
                batches = pyarrow.ipc.open_stream(file)
            pieces = (batch.slice(i, BATCH) for batch in batches for i in range(0, batch.num_rows, BATCH))
            yield from number_rows(unit.path, pieces, 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{escaped(unit.path)}: damaged or not fully downloaded: {error}") from None


def number_rows(path, batches, number):
    name = escaped(path)
    for batch in batches:
        refuse_twins(batch.schema.names, name)
        batch.validate(full=True)  # damaged offsets would end the process
        names, columns = batch.schema.names, map(to_python, batch.columns)
        for values in zip(*columns, strict=True):
            yield f"{name}:record {number}", dict(zip(names, values, strict=True)), None
            number += 1


def to_python(column):
    """The values of a column; None for those that Python cannot hold, as a date before the year 1."""
    try:
        return column.to_pylist()
    except (ArithmeticError, ValueError, LookupError):
        return [value_of(scalar) for scalar in column]


def value_of(scalar):
    try:
        return scalar.as_py()
    except (ArithmeticError, ValueError, LookupError):
        return None
