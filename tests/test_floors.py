"""Imports point strictly downward. The floors are what keeps a training process from loading a reference."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# Rooms, and those that each may look into. `train` may not look into scoring: that is the promise of one model in memory.
ROOMS = {
    "pipeline": set(),
    "pipeline.stored": {"pipeline"},
    "pipeline.model": {"pipeline"},
    "pipeline.preparing": {"pipeline", "pipeline.stored"},
    "pipeline.scoring": {"pipeline", "pipeline.stored", "pipeline.model"},
    "pipeline.training": {"pipeline", "pipeline.stored", "pipeline.model", "pipeline.views"},
    "pipeline.views": {"pipeline", "pipeline.stored"},
    "pipeline.report": {"pipeline", "pipeline.stored"},
    "pipeline.questions": {"pipeline"},
}
# Within a room, from the ground up: a module imports what stands before it. Packages are one module here.
FLOORS = {
    "pipeline": ["errors pieces schema", "pool progress", "config identity"],
    "pipeline.stored": ["artifact claims duck keys", "cache prepared rowfiles", "shorten upkeep"],
    "pipeline.model": ["logprobs packing memory products", "attention routing", "forward weights", "trainable"],
    "pipeline.preparing": [
        "example",
        "chat_template encoder examples frames sources",
        "formats templating",
        "lengths recipe records",
        "parts",
        "assembly",
    ],
    "pipeline.scoring": ["engines", "scorer", "actors"],
    "pipeline.training": [
        "losses",
        "devices",
        "alerts balance budget checkpoints density flops modelcard objective only optimizers runlog samples sweep token_sums "
        "trackers",
        "from_trl runfolder selection token_logps",
        "batches gains",
        "columns policy",
        "metrics moving_reference",
        "best",
        "origins session",
        "measuring watching",
        "outcome",
    ],
    "pipeline.views": ["statement", "advice", ""],
    "pipeline.report": ["figures intervals visible", "data reference runs", "charts words", "page"],
    "pipeline.questions": [""],
    "stages": [
        "sources",
        "adopt answers doctor export inspect merge parity prepare preview prompt push report score show tables train upkeep",
        "cli",
    ],
}
# Of one floor: a template with what is traced through it, and a reference with the keys that name it.
SAME_FLOOR = {
    ("pipeline.preparing.chat_template", "pipeline.preparing.frames"),
    ("pipeline.identity", "pipeline.config"),
}


def modules() -> dict[str, Path]:
    found = {}
    for file in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/**/*.py")]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return {name: file for name, file in found.items() if FLOORS.get(name, [""])[-1] == ""}


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    return max((name for name in FLOORS if f"{module}.".startswith(f"{name}.")), key=len)


def floor(module: str) -> int:
    """Where in its room a module stands; a package's own files stand where it does."""
    name = module.removeprefix(room(module)).removeprefix(".").partition(".")[0]
    return next(number for number, names in enumerate(FLOORS[room(module)]) if name in (names.split() or [""]))


MODULES = modules()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_strictly_downward(module):
    package = f"{room(module)}.{module.removeprefix(room(module)).split('.')[1]}" if module != room(module) else module
    for imported in set(imports(MODULES[module])) & set(MODULES):
        if f"{imported}.".startswith(f"{package}.") or (module, imported) in SAME_FLOOR:
            continue
        if room(imported) == room(module):
            assert floor(imported) < floor(module), f"{module} imports {imported}"
        else:
            assert module.startswith("stages") or room(imported) in ROOMS[room(module)], f"{module} imports {imported}"


def top_level(module: str) -> set[str]:
    return {imported.partition(".")[0] for imported in imports(MODULES[module])}


@pytest.mark.parametrize(
    "module", [name for name in MODULES if name.startswith(("pipeline.training.losses", "pipeline.model.logprobs"))]
)
def test_losses_and_logprobs_import_only_torch_and_the_ground_floor(module):
    ours = {
        name for name in imports(MODULES[module]) if name in MODULES and not name.startswith("pipeline.training.losses")
    }
    assert ours <= {"pipeline.errors", "pipeline.schema"}
    outside = top_level(module) - set(sys.stdlib_module_names) - {"pipeline"}
    assert outside <= {"torch", "numpy"}


def test_only_the_command_line_imports_click():
    assert {module.rpartition(".")[0] for module in MODULES if "click" in top_level(module)} == {"stages.cli"}


def test_only_the_worker_of_its_engine_imports_vllm():
    assert [module for module in MODULES if "vllm" in top_level(module)] == ["pipeline.scoring.engines.vllm_worker"]


def test_only_the_actors_import_ray():
    assert [module for module in MODULES if "ray" in top_level(module)] == ["pipeline.scoring.actors"]


def test_scoring_loads_ray_only_where_actors_score():
    # Neither do the packages that know of Ray, such as transformers.
    assert "ray" not in loaded_by("import stages.score, pipeline.scoring.actors, pipeline.scoring.engines.transformers")


def test_the_vllm_worker_needs_nothing_that_the_environment_of_vllm_lacks():
    assert top_level("pipeline.scoring.engines.vllm_worker") - set(sys.stdlib_module_names) == {"numpy", "vllm"}


@functools.cache
def loaded_by(code: str) -> set[str]:
    script = f"import sys; {code}; print(' '.join(sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_a_worker_that_prepares_loads_neither_torch_nor_transformers():
    # Each worker would load them anew, which takes seconds and memory.
    assert not {"torch", "transformers", "datasets"} & loaded_by("import pipeline.preparing.parts, pipeline.pool")


def test_training_cannot_load_a_reference():
    assert not {name for name in loaded_by("import stages.train") if name.startswith("pipeline.scoring.engines")}


def test_the_command_line_sql_and_the_report_load_no_torch():
    assert "torch" not in loaded_by("import stages.cli, stages.inspect, stages.report, stages.tables")


def test_only_the_report_loads_what_draws_it():
    assert "matplotlib" not in loaded_by("import stages.train") | loaded_by("import stages.inspect, stages.tables")


def test_help_loads_neither_torch_nor_arrow_nor_duckdb():
    # Measured by modules, not by seconds: a loaded module is what would make help slow.
    assert not {"torch", "pyarrow", "duckdb", "transformers", "pydantic"} & loaded_by("import stages.cli")
