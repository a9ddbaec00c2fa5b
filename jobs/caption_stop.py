"""Why a captioner ended the job -> what is told: who it was, what it said, and what to do."""

from __future__ import annotations

import re

from conf.captions import Captioner, Tier
from conf.section import Mistake
from conf.settings import Settings
from udfs.caption_asking import OVER_WORST

WAITS = "what was answered is landed, the rest waits for the next run of this command"


def stopped(settings: Settings, tier: Tier, why: str) -> Mistake:
    """why: a code and its detail, perhaps what was being done before them ("upload: redirected: HTTP 302 ..."), or words without a code."""
    one = settings.captions.captioners[tier.captioner]
    advice = advices(tier.captioner, one, settings.captions.prices)
    said = [why, *(advice[code] for code in re.findall(r"\w+", why)[:2] if code in advice), WAITS]
    who = f"captioner {tier.captioner} ({', '.join(filter(None, (one.engine, one.model)))})"
    return Mistake(f"caption: tier {tier.name}: {who} stopped the job: {'; '.join(said)}")


def advices(name: str, one: Captioner, prices: str) -> dict[str, str]:
    """The captioner's name in the config, its price list -> what to do about each code of udfs/caption_call.py that stops, and about a call over its
    worst.
    """
    here = f"captions.captioners.{name}"
    key = f"the key in {one.key.environment} ({here}.key)" if one.key else f"{here}.key: none is given"
    service = f"{here}.base_url ({one.base_url})" if one.base_url else "the service's own address"
    return {
        "key_refused": f"check {key}, and that its project, billing and place may use the service",
        "no_such_model": f"check {here}.model ({one.model}) and api_version ({one.api_version}) against what {service} serves",
        "bad_settings": f"the service refuses what is set for every request: check the other options of {here}",
        "spend_cap": "raise the spending limit at the service, or wait until it is renewed",
        "quota_used_up": "wait until the quota is renewed, or have it raised at the service",
        "usage_policy": "the service has shut this project out for its usage policy: see its console before anything more is sent",
        "redirected": f"redirects are not followed, they would carry the key away: check {service} and any proxy before it",
        OVER_WORST: f"the budget cannot hold with such prices: check captions.prices ({prices}), its image_tokens, and {here}.max_output_tokens",
    }
