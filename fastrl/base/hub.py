"""Repositories of the Hugging Face hub: a revision becomes a commit, files are fetched once and then lie in its cache.

A commit whose files are in the cache needs no network, and nothing is asked. A branch or tag is asked about by one
request with a timeout; without an answer it is what it was when it was last asked about. Nothing is tried for minutes.
"""

import contextlib
import glob
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastrl.base.log import say

COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = r"[\w.-]+/[\w.-]+"
REVISION = r"[\w.-]+(?:/[\w.-]+)*"


class HubError(ValueError):
    """What is wrong with a repository or the way to it, and what to do; without the flag that named it."""


@dataclass(frozen=True, kw_only=True)
class Repo:
    kind: Literal["dataset", "model"]
    name: str  # owner/name
    revision: str = "main"  # a branch, a tag or a commit

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}"

    @property
    def page(self) -> str:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    @property
    def what(self) -> str:
        return "data set" if self.kind == "dataset" else "model"

    @property
    def instead(self) -> str:
        """What can be done without a network."""
        local = "the path of local files as --data" if self.kind == "dataset" else "a local folder as --model"
        return f"run once with a network, or give {local}"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A repository at a commit: the names of its files, of which any may be fetched."""

    repo: Repo
    commit: str
    files: Sequence[str]


def snapshot_of(repo: Repo) -> Snapshot:
    """The commit that a revision is now, and its files. Raises HubError."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    commit = repo.revision if COMMIT.fullmatch(repo.revision) else ""
    if commit and (files := cached_files(repo, commit)):
        return Snapshot(repo=repo, commit=commit, files=files)
    api = hub.HfApi()
    try:
        ask = api.dataset_info if repo.kind == "dataset" else api.model_info
        info = ask(repo.name, revision=repo.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        commit = cached_commit(repo) if unreachable(error) else ""
        files = cached_files(repo, commit) if commit else None
        if not files:
            raise HubError(explain(repo, error)) from error
        say(f"hub: {repo.page} cannot be asked; {repo.revision} is taken for {commit}, as when it was last asked")
        return Snapshot(repo=repo, commit=commit, files=files)
    if not info.sha or not COMMIT.fullmatch(info.sha):
        raise HubError(f"{repo.page} names no commit for the revision {repo.revision!r}; is HF_ENDPOINT a hub?")
    if commit and info.sha != commit:
        say(f"hub: WARNING: {repo.page} gives commit {info.sha} where {commit} was asked for")
    files = [file.rfilename for file in info.siblings or []]
    if not files:  # some mirrors list them by their tree alone
        try:
            files = api.list_repo_files(repo.name, revision=info.sha, repo_type=repo.kind)
        except Exception as error:
            raise HubError(explain(repo, error)) from error
    return Snapshot(repo=repo, commit=info.sha, files=sorted(files))


def fetch(snapshot: Snapshot, files: Sequence[str]) -> Path:
    """The folder in the cache that holds these files of a snapshot. Raises HubError where one cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    repo = snapshot.repo
    if not sys.stderr.isatty():
        disable_progress_bars()
    where: dict = dict(repo_type=repo.kind, allow_patterns=[glob.escape(file) for file in files])
    folder = None
    with contextlib.suppress(OSError):  # not all of it is in the cache yet
        folder = Path(snapshot_download(repo.name, revision=snapshot.commit, local_files_only=True, **where))
    if folder is None or not all((folder / file).is_file() for file in files):
        say(f"hub: fetching {len(files)} files of {repo.page} at {snapshot.commit}")
        try:
            folder = Path(snapshot_download(repo.name, revision=snapshot.commit, **where))
        except Exception as error:
            raise HubError(explain(repo, error)) from error
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise HubError(f"{repo.page} at {snapshot.commit} gives no file {missing[0]!r}")
    remember(repo, snapshot.commit)
    return folder


def cached_files(repo: Repo, commit: str) -> list[str]:
    """Names of all files that the repository has at a commit, as far as the cache knows; else none."""
    import huggingface_hub as hub

    try:
        return sorted(file.path for file in hub.get_cached_repo_tree(repo.name, repo_type=repo.kind, revision=commit))
    except hub.errors.CachedRepoTreeNotFoundError:
        return []


def ref_file(repo: Repo) -> Path:
    """Where the cache keeps the commit that a branch or tag was."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repo.name, repo_type=repo.kind)
    return Path(constants.HF_HUB_CACHE).expanduser() / folder / "refs" / repo.revision


def cached_commit(repo: Repo) -> str:
    file = ref_file(repo)
    return file.read_text().strip() if file.is_file() else ""


def remember(repo: Repo, commit: str) -> None:
    """For the time without a network; a cache that cannot be written to is no reason to stop."""
    if repo.revision == commit or cached_commit(repo) == commit:
        return
    file = ref_file(repo)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        temporary.write_text(commit)
        os.replace(temporary, file)


def unreachable(error: BaseException | None) -> bool:
    """Whether there was no answer, or one that says nothing about the repository."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, (OfflineModeIsEnabled, ConnectionError, TimeoutError)) or "TransportError" in names


def explain(repo: Repo, error: BaseException) -> str:
    """In one line why a repository cannot be had, and what to do."""
    from huggingface_hub import constants, errors

    cause = error if unreachable(error) or not unreachable(error.__cause__) else error.__cause__
    if constants.HF_HUB_OFFLINE:
        return f"{repo} is not in the cache ({constants.HF_HUB_CACHE}) and HF_HUB_OFFLINE is set; {repo.instead}"
    if unreachable(cause):
        got = f"answers {cause.response.status_code}" if isinstance(cause, errors.HfHubHTTPError) else first_line(cause)
        return (
            f"{repo} is not in the cache ({constants.HF_HUB_CACHE}), and {constants.ENDPOINT} cannot be reached "
            f"({got}); {repo.instead}"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"access to {repo.page} is restricted: ask for it there, and set HF_TOKEN to a token of yours"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no {repo.what} {repo.page}, or it is private: correct the name, or set HF_TOKEN to a token of "
            "yours"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo.page} has no revision {repo.revision!r}; name a branch, a tag or a commit of it behind the @"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"{repo.page} refuses access ({error.response.status_code}); set HF_TOKEN to a token of yours"
    return f"{repo.page} cannot be fetched: {first_line(error)}"


def first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
