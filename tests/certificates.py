"""Certificates and passwords for tests of TLS."""

import base64
import ssl
import urllib.error
import urllib.request

import bcrypt
import trustme

AUTHORITY = trustme.CA()

SECRET_HASH = bcrypt.hashpw(b"secret", b"$2b$04$" + b"." * 22).decode()  # a fixed salt: it stands in names of tests


def write_pair(folder, name="server", authority=AUTHORITY):
    """Write NAME.crt and NAME.key for 127.0.0.1 into a folder."""
    issued = authority.issue_cert("127.0.0.1", common_name=name)
    issued.private_key_pem.write_to_path(folder / f"{name}.key")
    (folder / f"{name}.crt").write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))


def client_context(authority=AUTHORITY, identity=None):
    """Return a context that trusts the authority, and shows the certificate of an identity such as a DNS name."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if identity is not None:
        AUTHORITY.issue_cert(identity).configure_cert(context)
    return context


def basic(user, password):
    """Return the header that carries a user's password."""
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def status(url, headers=None, context=None):
    """Return the status that a URL is answered with."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers or {}), timeout=30, context=context
        ) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
