"""A column that the data brings is defined in one place."""

import json
import os
import shutil
import subprocess
import sys

from tests.helpers.project import ROOT, pair

ENTRY = 'DataColumn("weight", ("pairs", "labels"), "Give each record a weight."),'
READ = """
from pathlib import Path
from prefcache.pipeline.preparing.formats import get_format
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.training.losses.registry import COLUMNS
from prefcache.pipeline.training.loss_columns import _available_columns
prepared = Prepared(Path("runs/a/prepared"))
print(prepared.table()["weight"].to_pylist())
print("weight" in COLUMNS, "weight" in _available_columns(prepared), "weight" in get_format("pairs").optional)
"""


def test_a_new_column_takes_one_entry_in_the_schema(tmp_path, model):
    """It is read, stored, available to losses, listed by the formats and shown by the views."""
    package = tmp_path / "copy/prefcache"
    shutil.copytree(ROOT / "stages", package)
    shutil.copytree(ROOT / "pipeline", package / "pipeline")
    schema = package / "pipeline/schema.py"
    schema.write_text(schema.read_text().replace("\nDATA_COLUMNS = (", f"\nDATA_COLUMNS = (\n    {ENTRY}"))
    records = [pair(0) | {"weight": 0.5}, pair(1) | {"weight": 2}, pair(2)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def run(*arguments: object) -> str:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(package.parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    settings = ["prepare.data=pairs.jsonl", "prepare.held_out=0", f"model={model}", "out=runs/a"]
    run("-m", "prefcache", "prepare", *(part for setting in settings for part in ("--set", setting)))
    assert run("-c", READ).splitlines() == ["[0.5, 2.0, None]", "True True True"]
    query = "select p.weight from examples e join pairs p using (example_id, weight) order by 1"
    assert run("-m", "prefcache", "sql", query, "runs/a", "--format", "csv").split() == ["weight", "0.5", "2.0"]
