from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect


def front(request: HttpRequest) -> HttpResponse:
    """People get the sign-in page or their keys, programs get a word."""
    if "text/html" in request.headers.get("accept", ""):
        return redirect("account_login")
    return JsonResponse({"status": "running"})
