"""What is told when a captioner ends the job."""

from __future__ import annotations

from typing import Any

import pytest

from conf.captions import Captioner, Captions
from jobs import caption_stop
from tests.jobs.conftest import MakeSettings
from udfs.caption_asking import OVER_WORST
from udfs.caption_call import CODES, STOP

FLASH = {"engine": "gemini", "model": "gemini-9", "key": {"environment": "MY_KEY"}}
OWN = {"engine": "openai", "model": "ours", "base_url": "http://127.0.0.1:8000/v1"}


def test_every_code_that_stops_has_an_advice() -> None:
    told = caption_stop.advices("captions.captioners.flash.", Captioner.model_validate(FLASH), "prices.yaml")
    assert told.keys() == {OVER_WORST, *(code for code, outcome in CODES.items() if outcome == STOP)}


@pytest.mark.parametrize(
    ("captioner", "why", "told"),
    [
        (
            FLASH,
            "key_refused: HTTP 403: no",
            "captioner c (gemini, gemini-9) stopped the job: key_refused: HTTP 403: no; check the key in MY_KEY",
        ),
        (
            OWN,
            "key_refused: HTTP 401: no",
            "(openai, ours) stopped the job: key_refused: HTTP 401: no; captions.captioners.c.key: none is given, and",
        ),
        (
            FLASH,
            "no_such_model: HTTP 404: no",
            "check captions.captioners.c.model (gemini-9) and api_version (v1) against what the service's own address",
        ),
        (
            OWN,
            "no_such_model: HTTP 404: no",
            "check captions.captioners.c.model (ours) against what captions.captioners.c.base_url (http://127.0.0.1:8000/v1) serves",
        ),
        (
            FLASH,
            f"{OVER_WORST}: a call cost 9",
            "a call cost 9; the budget cannot hold with such prices: check captions.prices (prices), its",
        ),
        (FLASH, "upload: redirected: HTTP 302 to the host b", "to the host b; redirects are not followed"),
        (FLASH, "the service takes no more jobs now", f"stopped the job: the service takes no more jobs now; {caption_stop.WAITS}"),
        (FLASH, "upload: bad_request: a usage_policy", f"a usage_policy; {caption_stop.WAITS}"),  # a word of the server's, no code
    ],
)
def test_a_stop_names_the_captioner_and_says_what_to_do(
    make_settings: MakeSettings, captioner: dict[str, Any], why: str, told: str
) -> None:
    tiers = [{"name": "all", "captioner": "c"}]
    captions = Captions.model_validate({"budget_usd": 1.0, "captioners": {"c": captioner}, "tiers": tiers}, strict=False)
    said = str(caption_stop.stopped(make_settings(captions=captions.model_dump()), captions.tiers[0], why))
    assert said.startswith("caption: tier all: captioner c (") and told in said and said.endswith(caption_stop.WAITS)
