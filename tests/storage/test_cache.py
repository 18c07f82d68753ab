"""What was computed before is found again, within bounds, whatever happens to the file."""

import os
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest

from clipkit.core import cache_folder
from clipkit.storage import Cache, Entry, hash_of
from clipkit.storage import cache as room
from tests.kills import FORK


def vector(seed, dim=8):
    return np.random.default_rng(seed).normal(size=dim).astype(np.float32)


def fill(cache, numbers, dim=8):
    cache.keep((hash_of(number), Entry(vector(number, dim))) for number in numbers)


def held(cache, numbers):
    found = cache.entries([hash_of(number) for number in numbers])
    return [number for number in numbers if hash_of(number) in found]


def test_what_was_kept_comes_back_bit_by_bit(tmp_path):
    fill(Cache(tmp_path / "c"), range(1200))
    Cache(tmp_path / "c").keep([(hash_of("bad"), Entry(None, "broken header"))])
    found = Cache(tmp_path / "c").entries([hash_of(n) for n in [*range(1300), "bad"]])
    assert len(found) == 1201
    assert all(np.array_equal(found[hash_of(n)].vector, vector(n)) for n in range(1200))
    assert found[hash_of("bad")] == Entry(None, "broken header")
    assert Cache(tmp_path / "c").fact(hash_of("x")) is None
    Cache(tmp_path / "c").keep_fact(hash_of("x"), {"dim": 3})
    assert Cache(tmp_path / "c").fact(hash_of("x")) == {"dim": 3}


def test_none_keeps_nothing():
    cache = Cache(None)
    fill(cache, range(3))
    cache.keep_fact(hash_of("x"), 1)
    assert (cache.entries([hash_of(0)]), cache.fact(hash_of("x"))) == ({}, None)


def test_it_stays_within_its_limit_and_loses_what_was_not_used_for_longest(tmp_path, monkeypatch):
    limit = 400_000
    for day in range(6):
        monkeypatch.setattr(time, "time", lambda day=day: (100 + day) * room.DAY + 7)
        cache = Cache(tmp_path, limit)
        assert held(cache, range(50)) == list(range(50) if day else [])  # asked for each day
        fill(cache, range(1000 * day, 1000 * day + 100), dim=256)
        assert cache.path.stat().st_size <= limit
    assert len(held(cache, range(5000, 5100))) == 100
    assert held(cache, range(1000, 1100)) == []


def test_a_day_without_new_images_writes_nothing(tmp_path):
    fill(Cache(tmp_path), range(10))
    before = (tmp_path / "embeddings.sqlite").stat().st_mtime_ns
    assert len(held(Cache(tmp_path), range(10))) == 10
    assert (tmp_path / "embeddings.sqlite").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["text", "cut", "folder"])
def test_a_broken_file_costs_its_contents_and_a_warning(tmp_path, capsys, damage):
    fill(Cache(tmp_path), range(2000), dim=64)
    path = tmp_path / "embeddings.sqlite"
    if damage == "text":
        path.write_text("this is no database " * 1000)
    elif damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
        path.mkdir()
    cache = Cache(tmp_path)
    held(cache, range(2000))
    fill(cache, [1])
    told = capsys.readouterr().err
    assert ("made again" in told) == (damage != "folder")
    assert held(cache, [1]) == ([1] if damage != "folder" else [])
    assert ("cannot be used" in told) == (damage == "folder")
    assert told.count("\n") == 1


def test_a_full_disk_ends_the_keeping_and_not_the_work(tmp_path, capsys, monkeypatch):
    def full(*args, **how):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(sqlite3, "connect", full)
    cache = Cache(tmp_path)
    fill(cache, [1])
    assert held(cache, [1]) == []
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "disk is full" in told


def test_processes_may_share_one(tmp_path):
    def write(first):
        for _ in range(3):
            fill(Cache(tmp_path), range(first, 400, 4))

    writers = [FORK.Process(target=write, args=(first,)) for first in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert len(held(Cache(tmp_path), range(400))) == 400


def test_where_it_stands(monkeypatch, tmp_path):
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("CLIPKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "clipkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "clipkit"
