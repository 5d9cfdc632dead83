"""Signing in: by e-mail and password. Accounts are made by administrators; nobody signs up."""

from allauth.account.adapter import DefaultAccountAdapter
from django.conf import settings
from django.http import HttpRequest

from accounts.addresses import client_address, parsed


class AccountAdapter(DefaultAccountAdapter):
    def is_open_for_signup(self, request: HttpRequest) -> bool:
        return False

    def get_client_ip(self, request: HttpRequest) -> str:
        """For the limits on signing in. The socket's would be the front proxy's for everybody, so that anyone could lock all out."""
        said = request.META
        address = client_address(said.get("REMOTE_ADDR", ""), said.get("HTTP_X_FORWARDED_FOR", ""), settings.TRUSTED_PROXIES)
        return str(parsed(address) or address)
