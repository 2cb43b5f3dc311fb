"""Seeded damage to files, to their bytes and to their JSON values. Shared by the fuzz tests."""

import copy
import json
import random

BOMB = "[" * 100_000
HUGE = (2**31, 2**63, -(2**63), 10**30, 10**400, 1e308, 1e-320, float("nan"), float("inf"), -float("inf"))
WEIRD = (None, True, False, 0, -1, 1, 2, 0.5, -0.5, "", "x", "\ud800", "\x00", "a" * 5000, [], {}, [0], [[]], {"a": 1})
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3554214621\n"
ELSE = (b"", b"\x00" * 64, LFS, b"<!DOCTYPE html><html></html>", b"PK\x03\x04" + b"0" * 64, b"\x80\x02}q\x00.", b"null")


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Damage bytes: flipped bits, a cut, a piece lost, doubled or overwritten, or something else altogether."""
    kind = rng.choice(["flip", "flip", "flip", "cut", "lose", "double", "noise", "insert", "else"])
    at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 3, 16, 200])
    if kind == "flip":
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            if damaged:
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        return bytes(damaged)
    if kind == "else":
        return rng.choice(ELSE)
    noise = rng.randbytes(length)
    return {
        "cut": data[:at],
        "lose": data[:at] + data[at + length :],
        "double": data[: at + length] + data[at:],
        "noise": data[:at] + noise + data[at + length :],
        "insert": data[:at] + rng.choice([noise, b'"', b"}", b"\n", b"\xff", b"\x00", b",", BOMB.encode()]) + data[at:],
    }[kind]


def mutate_value(rng: random.Random, value: object, odd: tuple = ()) -> object:
    """Replace, remove, add, move or double one place in a copy of the JSON value. odd: more values to put in."""
    value = copy.deepcopy(value)
    holders = [(holder, key) for holder, key in _places(value)]
    if not holders:
        return rng.choice(WEIRD)
    holder, key = rng.choice(holders)
    kind = rng.choice(["replace", "replace", "replace", "huge", "remove", "add", "wrap", "retype", "swap"])
    old = holder[key]
    if kind == "replace":
        holder[key] = rng.choice([*WEIRD, *odd])
    elif kind == "huge":
        holder[key] = rng.choice(HUGE)
    elif kind == "remove":
        del holder[key]
    elif kind == "add":
        new = rng.choice([*WEIRD, *odd])
        holder.update({rng.choice(["", "x", "\u202e", "__class__"]): new}) if isinstance(
            holder, dict
        ) else holder.insert(rng.randrange(len(holder) + 1), new)
    elif kind == "wrap":
        holder[key] = rng.choice([[old], {"value": old}, [old, old]])
    elif kind == "retype":
        holder[key] = str(old) if not isinstance(old, str) else rng.choice([[old], len(old), ascii(old), old + "x"])
    else:
        other_holder, other_key = rng.choice(holders)
        if not _holds(old, other_holder) and not _holds(other_holder[other_key], holder):
            holder[key], other_holder[other_key] = other_holder[other_key], old
    return value


def mutate_json(rng: random.Random, value: object, odd: tuple = ()) -> bytes:
    """Make a JSON text with one to three such changes, sometimes with a repeated key or nested very deep."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = mutate_value(rng, value, odd)
    text = json.dumps(value)
    kind = rng.choice(["as it is"] * 8 + ["twice", "bomb"])
    if kind == "twice" and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        text = "{" + f"{json.dumps(key)}: {json.dumps(rng.choice(WEIRD))}, " + text[1:]
    if kind == "bomb" and isinstance(value, dict):
        text = "{" + f'"x": {BOMB}, ' + text[1:]
    return text.encode("utf-8", "surrogatepass")


def _places(value: object):
    """Yield every (holder, key) in a JSON value."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _holds(value: object, holder: object) -> bool:
    return value is holder or any(inner[key] is holder for inner, key in _places(value))
