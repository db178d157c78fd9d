"""The embedded catalogue: seeded, long-tailed, no repeats, words that foretell the next genre."""

import itertools
import re

import numpy as np
import pytest
from scipy import stats

from core import data, synthetic
from core.settings import DataSettings, SyntheticSettings

TITLE = re.compile(r"(\w+) (\w+)( [IVX]+| \d+)? \((19[3-9]\d|2000)\)")


def draw(users: int = 400, items: int = 300, mean_length: float = 16, seed: int = 0):
    shape = SyntheticSettings(users=users, items=items, mean_length=mean_length)
    return synthetic.ratings(DataSettings(synthetic=shape, seed=seed))


@pytest.fixture(scope="module")
def drawn():
    return draw()


def genre_of(title: str) -> int:
    """Genre of a title, by its noun alone."""
    noun = TITLE.fullmatch(title).group(2)
    return next(g for g, words in enumerate(synthetic.GENRES) if noun in words.split())


def steps(drawn) -> np.ndarray:
    """Genre of an item and of the item watched after it, (steps, 2)."""
    interactions, items = drawn
    known = dict(zip(items["item"], map(genre_of, items["title"]), strict=True))
    found = []
    for _, own in interactions.groupby("user")["item"]:
        watched = [known[item] for item in own]
        found += itertools.pairwise(watched)
    return np.array(found)


def test_equal_settings_give_equal_tables_and_seeds_differ(drawn):
    again = draw()
    assert all(a.equals(b) for a, b in zip(drawn, again, strict=True))
    other = draw(seed=1)
    assert not other[0].equals(drawn[0])
    assert not other[1].equals(drawn[1])


def test_tables_have_the_shape_that_was_asked_for(drawn):
    interactions, items = drawn
    assert list(interactions.columns) == ["user", "item", "time"]
    assert interactions["user"].nunique() == 400
    assert len(items) == 300
    assert set(interactions["item"]) <= set(items["item"])
    assert interactions["time"].is_monotonic_increasing and interactions["time"].is_unique
    lengths = interactions.groupby("user").size()
    assert lengths.min() >= 5
    assert lengths.mean() == pytest.approx(16, rel=0.15)
    assert lengths.max() > 2 * lengths.mean()  # some users watch much more


def test_nobody_watches_an_item_twice(drawn):
    assert not drawn[0].duplicated(["user", "item"]).any()


def test_a_noun_belongs_to_one_genre_only():
    nouns = " ".join(synthetic.GENRES).split()
    assert len(nouns) == len(set(nouns))
    assert not set(nouns) & set(synthetic.ADJECTIVES.split())
    assert 0 < synthetic.AHEAD < len(synthetic.GENRES)


def test_titles_are_distinct_but_for_their_years_and_genres_are_even(drawn):
    titles = drawn[1]["title"]
    names = titles.str.replace(r" \(\d+\)", "", regex=True)
    assert names.is_unique
    counts = np.bincount([genre_of(t) for t in titles], minlength=len(synthetic.GENRES))
    assert counts.max() - counts.min() <= 1


def test_the_words_foretell_the_next_genre(drawn):
    before, after = steps(drawn).T
    genres = len(synthetic.GENRES)
    followed = np.mean(after == (before + synthetic.AHEAD) % genres)
    # 80 % follow the rule, and one in 24 of the others by chance; watched-out genres move on.
    assert 0.7 < followed < synthetic.FOLLOWS + 0.2 / genres + 0.03
    table = np.zeros((genres, genres))
    np.add.at(table, (before, after), 1)
    assert stats.chi2_contingency(table + 1e-9).pvalue < 1e-100


def test_popularity_alone_does_not(drawn):
    """Without the words the next genre is nearly open: a model has to read them or learn items."""
    counts = np.bincount(steps(drawn)[:, 1], minlength=len(synthetic.GENRES))
    assert counts.max() / counts.sum() < 0.15


def test_popularity_has_a_long_tail(drawn):
    counts = np.sort(drawn[0]["item"].value_counts().to_numpy())[::-1]
    assert counts[:30].sum() > 0.2 * counts.sum()  # a tenth of the items, over a fifth of the views
    assert counts[150:].sum() < 0.35 * counts.sum()
    assert counts[0] > 4 * np.median(counts)


@pytest.mark.parametrize("items", [3, 5, 24, 25])
def test_small_catalogues_end(items):
    """A user can watch at most what there is."""
    interactions, _ = draw(users=20, items=items, mean_length=30)
    assert interactions.groupby("user").size().max() <= max(5, items // 4)
    assert not interactions.duplicated(["user", "item"]).any()


def test_the_default_is_ready_to_learn_from():
    cut = data.prepare(DataSettings())
    assert cut.num_users == 2000
    assert cut.num_items > 2300
    assert len(data.train_samples(cut)[0]) > 15_000
