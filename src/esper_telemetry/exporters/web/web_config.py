"""The web config file: TLS, passwords and headers, in the format that Prometheus's own exporters share.

Prometheus documents it as exporter-toolkit's web-configuration.md, and `promtool check web-config` checks it. What the
format allows and Python's `ssl` cannot do is refused by name, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

try:
    import yaml
except ImportError as error:
    raise ImportError("a web config file needs PyYAML and bcrypt: pip install 'esper-telemetry[server]'") from error

MAX_BYTES = 1024 * 1024
VERSIONS = ("TLS10", "TLS11", "TLS12", "TLS13")

_REQUIRED = "RequireAndVerifyClientCert"
_CLIENT_AUTH = ("NoClientCert", "VerifyClientCertIfGiven", _REQUIRED)
_HEADERS: Mapping[str, tuple[str, ...]] = {
    "Strict-Transport-Security": (),
    "X-Content-Type-Options": ("nosniff",),
    "X-Frame-Options": ("deny", "sameorigin"),
    "X-XSS-Protection": (),
    "Content-Security-Policy": (),
}
_BCRYPT = re.compile(r"\$2[aby]\$(0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")

_T = TypeVar("_T")
_Fields = tuple[tuple[str, str], ...]


class WebConfigError(ValueError):
    """Say in one line which file is wrong, and in which line or key."""


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Hold `tls_server_config`; paths are as given, or relative to the folder of the file."""

    cert_file: Path
    key_file: Path
    client_auth_type: str = "NoClientCert"
    client_ca_file: Path | None = None
    client_allowed_sans: tuple[str, ...] = ()
    min_version: str = "TLS12"
    max_version: str = "TLS13"
    cipher_suites: tuple[str, ...] = ()
    prefer_server_cipher_suites: bool = True

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the files that it names."""
        return tuple(file for file in (self.cert_file, self.key_file, self.client_ca_file) if file is not None)


@dataclass(frozen=True, slots=True)
class WebConfig:
    """Hold a web config file; `users` has bcrypt hashes by name."""

    tls: TlsConfig | None = None
    users: Mapping[str, str] = field(default_factory=dict)
    headers: _Fields = ()


def read_web_config(path: Path) -> WebConfig:
    """Read and check a web config file; raise WebConfigError when it is invalid."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise WebConfigError(f"{path}: {error.strerror}") from None
    return parse_web_config(content, path)


def parse_web_config(content: bytes, path: Path) -> WebConfig:
    """Check the content of a web config file; `path` is for relative paths and for what is said."""
    try:
        if len(content) > MAX_BYTES:
            raise _Bad(f"expected at most {MAX_BYTES} bytes")
        return _web_config(_Section("", _load(content)), path.parent)
    except _Bad as error:
        raise WebConfigError(f"{path}: {error}") from None


class _Bad(Exception):
    """Say what is wrong, without the file."""


