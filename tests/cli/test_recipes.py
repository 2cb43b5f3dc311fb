"""`rmr1 config`: the recipes of `configs/`, listed, printed, taken by name, and packaged."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rmr1_jax.cli import main as cli
from rmr1_jax.cli import recipes as module
from rmr1_jax.cli.train import Sft

ROOT = Path(__file__).parents[2]


def test_all_recipes_are_listed_with_a_line_about_each(capsys):
    assert cli.main(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert "RM-R1's first stage: one epoch of 8.7k traces, about 80 steps" in next(
        x for x in lines if "sft_qwen2.5_7b " in x
    )
    assert all(len(line.split()) > 4 and len(line) < 150 for line in lines)


@pytest.mark.parametrize("name", ["chains", "chains.yaml", "configs/chains.yaml"])
def test_a_recipe_is_printed_as_it_is(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["config", name]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "chains.yaml").read_text()


def test_an_unknown_recipe_names_the_nearest_one(capsys):
    assert cli.main(["config", "sft_qwen2.5_8b"]) == 2
    assert "no such recipe; did you mean the recipe sft_qwen2.5_7b?" in capsys.readouterr().err


def test_a_stage_takes_a_recipe_by_name_but_a_file_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Sft(config=Path("sft_qwen2.5_7b"), overrides=("seed=3",)).load().model == "Qwen/Qwen2.5-7B-Instruct"
    assert Sft(config=Path("configs/sft_qwen2.5_7b.yaml")).load().micro_rows == 16
    Path("sft_qwen2.5_7b").write_text("out: mine\n")
    assert Sft(config=Path("sft_qwen2.5_7b")).load().out == "mine"


def test_a_missing_file_says_where_recipes_are(tmp_path, capsys):
    assert cli.main(["sft", str(tmp_path / "run.yaml")]) == 2
    assert "cannot read the config" in (err := capsys.readouterr().err) and "`rmr1 config` lists" in err


def test_installed_recipes_are_those_of_the_distribution(tmp_path, monkeypatch):
    """As after `pip install`: no checkout around the package; the files are those that the wheel's record lists."""
    site, share = tmp_path / "lib" / "site-packages", tmp_path / "share" / "rmr1_jax" / "configs"
    (site / "rmr1_jax-0.1.0.dist-info").mkdir(parents=True)
    share.mkdir(parents=True)
    (share / "mine.yaml").write_text("# rmr1 sft mine\n# A run of mine.\nout: x\n")
    (site / "rmr1_jax-0.1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: rmr1-jax\nVersion: 0.1.0\n"
    )
    record = "../../share/rmr1_jax/configs/mine.yaml,,\nrmr1_jax/cli/recipes.py,,\n"
    (site / "rmr1_jax-0.1.0.dist-info" / "RECORD").write_text(record)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(module, "__file__", str(site / "rmr1_jax" / "cli" / "recipes.py"))
    assert {name: path.read_text()[:15] for name, path in module.recipes().items()} == {"mine": "# rmr1 sft mine"}


def test_the_wheel_carries_every_recipe(tmp_path):
    source, code = tmp_path / "source", f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "configs", "rmr1_jax"):
        (source / name).symlink_to(ROOT / name)
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = [name.partition(".data/data/share/rmr1_jax/configs/")[2] for name in zipfile.ZipFile(wheel).namelist()]
    assert sorted(filter(None, packed)) == sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
