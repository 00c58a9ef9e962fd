"""What is wrong where a store refuses a request or does not answer, in a sentence.

obstore raises one kind of error for nearly all of it. Its text quotes the store's answer (status, and the code that
S3's protocol has for the reason) and, below its first line, why a connection failed.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from vimfast.errors import UserError
from vimfast.stores.store import Missing

_KEYS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, run aws configure, or set AWS_SKIP_SIGNATURE=true for a "
    "public bucket",
    "gs": "run gcloud auth application-default login, or set GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_USE_AZURE_CLI=true after az login",
    "ht": "check the address",
}
_REFUSALS = {  # by S3's code for them
    "InvalidAccessKeyId": ("the store does not know the access key", "check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL"),
    "SignatureDoesNotMatch": ("the secret key is not that of the access key", "check AWS_SECRET_ACCESS_KEY"),
    "RequestTimeTooSkewed": ("the clock of this machine is wrong", "set it, then run again"),
    "AccessDenied": (
        "access is denied",
        "use credentials that may, and check the URL: stores also say this of what does not exist",
    ),
}
_ELSEWHERE = ("AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException")
_METADATA = "169.254.169.254"  # where a cloud's machine gets credentials; on others nobody answers there
_ADDRESS = r"https?://([^/\s:\[\]]+|\[[0-9A-Fa-f:.]+\])(:\d+)?(/\S*)?"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


class Unanswered(UserError):
    """The request was repeated, and the store did not answer it or was too busy; it may yet."""


class _Answer(NamedTuple):
    line: str  # the first, without the tree of causes that follows it
    status: str  # of HTTP, or nothing
    code: str
    message: str
    region: str  # which the bucket is in, where the store says so
    cause: str  # of a connection that failed
    repeated: bool


def no_credentials(where: str, done: str, url: str, said: str = "") -> UserError:
    """None are set, or the machine's role has none."""
    return UserError(f"{where} cannot be {done}: no credentials were found{said and f' ({said})'}", _keys(url))


def check_endpoint() -> None:
    """Whether the address of another store than Amazon's is one; obstore panics where it is not.

    Raises:
        UserError: it is not.
    """
    for name in _ENDPOINTS:
        if (value := os.environ.get(name)) and not re.fullmatch(_ADDRESS, value):
            raise UserError(f"{name} is {value!r}", "give the address of a server, such as http://127.0.0.1:9000")


def explained(error: Exception, where: str, done: str, url: str, seconds: float) -> UserError:
    """An error of obstore in a sentence.

    Args:
        where: the object, and what could not be `done` to it.
        url: of the store.
        seconds: for which the request was repeated.
    """
    answer = _parse(str(error))
    said = " ".join(part for part in (answer.status, answer.code) if part)
    begin = f"{where} cannot be {done}: "
    if answer.code == "NoSuchBucket":
        return Missing(f"{begin}there is no such bucket", "check the URL and the region")
    if "Range request not supported" in answer.line:
        fix = "use one that does, such as nginx"
        return UserError(f"{begin}its server does not answer requests for parts of a file", fix)
    if found := re.search(r"credential provider: (?:\w+: )?(.*)", answer.line):  # botocore's words
        return UserError(f"{begin}the credentials of the profile cannot be renewed ({found[1]})", "log in again")
    if _METADATA in answer.line:
        return no_credentials(where, done, url)
    if "Expired" in answer.code or answer.code == "InvalidToken" or answer.status == "401":
        fix = "renew them, then run again"
        return UserError(f"{begin}the credentials have expired or are not valid ({said})", fix)
    if "token request" in answer.line or "credential" in answer.line.lower():
        return no_credentials(where, done, url, answer.line)
    if answer.code in _ELSEWHERE or "LOCATION" in answer.line or answer.status == "301":
        fix = f"set AWS_REGION={answer.region}" if answer.region else "set AWS_REGION to its region"
        return UserError(f"{begin}the bucket is in another region", fix)
    if answer.code in _REFUSALS:
        problem, fix = _REFUSALS[answer.code]
        return UserError(f"{begin}{problem} ({said})", fix)
    if answer.status == "403":
        return UserError(f"{begin}access is denied ({said})", _keys(url))
    if answer.status in ("429", "503"):
        problem = f"the store has refused requests for {seconds:.0f} s ({said})"
        return Unanswered(f"{begin}{problem}", "run again when it is less busy")
    if answer.status == "501":
        fix = "check the address, and that the server speaks the protocol of such URLs"
        return UserError(f"{begin}its server does not know such requests ({said})", fix)
    if answer.status.startswith("5"):
        return Unanswered(f"{begin}the store has failed for {seconds:.0f} s ({said})", "run again later")
    if answer.status:
        return UserError(f"{begin}the store refuses the request ({said} {answer.message})", "check the URL")
    if answer.repeated or answer.cause:
        return _unreachable(answer, begin, url, seconds)
    return UserError(f"{begin}{answer.line}", "check the network and the address, then run again")


def too_short(where: str, end: int | None) -> UserError:
    """An object ends before byte `end`, or before the first that was asked for."""
    which = "a byte that is wanted" if end is None else f"byte {end}"
    return UserError(f"{where} is too short: it ends before {which}", "copy it to the store again")


def first_line(error: Exception) -> str:
    """What obstore says, without the tree of causes that follows it."""
    return str(error).partition("\n")[0].strip()


def _keys(url: str) -> str:
    return _KEYS.get(url[:2].lower(), _KEYS["az"])


def _unreachable(answer: _Answer, begin: str, url: str, seconds: float) -> UserError:
    server = _found(r"Error performing \w+ (https?://[^/\s]+)", answer.line) or "the store"
    if answer.cause == "InvalidContentType":
        return UserError(f"{begin}{server} does not speak TLS", "write http:// for https://")
    name = next((name for name in _ENDPOINTS if os.environ.get(name) and url.lower().startswith("s3")), "the URL")
    why = f" ({answer.cause})" if answer.cause else ""
    fix = f"check the network and {name}, then run again"
    return Unanswered(f"{begin}{server} has not answered for {seconds:.0f} s{why}", fix)


def _parse(text: str) -> _Answer:
    line, _, tree = text.partition("\n")
    return _Answer(
        line.strip(),
        _found(r"status code: (\d+)", text),
        _found(r"<Code>(\w+)</Code>", text),
        _found(r"<Message>([^<]*)</Message>", text),
        _found(r"<Region>([\w-]+)</Region>", text) or _found(r"expecting '([\w-]+)'", text),
        # The system's words, those of the name service, TLS's, or the kind of error of the library in between.
        _found(r'message: "([^"]+)"', tree)
        or _found(r'error: "[^"]*?([^":]+)"', tree).strip()
        or _found(r"(InvalidContentType|InvalidCertificate\(\s*\w+)", tree)
        or _found(r"kind: (Timeout)", tree).lower(),
        re.search(r"after \d+ retries", line) is not None,
    )


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
