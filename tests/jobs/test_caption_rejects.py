"""An image that was refused comes back when what the reject depended on has changed, and only then."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from pyspark.sql import functions as F

from conf.settings import Settings
from jobs import caption, caption_rejects, caption_tiers, ingest
from jobs.lake import Lake
from tests.jobs.conftest import MakeSettings, write_image
from tests.servers.gemini_server import GeminiServer

ALT = "A red fox stands in deep snow."
LOST = "0"


def test_a_refused_image_comes_back_when_what_its_reject_depended_on_has_changed_and_only_then(
    tmp_path: Path, make_settings: MakeSettings, make_lake: Callable[[Settings], Lake]
) -> None:
    folder, listed = tmp_path / "images", tmp_path / "images/list.jsonl"
    paths = {str(number): write_image(folder / f"{number}.png", number) for number in range(3)}
    names = {hashlib.sha256(path.read_bytes()).digest(): name for name, path in paths.items()}
    source = {"name": "list", "kind": "manifest", "uri": str(listed), "columns": {"uri": "file", "key": "key", "alt_text": "alt"}}
    with GeminiServer({}) as server:
        flash = {"engine": "gemini", "model": "gemini-3.8-flash", "key": {"environment": "HOME"}, "base_url": server.url, "in_flight": 2}
        flash |= {"media_resolution": "low", "max_output_tokens": 2048, "timeout_seconds": 5.0}
        told = {"budget_usd": 5.0, "captioners": {"flash": flash, "tags": {"engine": "tags"}}}

        def asking(captioner: str) -> Settings:
            waves = {"rows": 40, "task_rows": 20, "attempts": 1}  # a picture that is missing once is refused for good
            tiers = [{"name": "all", "captioner": captioner, "parts": ["short", "tags"]}]
            return make_settings(captions=told | {"tiers": tiers}, ingest={"sources": [source]}, waves=waves)

        free, paid = asking("tags"), asking("flash")
        lake = make_lake(free)

        def take(where: Path, alt: dict[str, str]) -> None:
            rows = [{"file": str(where / f"{name}.png"), "key": f"{where.name}/{name}", "alt": alt.get(name)} for name in paths]
            listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
            ingest.run(lake, free)

        def refused() -> dict[str, set[str]]:
            """code -> images with such a reject that holds."""
            found: dict[str, set[str]] = {}
            for row in caption_rejects.standing(lake, free, F.lit(True)).collect():
                found.setdefault(row["code"], set()).add(names[bytes(row["image_id"])])
            return found

        def waiting(settings: Settings) -> set[str]:
            return {names[bytes(row["image_id"])] for row in caption_tiers.pending(lake, settings).collect()}

        take(folder, {})
        shutil.copytree(folder, tmp_path / "copies")
        paths[LOST].unlink()
        server.order(queue=["block_SAFETY", "block_PROHIBITED_CONTENT"])
        for settings in (free, paid):
            caption.run(lake, settings)
        before = refused()
        assert before["nothing_known"] == paths.keys() and before["missing"] == {LOST}
        assert before["not_captioned"] | before["prohibited"] == paths.keys() - {LOST}  # blocked, and forbidden
        assert waiting(free) == waiting(paid) == set() and server.counts()["requests"] == 2

        # another source of each, and words for all but the one that is blocked; who is forbidden is shown to nobody, whatever is known of it
        take(tmp_path / "copies", dict.fromkeys(paths.keys() - before["not_captioned"], ALT))
        assert waiting(free) == waiting(paid) == {LOST}
        for settings in (free, paid):
            caption.run(lake, settings)
        by = {(names[bytes(row["image_id"])], row["engine"]) for row in lake.read("captions").collect()}
        assert by == {(LOST, "tags"), (LOST, "gemini")} and server.counts()["requests"] == 3
        silent = {"nothing_known": before["not_captioned"]}
        assert refused() == {code: before[code] for code in ("not_captioned", "prohibited")} | silent
        assert waiting(free) == waiting(paid) == set()
