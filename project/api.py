"""The management API: one ninja API that the apps' routers join. Errors are `{"error": {"code", "message", "fields"?}}`."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.decorators import login_required
from django.core.exceptions import PermissionDenied, ValidationError
from django.http import Http404, HttpRequest, HttpResponse
from ninja import NinjaAPI
from ninja.errors import AuthenticationError, HttpError
from ninja.errors import ValidationError as WrongRequest
from ninja.openapi.schema import OpenAPISchema
from ninja.security import SessionAuth

from accounts.actions import Conflict
from accounts.api import router as keys
from accounts.models import User
from providers.secrets import redact
from proxy.api import router as usage
from proxy.credentials_api import router as credentials
from proxy.routes_api import router as routes


class SignedIn(SessionAuth):
    """By session, with the CSRF token for everything that changes something. Who is not signed in is told that first."""

    def __call__(self, request: HttpRequest) -> User | None:
        return super().__call__(request) if request.user.is_authenticated else None


# Of every operation: all errors have one shape.
ERROR = {
    "description": "It was not done. `fields`: what is wrong, by the field of the query or the body, such as `limits.0.amount`.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["code", "message"],
                        "properties": {
                            "code": {"type": "string"},
                            "message": {"type": "string"},
                            "fields": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}},
                        },
                    }
                },
            }
        }
    },
}


class ManagementApi(NinjaAPI):
    def get_openapi_schema(self, **options: Any) -> OpenAPISchema:
        schema = super().get_openapi_schema(**options)
        schema["components"]["responses"] = {"Error": ERROR}
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"]["4XX"] = {"$ref": "#/components/responses/Error"}
        return schema

    def create_response(self, *args: Any, **kwargs: Any) -> HttpResponse:
        # Nobody keeps a copy: some answers hold a fresh key, and all of them are about one signed-in person.
        response = super().create_response(*args, **kwargs)
        response["Cache-Control"] = "no-store"
        return response


api = ManagementApi(
    title="Sluice",
    version="0.1",
    description=(
        "Keys, usage, upstream accounts and aliases. Sign in on the pages first; what changes something carries the CSRF token. "
        "A request that is not valid, or lies beyond a limit, gets 400 with what is wrong in `fields`."
    ),
    urls_namespace="api",
    auth=[SignedIn()],
    docs_decorator=login_required,
)
api.add_router("", keys)
api.add_router("", usage)
api.add_router("", credentials)
api.add_router("", routes)


def _say(request: HttpRequest, status: int, code: str, message: str, fields: dict[str, list[str]] | None = None) -> HttpResponse:
    # What was sent may be quoted in it, and a secret that stood in the wrong field with it: that stays out.
    error: dict[str, Any] = {"code": code, "message": redact(message)}
    if fields:
        error["fields"] = {redact(name): [redact(problem) for problem in problems] for name, problems in fields.items()}
    return api.create_response(request, {"error": error}, status=status)


@api.exception_handler(AuthenticationError)
def _nobody(request: HttpRequest, problem: AuthenticationError) -> HttpResponse:
    return _say(request, 401, "not_signed_in", "Sign in first.")


@api.exception_handler(Http404)
def _missing(request: HttpRequest, problem: Http404) -> HttpResponse:
    return _say(request, 404, "not_found", "There is no such thing, or it is not yours.")


@api.exception_handler(HttpError)
def _http_error(request: HttpRequest, problem: HttpError) -> HttpResponse:
    codes = {400: "bad_request", 403: "forbidden", 429: "too_many_requests"}
    return _say(request, problem.status_code, codes.get(problem.status_code, "error"), problem.message)


@api.exception_handler(PermissionDenied)
def _not_allowed(request: HttpRequest, problem: PermissionDenied) -> HttpResponse:
    return _say(request, 403, "forbidden", str(problem))


@api.exception_handler(Conflict)
def _conflict(request: HttpRequest, problem: Conflict) -> HttpResponse:
    return _say(request, 409, "conflict", str(problem))


@api.exception_handler(ValidationError)
def _invalid(request: HttpRequest, problem: ValidationError) -> HttpResponse:
    fields = problem.message_dict if hasattr(problem, "error_dict") else None
    return _say(request, 400, "invalid", " ".join(problem.messages), fields)


@api.exception_handler(WrongRequest)
def _wrong_request(request: HttpRequest, problem: WrongRequest) -> HttpResponse:
    fields: dict[str, list[str]] = {}
    for error in problem.errors:
        # The first step is where it stood (body, query), and for a body the second is our parameter's name.
        place = error["loc"][2:] if error["loc"][0] == "body" else error["loc"][1:]
        fields.setdefault(".".join(map(str, place)) or "body", []).append(error["msg"])
    return _say(request, 400, "invalid", "The request is not valid: " + ", ".join(fields) + ".", fields)
