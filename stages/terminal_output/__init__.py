"""What a person reads at the end of a command, on stdout: `print_result` for what a stage returned, the modules for lists.

To print a new kind of result, write its function in the module of its kind, annotate the argument, and list it here.
"""

from functools import singledispatch
from typing import Any

from prefcache.terminal_output import (
    caches_and_exports,
    coloured_tokens,
    config_text,
    data_and_scores,
    machine,
    runs_on_disk,
    training_plan,
    training_runs,
)


@singledispatch
def print_result(result: Any) -> None:
    raise TypeError(f"no table for a {type(result).__name__}")


for _printer in (
    config_text.print_converted,
    data_and_scores.print_waiting,
    data_and_scores.print_prepare,
    data_and_scores.print_score,
    data_and_scores.print_score_plan,
    data_and_scores.print_score_files,
    data_and_scores.print_report,
    data_and_scores.print_upload,
    data_and_scores.print_download,
    training_plan.print_train_plan,
    training_runs.print_train,
    training_runs.print_sweep,
    training_runs.print_merge,
    training_runs.print_push,
    coloured_tokens.print_show,
    caches_and_exports.print_export,
    caches_and_exports.print_trl_export,
    caches_and_exports.print_import,
    caches_and_exports.print_parity,
    caches_and_exports.print_verify,
    caches_and_exports.print_gc,
    caches_and_exports.print_sign,
    caches_and_exports.print_publish_plan,
    caches_and_exports.print_publish,
    caches_and_exports.print_fetch_plan,
    caches_and_exports.print_fetch,
    runs_on_disk.print_runs,
    runs_on_disk.print_clean,
    machine.print_doctor,
):
    print_result.register(_printer)
