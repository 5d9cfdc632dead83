"""What the forerunners' files say, as a plan: OpenAICompatible's `config.json`, and env files of the small proxies.

Pure: text in, plan out. Nothing of the file is left out in silence: what has no counterpart becomes a remark. A plan
can be printed without showing a secret. Protocol references: Gemini/Qwen/CodeGeeX section 1, CodeGPT/Kimi/Puter/OpenAI
sections 1.8, 2.13 and 4.1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from providers.secrets import SecretText

MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Remark:
    """One line of the report: what became of one thing in the file. Never holds a secret."""

    said: str  # made, unchanged, ignored, refused, note, WARNING
    where: str  # codegeex[0].token, OPENAI_API_KEY
    why: str

    def __str__(self) -> str:
        return f"{self.said}: {self.where}: {self.why}"


@dataclass(frozen=True, slots=True)
class Account:
    """A credential to be made."""

    where: str
    kind: str
    label: str
    prefix: str
    secret: SecretText
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)  # a proxy's address may hold a password
    tokens: bool = False  # the secret is the JSON of a sign-in's tokens
    mark: SecretText = field(default=SecretText(""))  # what stays the same of it from one import to the next
    base_url: str = ""
    own_path: str = ""  # the path at the end of the base URL that is the vendor's, not the operator's
    catch_all: str = ""  # its model under `*`; "*" = whatever was asked for


@dataclass(frozen=True, slots=True)
class Key:
    """A key that goes on working as it is."""

    where: str
    secret: SecretText


@dataclass(frozen=True, slots=True)
class Plan:
    accounts: tuple[Account, ...]
    keys: tuple[Key, ...]
    remarks: tuple[Remark, ...]
    secrets: frozenset[str] = field(default=frozenset(), repr=False)  # every secret text in the file: to be taken out of what is said


def read(text: str, *, written_at: float | None = None) -> Plan:
    """What a file asks for. `written_at` (seconds since the epoch): when it was written, which tokens without a date count from.

    Raises ValueError, in words, for a file that is neither of the two."""
    text = text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    if "\0" in text:
        raise ValueError("This is no text file.")
    return _config(text, written_at) if text.lstrip()[:1] in ("{", "[") else _env(text)


# config.json


@dataclass(frozen=True, slots=True)
class _Section:
    kind: str
    settings: tuple[str, ...] = ()
    always: Mapping[str, str] = field(default_factory=dict)
    tokens: bool = False


_SECTIONS = {
    "codegeex": _Section("codegeex", ("user_id", "user_role", "ide", "ide_version", "plugin_version", "machine_id", "talk_id", "locale")),
    "qwen": _Section("qwen_web"),
    "qwen_code": _Section("qwen", always={"auth": "oauth"}, tokens=True),
    "gemini_cli": _Section("gemini_cli", ("project_id",), tokens=True),
}
_ADDRESS = "Sluice listens where HOST and PORT say, or `serve --host --port`"
_NOT_OURS = {"host": _ADDRESS, "port": _ADDRESS, "dangbei": "Sluice has no such kind"}


def _config(text: str, written_at: float | None) -> Plan:
    try:
        config = json.loads(text)
    except RecursionError:
        raise ValueError("This JSON is nested too deeply.") from None
    except json.JSONDecodeError as problem:
        # Not the decoder's own words alone: some of them quote what stands there.
        raise ValueError(f"This is not valid JSON: see line {problem.lineno}, column {problem.colno}.") from None
    if not isinstance(config, dict) or not _SECTIONS.keys() & config.keys():
        raise ValueError(f"This JSON has none of the lists {', '.join(_SECTIONS)}: it is no config.json of OpenAICompatible.")
    reading = _Reading(written_at)
    proxy = config.get("proxy")
    if proxy is not None and not isinstance(proxy, str):
        # To go on without it would call the vendors from an address that nobody meant.
        raise ValueError("'proxy' is no address: write it as text, such as http://proxy.example.org:3128, or take it out.")
    for name, value in config.items():
        if name in _SECTIONS:
            reading.section(name, _SECTIONS[name], value, (proxy or "").strip())
        elif name == "proxy":
            reading.say("note", "proxy", "set on every account of this file" if proxy and proxy.strip() else "none: nothing to set")
        else:
            reading.say("ignored", _shown_name(name), _NOT_OURS.get(name, "Sluice knows nothing of this name"))
    if proxy and "@" in proxy:
        reading.secrets.add(proxy.strip())
    return reading.plan()


@dataclass
class _Reading:
    written_at: float | None = None
    accounts: list[Account] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    secrets: set[str] = field(default_factory=set)

    def say(self, said: str, where: str, why: str) -> None:
        self.remarks.append(Remark(said, where, why))

    def plan(self) -> Plan:
        return Plan(tuple(self.accounts), tuple(self.keys), tuple(self.remarks), frozenset(filter(None, self.secrets)))

    def section(self, name: str, section: _Section, value: object, proxy: str) -> None:
        entries = value if isinstance(value, list) else [] if value is None else [value]
        if not entries:
            self.say("ignored", name, "it is empty")
        for number, entry in enumerate(entries):
            where = f"{name}[{number}]"
            if isinstance(entry, dict):
                self._entry(where, name, number, section, entry, proxy)
            else:
                self.say("refused", where, "it is not an object with a token")

    def _entry(self, where: str, name: str, number: int, section: _Section, entry: dict[str, Any], proxy: str) -> None:
        token = entry.get("token")
        secret, mark = self._tokens(where, token) if section.tokens else self._plain(where, token)
        settings = dict(section.always)
        for field_name, value in entry.items():
            place = f"{where}.{_shown_name(field_name)}"
            if field_name in ("token", "prefix"):
                continue
            if field_name not in section.settings:
                self.say("ignored", place, f"the kind {section.kind} has no setting of this name")
            elif isinstance(value, dict | list):
                self.say("ignored", place, "a setting is one value, and this is not")
            elif (text := _text(value)) != "":
                settings[field_name] = text
        if proxy:
            settings["proxy_url"] = proxy
        if not secret:
            return
        # Without one of its own, its models keep the names under which that proxy's clients know them.
        prefix = _text(entry.get("prefix")).rstrip("/") or name
        self.accounts.append(
            Account(
                where=where,
                kind=section.kind,
                label=f"imported {name} {number + 1}",
                prefix=prefix,
                secret=SecretText(secret),
                settings=settings,
                tokens=section.tokens,
                mark=SecretText(mark),
            )
        )

    def _plain(self, where: str, token: object) -> tuple[str, str]:
        if isinstance(token, str) and token.strip():
            self.secrets.add(token.strip())
            return token.strip(), token.strip()
        self.say("refused", f"{where}.token", "there is none" if token in (None, "") else "it is not a line of text")
        return "", ""

    def _tokens(self, where: str, token: object) -> tuple[str, str]:
        if not isinstance(token, dict):
            self.say(
                "refused", f"{where}.token", "there is none" if not token else "it is not an object with access_token and refresh_token"
            )
            return "", ""
        self.secrets |= {value for name, value in token.items() if isinstance(value, str) and name.endswith("token")}
        mark = token.get("refresh_token") or token.get("access_token")
        if not isinstance(mark, str):
            self.say("refused", f"{where}.token", "it has neither access_token nor refresh_token")
            return "", ""
        return json.dumps(_dated(token, self.written_at), ensure_ascii=True, separators=(",", ":")), mark


def _dated(token: dict[str, Any], written_at: float | None) -> dict[str, Any]:
    """With the moment at which the token ends. Go writes the year 1 where it knows none; `expires_in` counts from the file's own time."""
    expiry = token.get("expiry")
    if isinstance(expiry, str) and expiry.startswith("0001-"):
        token = {name: value for name, value in token.items() if name != "expiry"}
        expiry = None
    lasts = token.get("expires_in")
    if expiry is None and written_at is not None and isinstance(lasts, int | float) and 0 < lasts < 10**9:
        return {**token, "expiry": datetime.fromtimestamp(written_at + lasts, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")}
    return token


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value).strip() if isinstance(value, str | int | float) else ""


def _shown_name(name: str) -> str:
    """A name out of a file, unless it could be a secret that slipped into the wrong place."""
    return name if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,39}", name) else "(a name that is not shown)"


