"""Vectors for the short forms of the programs of perf/."""

import array
import pathlib
import random
import tempfile


def write_fvecs(path, rows):
    """Rows of numbers as a TEXMEX file."""
    with open(path, "wb") as file:
        for row in rows:
            file.write(len(row).to_bytes(4, "little"))
            file.write(array.array("f", row).tobytes())


def normal_rows(count, dimension, seed):
    numbers = random.Random(seed)
    return [[numbers.gauss(0, 1) for _ in range(dimension)] for _ in range(count)]


def latent_rows(count, dimension, latent, seed):
    """Of many dimensions and few degrees of freedom, with a little noise in all."""
    basis = normal_rows(latent, dimension, 99)
    numbers = random.Random(seed)
    rows = []
    for _ in range(count):
        row = [numbers.gauss(0, 0.05) for _ in range(dimension)]
        for direction in basis:
            weight = numbers.gauss(0, 1)
            row = [value + weight * part for value, part in zip(row, direction)]
        rows.append(row)
    return rows


def store_vectors(case, name, rows, queries):
    """For all tests of a case: files `base` and `queries` in a `root` of that name, which ends with
    them."""
    folder = tempfile.TemporaryDirectory()
    case.addClassCleanup(folder.cleanup)
    case.root = pathlib.Path(folder.name) / name
    case.root.mkdir()
    case.base = case.root / "base.fvecs"
    case.queries = case.root / "query.fvecs"
    write_fvecs(case.base, rows)
    write_fvecs(case.queries, queries)
