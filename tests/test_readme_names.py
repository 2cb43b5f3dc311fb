"""Commands, settings, options, links and paths on every README page exist (`test_readme.py` runs the examples)."""

import contextlib
import dataclasses
import fnmatch
import importlib
import importlib.util
import re
import sys
import typing
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks, inline_code, prose, shell_commands

import rmr1_jax
from rmr1_jax.cli import data, train
from rmr1_jax.cli import eval as evaluation
from rmr1_jax.cli import judge as judging
from rmr1_jax.cli import main as cli
from rmr1_jax.cli.data import Data
from rmr1_jax.cli.judge import Judge
from rmr1_jax.cli.options import ConfigCommand
from rmr1_jax.config import load_config
from rmr1_jax.data.chains.chains import ChainsConfig
from rmr1_jax.data.mix.mixture import MixtureConfig
from rmr1_jax.data.prepare import PrepareConfig
from rmr1_jax.errors import InputError
from rmr1_jax.plan.judging import judging_config
from rmr1_jax.plan.model import model_shape
from rmr1_jax.train.config import GrpoConfig, SftConfig

CONFIGS = {
    train.Sft: (SftConfig,),
    train.Grpo: (GrpoConfig,),
    data.Mix: (MixtureConfig,),
    data.Chains: (ChainsConfig,),
    data.Prepare: (PrepareConfig,),
}
ALL_CONFIGS = tuple(kind for kinds in CONFIGS.values() for kind in kinds)
MODULES = (cli, data, evaluation, judging, train)
OTHER_PROGRAMS = {
    "echo",
    "cat",
    "hf",
    "source",
    "git",
    "gzip",
    "gcloud",
    "kubectl",
    "sky",
    "sbatch",
    "xpk",
    "tar",
    "pip",
    "pngquant",
    "cd",
}
WRITTEN = {
    "checkpoints/",
    "published_rows/",
    "rewardbench/",
    "model/",
}  # folders of data or runs, not of the repository
FILES = [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if not {".git", "__pycache__"} & set(p.parts)]
every_page = pytest.mark.parametrize("name", PAGES)


# ---- commands and settings


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Parses the words of an `rmr1` command; settings are loaded, and nothing runs. Returns the config, if any."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    for page in PAGES.values():
        for block in blocks(page, "yaml"):
            if named := re.match(r"# (\S+\.yaml)\n", block):
                Path(named[1]).write_text(block)
    loaded: list = []

    def load(command: ConfigCommand) -> None:
        if getattr(command, "sampler_only", False) and command.config.suffix != ".yaml":
            model_shape(judging_config(command.config, command.overrides).model)
        elif not command.config.name.startswith("CONFIG"):  # a placeholder
            config = load_any(CONFIGS.get(type(command), (SftConfig, GrpoConfig)), command.config, command.overrides)
            loaded.append(config)

    for kind in [kind for module in MODULES for kind in vars(module).values() if hasattr(kind, "run")]:
        if kind is not Data:  # it runs the command below it
            monkeypatch.setattr(kind, "run", load if issubclass(kind, ConfigCommand) else lambda self: None)

    def parse(words: list[str]):
        loaded.clear()
        try:
            assert cli.main(words) == 0, words
        except SystemExit as left:
            assert left.code == 0 and "--help" in words, words
        return loaded[0] if loaded else None

    return parse


def load_any(kinds: tuple[type, ...], path: Path, overrides: tuple[str, ...] = ()):
    """The settings as the first kind that accepts them; the last error where none does."""
    for kind in kinds[:-1]:
        with contextlib.suppress(InputError):
            return load_config(kind, path, overrides)
    return load_config(kinds[-1], path, overrides)


@pytest.fixture
def bench(monkeypatch):
    """scripts/bench.py as a module whose commands are parsed but not run."""
    spec = importlib.util.spec_from_file_location("readme_bench", ROOT / "scripts" / "bench.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "readme_bench", module)
    spec.loader.exec_module(module)
    for command in (module.Sample, module.Steps, module.Train, module.GrpoUpdate):
        monkeypatch.setattr(command, "run", lambda self: None)
    return module


@every_page
def test_commands_parse(name, parse, bench):
    for program, *words in shell_commands(PAGES[name]):
        if program.endswith("rmr1"):
            parse(words)
        elif "/" in program or program in ("bash", "python"):
            paths = [w.removeprefix("rmr1/") for w in (program, *words) if not w.startswith("-")]
            script = next((path for path in paths if "/" in path and not path.startswith(".venv")), None)
            assert script is None or (ROOT / script).is_file(), (program, *words)
            if "scripts/quickstart" in words:
                parse(["quickstart", *words[1:]])
            elif words[:1] == ["scripts/bench.py"]:
                assert bench.main(words[1:]) == 0, words
        else:
            assert program in OTHER_PROGRAMS, (program, *words)


def test_the_written_out_recipes_are_the_paper_s(parse):
    """The YAML blocks of the GRPO recipe are the defaults."""
    page = next(page for page in PAGES.values() if any("# grpo_7b.yaml" in b for b in blocks(page, "yaml")))
    settings = [parse(words) for program, *words in shell_commands(page) if words[:1] in (["sft"], ["grpo"])]
    recipes = {config.out: config for config in settings if config}
    assert recipes["runs/grpo-7b"] == GrpoConfig(model="runs/sft-7b/model", data="rlvr", out="runs/grpo-7b")
    assert recipes["runs/sft-7b"].optimizer.lr == 5e-6 and recipes["runs/sft-7b"].row_length == 12288
    assert recipes["runs/dapo-7b"].loss.clip_high == 0.28


@every_page
def test_settings_in_yaml_blocks_load(name, tmp_path):
    for block in blocks(PAGES[name], "yaml"):
        path = tmp_path / "block.yaml"
        path.write_text(block)
        load_any(ALL_CONFIGS, path)


def known(kind: type, keys: list[str]) -> bool:
    """Whether a dotted key is a setting of a config class."""
    hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    if not keys or keys[0] not in hints:
        return not keys
    options = [hints[keys[0]], *typing.get_args(hints[keys[0]])]
    options += [option for each in options for option in typing.get_args(each)]
    return len(keys) == 1 or keys[1].isdecimal() or any(known(option, keys[1:]) for option in options)


@every_page
def test_settings_in_the_text_exist(name):
    """`optimizer.lr=1e-5` and the like are settings of some command, or arguments in the code beside the page."""
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / name).parent.glob("*.py"))
    for code in inline_code(PAGES[name]):
        for key in re.findall(r"(?:^| )([a-z][a-z_0-9]*(?:\.[a-z_0-9]+)*)=(?=[^=\s])", "" if "(" in code else code):
            is_setting = any(known(kind, key.split(".")) for kind in ALL_CONFIGS)
            assert is_setting or re.search(rf"\b{re.escape(key)}: ", source), code


