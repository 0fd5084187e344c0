"""Convert the settings of another training program into a config."""

import tempfile
from pathlib import Path

from prefcache.command_results import ConvertResult
from prefcache.pipeline import config_file
from prefcache.pipeline.foreign_programs import Program
from prefcache.pipeline.preparing.formats import FORMATS
from prefcache.pipeline.preparing.sources import holds_text
from prefcache.pipeline.stored import overwrite_guard
from prefcache.pipeline.training.foreign_configs import convert


def run(program: Program, file: str, output: Path | None = None, force: bool = False) -> ConvertResult:
    converted = convert(program, config_file.read_yaml(Path(file)), Path(file))
    converted.drop_unknown_formats(FORMATS)
    with tempfile.TemporaryDirectory() as spool:
        converted.put_template(holds_text(converted.data_paths, Path(spool)))
    converted.check()
    result = ConvertResult(converted.config, converted.became, converted.ignored, converted.differs, output)
    if output is not None:
        inputs = overwrite_guard.Inputs(data=converted.data_paths).with_files(file)
        overwrite_guard.refuse_overwrite(output, inputs, force=force)
        overwrite_guard.write_bytes(output, result.config_text().encode())
    return result
