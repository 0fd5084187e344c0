"""Imports point strictly downward. The floors are what keeps a training process from loading a reference."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.documents import blocks
from tests.helpers.project import ROOT

# Rooms, and those that each may look into. `train` may not look into scoring: that is the promise of one model in memory.
ROOMS = {
    "prefcache.pipeline": set(),
    "prefcache.pipeline.stored": {"prefcache.pipeline"},
    "prefcache.pipeline.model": {"prefcache.pipeline"},
    "prefcache.pipeline.preparing": {"prefcache.pipeline", "prefcache.pipeline.stored"},
    "prefcache.pipeline.scoring": {"prefcache.pipeline", "prefcache.pipeline.stored", "prefcache.pipeline.model"},
    "prefcache.pipeline.training": {
        "prefcache.pipeline",
        "prefcache.pipeline.stored",
        "prefcache.pipeline.model",
        "prefcache.pipeline.views",
    },
    "prefcache.pipeline.views": {"prefcache.pipeline", "prefcache.pipeline.stored"},
    "prefcache.pipeline.report": {"prefcache.pipeline", "prefcache.pipeline.stored"},
    "prefcache.pipeline.questions": {"prefcache.pipeline"},
    "prefcache.pipeline.browsing": {"prefcache.pipeline", "prefcache.pipeline.stored", "prefcache.pipeline.views"},
}
# Within a room, from the ground up: a module imports what stands before it. Packages are one module here.
FLOORS = {
    "prefcache.pipeline": [
        "daemon_threads errors images intervals stored_paths token_colours token_text schema spans visible_text",
        "cache_place progress_display",
        "progress",
        "foreign_programs html_templates model_config process_pool safetensors_files thumbnails tokenizer",
        "gguf_files model_files",
        "config identity",
        "image_processor older_ids",
        "config_errors",
        "config_file config_settings",
    ],
    "prefcache.pipeline.stored": [
        "artifact claims disk_usage duckdb_connection id_lists key_index object_store",
        "partial_file records",
        "images memos signatures",
        "mirror",
        "overwrite_guard shards",
        "contradictions prepared row_writers store_writer verified_shards",
        "cache image_features prepared_store",
        "cache_writer folder_upkeep model_ids scoring_plan token_logps",
        "feature_writer store_upkeep",
        "cache_maintenance freshness cut_answers counted_logps gguf_conversion lookups scored",
    ],
    "prefcache.pipeline.model": [
        "architectures device packing oom stochastic_rounding tower",
        "offload traced_gpu vision",
        "logprobs",
        "attention lm_head",
        "chunked_lm_head weights",
        "packed_row",
        "forward trainable",
        "layer_kernels",
    ],
    "prefcache.pipeline.preparing": [
        "example garbage_collection probe_texts token_ids",
        "tokenizer_facts",
        "fast_tokenizer",
        "text_tokenizer",
        "placeholder_text encoder expand_rankings sources",
        "pictures shard_writer",
        "generation_marks turn_borders",
        "chat_template tokenizer_fingerprint formats",
        "template_cache rendered_text image_text",
        "render_chat",
        "truncation resolved_config record_outcomes sample_prompts",
        "part_images part_table prepared_inputs trl_rows",
        "part_worker",
        "finalize",
    ],
    "prefcache.pipeline.scoring": [
        "baseline cached_features placeholders refusals vllm_worker",
        "engines",
        "scored_inputs scorer",
        "actors sample_check",
    ],
    "prefcache.pipeline.training": [
        "losses",
        "distributed gpus",
        "bf16_adamw offloaded_state",
        "alerts router_loss callbacks checkpoints bco_density_ratio flops generation model_card example_expression example_filter optimizers run_log "
        "sample_answers sweep token_sums trackers",
        "objective micro_batch_size existing_run process_agreement removable selection released_gradients",
        "foreign_configs dataset token_gains loss_columns run_summary",
        "run_images run_inputs policy_logps",
        "cache_join gradient_step metrics",
        "policy",
        "moving_reference step_trace",
        "run_plan step_estimate",
        "run_estimate",
        "best_checkpoint",
        "run_context",
        "evaluate alert_handler",
        "finalize_run start_check train_loop",
    ],
    "prefcache.pipeline.views": ["query_check", "hints view_files", "database", "query", "", "query_worker"],
    "prefcache.pipeline.report": [
        "line_points",
        "svg confidence_intervals",
        "data_section pictures reference_section runs_section",
        "plots prose",
        "page",
    ],
    "prefcache.pipeline.questions": ["verdict", "data_verdicts reference_verdicts run_verdicts", ""],
    "prefcache.pipeline.browsing": ["browse_table neighbours", "filters", "queries"],
    "prefcache": [
        "hub interrupts row_layout view_sources command_results example_tokens guide working_folder",
        "reference_cache terminal_output commands",
        "query_output sql_repl sql_result trl ui",
        "cli",
        "__main__",
    ],
    "prefcache.ui": [
        "access axis_ticks token_process",
        "image_reader line_svg questioner token_reader",
        "reader",
        "histogram_svg pages",
        "images_page pair_page pairs_page questions_page runs_page selections_page",
        "app",
        "server",
    ],
    "prefcache.commands": [
        "config convert doctor download export export_trl fetch gc import_logps merge parity prepare preview publish push query report score show sign train upload verify",
    ],
}
# Of one floor: a template with what is traced through it, and a reference with the keys that name it.
SAME_FLOOR = {
    ("prefcache.pipeline.preparing.chat_template", "prefcache.pipeline.preparing.template_cache"),
    ("prefcache.pipeline.identity", "prefcache.pipeline.config"),
}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in (("pipeline", "prefcache.pipeline"), ("stages", "prefcache")):
        for file in (ROOT / folder).rglob("*.py"):
            parts = (package, *file.relative_to(ROOT / folder).with_suffix("").parts)
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
    if module == "prefcache.ui":
        return next(number for number, names in enumerate(FLOORS["prefcache"]) if "ui" in names.split())
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
        elif room(module) == "prefcache.ui":
            assert room(imported) != "prefcache" or floor(imported) < floor("prefcache.ui"), (
                f"{module} imports {imported}"
            )
        elif room(module) == "prefcache.commands":
            assert room(imported) != "prefcache" or floor(imported) == 0, f"{module} imports {imported}"
        else:
            assert room(module) == "prefcache" or room(imported) in ROOMS[room(module)], f"{module} imports {imported}"


def top_level(module: str) -> set[str]:
    return {imported.partition(".")[0] for imported in imports(MODULES[module])}


@pytest.mark.parametrize(
    "module",
    [
        name
        for name in MODULES
        if name.startswith(("prefcache.pipeline.training.losses", "prefcache.pipeline.model.logprobs"))
    ],
)
def test_losses_and_logprobs_import_only_torch_and_the_ground_floor(module):
    ours = {
        name
        for name in imports(MODULES[module])
        if name in MODULES and not name.startswith("prefcache.pipeline.training.losses")
    }
    assert ours <= {"prefcache.pipeline.errors", "prefcache.pipeline.schema", "prefcache.pipeline.model.device"}
    outside = top_level(module) - set(sys.stdlib_module_names) - {"prefcache"}
    assert outside <= {"torch", "numpy"}


def test_only_the_command_line_imports_click():
    assert {module.rpartition(".")[0] for module in MODULES if "click" in top_level(module)} == {"prefcache.cli"}


def test_only_the_worker_of_its_engine_imports_vllm():
    assert [module for module in MODULES if "vllm" in top_level(module)] == ["prefcache.pipeline.scoring.vllm_worker"]


def test_only_the_actors_import_ray():
    assert [module for module in MODULES if "ray" in top_level(module)] == ["prefcache.pipeline.scoring.actors"]


def test_scoring_loads_ray_only_where_actors_score():
    # Neither do the packages that know of Ray, such as transformers.
    assert "ray" not in loaded_by(
        "import prefcache.commands.score, prefcache.pipeline.scoring.actors, prefcache.pipeline.scoring.engines.transformers"
    )


def test_the_vllm_worker_needs_nothing_that_the_environment_of_vllm_lacks():
    assert top_level("prefcache.pipeline.scoring.vllm_worker") - set(sys.stdlib_module_names) == {
        "numpy",
        "vllm",
        # Of which it needs more for pictures only, and which vLLM brings.
        "PIL",
        "transformers",
    }


@functools.cache
def loaded_by(code: str) -> set[str]:
    script = f"import sys; {code}; print(' '.join(sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )


def test_a_worker_that_prepares_loads_neither_torch_nor_transformers():
    # Each worker would load them anew, which takes seconds and memory.
    assert not {"torch", "transformers", "datasets"} & loaded_by(
        "import prefcache.pipeline.preparing.part_worker, prefcache.pipeline.process_pool"
    )


def test_training_cannot_load_a_reference():
    assert not {
        name
        for name in loaded_by("import prefcache.commands.train")
        if name.startswith("prefcache.pipeline.scoring.engines")
    }


def test_the_command_line_sql_and_the_report_load_no_torch():
    assert "torch" not in loaded_by(
        "import prefcache.cli, prefcache.commands.query, prefcache.commands.report, prefcache.terminal_output"
    )


def test_only_the_report_loads_what_draws_it():
    assert "matplotlib" not in loaded_by("import prefcache.commands.train") | loaded_by(
        "import prefcache.commands.query, prefcache.terminal_output"
    )


def test_help_loads_neither_torch_nor_arrow_nor_duckdb():
    # Measured by modules, not by seconds: a loaded module is what would make help slow.
    guide = "from prefcache import guide; guide.render(guide.chapter('trust'), 80)"
    heavy = {"torch", "pyarrow", "duckdb", "transformers", "pydantic"}
    assert not heavy & loaded_by(f"import prefcache.cli; {guide}")


def test_the_picture_in_the_guide_has_every_room_with_what_it_imports():
    (picture,) = blocks("text", ROOT / "stages/guide/extend.md")
    header, *lines = picture.splitlines()
    start, end = header.index("imports"), header.index("what it does")
    drawn = {found[1]: set(line[start:end].split()) for line in lines if (found := re.search(r"(\w+)/ ", line))}
    assert drawn.pop("cli") == drawn.pop("ui") == drawn.pop("commands") == set()
    rooms = {name: {other for other in imported if other != "prefcache.pipeline"} for name, imported in ROOMS.items()}
    del rooms["prefcache.pipeline"]
    assert {
        f"prefcache.pipeline.{name}": {f"prefcache.pipeline.{each}" for each in imports}
        for name, imports in drawn.items()
    } == rooms
    ground = picture.partition("ground ")[2].replace("...", "").split()
    assert set(ground) <= set(" ".join(FLOORS["prefcache.pipeline"]).split())


def test_no_test_imports_another():
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if "helpers" not in file.parts]
    assert not [
        (file.name, name) for file in files for name in imports(file) if name.rpartition(".")[2].startswith("test_")
    ]