class _Loader(yaml.SafeLoader):
    """Refuse what YAML allows and the format does not: a key that appears twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _load(content: bytes) -> object:
    try:
        return yaml.load(content, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise _Bad(line + _one_line(error.problem or "invalid YAML")) from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:  # PyYAML lets some slip
        raise _Bad(f"invalid YAML: {_one_line(error)}") from None
    except RecursionError:
        raise _Bad("nested too deeply") from None


class _Section:
    """Take the keys of a mapping one by one, so that what is left in the end is unknown."""

    def __init__(self, name: str, content: object) -> None:
        if content is None:
            content = {}
        if not isinstance(content, dict):
            raise _Bad(f"{name or 'the file'}: expected a mapping, got {_shown(content)}")
        self.name = name
        self._left = dict(content)

    def take(self, key: str, check: Callable[[str, object], _T], default: _T) -> _T:
        """Return the checked value of a key; one that is missing or empty has its default."""
        value = self._left.pop(key, None)
        return default if value is None else check(self.path(key), value)

    def refuse(self, key: str, reason: str) -> None:
        """Raise when the key is there."""
        if self._left.pop(key, None) is not None:
            raise _Bad(f"{self.path(key)}: {reason}")

    def end(self) -> None:
        """Raise when a key was not asked for."""
        for key in self._left:
            raise _Bad(f"{self.path(_shown(key))}: no such key")

    def path(self, key: str) -> str:
        """Return the name of a key in the file."""
        return f"{self.name}.{key}" if self.name else key


def _web_config(file: _Section, folder: Path) -> WebConfig:
    config = WebConfig(
        tls=file.take("tls_server_config", lambda name, value: _tls(_Section(name, value), folder), None),
        users=file.take("basic_auth_users", _users, {}),
        headers=file.take("http_server_config", lambda name, value: _http(_Section(name, value)), ()),
    )
    file.refuse("rate_limit", "is not supported; the exporter bounds its own work")
    file.end()
    return config


def _tls(section: _Section, folder: Path) -> TlsConfig | None:
    for inline in ("cert", "key", "client_ca"):
        section.refuse(inline, f"is not supported; put it into a file, and use {inline}_file")
    section.refuse("curve_preferences", "is not supported; Python cannot choose them")
    cert_file = section.take("cert_file", _text, "")
    key_file = section.take("key_file", _text, "")
    client_ca_file = section.take("client_ca_file", _text, "")
    client_auth_type = section.take("client_auth_type", _one_of(_CLIENT_AUTH), "")
    config = TlsConfig(
        cert_file=folder / cert_file,
        key_file=folder / key_file,
        client_auth_type=client_auth_type or "NoClientCert",
        client_ca_file=folder / client_ca_file if client_ca_file else None,
        client_allowed_sans=section.take("client_allowed_sans", _texts, ()),
        min_version=section.take("min_version", _one_of(VERSIONS), "TLS12"),
        max_version=section.take("max_version", _one_of(VERSIONS), "TLS13"),
        cipher_suites=section.take("cipher_suites", _texts, ()),
        prefer_server_cipher_suites=section.take("prefer_server_cipher_suites", _truth, True),
    )
    section.end()
    if not (cert_file or key_file or client_ca_file or client_auth_type):
        return None
    for key, given in (("cert_file", cert_file), ("key_file", key_file)):
        if not given:
            raise _Bad(f"{section.path(key)}: is missing")
    _check_together(section, config)
    return config


def _check_together(section: _Section, config: TlsConfig) -> None:
    if VERSIONS.index(config.min_version) > VERSIONS.index(config.max_version):
        raise _Bad(f"{section.path('min_version')}: expected at most {config.max_version}, which is max_version")
    if config.client_ca_file is None and config.client_auth_type != "NoClientCert":
        raise _Bad(f"{section.path('client_ca_file')}: is missing, and client_auth_type is {config.client_auth_type}")
    if config.client_ca_file is not None and config.client_auth_type == "NoClientCert":
        raise _Bad(f"{section.path('client_auth_type')}: is missing, and there is a client_ca_file")
    if config.client_allowed_sans and config.client_auth_type != _REQUIRED:
        raise _Bad(f"{section.path('client_allowed_sans')}: expects client_auth_type {_REQUIRED}")


def _http(section: _Section) -> _Fields:
    section.take("http2", _truth, True)  # the exporter speaks HTTP/1.1, which every client of HTTP/2 does too
    headers: _Fields = section.take("headers", lambda name, value: _headers(_Section(name, value)), ())
    section.end()
    return headers


def _headers(section: _Section) -> _Fields:
    headers = tuple((name, section.take(name, _header_value(allowed), "")) for name, allowed in _HEADERS.items())
    section.end()
    return tuple((name, value) for name, value in headers if value)


def _users(name: str, value: object) -> dict[str, str]:
    users = _Section(name, value)
    checked = {}
    for user in value if isinstance(value, dict) else ():
        if not isinstance(user, str):
            raise _Bad(f"{name}: expected a name in quotes, got {_shown(user)}")
        checked[user] = users.take(user, _text, "")
        if not _BCRYPT.fullmatch(checked[user]):
            raise _Bad(f"{name}.{_one_line(user)}: expected a bcrypt hash, such as `htpasswd -nB` prints")
    return checked


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _Bad(f"{name}: expected text, got {_shown(value)}")
    if "\0" in value:
        raise _Bad(f"{name}: expected text without NUL")
    return value


def _texts(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _Bad(f"{name}: expected a list, got {_shown(value)}")
    return tuple(_text(name, each) for each in value)


def _truth(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _Bad(f"{name}: expected true or false, got {_shown(value)}")
    return value


def _one_of(choices: tuple[str, ...]) -> Callable[[str, object], str]:
    def check(name: str, value: object) -> str:
        if value not in choices:
            raise _Bad(f"{name}: expected one of {', '.join(choices)}, got {_shown(value)}")
        return str(value)

    return check


def _header_value(allowed: tuple[str, ...]) -> Callable[[str, object], str]:
    def check(name: str, value: object) -> str:
        text = _text(name, value).strip()
        if text and allowed and text not in allowed:
            raise _Bad(f"{name}: expected one of {', '.join(allowed)}, got {_shown(text)}")
        if not text.isascii() or not text.isprintable():
            raise _Bad(f"{name}: expected one line of ASCII, got {_shown(text)}")
        return text

    return check


def _shown(value: object) -> str:
    return _one_line(value if isinstance(value, str) else type(value).__name__)


def _one_line(text: object) -> str:
    printable = "".join(char if char.isprintable() else " " for char in str(text))
    return printable if len(printable) <= 80 else printable[:77] + "..."
