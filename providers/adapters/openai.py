"""OpenAI, and any server that speaks its API: give another base URL, as OpenAI's SDKs take it (ending in /v1)."""

from urllib.parse import urlsplit

from providers.adapter import OpenAICompatible


class OpenAI(OpenAICompatible):
    name = "openai"
    title = "OpenAI or compatible"
    base_url = "https://api.openai.com/v1"

    def base_url_from(self, given: str) -> str:
        """Operators often leave out the `/v1` of a bare host; any other path is taken at its word."""
        base_url = super().base_url_from(given)
        return base_url if urlsplit(base_url).path else f"{base_url}/v1"
