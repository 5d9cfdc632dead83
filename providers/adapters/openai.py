"""OpenAI, and any server that speaks its API: give another base URL, as OpenAI's SDKs take it (ending in /v1)."""

from providers.adapter import OpenAICompatible


class OpenAI(OpenAICompatible):
    name = "openai"
    title = "OpenAI or compatible"
    base_url = "https://api.openai.com/v1"
