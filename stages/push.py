"""push: a finished run's model to the hub, when asked and never by itself."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from pipeline.errors import IntegrityError, UsageError
from pipeline.progress import Progress
from pipeline.stored import artifact
from pipeline.training.runlog import PROVENANCE


def run(folder: Path, name: str, public: bool, progress: Progress) -> dict[str, Any]:
    """Of RUN/model what its manifest vouches for, and nothing else."""
    entries = _vouched_for(folder)
    progress.say(f"push: {len(entries)} files, {sum(entry['bytes'] for entry in entries):,} bytes, to {name}")
    try:
        api = HfApi()
        where = api.create_repo(name, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=where.repo_id,
            folder_path=folder / "model",
            allow_patterns=[entry["file"] for entry in entries],
            commit_message=f"{folder.name}, trained by prefcache",
        )
    except (OfflineModeIsEnabled, LocalTokenNotFoundError, HTTPError, ValueError) as error:
        raise UsageError(f"{folder / 'model'} was not pushed to {name}: {_why(error)}") from error
    return {"run": str(folder), "hub": where.repo_id, "url": str(where), "commit": commit.oid, "files": len(entries)}


def _vouched_for(folder: Path) -> list[dict[str, Any]]:
    if not (folder / PROVENANCE).exists():
        raise UsageError(f"{folder} is no run. Name the folder of one, such as runs/demo/trained.")
    if (manifest := artifact.read_manifest(folder)) is None:
        raise UsageError(f"{folder} is not finished. Train it to its end (make train), then push it.")
    entries: list[dict[str, Any]] = manifest["model"]
    for entry in entries:
        if reason := artifact.damage(folder / "model", entry):
            raise IntegrityError(
                f"{folder / 'model' / entry['file']} {reason}. Train again (make train) makes it anew."
            )
    return entries


def _why(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it, and run the same command again."
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        said = "there is no token" if status is None else f"the hub refused the token ({status})"
        return f"{said}. Log in (hf auth login), or set HF_TOKEN to one that may write there."
    reason = " ".join(str(error).split()).rstrip(".")
    if status is not None:
        return f"the hub answered with {status} ({reason}). Run the same command again, or another time."
    if isinstance(error, ValueError):  # the name, or something in the card, is not as the hub has it
        return f"{reason}."
    return f"the hub did not answer ({reason}). Look at the network and HF_ENDPOINT, and run the same command again."
