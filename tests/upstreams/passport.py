"""Passport: a kind that signs in, for tests alone. It speaks OpenAI; its accounts sign in by either flow at `oauth_server.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from providers.adapter import OpenAICompatible, Target
from providers.oauth import SignIn, TokenSet

REDIRECT = "http://127.0.0.1:8085/oauth2callback"


class Passport(OpenAICompatible):
    name = "passport"
    title = "Passport"
    base_url = "https://passport.example/v1"
    settings = frozenset(
        {"flow", "client_id", "client_secret", "token_url", "device_url", "authorize_url", "redirect_uri", "region", "dialect"}
    )

    def headers(self, target: Target) -> dict[str, str]:
        return {**super().headers(target), "X-Region": target.settings.get("region", "nowhere")}

    def sign_in(self, settings: Mapping[str, str]) -> SignIn | None:
        if settings.get("flow") == "none":
            return None
        if not settings.get("client_id"):
            raise ValueError("Set client_id: the id of the client that you registered with the vendor.")
        return SignIn(
            flow="code" if settings.get("flow") == "code" else "device",
            token_url=settings.get("token_url", "https://passport.example/token"),
            client_id=settings["client_id"],
            client_secret=settings.get("client_secret", ""),
            authorize_url=settings.get("authorize_url", ""),
            device_url=settings.get("device_url", ""),
            redirect_uri=settings.get("redirect_uri", REDIRECT),
            scopes=("models", "profile"),
        )

    def tokens_from(self, given: str) -> TokenSet | None:
        if not given.lstrip().startswith("{"):
            return None
        try:
            said = json.loads(given)
        except ValueError:
            raise ValueError("This looks like a credential file, and is not JSON.") from None
        if not said.get("access_token") and not said.get("refresh_token"):
            raise ValueError("This credential file has no tokens.")
        until = said.get("expiry_date")
        return TokenSet(said.get("access_token", ""), said.get("refresh_token", ""), until / 1000 if until else None, self.facts_from(said))

    def facts_from(self, reply: Any) -> dict[str, str]:
        return {"region": reply["region"]} if reply.get("region") else {}


def installed_in(folder: Path) -> str:
    """Make it an outside package there, as `pip` would. The folder goes into PYTHONPATH."""
    record = folder / "sluice_passport-1.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: sluice-passport\nVersion: 1\n")
    (record / "entry_points.txt").write_text("[sluice.adapters]\npassport = tests.upstreams.passport:Passport\n")
    return str(folder)


def file_of(tokens: dict[str, Any], until: float | None = None) -> str:
    """The credential file that the vendor's own tool would have written."""
    kept = {name: tokens[name] for name in ("access_token", "refresh_token", "region") if name in tokens}
    return json.dumps(kept | ({"expiry_date": int(until * 1000)} if until else {}))
