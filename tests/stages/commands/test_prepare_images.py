"""prepare with pictures: each stored once under its id, and no change of one goes unnoticed."""

import base64
import hashlib
import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefcache.commands import prepare as prepare_command
from prefcache.pipeline import config_file, image_processor
from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.images import decode, hash_pixels
from prefcache.pipeline.preparing import prepared_inputs
from prefcache.pipeline.progress import Progress
from prefcache.pipeline.schema import sequence_key
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.prepared import Prepared
from tests.helpers.kills import killed_at
from tests.helpers.vision_models import picture, save

PREPARED = Path("runs/seen/prepared")
SETTINGS = ("model=model", "out=runs/seen", "prepare.held_out=0.2", "prepare.max_quarantine=1.0", "prepare.workers=1")


def record(i: int, *images: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"what is it, {i}?"}],
        "chosen": [{"role": "assistant", "content": f"a cat {i}"}],
        "rejected": [{"role": "assistant", "content": f"a dog {i}"}],
        "images": list(images),
    }


class Project:
    """A model that sees, and data with pictures in a folder of their own."""

    def __init__(self, root: Path, prefcache: Callable[..., Any]) -> None:
        self.root, self.prefcache, self.settings = root, prefcache, list(SETTINGS)
        self.pics = root / "data/pics"
        self.pics.mkdir(parents=True)

    def use(self, family: str) -> None:
        shutil.copytree(save(family), self.root / "model")

    def draw(self, name: str, seed: int = 0, width: int = 24, height: int = 16) -> str:
        picture(width, height, seed).save(self.pics / name)
        return f"pics/{name}"

    def write(self, *records: dict[str, Any], name: str = "pairs.jsonl") -> None:
        (self.root / "data" / name).write_text("".join(json.dumps(each) + "\n" for each in records))

    def options(self, *more: str) -> list[str]:
        data = sorted(str(path.relative_to(self.root)) for path in (self.root / "data").glob("*.*"))
        every = [*self.settings, f"prepare.data={json.dumps(data)}", *more]
        return [word for setting in every for word in ("--set", setting)]

    def prepare(self, *more: str, code: int = 0) -> dict[str, Any]:
        done = self.prefcache("prepare", *self.options(*more), "--json", code=code)
        return (json.loads(done.stdout) if code == 0 else {}) | {"stderr": done.stderr}

    def rows(self) -> list[dict[str, Any]]:
        return Prepared(PREPARED).table().to_pylist()

    def keys(self) -> dict[int, tuple[str, str]]:
        return {row["line"]: (row["chosen_key"].hex(), row["rejected_key"].hex()) for row in self.rows()}

    def why_stale(self, *more: str) -> str | None:
        words = self.options(*more)
        return prepared_inputs.explain_if_stale(config_file.load(None, words[1::2]))


@pytest.fixture
def project(tmp_path, prefcache) -> Project:
    made = Project(tmp_path, prefcache)
    made.use("qwen2.5-vl")
    return made


def encoded(path: Path) -> bytes:
    return path.read_bytes()


# -- what is stored --------------------------------------------------------------------------------------------------


def test_each_picture_is_stored_once_under_its_id_as_it_came(project):
    a, b = project.draw("a.png", 1), project.draw("b.png", 2)
    shutil.copy(project.pics / "a.png", project.pics / "again.png")
    project.write(record(0, a), record(1, b, a), record(2), record(3, "pics/again.png"))
    project.prepare()
    found = {row["line"]: row for row in project.rows()}

    # The ids by their definition, from the files and the processor as Transformers loads it.
    processor = image_processor.load(project.root / "model")
    files = {name: encoded(project.pics / f"{name}.png") for name in "ab"}
    pixels = {name: decode(each).hash for name, each in files.items()}
    ids = {name: hashlib.blake2b(pixels[name] + processor.id + b"\0", digest_size=16).digest() for name in "ab"}
    assert [found[line]["images"] for line in (1, 2, 3, 4)] == [[ids["a"]], [ids["b"], ids["a"]], [], [ids["a"]]]
    tag = f"[image 24x16 {pixels['a'].hex()[:12]}]"
    assert found[1]["prompt"] == f"{tag} what is it, 0?" and found[3]["prompt"] == "what is it, 2?"
    for row in found.values():
        for side in ("chosen", "rejected"):
            assert row[f"{side}_key"] == sequence_key(row["prompt_ids"], row[f"{side}_ids"], row["images"])

    images = Prepared(PREPARED).images()
    assert len(images) == 2 and {name: images.encoded(ids[name]) for name in "ab"} == files
    assert {hash_pixels(images.pixels(ids[name])) for name in "ab"} == set(pixels.values())
    assert Prepared(PREPARED).manifest.inputs.processor_id == processor.id.hex()


