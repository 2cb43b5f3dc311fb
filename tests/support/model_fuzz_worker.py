"""Loads damaged model directories in a process of its own, with a bound on its memory; run by test_fuzz_model.py.

python tests/model_fuzz_worker.py WORK_DIR CASES SEED   ->   one line of JSON
"""

import collections
import dataclasses
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import jax
import numpy as np
from mutate import ELSE, mutate_bytes, mutate_json

from rmr1_jax.errors import InputError
from rmr1_jax.model.config import SIZES, QwenConfig
from rmr1_jax.model.hf import save_params
from rmr1_jax.model.qwen import module_for
from rmr1_jax.model.rope import rope_inverse_frequencies
from rmr1_jax.policy import fresh_policy, load
from rmr1_jax.quickstart.tokenizer import train_tokenizer
from rmr1_jax.quickstart.world import world_texts

SECONDS = 20  # for one directory; a sound one takes a fraction of one
ROOM = 2 * 2**30  # address space beyond what the warm process has
CHECKED = (*SIZES.values(), "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
HEADER_ODD = ([0, 2**40], [-64, 0], [2**63, 2**64], "F64", "I8", [10**12, 10**12], [0, 0])
INDEX_ODD = ("../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "model.bin", "\x00.safetensors")


def make_directories(root: Path) -> list[Path]:
    """A tied Qwen2 in one file and a Qwen3 in shards, both with a tokenizer and a generation config."""
    tokenizer = train_tokenizer(world_texts(50), root / "tokenizer", vocab_size=400)
    small = {"vocab_size": 512, "hidden_size": 8, "intermediate_size": 12, "num_layers": 2, "num_heads": 2}
    small |= {"num_kv_heads": 1, "head_dim": 4, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_position_embeddings": 64}
    made = []
    for name, shard_bytes in (("qwen2", 10**9), ("qwen3", 8_000)):
        kind = {"model_type": name, "qkv_bias": name == "qwen2", "qk_norm": name == "qwen3"}
        config = QwenConfig(**small, **kind, tie_word_embeddings=name == "qwen2")
        policy, path = fresh_policy(config, tokenizer, seed=0), root / name
        policy.save(path)
        save_params(path, module_for(config), policy.params, dtype="float32", max_shard_bytes=shard_bytes)
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "temperature": 0.7}))
        made.append(path)
    return made


def damage(rng: random.Random, path: Path) -> tuple[str, bool]:
    """Damages one file of the directory; returns what was done, and whether a tensor's bytes may have changed."""
    names = sorted(file.name for file in path.iterdir())
    weights = [name for name in names if name.endswith(".safetensors")]
    index = [name for name in names if name.endswith(".index.json")]
    kind = rng.choice(
        ["config"] * 6 + ["header"] * 5 + ["weights"] * 4 + ["tokenizer", "side", "side", "link", "bytes"]
    )
    if kind == "config" and index and rng.random() < 0.4:
        kind, name = "index", index[0]
        content = mutate_json(rng, json.loads((path / name).read_bytes()), INDEX_ODD)
    elif kind == "config":
        name = "config.json"
        content = mutate_json(rng, json.loads((path / name).read_bytes()))
    elif kind == "header":
        name = rng.choice(weights)
        content = _damaged_header(rng, (path / name).read_bytes())
    elif kind == "weights":
        name = rng.choice(weights)
        whole = (path / name).read_bytes()
        content = mutate_bytes(rng, whole)
        head = 8 + int.from_bytes(whole[:8], "little")
        (path / name).write_bytes(content)
        return f"weights {name}", content[:head] == whole[:head]
    elif kind == "tokenizer":
        name = "tokenizer.json"
        content = mutate_json(rng, json.loads((path / name).read_bytes()))
    elif kind == "side":
        name = rng.choice(["tokenizer_config.json", "generation_config.json"])
        content = mutate_json(rng, json.loads((path / name).read_bytes()))
    elif kind == "bytes":
        name = rng.choice([name for name in names if name not in weights])
        content = mutate_bytes(rng, (path / name).read_bytes())
    else:
        name = rng.choice(names)
        return f"{_link(rng, path / name)} {name}", name in weights
    (path / name).write_bytes(content)
    return f"{kind} {name}", False


