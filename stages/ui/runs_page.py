"""The runs of the experiment as they are now: a table, and the curves of those that are chosen, overlaid."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from starlette.requests import Request
from starlette.responses import Response

from prefcache import view_sources
from prefcache.commands.query import Experiment
from prefcache.pipeline.schema import EVALUATION, HELD_OUT
from prefcache.pipeline.training.run_summary import summarize
from prefcache.ui import line_svg, pages
from prefcache.ui.line_svg import Chart, Line
from prefcache.ui.reader import Reader

_MOST_CHOSEN = 8  # at first; each has a colour of its own
_SECONDS = 60.0
# Metrics and their titles, of training and, with eval_ before their names, of evaluations.
_METRICS = {"loss": "loss", "rewards/accuracies": "reward accuracy", "rewards/margins": "reward margin"}


def show(reader: Reader, request: Request) -> Response:
    # Not from the reader, which has them as they were when it was opened: a run may be in progress.
    runs = [summarize(folder) for folder in view_sources.list_runs(reader.folder)]
    names = [run.run for run in runs]
    chosen = [name for name in names if name in request.query_params.getlist("run")] or names[:_MOST_CHOSEN]
    return pages.render(
        "runs",
        section="/runs",
        reader=reader,
        runs=runs,
        chosen=chosen,
        evaluated=_name_split(next((run.evaluated for run in runs if run.evaluated), HELD_OUT)),
        curves=pages.address("/runs/curves", [("run", name) for name in chosen]),
        colours={name: line_svg.choose_colour(number) for number, name in enumerate(names)},
    )


def show_curves(reader: Reader, request: Request) -> Response:
    names = [folder.name for folder in view_sources.list_runs(reader.folder)]
    colours = {name: line_svg.choose_colour(number) for number, name in enumerate(names)}
    wanted = request.query_params.getlist("run")
    chosen = {name: colour for name, colour in colours.items() if name in wanted}
    charts = []
    if chosen:
        # Opened each time, so that it has the steps up to now.
        with contextlib.closing(Experiment(str(reader.folder))) as experiment:
            charts = list(_draw(experiment, chosen))
    return pages.render_part(request, "curves", reader=reader, charts=charts, colours=chosen)


def _draw(experiment: Experiment, colours: Mapping[str, str]) -> Iterator[Chart]:
    with experiment.ask("select * from metrics limit 0", timeout=_SECONDS) as answer:
        titles = dict(_title_metrics(answer.columns))
        list(answer.rows())
    names = ", ".join(f'"{name}"' for name in titles)
    query = f"select run, step, {names} from metrics where list_contains($runs, run) order by run, step"
    with experiment.ask(query, {"runs": list(colours)}, _SECONDS) as answer:
        columns = answer.arrow()
        table = pa.Table.from_batches(list(answer.batches(columns)), columns.schema)
    runs, steps = table["run"].to_numpy(), table["step"].to_numpy()
    for name, title in titles.items():
        values = table[name].to_numpy().astype(np.float64)
        # Step 0 is an evaluation's alone.
        is_point = np.isfinite(values) & ((steps > 0) | name.startswith(EVALUATION))
        lines = [_make_line(run, colour, steps, values, is_point & (runs == run)) for run, colour in colours.items()]
        if any(line.points for line in lines):
            yield line_svg.draw(title, lines)


def _make_line(run: str, colour: str, steps: np.ndarray, values: np.ndarray, kept: np.ndarray) -> Line:
    return Line(run, colour, list(zip(steps[kept].tolist(), values[kept].tolist(), strict=True)))


def _title_metrics(columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name the curves: each metric of training, then those of evaluations."""
    for metric, title in _METRICS.items():
        if metric in columns:
            yield metric, title
    for column in columns:
        for metric, title in _METRICS.items():
            if column.startswith(EVALUATION) and column.endswith(metric):
                split = column.removeprefix(EVALUATION).removesuffix(metric).removesuffix("_") or HELD_OUT
                yield column, f"{_name_split(split)} {title}"


def _name_split(split: str) -> str:
    return "held-out" if split == HELD_OUT else split
