"""Why one sample cannot be used."""

import re


class BadSampleError(ValueError):
    """One sample cannot be used; the loader puts another in its place. The message is the reason, in one line."""


def unreadable(medium: str, error: BaseException) -> BadSampleError:
    """`BadSampleError` for what a library raised on `medium` ("picture", "video", …), cut to its first line."""
    text = str(getattr(error, "strerror", None) or error)  # FFmpeg's str() begins with a number
    first_line = next(iter(text.splitlines()), "") or type(error).__name__
    # Libraries add objects and buffers ("<_io.BytesIO object at 0x…>"), which differ between runs.
    return BadSampleError(f"{medium} does not decode ({re.sub(' ?<.*>', '', first_line)[:200]})")
