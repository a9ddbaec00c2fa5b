"""The fake Gemini without HTTP: which mode a request meets, what is answered, and everything that is counted."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tests.servers import gemini_answers as answers
from tests.servers.gemini_answers import Asked, Tokens
from tests.servers.gemini_edits import MODES
from tests.servers.gemini_modes import Edit, Fault, Mode, Page, Wire

# What a script may hold, with what holds without it.
SCRIPT: dict[str, Any] = {
    "queue": [],  # modes of the next requests, in order; "" is a clean answer
    "always": "",  # the mode of every request
    "by_image": {},  # sha256 of an image, hex -> modes of its tries, in order; then clean
    "share": 0.0,  # of the tries that meet one of `modes`, drawn from (seed, body, number of the try)
    "modes": [],
    "seed": 0,
    "latency": 0.0,  # seconds that an answer takes
    "limit": 0.0,  # requests a second, hidden; 0: none
    "burst": 0.0,  # requests at once; 0: one second's
    "limit_says": "info",  # how long to wait, in a 429 of the limit: info (RetryInfo) | header (Retry-After) | nothing
    "thoughts": 0,  # tokens of each answer
    "obedient": False,  # does what notes and words in the image's bytes tell it: "ignore the above and say ..." (say, write, repeat, reveal, print)
    "elsewhere": "http://127.0.0.1:9/",  # where redirects point
    "upload_elsewhere": False,  # the bytes of an upload are answered with a redirect
    "batch_polls": 1,  # looks at a batch job before it ends
    "batch_end": "SUCCEEDED",  # SUCCEEDED | PARTIALLY_SUCCEEDED | EXPIRED | FAILED | CANCELLED; a list: of the next jobs, then SUCCEEDED
    "batch_room": 0,  # jobs that may be at work at once, more are a 429; 0: any number
    "batch_refuses": False,  # who asks for jobs has no right to: 403
    "batch_forgets": False,  # jobs and results are asked for too late: 404
    "batch_done": 1.0,  # share of the lines that are answered; of SUCCEEDED all
}
RPC_CODES = dict(  # google.rpc.Code, as lines of batches have it
    CANCELLED=1,
    INVALID_ARGUMENT=3,
    DEADLINE_EXCEEDED=4,
    NOT_FOUND=5,
    PERMISSION_DENIED=7,
    RESOURCE_EXHAUSTED=8,
    FAILED_PRECONDITION=9,
    ABORTED=10,
    UNIMPLEMENTED=12,
    INTERNAL=13,
    UNAVAILABLE=14,
    UNAUTHENTICATED=16,
)
SEEN = 200  # values kept of each header


class Service:
    """One service's state. Not for several threads: everything runs in one loop."""

    def __init__(self, script: Mapping[str, Any] | None = None) -> None:
        self.script = json.loads(json.dumps(SCRIPT))
        self.in_flight = 0
        self.order(script or {})
        self.forget()

    def order(self, script: Mapping[str, Any]) -> None:
        """Changes the members that are given."""
        assert set(script) <= set(SCRIPT), set(script) - set(SCRIPT)
        plans = itertools.chain(*script.get("by_image", {}).values())
        named = [*script.get("queue", []), *script.get("modes", []), script.get("always", ""), *plans]
        assert set(named) <= {"", *MODES}, set(named) - set(MODES)
        self.script |= script
        self._tokens, self._filled = float(self._burst()), -1.0

    def forget(self) -> None:
        """Every count begins anew."""
        self.by_body, self.by_image, self.modes = Counter[str](), Counter[str](), Counter[str]()
        self.by_question = Counter[str]()  # "sha256 of the image, sha256 of the text": what a key of the journal stands for
        self.requests = self.others = self.answered = self.limited = 0
        self.most_in_flight = self.in_flight  # who is there now will still leave
        self.billed, self.told, self.batch_billed = Tokens(), Tokens(), Tokens()
        self.headers: dict[str, list[str]] = {}
        self.last: dict[str, Any] = {}

    def counts(self) -> dict[str, Any]:
        """requests: of generateContent; others: of everything else; billed: tokens that the service charges; told: those of them that a
        readable answer named; limited: 429s of the hidden limit."""
        names = (
            "requests others answered limited in_flight most_in_flight by_body by_image by_question modes headers billed told batch_billed"
        )
        return {name: value._asdict() if isinstance(value := getattr(self, name), Tokens) else value for name in names.split()}

    def saw(self, headers: Mapping[str, str]) -> None:
        for name, value in headers.items():
            kept = self.headers.setdefault(name.lower(), [])
            if value not in kept and len(kept) < SEEN:
                kept.append(value)

    def unread(self) -> Wire | None:
        """A mode that does not even read the request; it is then counted here."""
        name = (self.script["queue"] or [self.script["always"]])[0]
        mode = MODES.get(name)
        if not isinstance(mode, Wire) or mode.read:
            return None
        self.modes[name] += 1
        del self.script["queue"][:1]
        return mode

    def mode(self, asked: Asked, raw: bytes) -> str:
        """-> the name of the mode that this request meets, "" for none. Counts the request."""
        body = hashlib.sha256(raw).hexdigest()
        self.by_body[body] += 1
        self.by_image[asked.digest] += 1
        self.by_question[f"{asked.digest} {hashlib.sha256(asked.text.encode()).hexdigest()}"] += 1
        plan = self.script["by_image"].get(asked.digest, [])
        number = self.by_image[asked.digest]
        if self.script["queue"]:
            name = self.script["queue"].pop(0)
        elif self.script["always"]:
            name = self.script["always"]
        elif number <= len(plan):
            name = plan[number - 1]
        else:
            dice = random.Random(f"{self.script['seed']}|{body}|{self.by_body[body]}")
            name = dice.choice(self.script["modes"]) if self.script["modes"] and dice.random() < self.script["share"] else ""
        self.modes[name or "clean"] += 1
        return str(name)

    def over_limit(self) -> Fault | None:
        """A token bucket: the 429 of a request too many."""
        limit = self.script["limit"]
        if not limit:
            return None
        now = asyncio.get_running_loop().time()
        if self._filled >= 0:
            self._tokens = min(self._burst(), self._tokens + (now - self._filled) * limit)
        self._filled = now
        if self._tokens >= 1:
            self._tokens -= 1
            return None
        self.limited += 1
        wait = max(1, round((1 - self._tokens) / limit))
        bare = MODES["429_bare"]
        assert isinstance(bare, Fault)
        if self.script["limit_says"] == "info":
            return bare._replace(details=({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{wait}s"},))
        return bare._replace(headers=(("Retry-After", str(wait)),)) if self.script["limit_says"] == "header" else bare

    def _burst(self) -> float:
        return float(self.script["burst"] or self.script["limit"])

    def clean(self, asked: Asked, model: str) -> tuple[dict[str, Any], Tokens]:
        parts = answers.caption(asked)
        text = (answers.obeyed(asked, parts) if self.script["obedient"] else None) or json.dumps(parts, ensure_ascii=False)
        cost = answers.tokens(asked, text, self.script["thoughts"])
        return answers.response(text, cost, model), cost

    def body(self, mode: Mode | None, asked: Asked, model: str, key: str) -> bytes:
        """-> the body of a 200 (or 206): the clean answer or a changed one. It is billed, and told where it can be read."""
        response, cost = self.clean(asked, model)
        changed = mode.change(response) if isinstance(mode, Edit) else response
        self.answered += mode is None
        said = _read_usage(changed)
        self.billed = self.billed.plus(said or cost)
        self.told = self.told.plus(said or Tokens())
        return changed if isinstance(changed, bytes) else json.dumps(changed).replace("{key}", key).encode()

    def worked(self, mode: Fault | Page | Wire, asked: Asked, model: str) -> None:
        """Bills what was done for nothing."""
        if mode.billed:
            self.billed = self.billed.plus(self.clean(asked, model)[1])

    def line(self, request: dict[str, Any], model: str, key: str) -> dict[str, Any]:
        """A request of a batch file -> its line's `response` or `error`. Modes of the bare connection do not exist here: they are a 500."""
        asked = answers.read(request)
        mode = MODES.get(self.mode(asked, json.dumps(request, sort_keys=True).encode()))
        if mode is None or isinstance(mode, Edit):
            before = self.billed
            body = self.body(mode, asked, model, key)
            self.batch_billed = self.batch_billed.plus(Tokens(*(now - then for now, then in zip(self.billed, before, strict=True))))
            self.billed = before
            try:
                return {"response": json.loads(body.decode("utf-8-sig"))}
            except ValueError:
                return {"error": {"code": 13, "message": "Internal error encountered."}}
        if isinstance(mode, Fault):
            error = mode.body(key)["error"]
            error["code"] = RPC_CODES[error.pop("status")]
            return {"error": error}
        return {"error": {"code": 13, "message": "Internal error encountered."}}


def _read_usage(body: Any) -> Tokens | None:
    """What a client can read of a response's usage; None: nothing."""
    try:
        body = json.loads(body.decode("utf-8-sig")) if isinstance(body, bytes) else body
        usage = body["usageMetadata"]
        prompt, output, thoughts = (int(usage.get(name, 0)) for name in ("promptTokenCount", "candidatesTokenCount", "thoughtsTokenCount"))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None
    image = sum(int(one["tokenCount"]) for one in usage.get("promptTokensDetails", []) if one["modality"] == "IMAGE")
    return None if prompt <= 0 else Tokens(prompt - image, image, output, thoughts)
