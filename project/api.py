"""The management API: one ninja API that the apps' routers join."""

from ninja import NinjaAPI

api = NinjaAPI(title="Sluice", version="0.1", urls_namespace="api")
