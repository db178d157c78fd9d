"""Rating files to tables: one reader for each layout, each returning interactions and items."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from core import synthetic
from core.config import InputError
from core.settings import DataSettings

Parts = Callable[[], Iterator[pd.DataFrame]]
"""A table too large to be held: every call gives it anew, some rows after the other."""
Tables = tuple[pd.DataFrame | Parts, pd.DataFrame]
"""Interactions (user, item, time; in file order) and items (item, title)."""
PART_ROWS = 1 << 20

OFFICIAL_PAGE = "https://grouplens.org/datasets/movielens/"
DOWNLOADABLE = ("ml-1m", "ml-100k", "ml-latest-small")
PARQUET = (".parquet", ".pq")
OWN_COLUMNS = {"user_id": "user", "item_id": "item", "timestamp": "time"}


def read_ml_1m(settings: DataSettings) -> Tables:
    """Read `ratings.dat` and `movies.dat`: latin-1, fields separated by `::`."""
    ratings, movies = source_files(settings)
    # Seen with one-character separators (the fast parser), "::" encloses an empty column.
    interactions = _integer_columns(ratings, ":", {0: "user", 2: "item", 6: "time"}, "::")
    return interactions, _title_lines(movies, "::", title_end=-1)


def read_ml_100k(settings: DataSettings) -> Tables:
    """Read `u.data` (tabs) and `u.item` (latin-1, fields separated by `|`)."""
    ratings, movies = source_files(settings)
    interactions = _integer_columns(ratings, "\t", {0: "user", 1: "item", 3: "time"}, "\t")
    return interactions, _title_lines(movies, "|", title_end=2)


def read_ml_latest(settings: DataSettings) -> Tables:
    """Read `ratings.csv` and `movies.csv` (UTF-8, quoted) of ml-latest and ml-latest-small."""
    ratings, movies = source_files(settings)
    columns = {"userId": "user", "movieId": "item", "timestamp": "time"}
    return _csv(ratings, columns), _csv(movies, {"movieId": "item", "title": "title"})


def read_csv(settings: DataSettings) -> Tables:
    """Read a CSV table user_id, item_id, timestamp; ids may be text."""
    return _csv(_own_file("data.root", settings.root), OWN_COLUMNS), _own_items(settings)


def read_parquet(settings: DataSettings) -> Tables:
    """Read a Parquet table with the columns of `read_csv`, or a folder of such files, which follow
    each other by name; never held as a whole.
    """
    files = parquet_files(settings.root)

    def parts() -> Iterator[pd.DataFrame]:
        for path in files:
            yield from _parquet_parts(path, OWN_COLUMNS)

    return parts, _own_items(settings)


def parquet_files(text: str) -> list[Path]:
    """The file of this path, or those in this folder and below by name; hidden ones left out.

    Raises InputError where there is none.
    """
    root = Path(text)
    if not root.is_dir():
        return [_own_file("data.root", text)]
    files = [path for end in PARQUET for path in root.rglob(f"*{end}")]
    parts = {path: path.relative_to(root).parts for path in files if path.is_file()}
    found = sorted(path for path, names in parts.items() if not any(n[0] in "._" for n in names))
    if not found:
        raise InputError(f"data.root: no {' or '.join(PARQUET)} file in {root}; wanted one or more")
    return found


READERS: dict[str, Callable[[DataSettings], Tables]] = {
    "synthetic": synthetic.ratings,
    "ml-1m": read_ml_1m,
    "ml-100k": read_ml_100k,
    "ml-latest-small": read_ml_latest,
    "ml-latest": read_ml_latest,
    "csv": read_csv,
    "parquet": read_parquet,
}


MOVIELENS_FILES = {
    "ml-1m": ("ratings.dat", "movies.dat"),
    "ml-100k": ("u.data", "u.item"),
    "ml-latest-small": ("ratings.csv", "movies.csv"),
    "ml-latest": ("ratings.csv", "movies.csv"),
}


def source_files(settings: DataSettings) -> list[Path]:
    """The files a source is read from, ratings first; none for the synthetic catalogue.

    Raises InputError naming the file that is not there and how to get it.
    """
    if settings.source == "synthetic":
        return []
    if settings.source in MOVIELENS_FILES:
        return _movielens_files(settings, *MOVIELENS_FILES[settings.source])
    if settings.source == "parquet":
        files = parquet_files(settings.root)
    else:
        files = [_own_file("data.root", settings.root)]
    if settings.items_file is not None:
        files.append(_own_file("data.items_file", settings.items_file))
    return files


def _movielens_files(settings: DataSettings, *names: str) -> list[Path]:
    """Paths of the named files in `data.root` or `data.root/<source>`."""
    root, source = Path(settings.root), settings.source
    folder = root / source if (root / source).is_dir() else root
    for name in names:
        if not (folder / name).is_file():
            how = f"get it from {OFFICIAL_PAGE}"
            if source in DOWNLOADABLE:
                how = f"`python -m core.data {source} --root {root}` downloads it, or {how}"
            looked = f"{root / name} or {root / source / name}"
            raise InputError(f"data.root: no file {looked}; {how}")
    return [folder / name for name in names]


def _integer_columns(
    path: Path, separator: str, columns: dict[int, str], mark: str
) -> pd.DataFrame:
    """Chosen integer columns of a table of four fields without header."""
    types = dict.fromkeys(columns, np.int64)
    try:
        table = pd.read_csv(path, sep=separator, header=None, usecols=list(columns), dtype=types)
        # The parser drops surplus fields in silence when columns are chosen.
        whole = path.read_bytes().count(mark.encode()) == 3 * len(table)
    except ValueError:
        whole = False
    if not whole:
        raise InputError(_first_bad_line(path, mark))
    return table.rename(columns=columns)


def _first_bad_line(path: Path, mark: str) -> str:
    wanted = f"wanted user, item, rating, time separated by {mark!r}, all but rating whole numbers"
    for number, line in enumerate(path.read_text(encoding="latin-1").split("\n"), 1):
        fields = line.strip("\r").split(mark)
        numbers = [*fields[:2], fields[-1]] if len(fields) == 4 else ["none"]
        if line and not all(field.strip().lstrip("-").isdigit() for field in numbers):
            return f"{path}:{number}: {line[:80]!r}; {wanted}"
    return f"{path}: no interactions; {wanted}"


def _title_lines(path: Path, mark: str, title_end: int) -> pd.DataFrame:
    """Item ids and titles of a latin-1 file: titles are fields 1 to `title_end`."""
    table = []
    # Not splitlines: in latin-1 it would also break at the byte 0x85.
    for number, line in enumerate(path.read_text(encoding="latin-1").split("\n"), 1):
        fields = line.strip("\r").split(mark)
        if line and (len(fields) < 3 or not fields[0].isdigit()):
            raise InputError(f"{path}:{number}: {line[:80]!r}; wanted id{mark}title{mark}...")
        if line:
            table.append((int(fields[0]), mark.join(fields[1:title_end])))
    return pd.DataFrame(table, columns=["item", "title"])


def _own_file(setting: str, text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise InputError(f"{setting}: no file {path}; csv and parquet want the table file itself")
    return path


def _own_items(settings: DataSettings) -> pd.DataFrame:
    """The table `data.items_file` (Parquet by its ending, else CSV); without one no titles."""
    if settings.items_file is None:
        return pd.DataFrame({"item": [], "title": []})
    path = _own_file("data.items_file", settings.items_file)
    read = _parquet if path.suffix in PARQUET else _csv
    return read(path, {"item_id": "item", "title": "title"})


def _csv(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    """Named columns of a CSV file with a header, under our names and checked."""
    # Ids are text until proven numbers ("007"); no word means "missing": there is a film "Null".
    types = {"user": "category", "item": "category", "title": str}
    types = {name: types[ours] for name, ours in columns.items() if ours in types}
    try:
        table = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""])
    except ValueError as error:
        raise InputError(f"{path}: {str(error).strip()}; wanted CSV in UTF-8") from None
    if not isinstance(table.index, pd.RangeIndex):  # pandas took the first column for row names
        raise InputError(f"{path}: rows longer than the header; quote titles that hold commas")
    return _checked(path, table, columns)


def _parquet(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
    except ValueError as error:
        raise InputError(f"{path}: {error}; wanted a Parquet table") from None
    return _checked(path, table, columns)


def _parquet_parts(path: Path, columns: dict[str, str]) -> Iterator[pd.DataFrame]:
    """The named columns of a Parquet file, so many rows at a time, checked like a whole table but
    for text ids: whether all are whole numbers is known at the end only.
    """
    from pyarrow import parquet  # takes long, and only this format needs it

    first = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, columns)
            for batch in file.iter_batches(PART_ROWS, columns=list(columns)):
                table = batch.to_pandas(ignore_metadata=True)
                yield _checked(path, table, columns, first, {"user": _names, "item": _names})
                first += len(table)
    except ValueError as error:
        raise InputError(f"{path}: {error}; wanted a Parquet table") from None


def _check_columns(path: Path, found: Sequence[str], columns: dict[str, str]) -> None:
    if any(name not in found for name in columns):
        there = ", ".join(map(str, found))
        raise InputError(f"{path}: columns {there}; wanted {', '.join(columns)}")


Check = Callable[[Path, pd.Series, int], pd.Series]


def _checked(
    path: Path,
    table: pd.DataFrame,
    columns: dict[str, str],
    first: int = 0,
    other_checks: dict[str, Check] | None = None,
) -> pd.DataFrame:
    """The named columns under our names, each value checked; items without title are left out.

    `first`: rows of the file before these.
    """
    _check_columns(path, table.columns, columns)
    table = table[list(columns)].rename(columns=columns)
    if "title" in table:
        table = table.dropna(subset="title").reset_index(drop=True)
    for name, column in table.items():
        if column.isna().any():
            row = first + int(np.flatnonzero(column.isna())[0]) + 1
            raise InputError(f"{path}: row {row}: no value for {name}; every row needs one")
    checks: dict[str, Check] = {"user": _ids, "item": _ids, "time": _times, "title": _texts}
    checks |= other_checks or {}
    return table.assign(**{name: checks[name](path, table[name], first) for name in table})


def _names(path: Path, column: pd.Series, first: int = 0) -> pd.Series:
    """Ids as int64 if they are stored as whole numbers, else as text."""
    if pd.api.types.is_integer_dtype(column):
        return column.astype(np.int64)
    if pd.api.types.is_float_dtype(column):
        raise InputError(f"{path}: {column.name} ids are fractions; wanted whole numbers or text")
    words = column.astype("category")
    texts = np.array([str(name) for name in words.cat.categories], dtype=object)
    return pd.Series(texts[words.cat.codes], name=column.name, dtype=object)


def as_numbers(names: list[str]) -> np.ndarray:
    """Distinct texts as int64 if all are plain whole numbers (so that they sort as such), else as
    they are.
    """
    if all(name.isascii() and name.isdigit() and str(int(name)) == name for name in names):
        return np.array([int(name) for name in names], dtype=np.int64)
    return np.array(names, dtype=object)


def _ids(path: Path, column: pd.Series, first: int = 0) -> pd.Series:
    """Ids as int64 if all are plain whole numbers, else as text."""
    ids = _names(path, column)
    if ids.dtype == np.int64:
        return ids
    words = ids.astype("category")
    values = as_numbers([str(name) for name in words.cat.categories])
    return pd.Series(values[words.cat.codes], name=column.name)


def _times(path: Path, column: pd.Series, first: int = 0) -> pd.Series:
    """Times as numbers: numbers as they are, dates (ISO 8601 text too) as nanoseconds."""
    if pd.api.types.is_numeric_dtype(column):
        return column
    dates = pd.to_datetime(column, format="ISO8601", utc=True, errors="coerce")
    if dates.isna().any():
        row = int(np.flatnonzero(dates.isna())[0])
        what = f"timestamp {column.iloc[row]!r}; wanted numbers or ISO 8601"
        raise InputError(f"{path}: row {first + row + 1}: {what}")
    return dates.astype("datetime64[ns, UTC]").astype(np.int64)


def _texts(path: Path, column: pd.Series, first: int = 0) -> pd.Series:
    return column.astype(str)
