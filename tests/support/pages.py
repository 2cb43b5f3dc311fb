"""The README pages of the repository, and their parts that can be checked: code blocks, commands, inline code."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("README.md", "rmr1_jax/*/README.md", "configs/README.md", "scripts/README.md", "tests/README.md")
PAGES = {p.relative_to(ROOT).as_posix(): p.read_text("utf-8") for n in (*NAMES, "tpu/README.md") for p in ROOT.glob(n)}
REDIRECTIONS = (">", ">>", "<", "<<")
SEPARATORS = ("&&", "||", "|", ";", "&", *REDIRECTIONS)


def blocks(page: str, *languages: str) -> list[str]:
    """The fenced blocks of a page in any of the languages, in order."""
    return [text for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S) if language in languages]


def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", page, flags=re.M | re.S)


def inline_code(page: str) -> list[str]:
    return [code.replace("\n", " ") for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def documented(file: str, word: str = "") -> list[set[str]]:
    """For every bullet, on any page, that begins with this file and contains this word: its words in backticks."""
    bullets = [b for page in PAGES.values() for b in re.findall(r"^- (.*(?:\n  .*)*)", prose(page), re.M)]
    return [set(re.findall(r"`(\w+)`", b)) for b in bullets if b.startswith(f"`{file}`") and word in b]


def commands(line: str) -> Iterator[list[str]]:
    """The simple commands of a shell line, without variables and redirections; commands in quotes are included."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    is_file = False  # of a redirection
    for word in [*lexer, ";"]:
        if word not in SEPARATORS:
            words += [] if is_file else [word]
            is_file = False
            if " " in word and re.search(r"\brmr1 |\bpython ", word):
                yield from commands(re.sub(r"^--[\w-]+=", "", word))
        elif word in REDIRECTIONS:
            is_file = True
        else:
            while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):  # environment variables
                words.pop(0)
            if words:
                yield words
            words = []


def shell_commands(page: str) -> list[list[str]]:
    """Every simple command in the shell blocks of a page, and every inline `bash ...`."""
    scripts = [re.sub(r"(<<'?(\w+)'?\n).*?^\2$", r"\1", b, flags=re.M | re.S) for b in blocks(page, "bash", "sh")]
    lines = [line for script in scripts for line in script.replace("\\\n", " ").splitlines()]  # without here-documents
    lines += [code for code in inline_code(page) if code.startswith("bash ")]
    return [words for line in lines for words in commands(line)]
