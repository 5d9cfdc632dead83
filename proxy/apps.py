from django.apps import AppConfig


class ProxyConfig(AppConfig):
    name = "proxy"
    verbose_name = "Traffic"

    def ready(self) -> None:
        from proxy import audit, snapshot

        snapshot.listen()
        audit.listen()
