"""Pages, the management API and the operators' admin. `/v1` never gets here: see `asgi.py`."""

from django.contrib import admin
from django.urls import include, path

from project.api import api

urlpatterns = [
    path("", include("proxy.dash.urls")),
    path("accounts/", include("allauth.account.urls")),
    path("api/", api.urls),
    path("admin/", admin.site.urls),
]
