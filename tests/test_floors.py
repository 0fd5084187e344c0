"""Imports point strictly downward. The floors are what keeps a training process from loading a reference."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = [
    {"pipeline.errors", "pipeline.schema", "pipeline.example"},
    {
        "pipeline.artifact",
        "pipeline.attention",
        "pipeline.config",
        "pipeline.chat_template",
        "pipeline.claims",
        "pipeline.duck",
        "pipeline.encoder",
        "pipeline.examples",
        "pipeline.frames",
        "pipeline.identity",
        "pipeline.keys",
        "pipeline.logprobs",
        "pipeline.losses",
        "pipeline.modelcard",
        "pipeline.losses.labels",
        "pipeline.losses.noise",
        "pipeline.losses.pairs",
        "pipeline.losses.reference_free",
        "pipeline.losses.registry",
        "pipeline.losses.targets",
        "pipeline.packing",
        "pipeline.pool",
        "pipeline.progress",
    },
    # A model in memory, and its forward.
    {"pipeline.forward", "pipeline.weights"},
    {
        "pipeline.alerts",
        "pipeline.cache",
        "pipeline.checkpoints",
        "pipeline.engines",
        "pipeline.engines.loading",
        "pipeline.engines.server",
        "pipeline.engines.transformers",
        "pipeline.engines.vllm",
        "pipeline.engines.vllm_worker",
        "pipeline.formats",
        "pipeline.formats.axolotl",
        "pipeline.formats.fields",
        "pipeline.formats.frameworks",
        "pipeline.formats.ours",
        "pipeline.formats.public",
        "pipeline.formats.registry",
        "pipeline.density",
        "pipeline.objective",
        "pipeline.prepared",
        "pipeline.sweep",
        "pipeline.rowfiles",
        "pipeline.runlog",
        "pipeline.samples",
        "pipeline.sources",
        "pipeline.sources.chunk",
        "pipeline.sources.kinds",
        "pipeline.sources.separated",
        "pipeline.sources.tables",
        "pipeline.sources.text",
        "pipeline.templating",
        "pipeline.token_sums",
        "pipeline.trainable",
        "pipeline.views",
    },
    {"pipeline.from_trl", "pipeline.runfolder"},
    # What is done with a cache as a whole, or with single tokens of it.
    {"pipeline.upkeep", "pipeline.shorten", "pipeline.token_logps", "pipeline.selection"},
    # Training: examples with what the cache knows of them, then what is made of those.
    {"pipeline.batches"},
    {"pipeline.columns", "pipeline.policy"},
    {"pipeline.metrics"},
    # Preparing: how a source is read and what is too long, then a part, then the whole.
    {"pipeline.scoring", "pipeline.records", "pipeline.lengths", "pipeline.recipe"},
    {"pipeline.parts", "pipeline.actors"},
    {"pipeline.assembly"},
    {
        "stages.adopt",
        "stages.export",
        "stages.inspect",
        "stages.merge",
        "stages.parity",
        "stages.prepare",
        "stages.preview",
        "stages.score",
        "stages.tables",
        "stages.train",
        "stages.upkeep",
    },
    {"stages.cli"},
]
# Of one floor: a template with what is traced through it, and a reference with the keys that name it.
SAME_FLOOR = {
    ("pipeline.chat_template", "pipeline.frames"),
    ("pipeline.identity", "pipeline.config"),
}
# Their own files may import one another.
PACKAGES = ("pipeline.engines", "pipeline.formats", "pipeline.losses", "pipeline.sources")


def modules() -> dict[str, Path]:
    found = {}
    for file in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/*.py")]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return {name: file for name, file in found.items() if name not in ("pipeline", "stages")}


def imports(file: Path) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(module: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if module in names)


def may_share_a_floor(module: str, imported: str) -> bool:
    of_one_package = any(f"{module}.".startswith(f"{p}.") and f"{imported}.".startswith(f"{p}.") for p in PACKAGES)
    return of_one_package or (module, imported) in SAME_FLOOR


MODULES = modules()


def test_every_module_has_a_floor():
    assert set(MODULES) == set().union(*FLOORS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_strictly_downward(module):
    for imported in imports(MODULES[module]):
        if imported in MODULES and not may_share_a_floor(module, imported):
            assert floor(imported) < floor(module), f"{module} imports {imported}"


def top_level(module: str) -> set[str]:
    return {imported.partition(".")[0] for imported in imports(MODULES[module])}


@pytest.mark.parametrize(
    "module", [name for name in MODULES if name.startswith(("pipeline.losses", "pipeline.logprobs"))]
)
def test_losses_and_logprobs_import_only_torch_and_the_ground_floor(module):
    ours = {name for name in imports(MODULES[module]) if name in MODULES and not name.startswith("pipeline.losses")}
    assert ours <= FLOORS[0]
    outside = top_level(module) - set(sys.stdlib_module_names) - {"pipeline"}
    assert outside <= {"torch", "numpy"}


def test_only_the_command_line_imports_click():
    assert [module for module in MODULES if "click" in top_level(module)] == ["stages.cli"]


def test_only_the_worker_of_its_engine_imports_vllm():
    assert [module for module in MODULES if "vllm" in top_level(module)] == ["pipeline.engines.vllm_worker"]


def test_only_the_actors_import_ray():
    assert [module for module in MODULES if "ray" in top_level(module)] == ["pipeline.actors"]


def test_scoring_loads_ray_only_where_actors_score():
    # Neither do the packages that know of Ray, such as transformers.
    assert "ray" not in loaded_by("import stages.score, pipeline.actors, pipeline.engines.transformers")


def test_the_vllm_worker_needs_nothing_that_the_environment_of_vllm_lacks():
    assert top_level("pipeline.engines.vllm_worker") - set(sys.stdlib_module_names) == {"numpy", "vllm"}


def loaded_by(code: str) -> set[str]:
    script = f"import sys; {code}; print(' '.join(sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_a_worker_that_prepares_loads_neither_torch_nor_transformers():
    # Each worker would load them anew, which takes seconds and memory.
    assert not {"torch", "transformers", "datasets"} & loaded_by("import pipeline.parts, pipeline.pool")


def test_training_cannot_load_a_reference():
    assert not {name for name in loaded_by("import stages.train") if name.startswith("pipeline.engines")}


def test_the_command_line_and_sql_load_no_torch():
    assert "torch" not in loaded_by("import stages.cli, stages.inspect, stages.tables")


def test_help_loads_neither_torch_nor_arrow_nor_duckdb():
    # Measured by modules, not by seconds: a loaded module is what would make help slow.
    assert not {"torch", "pyarrow", "duckdb", "transformers", "pydantic"} & loaded_by("import stages.cli")
