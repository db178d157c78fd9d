"""Loads the guard for the tests beside this file."""

from perf.plugin import (  # noqa: F401 (pytest finds hooks and fixtures by name)
    guard,
    pytest_addoption,
    pytest_collection_finish,
    pytest_configure,
    pytest_sessionfinish,
    pytest_terminal_summary,
)
