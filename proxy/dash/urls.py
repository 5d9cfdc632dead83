from django.urls import path

from proxy.dash import views

urlpatterns = [path("", views.front, name="front")]
