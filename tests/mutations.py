"""Small files of every kind, damaged at random and read: each must be read, or refused in one sentence.

    python -P tests/mutations.py KIND SEED COUNT FOLDER

A process of its own, since damaged Arrow may end the process that reads it. The file at hand lies in FOLDER, and stays
there if its reading ends badly.
"""

import gzip
import json
import os
import random
import resource
import sys
import time
from pathlib import Path

SLOW = 10  # seconds of computing for one file of a few kilobytes
LARGE = 1_000_000  # kilobytes of memory in use
MOST = 10 << 30  # bytes of memory asked for
TEXTS = ["hi é", "&lt;b&gt;", "[1]", '"', "", "x" * 40, "🙂"]
VALUES = [0, 1, 2, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFFFFFFFFFF, 1 << 62, 1 << 40]
PIECES = [b"[", b"]", b"{", b"}", b",", b'"', b"\\", b":", b"\0", b"\xff", b"\xef\xbb\xbf", b"1" * 5000, b"[" * 2000]
PIECES += [b"\r\n", b"nul,", b"1e999", b"-", b'{"a":' * 1500, b"\\ud800", b"NaN"]


def rows():
    """Conversations, ids and labels, and columns that nothing reads, all in one table."""
    for i in range(30):
        turns = [{"role": "user", "content": TEXTS[i % 7]}, {"role": "assistant", "content": TEXTS[(i + 1) % 7]}]
        yield {"id": f"r{i}", "messages": turns, "input_ids": list(range(i % 7)), "labels": list(range(i % 7)), "n": i}


def whole(kind):
    """A sound file of this kind, as bytes."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(rows()))
    sink = pyarrow.BufferOutputStream()
    match kind:
        case "list":
            return json.dumps(list(rows()), indent=1).encode()
        case "lines":
            return "\n".join(map(json.dumps, rows())).encode()
        case "objects":
            return "\n".join(json.dumps(row, indent=1) for row in rows()).encode()
        case "gzip":
            return gzip.compress(whole("lines"), mtime=0)
        case "parquet":
            pyarrow.parquet.write_table(table, sink, row_group_size=10)
        case "dates":
            days = pyarrow.array([0, 2**31 - 1, -(2**31)] * 10, pyarrow.int32()).cast(pyarrow.date32())
            table = table.append_column("day", days).append_column("label", days)
            pyarrow.parquet.write_table(table, sink)
        case "stream" | "packed stream":
            options = pyarrow.ipc.IpcWriteOptions(compression="lz4" if kind == "packed stream" else None)
            with pyarrow.ipc.new_stream(sink, table.schema, options=options) as writer:
                writer.write_table(table, max_chunksize=13)
        case "dictionaries":
            table = pyarrow.table({"id": table["id"].dictionary_encode(), "input_ids": table["input_ids"]})
            with pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        case "file":
            with pyarrow.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=13)
    return sink.getvalue().to_pybytes()


KINDS = ("list", "lines", "objects", "gzip", "parquet", "dates", "stream", "packed stream", "dictionaries", "file")


def damaged(data, chance):
    """The bytes with one to eight changes: bits, numbers, pieces that mean something, cuts, copies."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 3, 8])):
        at, kind = chance.randrange(len(data)), chance.randrange(6)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            size = chance.choice([4, 8])
            number = chance.choice([*VALUES, chance.randrange(1 << 32)]) % (1 << 8 * size)
            data[at & ~3 : (at & ~3) + size] = number.to_bytes(size, "little")
        elif kind == 2:
            data[at:at] = chance.choice(PIECES)
        elif kind == 3:
            del data[at : at + chance.randrange(1, 64)]
        elif kind == 4:
            other = chance.randrange(len(data))
            data[at : at + 16] = data[other : other + 16]
        else:
            del data[at : None if chance.random() < 0.2 else at + 1]
        data = data or bytearray(b" ")
    return bytes(data)


def read_all(file):
    """Read it in each way that the package has; only one sentence may come of it."""
    from minisft.data.ledger import Ledger
    from minisft.data.read_files import read
    from minisft.errors import UserError
    from minisft.labels.pretokenized import Tokenized, is_tokenized

    refused = 0
    for way in (lambda: list(read(file, Ledger())), lambda: is_tokenized(file), lambda: list(Tokenized(file))):
        try:
            way()
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 900, str(error)
            refused += 1
    return refused


def main(kind, seed, count, folder):
    from minisft.zero.measured_memory import peak_bytes

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if resource.getrlimit(resource.RLIMIT_AS)[1] == resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))
    chance, sound = random.Random(seed), whole(kind)
    file = Path(folder) / f"{kind.replace(' ', '-')}-{seed}.bin"
    refused = slowest = 0
    for number in range(count):
        file.write_bytes(damaged(sound, chance) if number else sound)
        began = time.process_time()
        refused += read_all(file)
        slowest = max(slowest, time.process_time() - began)
        used = peak_bytes("cpu") // 1024
        assert slowest < SLOW and used < LARGE, f"{file} took {slowest:.0f} s, {used:,} KB"
    file.unlink()
    print(f"{kind}: {count} files, {refused} refusals, slowest {slowest:.2f} s, {used:,} KB")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    sys.stdout.flush()
    os._exit(0)
