"""The records of study/results/: one .jsonl file a table, one line a run.

A record is a JSON object. Its `name` is the recipe's, the same for every seed. What was measured
is in its `metrics`, where it came from in the fields of `PROVENANCE`, and the settings of the run
stand beside them.
"""

import contextlib
import functools
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import filelock

RESULTS = Path(__file__).resolve().parent.parent / "results"

# What each line must have.
PROVENANCE = ("name", "command", "commit", "versions", "hardware", "seed", "started", "metrics")


def read(name: str) -> list[dict]:
    """The records of study/results/<name>.jsonl, in the file's order; none if there is no file."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return []
    at = path.stat()
    return list(read_once(path, (at.st_ino, at.st_mtime_ns, at.st_size)))


@functools.lru_cache(maxsize=32)
def read_once(path: Path, stamp: tuple) -> list[dict]:
    """A search looks hundreds of times into a file that changes once in minutes."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def named(table: str, name: str) -> list[dict]:
    """The records of one name, of every seed."""
    return [record for record in read(table) if record["name"] == name]


def keep(name: str, record: dict) -> None:
    """Write `record` to study/results/<name>.jsonl, in place of the line of its name and seed.

    The file is replaced in one act, so whoever reads it finds the old lines or the new ones,
    whenever this is cut off. Processes that share a table wait for each other here.
    """
    with lock(name):
        replace(name, record)


def replace(name: str, record: dict) -> None:
    records = read(name)
    same = [i for i, old in enumerate(records) if identity(old) == identity(record)]
    if same:
        records[same[0]] = record
    else:
        records.append(record)
    path = RESULTS / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "w") as out:
            out.writelines(json.dumps(record) + "\n" for record in records)
            out.flush()
            os.fsync(out.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def lock(name: str) -> filelock.FileLock:
    """What one process at a time can hold; it is let go of when that process ends, however."""
    folder = RESULTS.with_name(".locks")
    folder.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(folder / f"{quote(name, safe='')}.lock")


@contextlib.contextmanager
def claimed(name: str) -> Iterator[bool]:
    """Whether the work of this name is this process's, in the block; False: it is another's."""
    claim = lock(name)
    try:
        claim.acquire(timeout=0)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        claim.release()


def identity(record: dict) -> tuple[str, int]:
    """What tells a run from every other of its table."""
    return record["name"], record["seed"]


def mean_and_deviation(records: list[dict], key: str) -> tuple[float, float | None]:
    """Mean of a metric over records, and its standard deviation (of a sample: over n - 1).

    One record has no deviation: None.
    """
    values = [record["metrics"][key] for record in records]
    if len(values) == 1:
        return values[0], None
    return statistics.mean(values), statistics.stdev(values)


def by_key(records: list[dict], key: str) -> dict[str, list[dict]]:
    """Records that share a field, in the order in which they were first met."""
    groups = {}
    for record in records:
        groups.setdefault(record[key], []).append(record)
    return groups
