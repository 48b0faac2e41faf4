"""Captions and labels."""

import json
from collections.abc import Mapping

from lumina.data.decode.errors import BadSampleError


def caption_of(members: Mapping[str, bytes], fields: Mapping[str, object]) -> str | None:
    """Caption of a sample, None if it has none; `fields` is its parsed .json."""
    if "txt" in members:
        try:
            caption = members["txt"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSampleError(f"caption is not UTF-8 (byte {error.start})") from error
    else:
        caption = fields.get("caption")
    if caption is None:
        return None
    if not isinstance(caption, str):
        raise BadSampleError(f'"caption" in .json must be text, not {type(caption).__name__}')
    if "\0" in caption:
        raise BadSampleError("caption holds zero bytes, as a hole in a file leaves them")
    return caption.strip()


def label_of(fields: Mapping[str, object]) -> int | None:
    """Class number of a sample, None if it has none; `fields` is its parsed .json."""
    label = fields.get("label")
    if label is None:
        return None
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise BadSampleError(f'"label" in .json must be a whole number of at least 0, not {label!r}')
    return label


def parse_json(members: Mapping[str, bytes]) -> dict[str, object]:
    """The .json of a sample, empty if it has none; `BadSampleError` if it is not a JSON object."""
    if "json" not in members:
        return {}
    try:
        fields = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f".json does not parse ({error})") from error
    if not isinstance(fields, dict):
        raise BadSampleError(f".json must hold an object, not {type(fields).__name__}")
    return fields