# Env files

_LINE = re.compile(r"\s*(?:export\s+)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*=\s*(?P<value>.*)")
_QUOTED = re.compile(r"""(?P<quote>["'])(?P<text>.*?)(?<!\\)(?P=quote)\s*(?:#.*)?""")
_CODEGPT = ("CODEGPT_API_KEY", "CODEGPT_AGENT_ID", "CODEGPT_ORG_ID", "CODEGPT_API_URL")
_KIMI = ("KIMI_API_BASE_URL", "USER_AGENT", "KIMI_API_KEY")
_OPENAI = ("OPENAI_API_KEY", "OPENAI_BASE_URL")
VARIABLES = frozenset({*_CODEGPT, *_KIMI, *_OPENAI, "VALID_API_KEY"})
_SECRET_VARIABLES = ("CODEGPT_API_KEY", "KIMI_API_KEY", "OPENAI_API_KEY", "VALID_API_KEY")


def _env(text: str) -> Plan:
    reading, found = _Reading(), {}
    for number, name, value in _lines(text, reading.say):
        if name not in VARIABLES:
            # Only what looks like a variable's name is shown: it might be a secret on a line of its own.
            shown = name if re.fullmatch(r"[A-Z][A-Z0-9_]{0,39}", name) else f"line {number}"
            reading.say("ignored", shown, "none of the proxies that we know reads it")
        elif not value:
            reading.say("ignored", name, "it is empty")
        else:
            if name in found:
                reading.say("note", name, f"it stands there twice: line {number} counts")
            found[name] = value
    if not found:
        raise ValueError(f"This is neither JSON nor an env file with any of {', '.join(sorted(VARIABLES))}.")
    reading.secrets = {found[name] for name in _SECRET_VARIABLES if name in found}
    for read_some in (_codegpt, _openai, _kimi, _valid_key):
        read_some(found, reading)
    return reading.plan()


