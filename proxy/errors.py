"""Everything that can go wrong on a call, each with the status and code that the client sees.

ApiError                        providers/wire.py
├── GatewayError                refused by us
│   ├── Unauthenticated         401 invalid_api_key          or key_revoked, of a call under way
│   ├── IpNotAuthorized         401 ip_not_authorized
│   ├── ModelNotAllowed         403 model_not_allowed
│   ├── Frozen                  403 frozen                   by hand, until a moment; with Retry-After
│   ├── UnpricedModel           403 model_unpriced           a hard budget cannot hold money for it
│   ├── MetricsNotPublic        403 metrics_not_public
│   ├── InvalidRequest          400 (or the code given)
│   ├── UnknownPath             404
│   ├── ModelNotFound           404 model_not_found
│   ├── WrongMethod             405 method_not_supported     with Allow
│   ├── TooLarge                413
│   ├── OverLimit               429 rate_limit_exceeded      with Retry-After
│   ├── OverBudget              429 insufficient_quota       retrying does not help
│   └── Unavailable             503                          ours to mend: journal full, database away, not ready
├── UpstreamFailure             providers/failures.py        what an upstream did
└── ClientClosed                499, in our records alone
"""

from __future__ import annotations

from typing import Any

from providers.wire import ApiError


class GatewayError(ApiError):
    """We refuse, before or instead of calling an upstream."""

    type = "invalid_request_error"


class Unauthenticated(GatewayError):
    status = 401
    code = "invalid_api_key"


class IpNotAuthorized(GatewayError):
    status = 401
    code = "ip_not_authorized"


class ModelNotAllowed(GatewayError):
    status = 403
    type = "permission_error"
    code = "model_not_allowed"


class Frozen(GatewayError):
    status = 403
    type = "permission_error"
    code = "frozen"


class UnpricedModel(GatewayError):
    status = 403
    type = "permission_error"
    code = "model_unpriced"


class InvalidRequest(GatewayError):
    status = 400


class UnknownPath(GatewayError):
    status = 404


class MetricsNotPublic(GatewayError):
    status = 403
    type = "permission_error"
    code = "metrics_not_public"


class ModelNotFound(GatewayError):
    status = 404
    code = "model_not_found"


class WrongMethod(GatewayError):
    status = 405
    code = "method_not_supported"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class TooLarge(GatewayError):
    status = 413
    code = "request_too_large"


class OverLimit(GatewayError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    granted: Any = None  # what is left of the limits per minute: see `call.Granted`


class OverBudget(GatewayError):
    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"
    should_retry = False


class Unavailable(GatewayError):
    status = 503
    type = "server_error"
    code = "unavailable"


class ClientClosed(ApiError):
    """The client went away. Nobody is told; the record says 499."""

    status = 499
    code = "client_closed"
