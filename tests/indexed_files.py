"""Helper: writes Megatron-LM's indexed datasets; compared with Megatron's builder in the tests."""

import struct

import numpy as np

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_indexed(prefix, documents, dtype="int32"):
    """Write documents, which are lists of sequences; return the prefix as text."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    itemsize = np.dtype(dtype).itemsize
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * itemsize
    boundaries = np.cumsum([0, *map(len, documents)], dtype="<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX", 1, CODES[dtype], len(lengths), len(boundaries))
    with open(f"{prefix}.idx", "wb") as file:
        for part in (header, lengths, pointers.astype("<i8"), boundaries):
            file.write(bytes(part))
    with open(f"{prefix}.bin", "wb") as file:
        for sequence in sequences:
            file.write(np.array(sequence, dtype).tobytes())
    return str(prefix)
