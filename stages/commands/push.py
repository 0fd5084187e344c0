"""push: send a finished run's model to the hub, and only when asked."""

from pathlib import Path

from huggingface_hub import HfApi

from prefcache.command_results import PushResult
from prefcache.hub import hub_errors
from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.progress import Progress, working
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.records import FileEntry, RunManifest
from prefcache.pipeline.training import existing_run
from prefcache.pipeline.training.run_log import PROVENANCE


def run(folder: Path, name: str, public: bool, progress: Progress) -> PushResult:
    """Send the files of RUN/model that its manifest lists, and nothing else."""
    entries = _verified_files(folder)
    progress.say(f"push: {len(entries)} files, {sum(entry.bytes for entry in entries):,} bytes, to {name}")
    with hub_errors(f"{folder / 'model'} was not pushed to {name}", "write"):
        api = HfApi()
        repository = api.create_repo(name, private=not public, exist_ok=True)
        with working("upload"):
            commit = api.upload_folder(
                repo_id=repository.repo_id,
                folder_path=folder / "model",
                allow_patterns=[entry.file for entry in entries],
                commit_message=f"{folder.name}, trained by prefcache",
            )
    return PushResult(run=folder, hub=repository.repo_id, url=str(repository), commit=commit.oid, files=len(entries))


def _verified_files(folder: Path) -> list[FileEntry]:
    if not (folder / PROVENANCE).exists():
        raise UsageError(f"{folder} is not a run. Name the folder of one, such as runs/demo/trained.")
    if (manifest := RunManifest.find(folder)) is None:
        raise UsageError(f"{folder} is not finished. Train it to its end (prefcache train CONFIG), then push it.")
    for entry in manifest.model:
        if reason := artifact.damage(folder / "model", entry):
            raise IntegrityError(f"{folder / 'model' / entry.file} {reason}. {existing_run.remedy(folder)}")
    return manifest.model
