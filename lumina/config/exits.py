"""What the exit codes of the `lumina` command mean."""

DONE, FAILED, BAD_INPUT = 0, 1, 2
HANG = 75
"""The watchdog ended a run in which a rank had stopped; in sysexits.h the number of failures that may pass."""
CRASH_LOOP = 76
"""The supervisor gave up on a run that failed again and again at the same step."""
