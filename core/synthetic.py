"""The embedded catalogue: MovieLens-shaped ratings whose titles say what is watched next; seeded,
nothing downloaded.

A title is an adjective, a noun, an ordinal and a year: "Quiet Harbor III (1987)". The noun tells
the genre. After an item of genre g the next one comes, with probability `FOLLOWS`, from the genre
five places on in the list; otherwise from any. Inside a genre popularity is long-tailed. A model
that reads titles learns two dozen genres from a few dozen nouns; a model of item ids has to learn
every item for itself, and most items are rare.
"""

import numpy as np
import pandas as pd

from core.settings import DataSettings

ADJECTIVES = (
    "Quiet Silent Gentle Crimson Scarlet Burning Frozen Winter Northern Hidden Secret Forgotten "
    "Broken Shattered Fallen Golden Shining Radiant Restless Wandering Drifting Savage Wild Untamed"
)
GENRES = (
    "Harbor Lighthouse Pier",
    "Detective Inspector Witness",
    "Kingdom Castle Throne",
    "Orchard Meadow Garden",
    "Comet Planet Nebula",
    "Violin Sonata Orchestra",
    "Saloon Sheriff Stagecoach",
    "Phantom Ghost Seance",
    "Surgeon Hospital Ward",
    "Regiment Trench Cavalry",
    "Pirate Galleon Corsair",
    "Campus Professor Classroom",
    "Robot Android Circuit",
    "Wedding Bride Honeymoon",
    "Heist Vault Safecracker",
    "Jungle Expedition Temple",
    "Courtroom Verdict Attorney",
    "Circus Acrobat Trapeze",
    "Railway Locomotive Station",
    "Kitchen Chef Banquet",
    "Wolf Panther Falcon",
    "Boxer Champion Stadium",
    "Senator Election Embassy",
    "Dragon Wizard Spellbook",
)
AHEAD = 5
"""Places in `GENRES` from a genre to the one that follows it."""
FOLLOWS = 0.8
POPULARITY = 0.9
"""Exponent of the popularity law inside a genre."""
NUMERALS = ("", " II", " III", " IV", " V", " VI", " VII", " VIII")


def ratings(settings: DataSettings) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Draw the catalogue: interactions (user, item, time; in order) and items (item, title).

    Items no user watched are absent, as in real rating files. Equal settings give equal tables.
    """
    shape = settings.synthetic
    random = np.random.default_rng([settings.seed, 7])
    genre, titles = _catalogue(shape.items, random)
    by_genre = [np.flatnonzero(genre == g) for g in range(len(GENRES))]
    shares = [_popularity(len(members), random) for members in by_genre]
    longest = min(shape.items, max(5, shape.items // 4))  # nobody watches an item twice
    lengths = np.clip(
        random.lognormal(np.log(shape.mean_length) - 0.18, 0.6, shape.users).astype(int),
        min(5, longest),
        longest,
    )
    users, items = [], []
    for user, length in enumerate(lengths):
        users.append(np.full(length, user + 1))
        items.append(_walk(length, genre, by_genre, shares, random))
    interactions = pd.DataFrame({"user": np.concatenate(users), "item": np.concatenate(items) + 1})
    interactions["time"] = np.arange(len(interactions))
    return interactions, pd.DataFrame({"item": np.arange(1, shape.items + 1), "title": titles})


def _catalogue(items: int, random: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Genre and title of each item; titles repeat only as numbered sequels."""
    genre = random.permutation(np.arange(items) % len(GENRES))
    seen: dict[str, int] = {}
    titles = []
    for g in genre:
        name = f"{random.choice(ADJECTIVES.split())} {random.choice(GENRES[g].split())}"
        part = seen.get(name, 0)
        seen[name] = part + 1
        ordinal = NUMERALS[part] if part < len(NUMERALS) else f" {part + 1}"
        titles.append(f"{name}{ordinal} ({random.integers(1930, 2001)})")
    return genre, titles


def _popularity(members: int, random: np.random.Generator) -> np.ndarray:
    """Long-tailed shares in random order, summing to 1."""
    weights = 1.0 / np.arange(1, members + 1) ** POPULARITY
    return random.permutation(weights / weights.sum())


def _walk(length, genre, by_genre, shares, random) -> np.ndarray:
    """One user's items: each genre follows from the item before, no item twice."""
    seen: set[int] = set()
    walk = np.empty(length, dtype=np.int64)
    g = int(random.integers(len(GENRES)))
    for step in range(length):
        if step:
            follows = random.random() < FOLLOWS
            ahead = AHEAD if follows else random.integers(len(GENRES))
            g = int((genre[walk[step - 1]] + ahead) % len(GENRES))
        walk[step] = _unseen(by_genre, shares, g, seen, random)
        seen.add(int(walk[step]))
    return walk


def _unseen(by_genre, shares, g, seen, random) -> int:
    """An item of genre g not watched yet; of the next genre when all of them were."""
    while True:
        for _ in range(20):
            item = int(random.choice(by_genre[g], p=shares[g])) if len(by_genre[g]) else -1
            if item >= 0 and item not in seen:
                return item
        g = (g + 1) % len(GENRES)
