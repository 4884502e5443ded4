"""Why a server did not give what it was asked for: the errors of fsspec, botocore and aiohttp as OSErrors."""

from __future__ import annotations

import asyncio
import errno

from maxact.errors import one_line

CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for a public bucket FSSPEC_S3_ANON=true",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login; "
    "for a public bucket FSSPEC_GS_TOKEN=anon",
    "http": "put name and password for the host into ~/.netrc",
}
LASTING = (errno.ENOENT, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL, errno.EFBIG)  # asking again soon does not help


def as_oserror(error: Exception, kind: str) -> OSError:
    """Any error of fsspec, botocore or aiohttp as an OSError with a number and words; see `LASTING`."""
    status, name = http_status(error), type(error).__name__
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(errno.ENOENT, "there is no such file, folder or bucket")
    if "Credentials" in name or "Token" in name:
        return PermissionError(errno.EACCES, f"no credentials ({line(error)}): {CREDENTIALS[kind]}")
    if isinstance(error, PermissionError) or status in (401, 403):
        return PermissionError(errno.EACCES, f"access denied ({line(error)}): {CREDENTIALS[kind]}")
    if isinstance(error, asyncio.TimeoutError | TimeoutError) or "Timeout" in name:
        return TimeoutError(errno.ETIMEDOUT, f"the server did not answer in time ({line(error)})")
    if status in (408, 429, 503) or getattr(error, "errno", None) == errno.EBUSY:
        return OSError(errno.EBUSY, f"the server is busy ({line(error)})")
    if isinstance(error, ValueError | TypeError) or "Validation" in name or status == 400:
        return OSError(errno.EINVAL, f"it cannot be asked for ({line(error)})")
    number = getattr(error, "errno", None) or 0
    if isinstance(error, ConnectionError) or any(word in name for word in ("Connect", "Disconnect", "Payload")):
        # a name that cannot be resolved has a number below zero
        return OSError(number if number > 0 else errno.ECONNRESET, f"the server cannot be reached ({line(error)})")
    if isinstance(error, OSError) and number > 0 and status is None and error.strerror:
        return OSError(number, line(error.strerror))
    return OSError(errno.EIO, f"the server failed ({line(error)})")


def http_status(error: BaseException | None) -> int | None:
    """The status of the answer that an error, or what caused it, came from: aiohttp's, botocore's or gcsfs's."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return response if isinstance(response, int) else None
        for name in ("status", "code"):
            if isinstance(value := getattr(error, name, None), int):
                return value
        error = error.__cause__
    return None


def line(error: object) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return one_line(text if len(text) <= 200 else text[:200] + "…")
