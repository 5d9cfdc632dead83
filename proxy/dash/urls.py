"""Paths of the pages."""

from django.urls import path

from proxy.dash import views

urlpatterns = [
    path("", views.front, name="front"),
    path("keys/", views.keys, name="keys"),
    path("keys/<int:key_id>/", views.key, name="key"),
    path("keys/<int:key_id>/requests.csv", views.requests_csv, name="requests-csv"),
    path("keys/<int:key_id>/requests/<uuid:request_id>/", views.one_request, name="request"),
    path("keys/<int:key_id>/rotate/", views.rotate, name="rotate"),
    path("keys/<int:key_id>/freeze/", views.freeze, name="freeze"),
    path("keys/<int:key_id>/thaw/", views.thaw, name="thaw"),
    path("keys/<int:key_id>/revoke/", views.revoke, name="revoke"),
    path("keys/<int:key_id>/rename/", views.rename, name="rename"),
]
