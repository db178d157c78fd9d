"""The pipeline: ratings to a distilled student, one module for each concern; no `bench` here."""
