"""Pages, the management API and the operators' admin. `/v1` never gets here: see `asgi.py`."""

from django.contrib import admin
from django.http import Http404, HttpRequest, HttpResponse
from django.urls import include, path

from project.api import api


def not_offered(request: HttpRequest) -> HttpResponse:
    """An e-mail address is who somebody is here: keys are issued to it. An administrator changes it, not its owner."""
    raise Http404("This is not offered here.")


urlpatterns = [
    path("", include("proxy.dash.urls")),
    path("accounts/email/", not_offered),
    path("accounts/", include("allauth.account.urls")),
    path("api/", api.urls),
    path("admin/", admin.site.urls),
]
