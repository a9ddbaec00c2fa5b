"""What one try of a captioner gave, whoever the captioner is: the words that engines, journal and budget share."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from udfs.caption_request import Request

# what is to be done with a reply
ANSWER = "answer"  # there is a text (perhaps cut off): it is paid for and is checked
RETRY = "retry"  # the same request may succeed later
PERMANENT = "permanent"  # this engine will not answer this request; another may
QUARANTINE = "quarantine"  # nobody is to be asked again, and nothing but id and code is kept
STOP = "stop"  # no request of the job can succeed: it ends, and says why

# code -> outcome: every way in which a try ends
CODES = {
    "ok": ANSWER,
    "cut": ANSWER,  # the limit of output tokens was reached
    "rate_limited": RETRY,
    "timeout": RETRY,
    "dropped": RETRY,  # no connection, or it was lost before an answer began
    "cut_body": RETRY,  # an answer began and did not end
    "server_error": RETRY,
    "not_json": RETRY,  # a 200 that holds something else, such as a proxy's page
    "not_an_answer": RETRY,  # JSON of another shape
    "no_text": RETRY,
    "malformed": RETRY,  # the model's own word for a broken answer
    "unknown_finish": RETRY,
    "bad_request": PERMANENT,
    "too_large": PERMANENT,
    "blocked": PERMANENT,
    "blocked_unknown": PERMANENT,
    "refused": PERMANENT,  # the model began and its answer was withheld: safety, recitation, personal data, ...
    "prohibited": QUARANTINE,
    "key_refused": STOP,
    "no_such_model": STOP,
    "bad_settings": STOP,  # the service knows none of what is set for every request: no image is to blame
    "spend_cap": STOP,
    "quota_used_up": STOP,  # of the day: no waiting within the job cures it
    "usage_policy": STOP,  # PUP_LIMITED_DISABLED
    "redirected": STOP,
}


class Usage(NamedTuple):
    """Billed tokens of one try. image is part of the prompt that was sent, not of `prompt`; thoughts are billed as output.

    estimated: the server did not say, and this is the most that it can have been.
    """

    prompt: int
    image: int
    output: int
    thoughts: int
    estimated: bool = False


class Reply(NamedTuple):
    """code: one of CODES; detail: short, holds no key and, of a prohibited image, nothing; text: the answer, empty without one;
    usage: None when nothing can have been billed; retry_after: seconds that the server asked for.
    """

    code: str
    detail: str = ""
    text: str = ""
    usage: Usage | None = None
    retry_after: float | None = None

    @property
    def outcome(self) -> str:
        return CODES[self.code]


class Engine(Protocol):
    """A captioner that is asked over a network."""

    async def ask(self, request: Request, image: bytes, mime: str) -> Reply:
        """One try. Raises nothing: what went wrong is the reply's code."""

    async def close(self) -> None:
        """Ends its connections."""
