"""Features of pictures on disk: finished shards outlive every kill, damage is noticed, and each picture is computed once."""

import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from prefcache.pipeline import identity
from prefcache.pipeline.errors import IntegrityError, ResourceError, UsageError
from prefcache.pipeline.identity import Reference
from prefcache.pipeline.schema import StoredFeatures
from prefcache.pipeline.stored import artifact, cache_maintenance, feature_writer, overwrite_guard
from prefcache.pipeline.stored.feature_writer import PICTURES_OF_SHARD, fill
from prefcache.pipeline.stored.image_features import TOWER_FILE, FeatureStore

N = 3 * PICTURES_OF_SHARD + 5
IMAGES = [hashlib.blake2b(bytes([i]), digest_size=16).digest() for i in range(N)]
FORK = multiprocessing.get_context("fork")


def open_store(root: Path, model: Path, dtype: str = "float32") -> FeatureStore:
    reference = Reference(model)
    return feature_writer.open_store(root, reference, identity.tower_numerics(reference, "cpu", dtype, "sdpa"))


def features(image: bytes) -> StoredFeatures:
    """Values that depend on the picture alone, of varying length, with and without DeepStack."""
    dice = np.random.default_rng(list(image))
    n = 3 + image[0] % 4
    embeds, deep = (dice.integers(0, 256, n * 8 * k, dtype=np.uint8) for k in (1, 2))
    odd = image[1] % 2
    return StoredFeatures(embeds, deep if odd else None, n, (1, 2, n) if odd else None, None if odd else 2)


def same(a: StoredFeatures, b: StoredFeatures) -> bool:
    deep = (a.deep is None) == (b.deep is None) and (a.deep is None or np.array_equal(a.deep, b.deep))
    return np.array_equal(a.embeds, b.embeds) and deep and a[2:] == b[2:]


def holds(store: FeatureStore, images: list[bytes]) -> bool:
    return all(image in store and same(store.read(image), features(image)) for image in images)


class Counting:
    def __init__(self) -> None:
        self.images: list[bytes] = []

    def __call__(self, image: bytes) -> StoredFeatures:
        self.images.append(image)
        return features(image)


def test_what_was_stored_is_read_back_bit_by_bit(tmp_path, model):
    store, encode = open_store(tmp_path, model), Counting()
    fill(store, IMAGES[:40], encode)
    assert sorted(encode.images) == sorted(IMAGES[:40]) and holds(FeatureStore(store.folder), IMAGES[:40])
    assert store.missing(IMAGES) == sorted(IMAGES[40:])
    fill(store, IMAGES, encode)
    assert (
        sorted(encode.images) == sorted(IMAGES) and holds(store, IMAGES) and holds(FeatureStore(store.folder), IMAGES)
    )


def test_another_dtype_or_another_tower_has_another_store(tmp_path, model):
    changed = shutil.copytree(model, tmp_path / "changed")
    (changed / "config.json").write_text((model / "config.json").read_text().replace('"llama"', '"llama" '))
    folders = [
        open_store(tmp_path / "cache", each, dtype).folder
        for each in (model, changed)
        for dtype in ("float32", "bfloat16")
    ]
    assert folders[:2] == folders[2:] and folders[0] != folders[1]
    text = (model / "config.json").read_text().replace('"model_type"', '"vision_config": {"depth": 3}, "model_type"')
    (changed / "config.json").write_text(text)
    assert open_store(tmp_path / "cache", changed).folder not in folders