def test_text_alone_has_the_keys_that_it_always_had_and_no_processor(project):
    project.write(*(record(i) | {"images": []} for i in range(3)))
    project.prepare()
    for row in project.rows():
        assert row["images"] == [] and row["chosen_key"] == sequence_key(row["prompt_ids"], row["chosen_ids"])
    assert not list(PREPARED.glob("image-*"))


def test_another_picture_with_the_same_question_is_another_prompt(project):
    """So the held-out split, which goes by the prompt's text, may put them on different sides."""
    for i in range(40):
        project.draw(f"{i}.png", i)
    project.write(*(record(0, f"pics/{i}.png") for i in range(40)))
    project.prepare()
    assert len({row["prompt"] for row in project.rows()}) == 40
    assert {row["split"] for row in project.rows()} == {"train", "held_out"}


def test_only_pictures_of_kept_examples_are_stored(project):
    kept, dropped = project.draw("kept.png", 1), project.draw("dropped.png", 2)
    project.write(
        record(0, kept), record(1, dropped) | {"rejected": record(1)["chosen"]}, record(2, dropped, "gone.png")
    )
    assert project.prepare()["quarantined"] == {"chosen equals rejected": 1, "image not read": 1}
    assert len(Prepared(PREPARED).images()) == 1


def test_parts_share_pictures_and_shards_end_where_they_are_full(project, monkeypatch):
    monkeypatch.setattr(prepare_command.finalize, "_IMAGE_SHARD_BYTES", 2500)
    names = [project.draw(f"{i}.png", i) for i in range(6)]
    for part in range(4):  # each file is a part
        records = (record(i, names[part], names[part + i % 3]) for i in range(part, 20, 4))
        project.write(*records, name=f"{part}.jsonl")
    project.prepare()
    stored = Prepared(PREPARED)
    assert len(stored.manifest.images) > 1 and len(stored.images()) == 6
    assert {image for row in project.rows() for image in row["images"]} == set(
        stored.images().table["image"].to_pylist()
    )


def test_pictures_of_earlier_preparations_are_removed(project):
    a, b = project.draw("a.png", 1), project.draw("b.png", 2)
    project.write(record(0, a))
    project.prepare()
    before = {path.name for path in PREPARED.glob("image-*")}
    project.write(record(0, b))
    project.prepare()
    now = {path.name for path in PREPARED.glob("image-*")}
    manifest = Prepared(PREPARED).manifest
    assert now == {entry.file for entry in (*manifest.images, *manifest.image_files)} and not now & before
    project.write(record(0))
    project.prepare()
    assert not list(PREPARED.glob("image-*"))


def test_a_picture_among_several_has_an_id_of_its_own_where_the_processor_tells_them_apart(tmp_path, prefcache):
    project = Project(tmp_path, prefcache)
    project.use("llava-onevision")
    a, b = project.draw("a.png", 1), project.draw("b.png", 2)
    project.write(record(0, a), record(1, a, b))
    project.prepare()
    one, several = (row["images"] for row in sorted(project.rows(), key=lambda row: row["line"]))
    images = Prepared(PREPARED).images()
    assert one[0] != several[0] and len(images) == 3
    assert [images.is_one_of_several(image) for image in (*one, *several)] == [False, True, True]
    assert images.facts(one[0]).pixels == images.facts(several[0]).pixels


@pytest.mark.parametrize("brings", [[], ["tokenizer.json"], ["tokenizer.json", "processor_config.json"]], ids=str)
def test_an_adapter_is_prepared_with_the_processor_of_its_base(project, brings):
    project.write(record(0, project.draw("a.png", 1)))
    project.prepare()
    expected, adapter = project.keys(), project.root / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "model"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    for name in [*brings, *(["tokenizer_config.json", "chat_template.jinja"] if brings else [])]:
        shutil.copy(project.root / "model" / name, adapter)
    project.prepare("model=adapter")
    assert project.keys() == expected and project.why_stale("model=adapter") is None
    path = (adapter if "processor_config.json" in brings else project.root / "model") / "processor_config.json"
    path.write_text(path.read_text().replace('"longest_edge": 4096', '"longest_edge": 2048'))
    assert "image processor have changed" in project.why_stale("model=adapter")


