"""The checks behind the proofs, and what differs beside the setting under test."""
