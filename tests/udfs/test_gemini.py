"""Every failure by name -> what is to be done with it: real HTTP against the fake service on loopback, one request a try."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import pickle
import random
from collections.abc import Mapping
from typing import Any

import pytest

from tests.servers.gemini_answers import Asked, Tokens, caption, response
from tests.servers.gemini_edits import MODES
from tests.servers.gemini_modes import Fault
from tests.servers.gemini_server import GeminiServer
from tests.udfs.conftest import CANARY, OPTIONS, REQUEST, Bench
from udfs import caption_answer, caption_reply, gemini_errors, gemini_reply
from udfs.caption_call import ANSWER, CODES, PERMANENT, QUARANTINE, RETRY, STOP, Reply, Usage
from udfs.gemini import GeminiEngine
from udfs.gemini_request import most_usage

# (outcome, code) -> modes. Those whose text is kept stand under ANSWER: whether it is a good caption is another module's word.
TABLE: dict[tuple[str, str], str] = {
    (
        ANSWER,
        "ok",
    ): "wrong_content_type octet_stream odd_charset byte_order_mark two_candidates thought_and_answer two_parts no_usage usage_text "
    "usage_negative usage_infinite usage_strings usage_no_details usage_no_prompt caption_wrong_schema caption_prose caption_fenced caption_cut "
    "caption_nul caption_raw_nul caption_half_character caption_raw_half_character caption_megabyte caption_megabyte_of_escapes caption_says_the_key",
    (ANSWER, "cut"): "finish_MAX_TOKENS finish_CONTINUATION thoughts_took_all",
    (
        RETRY,
        "rate_limited",
    ): "429_retry_info 429_retry_info_fraction 429_retry_info_nonsense 429_retry_after 429_retry_after_date 429_bare 429_html",
    (RETRY, "timeout"): "408 504 hang hang_in_body slow_drip",
    (RETRY, "dropped"): "drop_unread drop drop_reset drop_after_work drop_in_headers",
    (RETRY, "cut_body"): "cut_body cut_body_reset cut_chunks bad_gzip cut_json",
    (
        RETRY,
        "server_error",
    ): "409 499 500 500_empty 500_list 500_odd_json 500_deep 500_bad_utf8 501 502_html 503 503_cut_json 503_html_called_json error_in_200",
    (
        RETRY,
        "not_json",
    ): "204 206_answer 400_html bad_chunks not_http huge_header html html_called_json event_stream number deep bad_utf8 utf16",
    (RETRY, "not_an_answer"): "endless_body null list other_object candidates_text candidate_number content_text parts_object text_number",
    (
        RETRY,
        "no_text",
    ): "empty_body blank_body no_candidates candidates_empty candidates_null no_content no_parts parts_empty text_empty text_blank "
    "thoughts_only function_call",
    (
        RETRY,
        "malformed",
    ): "finish_MALFORMED_FUNCTION_CALL finish_UNEXPECTED_TOOL_CALL finish_TOO_MANY_TOOL_CALLS finish_MISSING_THOUGHT_SIGNATURE "
    "finish_MALFORMED_RESPONSE finish_IMAGE_OTHER finish_NO_IMAGE",
    (RETRY, "unknown_finish"): "finish_FINISH_REASON_UNSPECIFIED finish_OTHER finish_A_NEW_ONE no_finish finish_number",
    (PERMANENT, "bad_request"): "400_image",
    (PERMANENT, "too_large"): "400_payload 400_tokens 413_html",
    (PERMANENT, "blocked"): "block_SAFETY block_OTHER block_BLOCKLIST block_IMAGE_SAFETY block_MODEL_ARMOR block_JAILBREAK",
    (PERMANENT, "blocked_unknown"): "block_BLOCKED_REASON_UNSPECIFIED block_A_NEW_ONE",
    (
        PERMANENT,
        "refused",
    ): "finish_SAFETY finish_RECITATION finish_LANGUAGE finish_BLOCKLIST finish_SPII finish_IMAGE_SAFETY finish_IMAGE_RECITATION "
    "finish_ESCALATION finish_MODEL_ARMOR",
    (
        QUARANTINE,
        "prohibited",
    ): "422_prohibited cut_body_prohibited cut_json_prohibited finish_PROHIBITED_CONTENT finish_IMAGE_PROHIBITED_CONTENT "
    "finish_A_NEW_PROHIBITED_CONTENT block_PROHIBITED_CONTENT second_candidate_prohibited",
    (STOP, "key_refused"): "400_key 400_location 401 403 403_leaked 403_suspended_says_the_key 407_proxy error_in_200_key",
    (STOP, "no_such_model"): "404_model 404_html",
    (STOP, "bad_settings"): "400_settings",
    (STOP, "spend_cap"): "429_spend_cap 429_prepaid 402",
    (STOP, "quota_used_up"): "429_per_day 429_limit_zero",
    (STOP, "usage_policy"): "403_usage_policy finish_PUP_LIMITED_DISABLED block_PUP_LIMITED_DISABLED",
    (STOP, "redirected"): "301_elsewhere 302_elsewhere 302_nowhere 303_elsewhere 307_elsewhere 308_elsewhere",
}
CASES = [(mode, *wanted) for wanted, modes in TABLE.items() for mode in modes.split()]
WAITS = {"429_retry_info": 3.0, "429_retry_info_fraction": 34.074824224, "429_retry_after": 7.0, "429_retry_after_date": 9.0}


def test_the_table_has_every_mode_once_and_every_code() -> None:
    assert sorted(mode for mode, *_ in CASES) == sorted(MODES)
    assert {code for _, code in TABLE} == set(CODES)


@pytest.mark.parametrize(("mode", "outcome", "code"), CASES, ids=[mode for mode, *_ in CASES])
def test_a_failure_becomes_its_code_by_one_request(bench: Bench, mode: str, outcome: str, code: str) -> None:
    reply = bench.ask(mode)
    counts = bench.server.counts()
    assert (reply.outcome, reply.code) == (outcome, code), reply
    assert (counts["requests"], counts["others"], counts["modes"]) == (1, 0, {mode: 1})
    assert len(reply.detail) <= 200 and reply.detail.isprintable() and len(reply.text) <= caption_answer.LARGEST + 1
    assert CANARY not in repr(reply) and "secret" not in reply.detail
    reply.text.encode()  # no half characters
    assert bool(reply.text) == (outcome == ANSWER and mode != "thoughts_took_all")
    if code == "rate_limited":
        assert reply.retry_after == WAITS.get(mode)
    if code == "prohibited":
        assert (reply.detail, reply.text, reply.retry_after) == ("", "", None)
    billed, told = (sum(counts[name].values()) for name in ("billed", "told"))
    if reply.usage is None:
        assert billed == 0
    elif reply.usage.estimated:
        assert reply.usage == most_usage(REQUEST, {**OPTIONS, **REQUEST.options}) and sum(reply.usage[:4]) >= billed
    else:
        assert sum(reply.usage[:4]) == told == billed


def test_any_json_becomes_a_reply() -> None:
    """20,000 answers and errors with members that are missing or of another type: none raises, and each has a code."""
    dice, deep = random.Random(6), json.loads('{"a":' * 900 + "1" + "}" * 900)
    asked = Asked(b"an image", "words", 7, 280, {})
    whole = response(json.dumps(caption(asked)), Tokens(7, 280, 450, 3), "m")
    errors = [mode.body() for mode in MODES.values() if isinstance(mode, Fault)]
    most = Usage(1, 1, 1, 1, True)
    for _ in range(10_000):
        answer, error = json.loads(json.dumps(whole)), json.loads(json.dumps(dice.choice(errors)))
        for _ in range(dice.randrange(1, 4)):
            spoil(answer, dice, deep)
            spoil(error, dice, deep)
        for reply in (
            gemini_reply.of_answer(answer, most),
            gemini_reply.of_answer(error, most),
            gemini_errors.of_error(dice.choice((0, 200, 400, 429)), error),
        ):
            cleaned = caption_reply.clean(reply, CANARY)
            assert cleaned.code in CODES and len(cleaned.detail) <= 200 and (cleaned.usage is None or min(cleaned.usage[:4]) >= 0)


def spoil(value: Any, dice: random.Random, deep: Any) -> None:
    """One member, anywhere, becomes something else or is taken away."""
    while isinstance(value, dict | list) and value:
        at = dice.choice(list(value)) if isinstance(value, dict) else dice.randrange(len(value))
        if isinstance(value[at], dict | list) and value[at] and dice.random() < 0.8:
            value = value[at]
            continue
        if dice.random() < 0.2:
            del value[at]
        else:
            value[at] = dice.choice(
                (None, "", "words", "PROHIBITED_CONTENT", 7, -1, 10**30, 0.5, True, float("nan"), [], {}, [[]], [{}], [None], deep)
            )
        return


def test_a_clean_answer_is_a_whole_caption_with_its_tokens(bench: Bench, server: GeminiServer) -> None:
    server.order(thoughts=30)
    reply, again = (bench.run(bench.patient.ask(REQUEST, b"an image", "image/jpeg")) for _ in range(2))
    rules = caption_answer.Rules({"short": (6, 48), "medium": (24, 200), "long": (64, 560), "style": (16, 240)}, ["appears"], 40, 64, "en")
    checked = caption_answer.check(reply.text, rules, lambda text: len(text.split()) * 4 // 3, REQUEST.prompt)
    assert checked.whole, checked.faults
    assert again.text == reply.text and bench.run(bench.patient.ask(REQUEST, b"another", "image/png")).text != reply.text
    assert (reply.code, reply.detail) == ("ok", "") and reply.usage is not None
    assert reply.usage == Usage(-(-len("Describe.\nshort: one sentence.") // 4), 280, -(-len(reply.text.encode()) // 4), 30)


def test_what_is_sent_is_what_the_request_and_the_options_say(bench: Bench, server: GeminiServer) -> None:
    engine = bench.engine(safety_settings={"harassment": "off"}, thinking="low", media_resolution="high")
    assert bench.run(engine.ask(REQUEST, b"an image", "image/jpeg")).code == "ok"
    sent = server.last_request()
    generation = sent["generationConfig"]
    assert generation.pop("responseJsonSchema") == caption_answer.SCHEMA
    assert generation == {
        "candidateCount": 1,
        "maxOutputTokens": 2_000,
        "responseMimeType": "application/json",
        "mediaResolution": "MEDIA_RESOLUTION_LOW",  # the request's own comes first
        "thinkingConfig": {"thinkingLevel": "LOW"},
    }
    assert sent["safetySettings"] == [{"category": "HARM_CATEGORY_HARASSMENT", "threshold": "OFF"}]
    assert [sorted(part) for part in sent["contents"][0]["parts"]] == [["inlineData"], ["text"]]
    assert sent["systemInstruction"]["parts"] == [{"text": "Describe."}]
    bench.run(engine.close())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"media_resolution": "huge"}, "media_resolution"),
        ({"safety_settings": {"harassment": "never"}}, "HarmBlockThreshold"),
        ({"thinking": "deep"}, "ThinkingLevel"),
        ({"max_output_tokens": "many"}, "many"),
        ({"timeout": 0}, "timeout"),
        ({"model": ""}, "model"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_sent(bench: Bench, options: Mapping[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word) as refused:
        bench.engine(**options)
    assert CANARY not in str(refused.value)


@pytest.mark.parametrize("key", ["", " ", "a\nb", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_said(key: str) -> None:
    with pytest.raises(ValueError, match="API key") as refused:
        GeminiEngine(OPTIONS, key)
    assert not key.strip() or key not in str(refused.value)


def test_a_request_of_wrong_options_stops_the_job_and_sends_nothing(bench: Bench, server: GeminiServer) -> None:
    wrong = REQUEST._replace(options={"media_resolution": "huge"})
    assert bench.run(bench.patient.ask(wrong, b"an image", "image/jpeg")).code == "bad_settings"
    assert server.counts()["requests"] == 0


def test_without_a_listener_nothing_is_billed() -> None:
    async def work() -> Reply:
        engine = GeminiEngine({**OPTIONS, "base_url": "http://127.0.0.1:9"}, CANARY)
        try:
            return await engine.ask(REQUEST, b"an image", "image/jpeg")
        finally:
            await engine.close()

    reply = asyncio.run(work())
    assert (reply.code, reply.usage) == ("dropped", None)


def test_a_cancelled_try_ends_at_once_and_the_engine_goes_on(bench: Bench, server: GeminiServer) -> None:
    async def work() -> Reply:
        server.order(queue=["hang"])
        asked = asyncio.create_task(bench.patient.ask(REQUEST, b"an image", "image/jpeg"))
        await asyncio.sleep(0.1)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        return await bench.patient.ask(REQUEST, b"an image", "image/jpeg")

    assert bench.run(work()).code == "ok"


def test_the_key_goes_nowhere_but_to_the_service(bench: Bench, server: GeminiServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said = [repr(bench.ask(mode)) for mode in MODES]
    assert CANARY in json.dumps(server.counts()["headers"])  # the search can find it
    engine = bench.patient
    said += [
        repr(engine),
        str(engine),
        caplog.text,
        json.dumps(bench.elsewhere.counts()),
        "\n".join(str(record.__dict__) for record in caplog.records),
    ]
    with pytest.raises((TypeError, pickle.PicklingError, AttributeError)) as refused:
        pickle.dumps(engine)
    said.append(str(refused.value))
    assert [text[:80] for text, part in itertools.product(said, (CANARY, CANARY[:20], CANARY[-20:])) if part in text] == []
    assert bench.elsewhere.counts()["requests"] == bench.elsewhere.counts()["others"] == 0
