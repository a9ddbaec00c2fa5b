"""The sections that we ship as examples are of a config that would run: known values, models with a price, detectors that tell them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from conf.section import Mistake
from conf.settings import Settings, load
from jobs import caption_plan, caption_sample, caption_tiers, checks
from tests.jobs.conftest import REPOSITORY

PAID = ("gemini", "gemini-batch", "openai")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The demo with the paid captions' sections; on a cluster, whose files this machine does not see."""
    whole = yaml.safe_load((REPOSITORY / "conf/demo.yaml").read_text()) | {"spark": {}}
    whole |= yaml.safe_load((REPOSITORY / "conf/examples/captions-paid.yaml").read_text())
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(whole))
    return load(tmp_path / "build.yaml")


def test_the_example_of_paid_captions_is_a_config_whose_rules_and_prices_are_known(settings: Settings) -> None:
    checks.check(settings)
    tiers = [tier for tier in caption_tiers.tiers(settings) if settings.captions.captioners[tier.captioner].engine in PAID]
    bills = {tier.name: caption_plan.bill(settings, tier, 100) for tier in tiers}
    assert bills.keys() == {"text", "disputed", "rare", "none", "best"}  # the comparison costs nothing
    assert bills["text"].image_tokens == 1120 and bills["rare"].image_tokens == 280 and 0 < bills["best"].worst < bills["rare"].worst
    assert {rule.value for tier in settings.captions.tiers for rule in tier.rules} == {
        *("text_share", "score", "disagreement"),
        *("style_share", "style_state"),
    }


def test_what_the_example_compares_is_captioned_by_another_where_they_disagree(settings: Settings) -> None:
    told = settings.compare_captioners
    disputed = next(tier for tier in settings.captions.tiers if tier.name == "disputed")
    assert told.images is None and disputed.captioner not in told.captioners
    last = {tier.captioner: number for number, tier in enumerate(settings.captions.tiers)}
    assert min(last[name] for name in told.captioners) > settings.captions.tiers.index(disputed)  # or the rule's tier would buy nothing


def test_a_compared_captioner_is_asked_for_the_parts_of_its_first_tier_and_one_without_a_tier_for_all(settings: Settings) -> None:
    words = next(tier for tier in settings.captions.tiers if tier.captioner == "words")
    alone = settings.model_copy(update={"captions": settings.captions.model_copy(update={"tiers": (words,)})})
    asked = {tier.captioner: tier.parts for tier in caption_sample.tiers(alone)}
    assert asked["words"] == words.parts and asked["own"] == ("short", "medium", "long", "style", "tags", "ocr")
    assert {tier.captioner: tier.parts for tier in caption_sample.tiers(settings)}["own"] == ("short", "medium", "style", "tags", "ocr")


def test_a_tiers_rule_over_a_value_that_nothing_in_the_build_tells_is_named(settings: Settings) -> None:
    embed = settings.embed.model_copy(update={"detectors": ("open-nsfw",)})
    with pytest.raises(Mistake, match=r"captions\.tiers\.text: text_share is told by a detector of kernel text; embed\.detectors has none"):
        checks.check(settings.model_copy(update={"embed": embed}))