def test_a_killed_process_leaves_its_finished_shards(tmp_path, model):
    store = open_store(tmp_path, model)

    def die() -> None:
        encode = Counting()

        def slowly(image: bytes) -> StoredFeatures:
            if len(encode.images) == 2 * PICTURES_OF_SHARD + 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(image)

        fill(store, IMAGES, slowly)

    process = FORK.Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    again, encode = open_store(tmp_path, model), Counting()
    assert len(again) == 2 * PICTURES_OF_SHARD
    fill(again, IMAGES, encode)
    assert len(encode.images) == N - 2 * PICTURES_OF_SHARD and holds(again, IMAGES)
    assert not [path for path in again.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("between", ["shard", "record"])
def test_killed_in_a_commit_it_leaves_nothing_that_counts(tmp_path, model, monkeypatch, between):
    store = open_store(tmp_path, model)

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def commit() -> None:
        target = (os, "replace") if between == "shard" else (os, "link")
        monkeypatch.setattr(*target, die)
        fill(store, IMAGES[:3], features)

    process = FORK.Process(target=commit)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    again = open_store(tmp_path, model)
    assert not len(again) and not again.damaged
    fill(again, IMAGES[:3], features)
    assert holds(again, IMAGES[:3]) and holds(FeatureStore(store.folder, every_byte=True), IMAGES[:3])


def test_several_processes_compute_each_picture_once(tmp_path, model):
    open_store(tmp_path / "cache", model)

    def work(number: int) -> None:
        encode = Counting()

        def slowly(image: bytes) -> StoredFeatures:
            time.sleep(0.002)
            return encode(image)

        store = open_store(tmp_path / "cache", model)
        fill(store, IMAGES, slowly, first=number)
        assert holds(store, IMAGES)
        (tmp_path / f"done-{number}").write_bytes(b"".join(encode.images))

    processes = [FORK.Process(target=work, args=(number,)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sum((tmp_path / f"done-{number}").stat().st_size for number in range(3)) == 16 * N
    store = open_store(tmp_path / "cache", model)
    assert sum(record.rows for record in store.records) == N and holds(store, IMAGES)


@pytest.mark.parametrize("harm", ["a bit", "cut", "gone", "record"])
def test_damage_is_noticed_and_computed_again(tmp_path, model, harm):
    store = open_store(tmp_path, model)
    fill(store, IMAGES[: 2 * PICTURES_OF_SHARD], features)
    record = store.records[0]
    shard, lost = store.folder / record.file, record.rows
    match harm:
        case "a bit":
            data = bytearray(shard.read_bytes())
            data[len(data) // 2] ^= 4
            shard.write_bytes(data)
        case "cut":
            shard.write_bytes(shard.read_bytes()[:-9])
        case "gone":
            shard.unlink()
        case "record":
            (store.folder / record.name).write_text("{}")
    again, encode = open_store(tmp_path, model), Counting()
    assert len(again.damaged) == 1 and len(again) == PICTURES_OF_SHARD
    verified = cache_maintenance.verify(store.folder)
    assert len(verified.damaged) == 1 and verified.shards == 1
    fill(again, IMAGES[: 2 * PICTURES_OF_SHARD], encode)
    assert len(encode.images) == lost and holds(again, IMAGES[: 2 * PICTURES_OF_SHARD])
    assert not cache_maintenance.verify(store.folder).damaged


def test_values_that_rot_after_they_were_found_whole_are_not_served(tmp_path, model):
    fill(open_store(tmp_path, model), IMAGES[:4], features)
    store = open_store(tmp_path, model)
    with open(store.folder / store.records[0].file, "r+b") as file:
        data = file.read()
        at = data.index(features(IMAGES[2]).embeds.tobytes())
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))
    with pytest.raises(IntegrityError, match=r"other values than were written .*Delete .*\.json and run the same"):
        store.read(IMAGES[2])
    assert same(store.read(IMAGES[1]), features(IMAGES[1]))


def test_a_newer_prefcache_s_record_is_kept(tmp_path, model):
    store = open_store(tmp_path, model)
    fill(store, IMAGES[:2], features)
    path = store.folder / store.records[0].name
    path.write_bytes(artifact.seal(artifact.unseal(path) | {"schema_version": 99}))
    again = open_store(tmp_path, model)
    assert again.newer == [path]
    fill(again, IMAGES[:3], features)
    assert path.exists() and holds(again, IMAGES[:3])


def test_gc_removes_leftovers_and_old_orphans_only(tmp_path, model):
    store = open_store(tmp_path, model)
    fill(store, IMAGES[:40], features)
    kept = {path.name for path in store.folder.iterdir()}
    orphan = store.folder / f"{'0' * 32}-00000000.arrow"
    orphan.write_bytes(b"x")
    assert cache_maintenance.find_caches([str(tmp_path)]) == [store.folder]
    assert cache_maintenance.verify(store.folder).orphans == 1
    assert cache_maintenance.gc(store.folder, 1).orphans == 0 and orphan.exists()
    assert cache_maintenance.gc(store.folder, 1, dry_run=True, old_seconds=-1).orphans == 1 and orphan.exists()
    found = cache_maintenance.gc(store.folder, 1, old_seconds=-1)
    assert found.orphans == 1 and found.shards == 2
    assert {path.name for path in store.folder.iterdir()} == kept and holds(FeatureStore(store.folder), IMAGES[:40])


def test_gc_removes_a_store_that_no_command_has_opened_for_so_long(tmp_path, model):
    store = open_store(tmp_path, model)
    fill(store, IMAGES[:40], features)
    month_ago = time.time() - 30 * 86_400
    for path in store.folder.iterdir():
        os.utime(path, (month_ago, month_ago))
    found = [cache_maintenance.gc(store.folder, 1, True, features_unused_for=days) for days in (None, 31, 29)]
    assert [each.removed for each in found] == [False, False, True] and store.folder.is_dir()
    assert found[0].unused_days == pytest.approx(30, abs=0.1)
    assert found[0].features_bytes == sum(path.stat().st_size for path in store.folder.glob("*.arrow"))
    assert not cache_maintenance.gc(open_store(tmp_path, model).folder, 1, features_unused_for=29).removed
    os.utime(store.folder / TOWER_FILE, (month_ago, month_ago))
    shutil.copytree(store.folder, being_removed := artifact.temporary_path(store.folder))
    assert cache_maintenance.find_caches([str(tmp_path)]) == [store.folder]
    shutil.rmtree(being_removed)
    assert cache_maintenance.gc(store.folder, 1, features_unused_for=29).removed
    assert [path.name for path in tmp_path.iterdir()] == [".weights.json"]
    assert holds(store, IMAGES[:40])  # a command that has it open reads on


def test_nothing_is_written_onto_a_store(tmp_path, model):
    store = open_store(tmp_path, model)
    with pytest.raises(UsageError, match="keeps what a vision tower made of pictures"):
        overwrite_guard.refuse_owned(store.folder / "rows.csv")
    assert (store.folder / TOWER_FILE).is_file()


def test_a_disk_that_will_not_hold_them_is_noticed_early(tmp_path, model, monkeypatch):
    store, usage = open_store(tmp_path, model), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(ResourceError, match=r"the features of 69 more pictures take about .* GB"):
        fill(store, IMAGES, features)
    assert len(FeatureStore(store.folder)) == PICTURES_OF_SHARD