def _lines(text: str, say: Callable[[str, str, str], None]) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            say("ignored", f"line {number}", "it does not read NAME=value")
            continue
        yield number, found["name"], _value(found["value"])


def _value(written: str) -> str:
    quoted = _QUOTED.fullmatch(written.strip())
    if quoted is not None:
        return quoted["text"].replace(f"\\{quoted['quote']}", quoted["quote"])
    return re.sub(r"(?:^|\s+)#.*", "", written).strip()


def _codegpt(found: Mapping[str, str], reading: _Reading) -> None:
    if not found.keys() & set(_CODEGPT):
        return None
    if missing := [name for name in ("CODEGPT_API_KEY", "CODEGPT_AGENT_ID") if name not in found]:
        given = ", ".join(name for name in _CODEGPT if name in found)
        return reading.say("refused", given, f"a CodeGPT account also needs {' and '.join(missing)}")
    settings = {"agent_id": found["CODEGPT_AGENT_ID"]}
    if "CODEGPT_ORG_ID" in found:
        settings["org_id"] = found["CODEGPT_ORG_ID"]
    url = found.get("CODEGPT_API_URL", "").rstrip("/")
    reading.accounts.append(
        Account(
            where="CODEGPT_API_KEY",
            kind="codegpt",
            label="imported CodeGPT",
            prefix="codegpt",
            secret=SecretText(found["CODEGPT_API_KEY"]),
            settings=settings,
            mark=SecretText(f"{found['CODEGPT_API_KEY']} {found['CODEGPT_AGENT_ID']}"),
            base_url=url.removesuffix("/chat/completions"),
            own_path="/api/v1",
            catch_all="default",  # the account's agent, whatever its id looks like
        )
    )


def _openai(found: Mapping[str, str], reading: _Reading) -> None:
    if "OPENAI_API_KEY" not in found:
        if "OPENAI_BASE_URL" in found:
            reading.say("ignored", "OPENAI_BASE_URL", "there is no OPENAI_API_KEY beside it")
        return
    reading.accounts.append(
        Account(
            where="OPENAI_API_KEY",
            kind="openai",
            label="imported OpenAI",
            prefix="openai",
            secret=SecretText(found["OPENAI_API_KEY"]),
            settings={"pass_through": "true"},  # that worker's clients may send a key of their own in x-openai-key
            mark=SecretText(found["OPENAI_API_KEY"]),
            base_url=found.get("OPENAI_BASE_URL", ""),
            catch_all="*",
        )
    )


def _kimi(found: Mapping[str, str], reading: _Reading) -> None:
    if not found.keys() & {"KIMI_API_BASE_URL", "KIMI_API_KEY"}:
        if "USER_AGENT" in found:
            reading.say("ignored", "USER_AGENT", "it is Kimi's, and there is no KIMI_API_BASE_URL beside it")
        return
    secret = found.get("KIMI_API_KEY", "")
    settings = {"user_agent": found["USER_AGENT"]} if "USER_AGENT" in found else {}
    where = "KIMI_API_KEY" if secret else "KIMI_API_BASE_URL"
    if "kimi" in settings.get("user_agent", "").lower():
        reading.say(
            "note", "USER_AGENT", "it names a client of the vendor's own; accounts were restricted for that. Without it we name ourselves"
        )
    if not secret:
        settings["pass_through"] = "true"
        reading.say(
            "note", where, "that proxy passed on its clients' own keys: here they send theirs in X-Upstream-Key beside an issued key"
        )
    reading.accounts.append(
        Account(
            where=where,
            kind="kimi",
            label="imported Kimi",
            prefix="kimi",
            secret=SecretText(secret),
            settings=settings,
            mark=SecretText(secret or found["KIMI_API_BASE_URL"]),
            base_url=found.get("KIMI_API_BASE_URL", ""),
            own_path="/coding/v1",
            # A caller's own key must not come to a vendor that the caller did not name.
            catch_all="kimi-for-coding" if secret or not reading.accounts else "",
        )
    )


def _valid_key(found: Mapping[str, str], reading: _Reading) -> None:
    if "VALID_API_KEY" in found:
        reading.keys.append(Key("VALID_API_KEY", SecretText(found["VALID_API_KEY"])))
