"""Lines to copy into a terminal or a program that call Sluice with a key."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

# Shown where the key itself is not: it is known only at the moment when it is made.
VARIABLE = "SLUICE_API_KEY"
FALLBACK_MODEL = "demo/echo"
PLACEHOLDER = "A-MODEL-OF-YOURS"  # for a key that may not use the other

# A model's name comes from clients and goes into code that people paste: only what needs no quoting is shown.
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,99}")


@dataclass(frozen=True, slots=True)
class Snippet:
    id: str
    title: str
    text: str


def example_model(names: Iterable[str], patterns: Collection[str] = ()) -> str:
    """The first that can be pasted as it is, else what the key may use of what is always there. `patterns`: its models; none = all."""
    may_fall_back = not patterns or any(fnmatchcase(FALLBACK_MODEL, pattern) for pattern in patterns)
    return next((name for name in names if _PLAIN.fullmatch(name)), FALLBACK_MODEL if may_fall_back else PLACEHOLDER)


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