def _damaged_header(rng: random.Random, whole: bytes) -> bytes:
    length = int.from_bytes(whole[:8], "little")
    text, data = whole[8 : 8 + length], whole[8 + length :]
    if rng.random() < 0.25:  # the length alone
        claimed = rng.choice([0, 1, length - 1, length + 1, len(whole), 10**8, 10**12, 2**63, 2**64 - 1])
        return claimed.to_bytes(8, "little") + text + data
    if rng.random() < 0.7:
        header = json.loads(text)
        names = sorted(header)
        if rng.random() < 0.3:  # another tensor's place, twice
            header[rng.choice(names)] = header[rng.choice(names)]
        text = mutate_json(rng, header, HEADER_ODD)
    else:
        text = mutate_bytes(rng, text)
    return len(text).to_bytes(8, "little") + text + data


def _link(rng: random.Random, file: Path) -> str:
    kind = rng.choice(
        ["gone", "directory", "pipe", "link out", "link to /dev/zero", "loop", "link inside", "else", "sparse"]
    )
    whole = file.read_bytes()
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "link out":
        outside = file.parent.parent / f"outside-{file.name}"
        outside.write_bytes(whole)
        file.symlink_to(rng.choice([outside, Path("..") / outside.name]))
    elif kind == "link to /dev/zero":
        file.symlink_to("/dev/zero")
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "link inside":
        (file.parent / "kept").write_bytes(whole)
        file.symlink_to("kept")
    elif kind == "else":
        file.write_bytes(rng.choice(ELSE))
    elif kind == "sparse":  # a terabyte that takes no room on the disk
        with file.open("wb") as out:
            out.write(whole)
            out.truncate(2**40)
    return kind


def check(path: Path, weights: dict, exact: bool) -> str | None:
    """What is wrong with what was loaded; None for a right load."""
    policy = load(path, "float32")
    raw = json.loads((path / "config.json").read_bytes())
    ours = dataclasses.asdict(policy.config)
    ours |= {"num_hidden_layers": policy.config.num_layers, "num_attention_heads": policy.config.num_heads}
    ours |= {"num_key_value_heads": policy.config.num_kv_heads}
    for name in CHECKED:
        if raw.get(name) is not None and raw[name] != ours[name]:
            return f"{name} is {raw[name]} in the file and {ours[name]} in the policy"
    rope_inverse_frequencies(policy.config)
    if exact and not jax.tree.all(jax.tree.map(np.array_equal, policy.params, weights)):
        return "other weights"
    ids = policy.tokenizer.render([{"role": "user", "content": "What is 2 + 3? <|im_end|>"}])
    policy.tokenizer.decode(ids)
    return None


def main(root: Path, cases: int, seed: int) -> dict:
    bases = make_directories(root)
    sound = [jax.tree.map(np.asarray, load(base, "float32").params) for base in bases]
    for base, weights in zip(bases, sound, strict=True):
        assert check(base, weights, True) is None
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + ROOM, pages + ROOM))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"more than {SECONDS} s")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts, bad, slowest = collections.Counter(), [], 0.0
    for case in range(cases):
        rng, which = random.Random(f"{seed}/{case}"), case % 2
        path = root / f"case-{case}" / "model"
        shutil.copytree(bases[which], path)
        done, payload = damage(rng, path)
        (root / "last").write_text(f"{case}: {done}")
        start = time.monotonic()
        signal.alarm(SECONDS)
        try:
            wrong = check(path, sound[which], not payload)
            counts["loaded"] += 1
        except InputError as error:
            wrong = None if str(path) in str(error) else f"the error does not say where: {error}"
            counts["refused"] += 1
            counts[f"refused {done.split()[0]}"] += 1
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)[-6:]
            places = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
            wrong = f"{type(error).__name__}: {error} ({places})"
        signal.alarm(0)
        slowest = max(slowest, time.monotonic() - start)
        if wrong:
            bad.append(f"case {case} ({done}): {wrong[:600]}")
        shutil.rmtree(path.parent)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"counts": counts, "bad": bad, "slowest": slowest, "grown": grown}


if __name__ == "__main__":
    faulthandler.enable()
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
