"""The harness: runs a matrix of settings over `core`, proves each setting, judges and reports."""
