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
    if fault := label_fault(label):
        raise BadSampleError(f'"label" in .json {fault}')
    return label


def label_fault(label: object) -> str | None:
    """Why a value is no class number, None if it is one."""
    if type(label) is not int or not 0 <= label < 2**63:  # a column of the index is int64
        return f"must be a whole number from 0 to 2⁶³ - 1, not {label!r:.100}"
    return None


def encoders_of(fields: Mapping[str, object]) -> dict[str, str | None]:
    """What made a sample's latents ("vae") and features ("text"), in words; `fields` is its parsed .json."""
    encoders = fields.get("encoders", {})
    if not isinstance(encoders, dict) or not all(isinstance(name, str | None) for name in encoders.values()):
        raise BadSampleError(f'"encoders" in .json must be an object of names, not {encoders!r:.100}')
    return encoders


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