def test_a_processor_that_lacks_a_package_names_it(project, monkeypatch):
    def lack(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {'torchvision'!r}", name="torchvision")

    monkeypatch.setattr(image_processor, "import_module", lack)
    project.write(record(0, project.draw("a.png")))
    done = project.prefcache("prepare", *project.options(), code=2)
    assert "needs the package torchvision, which is not installed (pip install torchvision)" in done.stderr
    assert "Expected preprocessor_config.json" not in done.stderr


def test_mismatched_answers_of_labels_have_keys_with_the_picture(project):
    names = [project.draw(f"{i}.png", i) for i in range(4)]
    project.write(*(record(0, names[i]) | {"chosen": record(i)["chosen"]} for i in range(4)))
    project.prepare("prepare.examples=labels")
    rows = project.rows()
    assert len(rows) == 8
    for row in rows:
        assert row["completion_key"] == sequence_key(row["prompt_ids"], row["completion_ids"], row["images"])
        assert row["kl_key"] == sequence_key(row["prompt_ids"], row["kl_ids"], row["images"])


def test_pictures_come_out_of_parquet_as_datasets_stores_them(project):
    a = project.draw("a.png", 1)
    values = [{"bytes": encoded(project.pics / "a.png"), "path": "somewhere/else.png"}, {"bytes": None, "path": a}]
    rows = [record(i) | {"images": [value]} for i, value in enumerate(values)]
    pq.write_table(pa.Table.from_pylist(rows), project.root / "data/pairs.parquet")
    project.prepare()
    first, second = sorted(project.rows(), key=lambda row: row["line"])
    assert first["images"] == second["images"] != []
    assert len(Prepared(PREPARED).images()) == 1


def test_pictures_are_fetched_from_the_hosts_that_are_named(project, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    project.draw("a.png", 1)
    handler = partial(SimpleHTTPRequestHandler, directory=str(project.pics))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        project.write(record(0, f"http://{host}/a.png"), record(1, f"http://{host}/gone.png"), record(2))
        assert project.prepare()["quarantined"] == {"image not fetched": 2}
        (row, _) = pq.read_table(PREPARED / "quarantine.parquet").to_pylist()
        assert row["detail"] == f"{host} is not one of prepare.image_hosts"
        assert project.prepare(f"prepare.image_hosts={host}")["quarantined"] == {"image not fetched": 1}
        server.shutdown()
    assert len(Prepared(PREPARED).images()) == 1
    (row,) = pq.read_table(PREPARED / "quarantine.parquet").to_pylist()
    assert row["detail"] == f"{host}: HTTP 404"


# -- late images -----------------------------------------------------------------------------------------------------


def test_pictures_after_the_first_records_are_found(project):
    a = project.draw("a.png", 1)
    records = [record(i) for i in range(130)]
    for each in records:
        del each["images"]
    project.write(*records, record(130, a))
    done = project.prepare()
    assert "pairs.jsonl, line 131, has images" in done["stderr"]
    assert sum(len(row["images"]) for row in project.rows()) == 1 and len(project.rows()) == 131
    assert project.prepare()["changed"] is False


def test_a_model_that_sees_nothing_is_refused_before_all_of_it_is_quarantined(project, model):
    project.write(record(0, project.draw("a.png")))
    done = project.prefcache("prepare", *project.options(f"model={model}"), code=2)
    assert "has images" in done.stderr and not PREPARED.exists()


# -- freshness -------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(project) -> Project:
    a, b = project.draw("a.png", 1), project.draw("b.png", 2)
    project.write(record(0, a), record(1, b), record(2, "pics/gone.png"), record(3))
    project.prepare()
    assert project.why_stale() is None
    return project


def test_what_is_prepared_stays_fresh(prepared):
    os.utime(prepared.pics / "a.png")  # touched, with the same bytes
    assert prepared.why_stale() is None
    assert prepared.prepare()["changed"] is False


def test_a_changed_picture_makes_it_stale(prepared):
    before = prepared.keys()
    prepared.draw("a.png", 3)
    assert prepared.why_stale() == f"{PREPARED} is out of date: data/pics/a.png has changed"
    done = prepared.prepare()
    assert done["changed"] and "data/pics/a.png has changed" in done["stderr"]
    changed = {line for line, keys in prepared.keys().items() if keys != before[line]}
    assert changed == {1} and prepared.why_stale() is None


def test_a_picture_that_is_gone_or_appears_makes_it_stale(prepared):
    (prepared.pics / "b.png").unlink()
    assert prepared.why_stale() == f"{PREPARED} is out of date: data/pics/b.png is gone"
    prepared.draw("gone.png", 4)
    assert prepared.why_stale().startswith(f"{PREPARED} is out of date: 2 files of images have changed: ")
    assert prepared.prepare()["quarantined"] == {"image not read": 1}
    assert {*prepared.keys()} == {1, 3, 4}


def test_other_settings_of_the_processor_make_it_stale(prepared):
    before, path = prepared.keys(), prepared.root / "model/processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    path.write_text(json.dumps(settings))
    assert prepared.why_stale() == (
        f"{PREPARED} is out of date: the settings of the model's image processor have changed"
    )
    assert prepared.prepare()["changed"]
    assert {line for line, keys in prepared.keys().items() if keys != before[line]} == {1, 2}  # not the text
    settings["image_processor"]["image_mean"] = settings["image_processor"]["image_mean"]
    path.write_text(json.dumps(settings, indent=3, sort_keys=True))
    assert prepared.why_stale() is None


def test_records_are_not_read_again_with_other_pictures(prepared):
    """Values would be written next to records that they do not belong to."""
    prepared.draw("a.png", 3)
    prepared.settings.append("score.parity_sample=0")
    done = prepared.prefcache("import", *prepared.options(), code=5)
    assert "data/pics/a.png has changed since runs/seen/prepared was prepared" in done.stderr


def test_a_picture_that_was_read_is_never_overwritten(prepared):
    before = encoded(prepared.pics / "a.png")
    (prepared.root / "link.csv").hardlink_to(prepared.pics / "a.png")
    asked = ["sql", "select 1", "runs/seen", "--out"]
    done = prepared.prefcache(*asked, "link.csv", "--force", code=2)
    assert "data that runs/seen was made from" in done.stderr and encoded(prepared.pics / "a.png") == before


def test_a_damaged_picture_is_noticed(prepared):
    (shard,) = PREPARED.glob("image-bytes-*")
    data = bytearray(shard.read_bytes())
    at = data.index(b"IDAT") + 10
    data[at] ^= 1
    shard.write_bytes(data)
    images = Prepared(PREPARED).images()
    with pytest.raises(IntegrityError, match="decodes to broken image"):
        [images.pixels(image) for image in images.table["image"].to_pylist()]
    done = prepared.prepare()
    assert f"{shard.name} has other bytes than were written" in done["stderr"]
    images = Prepared(PREPARED).images()
    assert [images.pixels(image).shape for image in images.table["image"].to_pylist()] == [(16, 24, 3)] * 2


# -- what changes keys -----------------------------------------------------------------------------------------------


def test_the_place_the_name_and_the_container_of_a_picture_change_no_key(project):
    a = project.draw("a.png", 1)
    project.write(record(0, a))
    project.prepare()
    keys = project.keys()
    text = base64.b64encode(encoded(project.pics / "a.png")).decode()
    bitmap = io.BytesIO()
    picture(24, 16, 1).save(bitmap, "BMP")
    (project.root / "data/pics/other.bmp").write_bytes(bitmap.getvalue())
    (project.root / "moved").mkdir()
    shutil.move(project.pics / "a.png", project.root / "moved/b.png")
    for value in (
        "../moved/b.png",
        str(project.root / "moved/b.png"),
        f"data:image/png;base64,{text}",
        "pics/other.bmp",
    ):
        project.write(record(0, value))
        assert project.prepare()["changed"] and project.keys() == keys, value


# -- killed ----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "inputs.mk")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_killed_at_any_step_it_ends_with_the_same_bytes(project):
    names = [project.draw(f"{i}.png", i) for i in range(3)]
    for part in range(2):
        project.write(*(record(i, names[part], names[i]) for i in range(3)), name=f"{part}.jsonl")
    config = config_file.load(None, project.options()[1::2])
    act = partial(prepare_command.run, config, Progress(quiet=True))
    act()
    whole, step, n_killed = contents(PREPARED), 0, 0
    shutil.rmtree("runs")
    while killed_at(step, act):
        act()
        assert contents(PREPARED) == whole, step
        shutil.rmtree("runs")
        step, n_killed = step + 61, n_killed + 1
    assert n_killed > 9


def test_a_torn_picture_file_of_a_part_is_written_again(project, monkeypatch):
    project.write(record(0, project.draw("a.png", 1)))
    with monkeypatch.context() as patch:
        patch.setattr(prepare_command, "_finalize", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            project.prepare()
    (part,) = PREPARED.glob(".parts-*/*.images")
    for damage in (lambda: part.write_bytes(part.read_bytes()[:-9]), part.unlink):
        damage()
        with monkeypatch.context() as patch:
            patch.setattr(prepare_command, "_finalize", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                project.prepare()
        assert artifact.open_arrow_stream(part).num_rows == 1
    project.draw("a.png", 2)  # changed since the part was prepared
    project.prepare()
    (row,) = project.rows()
    assert Prepared(PREPARED).images().facts(row["images"][0]).pixels == decode(encoded(project.pics / "a.png")).hash
