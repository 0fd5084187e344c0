"""In a notebook: a real kernel runs the guide's chapter, with progress in place, and what a notebook does to a process does no harm."""

import ast
import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.helpers.documents import SCRIPTS, blocks
from tests.helpers.project import write_config, write_pairs

CHAPTER = next(file for file in SCRIPTS if file.stem == "python")


def run_notebook(folder: Path, *cells: str) -> list[list[dict]]:
    """Run cells in a kernel of their own; return the outputs of each. A traceback fails."""
    # Whatever imports tqdm first is told that ipywidgets is missing; nothing here shows tqdm's bars.
    cells = ("import tqdm.auto", *cells)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    return [cell.outputs for cell in notebook.cells[1:]]


def text(outputs: list[dict], stream: str = "stdout") -> str:
    return "".join(output["text"] for output in outputs if output.get("name") == stream)


def bars(outputs: list[dict]) -> list[dict]:
    """The displays of progress, as the notebook keeps them: of each only what it showed last."""
    shown = [output["data"] for output in outputs if output["output_type"] == "display_data"]
    return [data for data in shown if "<progress" in data.get("text/html", "")]


@pytest.fixture
def demo_folder(model, tmp_path) -> Path:
    """A folder with a tiny model and a few pairs where the guide has the demo's."""
    (tmp_path / "data/demo").mkdir(parents=True)
    shutil.copytree(model, tmp_path / "data/demo/reference")
    write_pairs(tmp_path / "data/demo/pairs.jsonl", 60)
    return tmp_path


def test_the_chapter_runs_in_a_kernel_and_its_progress_is_shown_in_place(demo_folder):
    cells = blocks("python", CHAPTER)
    ran = run_notebook(demo_folder, *cells)
    prepared, sweep, callback, further, runs, query, duckdb, asked, report, looked_up = ran
    score, train = bars(prepared)[-2:]
    assert score["text/plain"].startswith("score: ") and "tokens" in score["text/plain"]
    assert train["text/plain"].startswith("train: 8/8 steps, ") and "loss " in train["text/plain"]
    assert train["text/html"] == f"<progress value='1.0000' max='1'></progress> {train['text/plain']}"
    assert "train: start checked" in text(prepared) and "runs/python/trained/model" in text(prepared)
    # Nothing is on red but warnings.
    for outputs in ran:
        assert all(line.startswith("warning: ") for line in text(outputs, "stderr").splitlines()), outputs
    assert len(bars(sweep)) == 2
    assert text(callback).splitlines()[-1].endswith("of 8 by StopWhenLow: the loss is below 0.69")
    assert bars(callback)[-1]["text/plain"].startswith("train: ")
    assert text(further).splitlines()[-1] == "8 None"
    assert "beta-0.05" in text(runs)
    assert "of their words in common" in text(asked)
    # A DataFrame is shown as a table, and DuckDB reads the answer.
    assert "<table" in query[-1]["data"]["text/html"] and "beta-0.05" in text(query)
    assert "max" in text(duckdb) and text(report).splitlines()[-1].endswith("report.html")
    assert text(looked_up).splitlines()[-1].count("[") == 4  # two sums, and the log-probs of two answers


QUERIES = """
import threading
import torch
import prefcache

torch.ones(512, 512) @ torch.ones(512, 512)  # starts its threads
for run in ("a", "b"):
    prefcache.train("config.yaml", overrides={"train.run": run}, quiet=True)
    print([prefcache.sql("select count(*) as n from rewards").fetchall() for _ in range(3)])
prefcache.sql("select '<b>' as text from runs")
"""
THREAD = """
class Query(prefcache.TrainCallback):
    def on_checkpoint(self, checkpoint):
        print(prefcache.sql("select max(step) from metrics where run = 'c'").fetchall())


def work():
    prefcache.train("config.yaml", overrides={"train.run": "c"}, callbacks=[Query()], quiet=True)


thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
INTERRUPTED = """
import os, signal

class Interrupt(prefcache.TrainCallback):
    def on_step(self, step):
        if step.step == 5:
            os.kill(os.getpid(), signal.SIGINT)  # as the kernel's interrupt does

try:
    prefcache.train("config.yaml", callbacks=[Interrupt()])
except KeyboardInterrupt:
    print("interrupted")
"""
AGAIN = """
print(prefcache.train("config.yaml").steps)
"""
WORKERS = """
overrides = {"out": "runs/both", "prepare.workers": 2, "prepare.data": ["pairs.jsonl", "more.jsonl"]}
prefcache.prepare("config.yaml", overrides=overrides).train
"""


@pytest.fixture(scope="module")
def cells(scored_once, model, tmp_path_factory) -> dict[str, list[dict]]:
    """The outputs of these cells, run in one kernel."""
    folder = shutil.copytree(scored_once, tmp_path_factory.mktemp("notebook") / "it")
    write_config(folder, model, max_steps=8, checkpoint_every=3, samples=0)
    write_pairs(folder / "more.jsonl", 20, start=60)
    run = (QUERIES, THREAD, INTERRUPTED, AGAIN, WORKERS)
    return dict(zip(run, run_notebook(folder, *run), strict=True))


def test_queries_work_next_to_threads_again_and_again_and_after_training(cells):
    # Each run has rewards of the same pairs.
    first, second = map(ast.literal_eval, text(cells[QUERIES]).splitlines())
    assert first == [[(60,)]] * 3 and second == [[(120,)]] * 3
    assert "<td>&lt;b&gt;</td>" in cells[QUERIES][-1]["data"]["text/html"] and not text(cells[QUERIES], "stderr")


def test_a_run_in_a_thread_works_and_its_callback_may_query_it(cells):
    assert text(cells[THREAD]).splitlines() == ["[(3,)]", "[(6,)]", "[(8,)]"]


def test_an_interrupted_cell_leaves_a_run_to_continue(cells):
    assert text(cells[INTERRUPTED]).splitlines()[-1] == "interrupted"
    assert "train: resuming from step 3" in text(cells[AGAIN]) and text(cells[AGAIN]).splitlines()[-1] == "8"
    assert bars(cells[AGAIN])[-1]["text/plain"].startswith("train: 8/8 steps")


def test_workers_start_from_a_notebook(cells):
    assert "prepare: 80 records" in "".join(
        output["data"]["text/plain"] for output in cells[WORKERS][:-1] if "data" in output
    )
