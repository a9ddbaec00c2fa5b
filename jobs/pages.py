"""An HTML page that opens without a server: drawn from a template of this folder, and known again by the identity in its head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jobs.lake import Lake


def is_current(lake: Lake, uri: str, identity: str) -> bool:
    """Whether the page is there and was drawn from what has this identity (the template writes it into a <meta> at its top)."""
    return lake.opener.exists(uri) and f'content="{identity}"'.encode() in lake.opener.read(uri)[:600]


def render(template: str, facts: dict[str, Any]) -> bytes:
    """A template that lacks a fact is an error."""
    folder = FileSystemLoader(Path(__file__).parent)
    page = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.get_template(template).render(facts).encode()
