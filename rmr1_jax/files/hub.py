"""Where data and models lie: a local path as it is, or a snapshot of a hub repository, whose revision can be pinned.

    locate("pairs.jsonl")                                              # Path("pairs.jsonl")
    locate("Skywork/Skywork-Reward-Preference-80K-v0.2")               # the snapshot's folder in the hub's cache
    locate("allenai/reward-bench@168ed8ab/data/filtered-00000-of-00001.parquet")    # one file of one revision

What was fetched once is found again without a network (HF_HUB_OFFLINE=1), in the cache that HF_HOME names.

Next: `data/containers.py`, which reads the files; `policy.py`, which loads a model from such a folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rmr1_jax.errors import InputError

SUFFIXES = (".jsonl", ".json", ".parquet")

DATA_FILES = tuple(f"*{suffix}" for suffix in SUFFIXES)


_LOCAL = {"dataset": "file or folder", "model": "directory"}  # what a source of each kind is on this machine


# A path in the repository needs the revision before it: without, a misspelt local path would be looked for in the hub.
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/\s]+)(?:/(?P<inside>\S.*))?)?")


class HubId(NamedTuple):
    """A repository of the hub, the revision (a branch, tag or commit; None: the newest) and a file or folder in it."""

    repo: str
    revision: str | None
    inside: str | None


def parse_hub_id(source: str) -> HubId | None:
    """`owner/name[@revision[/path in the repository]]` taken apart; None where `source` is nothing of the kind."""
    found = _HUB.fullmatch(source)
    if not found or ".." in source.split("/") or found["repo"].endswith(SUFFIXES):
        return None
    return HubId(**found.groupdict())


def locate(
    source: str | Path,
    revision: str | None = None,
    *,
    kind: str = "dataset",
    patterns: Sequence[str] = DATA_FILES,
) -> Path:
    """The local file or folder that `source` names, fetched from the hub where it is no path of this machine.

    Args:
        source: a path, or `owner/name[@revision[/path in the repository]]`; a path that exists wins.
        revision: pins a hub id that has no `@revision` of its own: a branch, a tag, or best a commit.
        kind: of the repository, "dataset" or "model". patterns: the files to fetch of it.

    Raises:
        InputError: no such path and no hub id; a local path with a revision; the hub and its cache do not have it.
    """
    path = Path(source)
    if path.is_dir() or (path.exists() and kind == "dataset"):
        if revision is not None:
            raise InputError(f"{source} is a local path: revision={revision!r} is for hub ids; leave it out")
        return path
    hub = None if path.is_absolute() else parse_hub_id(str(source))
    if hub is None:
        raise InputError(f"{kind} {str(source)!r} is no {_LOCAL[kind]} and no hub id (owner/name[@revision[/path]])")
    if hub.revision is not None and revision not in (None, hub.revision):
        raise InputError(
            f"{source}: names revision {hub.revision!r}, and revision={revision!r} is given; leave one out"
        )
    folder = _snapshot(hub, revision or hub.revision, kind, patterns)
    found = folder / (hub.inside or "")
    if not found.exists():
        raise InputError(f"{source}: {hub.repo} has no {hub.inside!r} at {_commit(folder) or folder}")
    return found


def commit_of(path: Path) -> str | None:
    """The commit of the hub's snapshot that `path` lies in; None for any other path."""
    return next((commit for folder in (path, *path.parents) if (commit := _commit(folder))), None)


def _commit(folder: Path) -> str | None:
    return folder.name if folder.parent.name == "snapshots" and "--" in folder.parent.parent.name else None


def _snapshot(hub: HubId, revision: str | None, kind: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # here: it takes half a second, and a local path does not need it

    wanted = [hub.inside, f"{hub.inside}/*"] if hub.inside else list(patterns)
    try:
        return Path(snapshot_download(hub.repo, repo_type=kind, revision=revision, allow_patterns=wanted))
    except Exception as error:
        # The hub's errors, its HTTP library's and the disk's have no class in common, and the remedy is the user's in
        # all of them: the name, the network, the token, or space.
        at = f" at revision {revision!r}" if revision else ""
        raise InputError(
            f"{kind} {hub.repo!r} is no local {_LOCAL[kind]}, and the hub did not give it{at}: {error}; check the name "
            f"or fetch it where there is a network: hf download {hub.repo} --repo-type {kind}"
        ) from error
