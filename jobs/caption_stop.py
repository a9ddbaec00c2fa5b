"""Why a captioner ended the job -> what is told: who it was, what it said, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from conf.captions import Captioner, Tier
from conf.section import Mistake
from conf.settings import Settings
from udfs.caption_asking import OVER_WORST

WAITS = "what was answered is landed, the rest waits for the next run of this command"
FOUND_AGAIN = "nothing is lost: the next run of this command looks for them again"


def stopped(settings: Settings, tier: Tier, why: str) -> Mistake:
    """why: a code and its detail, perhaps what was being done before them ("upload: redirected: HTTP 302 ..."), or words without a code."""
    one = settings.captions.captioners[tier.captioner]
    said = [why, *_advice(f"captions.captioners.{tier.captioner}.", one, settings.captions.prices, why), WAITS]
    return Mistake(f"caption: tier {tier.name}: captioner {tier.captioner} ({_names(one)}) stopped the job: {'; '.join(said)}")


def unsettled(tier: str, captioner: Mapping[str, Any], why: str) -> Mistake:
    """captioner: as it was when the jobs were sent, whatever the config says now; why: as of `stopped`."""
    one = Captioner.model_validate(captioner, strict=False)
    said = [why, *_advice("", one, "", why), FOUND_AGAIN]
    return Mistake(f"caption: tier {tier}: the service ({_names(one)}) does not tell of jobs that it was sent: {'; '.join(said)}")


def _names(one: Captioner) -> str:
    return ", ".join(filter(None, (one.engine, one.model)))


def _advice(here: str, one: Captioner, prices: str, why: str) -> list[str]:
    told = advices(here, one, prices)
    return [told[code] for code in re.findall(r"\w+", why)[:2] if code in told]


def advices(here: str, one: Captioner, prices: str) -> dict[str, str]:
    """here: what stands before the names of its options in the config; its price list -> what to do about each code of udfs/caption_call.py that
    stops, and about a call over its worst.
    """
    gemini = one.engine in ("gemini", "gemini-batch")
    refused = f"{here}key: none is given, and the server asks for one"
    if one.key is not None:
        refused = f"check the key in {one.key.environment} ({here}key), and that its project, billing and place may use the service"
    service = f"{here}base_url ({one.base_url})" if one.base_url else "the service's own address"
    whole = here.rstrip(".") or "its options"
    version = f" and api_version ({one.api_version})" if gemini else ""
    return {
        "key_refused": f"{refused}; a 407 is the proxy's",
        "no_such_model": f"check {here}model ({one.model}){version} against what {service} serves",
        "bad_settings": f"no request as it is set can be answered: check {whole} against what {service} and its model take",
        "spend_cap": "raise the spending limit at the service or pay in, or wait until it is renewed",
        "quota_used_up": "wait until the quota is renewed, or have it raised at the service: of some models a key has none at all",
        "usage_policy": "the service has shut this project out for its usage policy: see its console before anything more is sent",
        "redirected": f"redirects are not followed, they would carry the key away: check {service} and any proxy before it",
        OVER_WORST: f"the budget cannot hold with such prices: check captions.prices ({prices}), its image_tokens, and {here}max_output_tokens",
    }
