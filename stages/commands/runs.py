"""runs: the runs of an experiment, what each came to and what it takes on disk. Reads records and changes nothing."""

from prefcache import view_sources
from prefcache.command_results import RunsResult
from prefcache.pipeline.training.run_summary import summarize


def run(where: str | None) -> RunsResult:
    """List the runs of the experiment that a config or its folder names; None: of the only one in runs/."""
    folder = view_sources.find_experiment(where)
    return RunsResult(folder, [summarize(path) for path in view_sources.list_runs(folder)])
