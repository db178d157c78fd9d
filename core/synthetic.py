"""The embedded catalogue: MovieLens-shaped ratings whose titles say what is watched next; seeded, nothing downloaded.

A title is an adjective, a noun, an ordinal and a year: "Quiet Harbor III (1987)". The noun belongs to a genre, the
adjective to a mood. After an item of genre g and mood m the next item comes, with probability `FOLLOWS`, from genre
(g + SHIFT[m]) mod G; otherwise from any genre. Inside a genre popularity is long-tailed. A model that reads the words
learns G genres and M moods; a model of item ids has to learn every item for itself, and most items are rare.
"""

import numpy as np
import pandas as pd

from core.settings import DataSettings

MOODS = (
    "Quiet Silent Still Gentle",
    "Crimson Scarlet Burning Blazing",
    "Frozen Winter Glacial Northern",
    "Hidden Secret Forgotten Buried",
    "Broken Shattered Fallen Ruined",
    "Golden Shining Gilded Radiant",
    "Restless Wandering Drifting Roaming",
    "Savage Wild Feral Untamed",
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
SHIFT = (1, 3, 4, 7, 9, 12, 16, 19)
"""Genres ahead for each mood; distinct, so that both words are needed."""
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
    genre, mood, titles = _catalogue(shape.items, random)
    by_genre = [np.flatnonzero(genre == g) for g in range(len(GENRES))]
    shares = [_popularity(len(members), random) for members in by_genre]
    lengths = np.clip(
        random.lognormal(np.log(shape.mean_length) - 0.18, 0.6, shape.users).astype(int),
        5,
        max(5, shape.items // 4),
    )
    users, items = [], []
    for user, length in enumerate(lengths):
        users.append(np.full(length, user + 1))
        items.append(_walk(length, genre, mood, by_genre, shares, random))
    interactions = pd.DataFrame({"user": np.concatenate(users), "item": np.concatenate(items) + 1})
    interactions["time"] = np.arange(len(interactions))
    return interactions, pd.DataFrame({"item": np.arange(1, shape.items + 1), "title": titles})


def _catalogue(items: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Genre, mood and title of each item; titles repeat only as numbered sequels."""
    genre = random.permutation(np.arange(items) % len(GENRES))
    mood = random.integers(len(MOODS), size=items)
    seen: dict[str, int] = {}
    titles = []
    for g, m in zip(genre, mood, strict=True):
        name = f"{random.choice(MOODS[m].split())} {random.choice(GENRES[g].split())}"
        part = seen.get(name, 0)
        seen[name] = part + 1
        ordinal = NUMERALS[part] if part < len(NUMERALS) else f" {part + 1}"
        titles.append(f"{name}{ordinal} ({random.integers(1930, 2001)})")
    return genre, mood, titles


def _popularity(members: int, random: np.random.Generator) -> np.ndarray:
    """Long-tailed shares in random order, summing to 1."""
    weights = 1.0 / np.arange(1, members + 1) ** POPULARITY
    return random.permutation(weights / weights.sum())


def _walk(length, genre, mood, by_genre, shares, random) -> np.ndarray:
    """One user's items: genres follow the words of the item before, no item twice."""
    seen: set[int] = set()
    walk = np.empty(length, dtype=np.int64)
    g = int(random.integers(len(GENRES)))
    for step in range(length):
        if step:
            last = walk[step - 1]
            follows = random.random() < FOLLOWS
            g = int(
                (genre[last] + SHIFT[mood[last]]) % len(GENRES)
                if follows
                else random.integers(len(GENRES))
            )
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
