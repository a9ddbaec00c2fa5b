"""What every captioner's replies share: a key that the server repeats is taken out, and how long a server asks to wait."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from urllib.parse import quote

from udfs.caption_call import Reply

LONGEST_DETAIL = 200  # characters
LONGEST_WAIT = 3_600.0  # seconds
HALF = re.compile(r"[\ud800-\udfff]")
# as Google's and OpenAI's keys look, also masked: one that is not ours is nobody's business either
_KEY = re.compile(r"AIza[\w-]{20,}|AQ\.[\w-]{20,}|\bsk-[\w*-]{8,}")


def clean(reply: Reply, key: str) -> Reply:
    """Without the key, wherever the server said it; the detail on one line and clipped; nothing but the code of a prohibited one."""
    if reply.code == "prohibited":
        return Reply("prohibited", usage=reply.usage)
    detail, text = reply.detail, reply.text
    for form in {key, quote(key, safe=""), json.dumps(key)[1:-1]} - {""}:
        detail, text = detail.replace(form, "***"), text.replace(form, "***")
    detail = " ".join(HALF.sub("?", _KEY.sub("***", detail)).split())
    return reply._replace(detail="".join(c if c.isprintable() else "?" for c in detail[:LONGEST_DETAIL]), text=text)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """-> seconds of Retry-After (a number, or a date beside the server's own), at most LONGEST_WAIT."""
    told = str(headers.get("Retry-After", ""))
    if re.fullmatch(r"\d{1,9}(?:\.\d{1,9})?", told):
        return min(float(told), LONGEST_WAIT)
    try:
        seconds = (parsedate_to_datetime(told) - parsedate_to_datetime(str(headers.get("Date", "")))).total_seconds()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_WAIT)