@every_page
def test_commands_named_in_the_text_exist(name, capsys):
    for code in inline_code(PAGES[name]):
        if found := re.match(r"rmr1((?: [a-z][a-z-]*)+)", code):
            words = found[1].split()
            depth = 2 if words[0] == "data" else 1
            with pytest.raises(SystemExit) as left:
                cli.main([*words[:depth], "--help"])
            assert left.value.code == 0, code
            help_text = capsys.readouterr().out
            assert f"usage: rmr1 {' '.join(words[:depth])} " in help_text, code
            assert all(option in help_text for option in re.findall(r"--[a-z-]+", code)), code


def options_of_all_commands(capsys) -> set[str]:
    options: set[str] = set()
    commands = [[name] for name in ("quickstart", "sft", "grpo", "plan", "judge", "eval", "score", "compare", "export")]
    commands += [["report"], *(["data", name] for name in ("mix", "chains", "prepare", "show", "prompt"))]
    for command in commands:
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        options |= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    return options


def test_options_in_tables_exist(capsys):
    options = options_of_all_commands(capsys)
    for name, page in PAGES.items():
        for line in page.splitlines():
            if line.startswith("| `--"):
                assert set(re.findall(r"`(--[a-z-]+)", line)) <= options, (name, line)


def test_one_page_shows_every_option_of_the_judge():
    options = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Judge)}
    options.remove("--texts")  # the question and the answers, which have no name on the command line
    assert any(options <= set(re.findall(r"--[a-z-]+", page)) for page in PAGES.values())


# ---- paths and links


def anchors(page: str) -> set[str]:
    titles = [re.sub(r"[^\w -]", "", title) for title in re.findall(r"^#+ (.*)", prose(page), re.M)]
    return {title.lower().replace(" ", "-") for title in titles}


@every_page
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[name])):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@every_page
def test_files_named_in_the_text_exist(name):
    """`sft.py`, `train/sft.py`, `configs/chains.yaml`, `rmr1_jax/pairs/` and the like, somewhere in the repository."""
    for code in inline_code(PAGES[name]):
        for path in re.findall(r"(?<![\w/.*-])[\w./*-]+(?:\.(?:py|j2|sh|ipynb|sbatch)|/)(?![\w/*.])", code):
            if path in WRITTEN or path.startswith(("/", "..", "runs/", ".venv")):
                continue
            assert any(matches(file, path.rstrip("/")) for file in FILES), (code, path)
        if re.fullmatch(r"configs/[\w.*-]+\.yaml", code):
            assert any(fnmatch.fnmatch(file, code) for file in FILES), code


def matches(file: str, path: str) -> bool:
    return fnmatch.fnmatch(file, path) or fnmatch.fnmatch(file, f"*/{path}")


@every_page
def test_modules_and_names_in_the_text_exist(name):
    """`rmr1_jax.train.sft`, `rmr1.load` and the like."""
    for code in inline_code(PAGES[name]):
        if found := re.match(r"(rmr1_jax|rmr1)((?:\.\w+)+)", code):
            value = rmr1_jax
            for part in found[2][1:].split("."):
                with contextlib.suppress(ModuleNotFoundError):
                    importlib.import_module(f"{value.__name__}.{part}") if hasattr(value, "__path__") else None
                assert hasattr(value, part), code
                value = getattr(value, part)


@pytest.mark.parametrize("name", [name for name in PAGES if name not in ("README.md", "tests/README.md")])
def test_a_page_names_every_file_beside_it(name):
    """With `*` for several, and templates or folders within as the page likes."""
    folder = (ROOT / name).parent
    named = {code.rsplit("/", 1)[-1] for code in inline_code(PAGES[name])} | set(inline_code(PAGES[name]))
    for file in folder.iterdir():
        if file.is_file() and file.name not in ("README.md", "__init__.py"):
            assert any(fnmatch.fnmatch(file.name, pattern) for pattern in named), file.name
