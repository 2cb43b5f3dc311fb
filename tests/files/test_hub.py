"""Locating data and models: local paths, hub ids, the hub cache without a network, and errors."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from rmr1_jax.errors import InputError
from rmr1_jax.files.hub import HubId, commit_of, locate, parse_hub_id
from rmr1_jax.pairs.read import read_pairs
from rmr1_jax.policy import MODEL_FILES, load

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROW = '{"id": "1", "question": "q", "response_a": "a", "response_b": "b", "better": "A"}\n'


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[dict]:
    """The arguments of the calls of snapshot_download, which returns a folder that holds data/pairs.jsonl."""
    seen = []

    def snapshot_download(repo, **given):
        seen.append({"repo": repo, **given})
        folder = tmp_path / "datasets--o--n" / "snapshots" / COMMIT
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "data" / "pairs.jsonl").write_text(ROW)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return seen


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """A hub cache that holds one commit of the data set o/n, as `main` and as the tag v1. There is no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub" / "datasets--o--n"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot / "data"):
        folder.mkdir(parents=True)
    for name in ("main", "v1"):
        (repo / "refs" / name).write_text(COMMIT)
    (repo / "blobs" / "abc").write_text(ROW)
    (snapshot / "data" / "train.jsonl").symlink_to(repo / "blobs" / "abc")
    return snapshot


@pytest.mark.parametrize(
    ("source", "hub"),
    [
        ("owner/name", HubId("owner/name", None, None)),
        ("Skywork/Skywork-Reward-Preference-80K-v0.2", HubId("Skywork/Skywork-Reward-Preference-80K-v0.2", None, None)),
        ("o/n@v1", HubId("o/n", "v1", None)),
        (f"o/n@{COMMIT}/data/x-0.parquet", HubId("o/n", COMMIT, "data/x-0.parquet")),
        ("o/n/data", None),  # without a revision it may be a misspelt local path
        ("data/pairs.jsonl", None),
        ("name", None),
        ("../name", None),
        ("o/n@v1/../x", None),
        ("o/n@", None),
        ("o /n", None),
        ("./o/n", None),
    ],
)
def test_hub_ids(source, hub):
    assert parse_hub_id(source) == hub


def test_a_local_path_takes_precedence(tmp_path, monkeypatch, calls):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "o" / "n"
    file.parent.mkdir()
    file.write_text(ROW)
    assert locate(file) == file and locate("o/n") == Path("o/n") and locate("o") == Path("o")
    assert commit_of(file) is None
    with pytest.raises(InputError, match="is a local path: revision='v1' is for hub ids"):
        locate("o/n", "v1")
    assert not calls


def test_downloads(calls):
    data = ["*.jsonl", "*.json", "*.parquet", "*.jsonl.gz", "*.json.gz", "*.csv", "*.csv.gz"]
    found = locate("o/n")
    assert found.name == COMMIT and commit_of(found) == COMMIT
    assert locate("o/n", "v1") == locate("o/n@v1") == locate("o/n@v1", "v1") == found
    assert locate("o/n@v1/data") == found / "data" and commit_of(found / "data" / "pairs.jsonl") == COMMIT
    assert locate("o/n", kind="model", patterns=MODEL_FILES) == found
    assert [(ask["repo_type"], ask["revision"], ask["allow_patterns"]) for ask in calls] == [
        ("dataset", None, data),
        *[("dataset", "v1", data)] * 3,
        ("dataset", "v1", ["data", "data/*"]),
        ("model", None, list(MODEL_FILES)),
    ]
    assert {ask["repo"] for ask in calls} == {"o/n"}


def test_wrong_sources(calls, tmp_path):
    for source in ("data/pairs.jsonl", "a/b/c", str(tmp_path / "none")):
        with pytest.raises(InputError, match="is neither a file or folder nor a hub id"):
            locate(source)
    with pytest.raises(InputError, match="names revision 'v1', and revision='v2' is given"):
        locate("o/n@v1", "v2")
    assert not calls
    with pytest.raises(InputError, match=f"o/n has no 'data/other.jsonl' at {COMMIT}"):
        locate("o/n@v1/data/other.jsonl")


def test_a_model_is_a_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    for model in (tmp_path / "file", "no_such_model", "runs/no/model"):
        with pytest.raises(InputError, match="is neither a directory nor a hub id"):
            load(model)


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("it is not cached"), RuntimeError("the proxy said no")])
def test_a_failed_download_is_an_input_error(monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError) as caught:
        locate("o/n", "v9")
    message = str(caught.value)
    assert message.startswith(
        "dataset 'o/n' is not a local file or folder, and cannot be downloaded at revision 'v9': "
    )
    assert str(error) in message and "hf download o/n --repo-type dataset" in message


def test_the_cache_works_without_a_network(cache):
    for source, revision in (("o/n", None), ("o/n", "v1"), ("o/n@main", None), ("o/n", COMMIT)):
        assert locate(source, revision) == cache
    assert [pair.id for pair in read_pairs(locate("o/n"))] == ["1"]
    assert [pair.id for pair in read_pairs(locate("o/n@v1/data/train.jsonl"))] == ["1"]
    assert commit_of(locate("o/n@v1/data/train.jsonl")) == COMMIT  # a link to a blob, whose own place has no commit
    for source in ("o/other", "o/n@v2"):
        with pytest.raises(InputError, match=r"is not a local .*, and cannot be downloaded"):
            locate(source)
    with pytest.raises(InputError, match="model 'o/n' is not a local directory, and cannot be downloaded"):
        load("o/n")
