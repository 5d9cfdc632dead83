"""What can go wrong at an upstream, in one vocabulary (protocol reference 0.3). An adapter raises exactly one of these.

UpstreamFailure                 what the client sees                another credential or target may be tried?
├── UpstreamRefused             the client's own mistake            no
│   ├── InvalidAtUpstream       400 (or the 4xx that was said)
│   │   ├── UsageOptionRefused  400                                 the same one again, without the option we added
│   │   └── OptionRefused       400                                 the same one again, without what may be left out
│   ├── ContextLength           400 context_length_exceeded
│   ├── ContentFiltered         400 content_policy_violation
│   ├── ModelGone               404 model_not_found
│   └── CallersKeyRefused       401 invalid_api_key                 (the key came in X-Upstream-Key)
├── UpstreamFailed              about the account or the upstream   yes, until content has gone to the client
│   ├── CredentialRefused       502 upstream_auth_failed
│   ├── NotRenewed              503 upstream_auth_pending       (its token has ended, and there is no new one yet)
│   ├── ForbiddenAtUpstream     403
│   ├── ModelNotHere            404 model_not_found                 (this account has not got it; another may)
│   ├── OutOfCredit             402 or 429 insufficient_quota
│   ├── RateLimited             429 rate_limit_exceeded
│   ├── Overloaded              503 overloaded
│   ├── UpstreamServer          502 upstream_error
│   ├── UpstreamTimeout         504 upstream_timeout
│   ├── UpstreamUnreachable     502 upstream_unreachable            (it never had the request)
│   │   └── NoConnectionFree    503 overloaded                      all that we allow ourselves to it are in use
│   └── UpstreamProtocol        502 upstream_bad_response
└── UpstreamBroke               502 upstream_broke                  no: the stream had begun
"""

from __future__ import annotations

from providers.wire import ApiError


class UpstreamFailure(ApiError):
    """The call reached an upstream, or tried to. `upstream_status` is what it said, where it said anything."""

    upstream_status: int | None = None
    detail = ""  # for operators alone: it may name hosts
    cause: UpstreamFailure | None = None  # of a broken stream: what the same failure had been before content went out
    unlearn = False  # True: what earlier calls found out about the account (`Ask.learned`) does not hold any more


class UpstreamRefused(UpstreamFailure):
    status = 400
    type = "invalid_request_error"


class InvalidAtUpstream(UpstreamRefused):
    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status


class UsageOptionRefused(InvalidAtUpstream):
    pass


class OptionRefused(InvalidAtUpstream):
    """An answer without this option is better than none: the same call goes out again, with `option` in `Ask.left_out`."""

    def __init__(self, message: str, *, option: str = "", code: str | None = None) -> None:
        super().__init__(message, param=option or None, code=code)
        self.option = option


class ContextLength(UpstreamRefused):
    code = "context_length_exceeded"


class ContentFiltered(UpstreamRefused):
    code = "content_policy_violation"


class ModelGone(UpstreamRefused):
    status = 404
    code = "model_not_found"


class UpstreamFailed(UpstreamFailure):
    status = 502
    whole_account = False  # True: the failure is about the account, not about one model of it


class CredentialRefused(UpstreamFailed):
    code = "upstream_auth_failed"
    whole_account = True


class NotRenewed(UpstreamFailed):
    status = 503
    code = "upstream_auth_pending"
    whole_account = True


class CallersKeyRefused(UpstreamRefused):
    """The caller's own upstream key (`X-Upstream-Key`) was refused: that is the caller's to mend."""

    status = 401
    code = "invalid_api_key"


class ForbiddenAtUpstream(UpstreamFailed):
    status = 403
    type = "permission_error"


class ModelNotHere(UpstreamFailed):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class OutOfCredit(UpstreamFailed):
    type = "insufficient_quota"
    code = "insufficient_quota"
    should_retry = False

    def __init__(self, message: str, *, status: int = 429, retry_after_seconds: float | None = None) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds)
        self.status = status


class RateLimited(UpstreamFailed):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Overloaded(UpstreamFailed):
    status = 503
    code = "overloaded"


class UpstreamServer(UpstreamFailed):
    code = "upstream_error"


class UpstreamTimeout(UpstreamFailed):
    status = 504
    code = "upstream_timeout"


class UpstreamUnreachable(UpstreamFailed):
    code = "upstream_unreachable"


class NoConnectionFree(UpstreamUnreachable):
    status = 503
    code = "overloaded"


class UpstreamProtocol(UpstreamFailed):
    code = "upstream_bad_response"


class UpstreamBroke(UpstreamFailure):
    status = 502
    code = "upstream_broke"


def gateway_error(problem: UpstreamFailure) -> bool:
    """True for failures that count towards the ejection of a credential: the upstream as such is unwell."""
    unwell = Overloaded | UpstreamServer | UpstreamTimeout | UpstreamUnreachable | UpstreamProtocol
    return isinstance(problem, unwell) and not isinstance(problem, NoConnectionFree)
