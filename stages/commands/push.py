"""push: send a finished run's model to the hub, and only when asked."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from prefcache.command_results import PushResult
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
    try:
        api = HfApi()
        repository = api.create_repo(name, private=not public, exist_ok=True)
        with working("upload"):
            commit = api.upload_folder(
                repo_id=repository.repo_id,
                folder_path=folder / "model",
                allow_patterns=[entry.file for entry in entries],
                commit_message=f"{folder.name}, trained by prefcache",
            )
    except (OfflineModeIsEnabled, LocalTokenNotFoundError, HTTPError, ValueError) as error:
        raise UsageError(f"{folder / 'model'} was not pushed to {name}: {_explain(error)}") from error
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


def _explain(error: Exception) -> str:
    """Say what went wrong and what to do."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it, and run the same command again."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        problem = "there is no token" if status is None else f"the hub refused the token ({status})"
        return f"{problem}. Log in (hf auth login), or set HF_TOKEN to one with write access."
    reason = " ".join(str(error).split()).rstrip(".")
    if status is not None:
        return f"the hub answered with {status} ({reason}). Run the same command again, or try later."
    if isinstance(error, ValueError):  # the hub's client refuses the name or the card
        return f"{reason}."
    return f"the hub did not answer ({reason}). Check the network and HF_ENDPOINT, and run the same command again."
