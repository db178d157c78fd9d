"""The parts of a report: sections, tables, pictures, words, the list of runs."""
