"""Names of files that more than one room knows."""

PROBE = ".lumina-doctor-"
"""How the names of files begin that `lumina doctor` writes into folders for a moment; they are no part of a run."""
