"""Lines to copy into a terminal or a program that call Sluice with a key."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from accounts.principal import Principal
from providers import registry
from providers.wire import ApiError
from proxy.catalog import Catalog
from proxy.pipeline.route import allowed, resolve, visible_models, with_secret

# Shown where the key itself is not: it is known only at the moment when it is made.
VARIABLE = "SLUICE_API_KEY"
DEMO_MODEL = "demo/echo"
PLACEHOLDER = "A-MODEL-OF-YOURS"  # where there is none that this key can call
ENDPOINT = "chat/completions"  # that the lines call

# A model's name comes from clients and goes into code that people paste: only what needs no quoting is shown.
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,99}")
# Upstreams list whatever they have, and say of few what it is for.
_NOT_FOR_CHAT = re.compile(
    r"embed|moderat|rerank|whisper|transcri|tts|speech|audio|realtime|image|dall-e|video|sora|davinci|babbage|instruct"
)


@dataclass(frozen=True, slots=True)
class Snippet:
    id: str
    title: str
    text: str


def example_model(principal: Principal, catalog: Catalog, used: Iterable[str] = ()) -> str:
    """A model that this caller can call, and that can be pasted as it is: one `used` before, else the demo, else what there is."""
    named = chain(principal.models, (name for name, _ in visible_models(principal, catalog)))
    for name in chain(used, [DEMO_MODEL], (name for name in named if not _NOT_FOR_CHAT.search(name))):
        if _PLAIN.fullmatch(name) and _can_call(principal, name, catalog):
            return name
    return PLACEHOLDER


def _can_call(principal: Principal, model: str, catalog: Catalog) -> bool:
    """By the trip's own rules. Limits, prices and how upstreams are do not count: they may be different in a minute."""
    try:
        groups = with_secret(allowed(principal, model, resolve(principal, model, catalog), catalog), "")
    except ApiError:
        return False
    return any(ENDPOINT in registry.adapter(upstream.kind).endpoints for group in groups.values() for upstream, _ in group)


def snippets(public_url: str, model: str, key: str | None = None) -> list[Snippet]:
    """With the key itself where it is given, else with a variable of the environment."""
    base = f"{public_url}/v1"
    python_key = f'"{key}"' if key else f'os.environ["{VARIABLE}"]'
    node_key = f'"{key}"' if key else f"process.env.{VARIABLE}"
    shell_key = key or f"${VARIABLE}"
    curl = f"""curl -N {base}/chat/completions \\
  -H "Authorization: Bearer {shell_key}" \\
  -H "Content-Type: application/json" \\
  -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'"""
    python = f"""{"" if key else "import os" + chr(10) + chr(10)}from openai import OpenAI

client = OpenAI(base_url="{base}", api_key={python_key})
answer = client.chat.completions.create(
    model="{model}",
    messages=[{{"role": "user", "content": "Hello"}}],
)
print(answer.choices[0].message.content)"""
    node = f"""import OpenAI from "openai";

const client = new OpenAI({{ baseURL: "{base}", apiKey: {node_key} }});
const answer = await client.chat.completions.create({{
  model: "{model}",
  messages: [{{ role: "user", content: "Hello" }}],
}});
console.log(answer.choices[0].message.content);"""
    environment = f"""export OPENAI_BASE_URL="{base}"
export OPENAI_API_KEY="{shell_key}\""""
    return [
        Snippet("curl", "curl", curl),
        Snippet("python", "Python", python),
        Snippet("node", "Node", node),
        Snippet("environment", "Environment", environment),
    ]
