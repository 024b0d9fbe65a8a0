"""Directories of a few known files to the Hugging Face Hub and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..errors import CheckpointError, DataError


def fetch(
    source: Path | str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | str | None = None,
    local_files_only: bool = False,
) -> Path:
    """A directory as it is, or the files of a model repository in the cache of the Hub's client, downloaded if need be.

    Raises DataError when neither is to be had.
    """
    if isinstance(source, Path) or Path(source).exists() or source.startswith((".", "/")):
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            source,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(files),
            library_name="engram-lm",
            library_version=__version__,
        )
    except Exception as error:  # of the client, of its HTTP library, of the system
        raise DataError(
            f"{source}: there is no such directory, and the Hub did not give a repository of that name ({error})."
        ) from error
    return Path(found)


def upload(
    directory: Path | str,
    files: Sequence[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str,
) -> str:
    """Commit files to a model repository, made if need be, and so is a branch `revision`; returns its URL.

    Raises CheckpointError when the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="engram-lm", library_version=__version__)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            allow_patterns=list(files),
            revision=revision,
            commit_message=message,
        )
    except Exception as error:  # of the client, of its HTTP library, of the system
        raise CheckpointError(f"{directory} cannot be uploaded to {repo_id} ({error}).") from error
    return str(url)
