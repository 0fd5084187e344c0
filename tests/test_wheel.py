"""The wheel, installed in a bare environment outside the checkout, next to a project that has modules of the same names."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.project import ROOT, write_config, write_pairs


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy of what git would carry: building writes into the source folder.
    for name in ("pyproject.toml", "README.md", "pipeline", "stages"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", "dist", "."], cwd=folder, check=True, timeout=300)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_it_has_one_import_name_and_every_file_of_the_source(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"prefcache"}
    source = {f"prefcache/{path.relative_to(ROOT / 'stages')}" for path in (ROOT / "stages").rglob("*")}
    source |= {f"prefcache/pipeline/{path.relative_to(ROOT / 'pipeline')}" for path in (ROOT / "pipeline").rglob("*")}
    assert not {name for name in source if "__pycache__" not in name and "." in Path(name).name} - names


@pytest.mark.slow  # the dependencies are compiled anew
def test_the_three_stages_run_next_to_a_users_own_pipeline_and_stages(wheel, model, tmp_path):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin/python"
    site = next((environment / "lib").glob("python*/site-packages"))
    # The dependencies come from this environment. Its .pth files, and so its editable installation, are not read.
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--force-reinstall", wheel], check=True, timeout=300)

    project = tmp_path / "project"
    project.mkdir()
    for name in ("pipeline", "stages"):
        (project / f"{name}.py").write_text("raise SystemExit('the decoy was imported')\n")
    write_pairs(project / "pairs.jsonl", 16)
    config = write_config(project, model, epochs=1, samples=0)
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(project), "HF_HUB_OFFLINE": "1"}

    def run(*command: object) -> str:
        done = subprocess.run(
            list(map(str, command)), cwd=project, env=variables, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import prefcache.pipeline.config as c; print(c.__file__)"
    assert Path(run(python, "-c", where).strip()).is_relative_to(environment)
    assert "version 0.1.0" in run(environment / "bin/prefcache", "--version")
    for stage in ("prepare", "score", "train"):
        run(python, "-m", "prefcache", stage, config)
    assert (project / "runs/tiny/trained/model/model.safetensors").exists()
    assert "avg" in run(environment / "bin/prefcache", "sql", "select avg(margin) as avg from rewards")
