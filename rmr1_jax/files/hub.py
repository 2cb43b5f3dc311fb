"""Locating data and models: local paths, and snapshots of Hugging Face hub repositories at a pinned revision.

    locate("pairs.jsonl")                                              # Path("pairs.jsonl")
    locate("Skywork/Skywork-Reward-Preference-80K-v0.2")               # the snapshot's folder in the hub cache
    locate("allenai/reward-bench@168ed8ab/data/filtered-00000-of-00001.parquet")    # one file of one revision

Downloads are kept in the cache that HF_HOME names, and are found there without a network too (HF_HUB_OFFLINE=1).

Next: `pairs/rows.py`, which reads data files; `policy.py`, which loads a model from such a folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rmr1_jax.errors import InputError

SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz", ".csv", ".csv.gz")

_LOCAL = {"dataset": "file or folder", "model": "directory"}  # what a local source of each kind is

# A path in a repository requires a revision. Otherwise a misspelt local path would be requested from the hub.
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/\s]+)(?:/(?P<inside>\S.*))?)?")


class HubId(NamedTuple):
    """A hub repository, a revision (branch, tag or commit; None: the newest), and a path in it (None: all)."""

    repo: str
    revision: str | None
    inside: str | None


def parse_hub_id(source: str) -> HubId | None:
    """Parse `owner/name[@revision[/path in the repository]]`; returns None for any other text."""
    found = _HUB.fullmatch(source)
    if not found or ".." in source.split("/") or found["repo"].endswith(SUFFIXES):
        return None
    return HubId(**found.groupdict())


def locate(
    source: str | Path,
    revision: str | None = None,
    *,
    kind: str = "dataset",
    patterns: Sequence[str] = tuple(f"*{suffix}" for suffix in SUFFIXES),
) -> Path:
    """Return the local file or folder that `source` names, after a download if it is a hub id.

    Args:
        source: a path, or `owner/name[@revision[/path in the repository]]`; a path that exists takes precedence.
        revision: a branch, a tag, or best a commit, for a hub id without its own `@revision`.
        kind: the type of the repository, "dataset" or "model". patterns: the files to download.

    Raises:
        InputError: neither a path that exists nor a hub id; a local path with a revision; the download failed.
    """
    path = Path(source)
    if path.is_dir() or (path.exists() and kind == "dataset"):
        if revision is not None:
            raise InputError(f"{source} is a local path: revision={revision!r} is for hub ids; leave it out")
        return path
    hub = None if path.is_absolute() else parse_hub_id(str(source))
    if hub is None:
        raise InputError(
            f"{kind} {str(source)!r} is neither a {_LOCAL[kind]} nor a hub id (owner/name[@revision[/path]])"
        )
    if hub.revision is not None and revision not in (None, hub.revision):
        raise InputError(
            f"{source}: names revision {hub.revision!r}, and revision={revision!r} is given; leave one out"
        )
    folder = _snapshot(hub, revision or hub.revision, kind, patterns)
    found = folder / (hub.inside or "")
    if not found.exists():
        raise InputError(f"{source}: {hub.repo} has no {hub.inside!r} at {commit_of(folder) or folder}")
    return found


def commit_of(path: Path) -> str | None:
    """Return the commit of the hub snapshot that `path` is in; None for any other path."""
    folders = (each for each in (path, *path.parents) if each.parent.name == "snapshots")
    return next((each.name for each in folders if "--" in each.parent.parent.name), None)


def _snapshot(hub: HubId, revision: str | None, kind: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # imported here because it takes half a second

    wanted = [hub.inside, f"{hub.inside}/*"] if hub.inside else list(patterns)
    try:
        return Path(snapshot_download(hub.repo, repo_type=kind, revision=revision, allow_patterns=wanted))
    except Exception as error:
        # The errors of the hub, of its HTTP library and of the disk have no common class, and the user can fix all of
        # them: the name, the network, the token, or space on the disk.
        at = f" at revision {revision!r}" if revision else ""
        raise InputError(
            f"{kind} {hub.repo!r} is not a local {_LOCAL[kind]}, and cannot be downloaded{at}: {error}; check the name "
            f"or download it on a machine with a network: hf download {hub.repo} --repo-type {kind}"
        ) from error
