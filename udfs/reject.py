"""Why an input could not be taken: one closed list of codes for every stage.

`transient` codes are tried again by a later run until `waves.attempts` is reached; the rest are final for the
same input under the same fingerprint (which may name what was tried: addresses, limits, what was told).
"""

CODES: dict[str, tuple[bool, str]] = {
    # code: (transient, what it means)
    "missing": (True, "no object at the address"),
    "unreadable": (True, "the store refused or failed to give the bytes"),
    "bytes_changed": (
        False,
        "size, time or sha256 of the object differ from those at listing or ingest, and no other source has the image",
    ),
    "address_refused": (False, "an address of a kind that no store here serves"),
    "empty": (False, "zero bytes"),
    "too_many_bytes": (False, "the file is larger than limits.max_bytes"),
    "not_an_image": (False, "the first bytes belong to no image format"),
    "format_refused": (False, "an image or document format that limits.formats does not list"),
    "header_broken": (False, "an image format, but its header cannot be parsed"),
    "too_many_pixels": (False, "width x height is above limits.max_pixels, or above what a worker has memory to decode"),
    "too_small": (False, "the shorter side is below limits.min_side"),
    "too_many_frames": (False, "more frames than limits.max_frames"),
    "decode_failed": (False, "the header is good, the pixels are not (truncated or corrupt)"),
    "archive_broken": (False, "the archive ends or turns invalid here; members before this point were taken"),
    "archive_empty": (False, "the archive holds no member that could be an image"),
    "parquet_broken": (False, "the parquet file, or a row group of it from this row on, cannot be read; rows before this point were taken"),
    "column_unfit": (False, "the parquet file lacks a named column, or its image column is of a type that holds no bytes"),
    "row_group_too_big": (
        False,
        "a parquet row group's columns hold more bytes than a worker takes (udfs/parquet_file.py); write smaller ones",
    ),
    "no_image": (False, "the cell of the image column is null"),
    "manifest_row_invalid": (False, "the manifest row has no address, or it (or a parquet row) has a field of the wrong type"),
    "not_finite": (False, "the model gave NaN or infinity"),
    "out_of_memory": (True, "a model's device had no memory even for this image alone"),
    "answer_refused": (False, "a captioner's answers passed in no part"),
    "prohibited": (False, "a captioner's service forbids the picture: nobody is asked again, and nothing else of it is kept"),
    "not_captioned": (True, "a captioner gave no answer; the detail says why"),
    "nothing_known": (False, "no tag, alt text or text in the picture to compose a caption of"),
    "denied": (False, "a deny list names the picture; nothing else of it is kept"),
}


class Reject(Exception):
    """An input that a stage cannot take. `code` is one of CODES; `detail` says what was found, for a person."""

    def __init__(self, code: str, detail: str = "") -> None:
        assert code in CODES, code
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail[:300].encode("utf-8", "backslashreplace").decode()  # a name need not be UTF-8, a table's text must

    @property
    def transient(self) -> bool:
        return CODES[self.code][0]

    def __reduce__(self) -> tuple[type["Reject"], tuple[str, str]]:
        return Reject, (self.code, self.detail)
