"""What commands import when they start: PyTorch and Transformers take seconds, so only a command that computes loads them."""

import subprocess
import sys

import torch

from tests.helpers.project import write_config, write_pairs

RUN = """
import sys
from prefcache.cli import main
for line in sys.argv[1:]:
    main(line.split(), standalone_mode=False)
    loaded = [name for name in ("torch", "transformers", "datasets") if name in sys.modules]
    print(*loaded, "after", line, file=sys.stderr)
"""
COMMANDS = """
init my.yaml
config
config --schema
formats
losses
guide trust
architectures
doctor
preview -n 1 config.yaml
prepare config.yaml
prepare config.yaml
sql select+1 runs/tiny
"""


def test_commands_that_compute_nothing_load_neither_torch_nor_transformers(tmp_path, model):
    write_pairs(tmp_path / "pairs.jsonl", 60)
    write_config(tmp_path, model)
    commands = [line for line in COMMANDS.splitlines() if line]
    if torch.version.cuda or torch.version.hip:
        commands.remove("doctor")  # it lists the GPUs
    done = subprocess.run(
        [sys.executable, "-c", RUN, *commands], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    loaded = [line for line in done.stderr.splitlines() if "after " in line]
    assert loaded == [f"after {command}" for command in commands]
