"""TLS as a web config asks for it."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper_telemetry.exporters.web.web_config import TlsConfig, WebConfigError

_VERSIONS = {
    "TLS10": ssl.TLSVersion.TLSv1,
    "TLS11": ssl.TLSVersion.TLSv1_1,
    "TLS12": ssl.TLSVersion.TLSv1_2,
    "TLS13": ssl.TLSVersion.TLSv1_3,
}
_VERIFY = {
    "NoClientCert": ssl.CERT_NONE,
    "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}
# The format has the names of the RFCs, OpenSSL has its own. Those of TLS 1.3 cannot be chosen, in Go neither.
_CIPHERS = {
    "TLS_AES_128_GCM_SHA256": "",
    "TLS_AES_256_GCM_SHA384": "",
    "TLS_CHACHA20_POLY1305_SHA256": "",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA": "ECDHE-ECDSA-AES128-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA": "ECDHE-ECDSA-AES256-SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA": "ECDHE-RSA-AES128-SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA": "ECDHE-RSA-AES256-SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": "ECDHE-ECDSA-AES128-GCM-SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": "ECDHE-ECDSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256": "ECDHE-RSA-AES128-GCM-SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384": "ECDHE-RSA-AES256-GCM-SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-RSA-CHACHA20-POLY1305",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": "ECDHE-ECDSA-CHACHA20-POLY1305",
}
_SECTION = "tls_server_config"


def server_context(config: TlsConfig, path: Path) -> ssl.SSLContext:
    """Load certificate, key and client CA; raise WebConfigError, which names `path` and the key, when one is invalid.

    A key with a pass phrase is refused: there is nobody to ask.
    """
    for key, file in (("cert_file", config.cert_file), ("key_file", config.key_file)):
        _check_readable(path, key, file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # a scraper keeps its connection, or does not resume a session
    context.minimum_version = _VERSIONS[config.min_version]
    context.maximum_version = _VERSIONS[config.max_version]
    if not config.prefer_server_cipher_suites:
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    try:
        context.load_cert_chain(config.cert_file, config.key_file, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        files = f"{config.cert_file} and {config.key_file}"
        raise WebConfigError(f"{path}: {_SECTION}.cert_file: {files} do not match: {_reason(error)}") from None
    _choose_ciphers(context, config, path)
    _ask_for_certificate(context, config, path)
    return context


def may_enter(certificate: Mapping[str, Any] | None, allowed: tuple[str, ...]) -> bool:
    """Tell whether a client's certificate carries one of the allowed alternative names; none allowed allows all."""
    names = () if certificate is None else certificate.get("subjectAltName", ())
    return not allowed or any(name in allowed for _, name in names)


def _choose_ciphers(context: ssl.SSLContext, config: TlsConfig, path: Path) -> None:
    for name in config.cipher_suites:
        if name not in _CIPHERS:
            raise WebConfigError(f"{path}: {_SECTION}.cipher_suites: unknown or insecure: {name[:80]!r}")
    chosen = [_CIPHERS[name] for name in config.cipher_suites if _CIPHERS[name]]
    if chosen:
        context.set_ciphers(":".join(chosen))


def _ask_for_certificate(context: ssl.SSLContext, config: TlsConfig, path: Path) -> None:
    if config.client_ca_file is None:
        return
    _check_readable(path, "client_ca_file", config.client_ca_file)
    try:
        context.load_verify_locations(config.client_ca_file)
    except ssl.SSLError as error:
        where = f"{path}: {_SECTION}.client_ca_file: {config.client_ca_file}"
        raise WebConfigError(f"{where} holds no certificate: {_reason(error)}") from None
    context.verify_mode = _VERIFY[config.client_auth_type]


def _check_readable(path: Path, key: str, file: Path) -> None:
    try:
        file.open("rb").close()
    except OSError as error:
        raise WebConfigError(f"{path}: {_SECTION}.{key}: {file}: {error.strerror}") from None


def _no_password() -> str:
    raise ValueError("the key has a pass phrase")


def _reason(error: Exception) -> str:
    return (error.reason if isinstance(error, ssl.SSLError) else None) or str(error)
