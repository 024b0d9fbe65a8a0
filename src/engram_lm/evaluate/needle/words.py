"""What is hidden and asked for: words, numbers, codes, names. All of one draw are different."""

from __future__ import annotations

import math
import string
import uuid

import numpy as np

ADJECTIVES = (
    "amber ancient bitter blue bold brave brief bright brisk broken calm careful clever cold coral crisp curious dark dusty "
    "eager early empty faint fierce fine fond foggy fresh frosty gentle giant golden grand green grey happy heavy hidden "
    "hollow honest humble icy jolly keen kind late lazy lively lonely loud lucky mellow mild modest narrow noble odd pale "
    "patient plain polite proud purple quick quiet rapid rare red rough round rusty salty scarlet shy silent silver simple "
    "sleepy slow smooth soft solemn spare steady stern still sturdy sudden tall tender tidy timid vivid warm wild wise young"
).split()
NOUNS = (
    "anchor apple arrow badge barrel basin beacon bell bicycle blanket bottle branch bridge brush bucket button cabin camel "
    "candle canyon carpet castle cedar chapel cherry chimney circle cloud comet compass copper cottage cradle crane crystal "
    "curtain desert dolphin drum eagle engine falcon feather ferry fiddle forest fountain garden glacier glove hammer harbour "
    "hazel helmet heron hill island jacket kettle kitten ladder lagoon lantern lemon library lizard magnet maple marble "
    "meadow mirror mountain needle nutmeg oak orchard otter paddle palace pebble pencil piano pigeon pillow planet pocket "
    "quarry rabbit ribbon river rocket saddle sailor shelter shovel sparrow spoon summit teapot temple thimble tower tunnel "
    "turnip valley violin wagon walnut whistle willow window"
).split()

CONSONANTS, VOWELS = "bdfghjklmnprstvwz", "aeiou"
SYLLABLES = len(CONSONANTS) * len(VOWELS)


def words(rng: np.random.Generator, count: int) -> list[str]:
    """`humble-otter`; with a further adjective in front where `count` is more than there are pairs."""
    parts = [ADJECTIVES, NOUNS]
    while math.prod(map(len, parts)) < count:
        parts.insert(0, ADJECTIVES)
    sizes = tuple(map(len, parts))
    chosen = np.unravel_index(rng.choice(math.prod(sizes), count, replace=False), sizes)
    return ["-".join(part[i] for part, i in zip(parts, places, strict=True)) for places in zip(*chosen, strict=True)]


def numbers(rng: np.random.Generator, count: int) -> list[str]:
    """Seven digits, the first of them not 0."""
    return [str(10**6 + n) for n in rng.choice(9 * 10**6, count, replace=False).tolist()]


def uuids(rng: np.random.Generator, count: int) -> list[str]:
    """Random UUIDs (version 4)."""
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]


def invented(rng: np.random.Generator, count: int) -> list[str]:
    """`bako`: words of two syllables, or more where there are not enough; equally long, so that none contains another."""
    syllables = 2
    while SYLLABLES**syllables < count:
        syllables += 1
    chosen = rng.choice(SYLLABLES**syllables, count, replace=False)
    places = np.unravel_index(chosen, (SYLLABLES,) * syllables)
    return ["".join(CONSONANTS[i // 5] + VOWELS[i % 5] for i in word) for word in zip(*places, strict=True)]


def letters(rng: np.random.Generator, count: int, length: int, alphabet: str = string.ascii_lowercase) -> list[str]:
    """Random strings of `length` letters; a larger `count` begins with the same ones."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(alphabet[i] for i in rng.integers(len(alphabet), size=length))] = None
    return list(found)
