"""The web config file: what is read, what is refused, and that promtool agrees."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.stack import servers
from esper_telemetry.exporters.web.access import Access
from esper_telemetry.exporters.web.web_config import WebConfigError, parse_web_config
from tests.certificates import AUTHORITY, SECRET_HASH, write_pair

EXAMPLE = Path(__file__).parents[1] / "deploy" / "web-config.example.yml"
PAIR = "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n"
MUTUAL = PAIR + "  client_ca_file: ca.crt\n  client_auth_type: RequireAndVerifyClientCert\n"


@pytest.fixture
def folder(tmp_path):
    write_pair(tmp_path)
    AUTHORITY.cert_pem.write_to_path(tmp_path / "ca.crt")
    return tmp_path


def promtool_accepts(path):
    return subprocess.run([servers.find("promtool"), "check", "web-config", path], capture_output=True).returncode == 0


def complaint(path):
    with pytest.raises(WebConfigError) as refused:
        Access(path)
    text = str(refused.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "tls_server_config:\n",
        "basic_auth_users: {}",
        f"basic_auth_users:\n  prometheus: {SECRET_HASH}\n",
        PAIR,
        PAIR + "  min_version: TLS13\n  max_version: TLS13\n  prefer_server_cipher_suites: false\n",
        PAIR + "  cipher_suites: [TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, TLS_AES_128_GCM_SHA256]\n",
        MUTUAL,
        PAIR + "http_server_config:\n  http2: true\n  headers:\n    X-Frame-Options: deny\n",
        "http_server_config:\n  headers:\n    Strict-Transport-Security: max-age=60\n",
    ],
)
def test_what_is_accepted_is_accepted_by_promtool_too(folder, content):
    (folder / "web.yml").write_text(content)
    Access(folder / "web.yml")
    assert promtool_accepts(folder / "web.yml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("basic_auth_users:\n\t- x", "line 2: found character '\\t' that cannot start any token"),
        ("[1]", "the file: expected a mapping, got list"),
        ("tls_config: {}", "tls_config: no such key"),
        (PAIR + "  cert_fle: x", "tls_server_config.cert_fle: no such key"),
        (PAIR + "  cert_file: x", "line 4: 'cert_file' appears twice"),
        ("tls_server_config: yes please", "tls_server_config: expected a mapping, got yes please"),
        ("tls_server_config:\n  cert_file: server.crt", "tls_server_config.key_file: is missing"),
        ("tls_server_config:\n  key_file: server.key", "tls_server_config.cert_file: is missing"),
        (PAIR.replace("server.crt", "[1]"), "tls_server_config.cert_file: expected text, got list"),
        (
            PAIR.replace("server.crt", "gone.crt"),
            "tls_server_config.cert_file: {folder}/gone.crt: No such file or directory",
        ),
        (PAIR.replace("server.key", "."), "tls_server_config.key_file: {folder}: Is a directory"),
        (
            PAIR.replace("server.key", "ca.crt"),
            "tls_server_config.cert_file: {folder}/server.crt and {folder}/ca.crt do not match",
        ),
        (PAIR + "  min_version: SSL3", "tls_server_config.min_version: expected one of TLS10, TLS11, TLS12, TLS13"),
        (PAIR + "  client_auth_type: Sometimes", "tls_server_config.client_auth_type: expected one of NoClientCert"),
        (PAIR + "  client_ca_file: ca.crt", "tls_server_config.client_auth_type: is missing"),
        (PAIR + "  client_allowed_sans: [x]", "tls_server_config.client_allowed_sans: expects client_auth_type Requ"),
        (PAIR + "  cipher_suites: [RC4]", "tls_server_config.cipher_suites: unknown or insecure: 'RC4'"),
        (PAIR + "  prefer_server_cipher_suites: 3", "tls_server_config.prefer_server_cipher_suites: expected true or"),
        ("basic_auth_users:\n  joe: secret", "basic_auth_users.joe: expected a bcrypt hash"),
        (
            "http_server_config:\n  headers:\n    X-Powered-By: x",
            "http_server_config.headers.X-Powered-By: no such key",
        ),
        ("http_server_config:\n  headers:\n    X-Frame-Options: x", "http_server_config.headers.X-Frame-Options: expe"),
    ],
)
def test_what_is_refused_is_said_in_one_line_and_refused_by_promtool_too(folder, content, said):
    (folder / "web.yml").write_text(content)
    assert complaint(folder / "web.yml").startswith(said.format(folder=folder))
    assert not promtool_accepts(folder / "web.yml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (PAIR + "  cert: inline", "tls_server_config.cert: is not supported; put it into a file, and use cert_file"),
        (PAIR + "  curve_preferences: [X25519]", "tls_server_config.curve_preferences: is not supported"),
        (PAIR + "  client_auth_type: RequireAnyClientCert", "tls_server_config.client_auth_type: expected one of"),
        (PAIR + "  client_auth_type: VerifyClientCertIfGiven", "tls_server_config.client_ca_file: is missing"),
        ("rate_limit: {burst: 1}", "rate_limit: is not supported"),
        (
            'http_server_config:\n  headers:\n    X-XSS-Protection: "a\\nb"',
            "http_server_config.headers.X-XSS-Protection: ",
        ),
        (PAIR + "  min_version: TLS13\n  max_version: TLS12", "tls_server_config.min_version: expected at most TLS12"),
        (MUTUAL.replace("ca.crt", "server.key"), "tls_server_config.client_ca_file: {folder}/server.key holds no cert"),
    ],
)
def test_what_python_cannot_do_or_helps_nobody_is_refused_by_name(folder, content, said):
    (folder / "web.yml").write_text(content)
    assert complaint(folder / "web.yml").startswith(said.format(folder=folder))


def test_a_missing_file_is_named(tmp_path):
    assert complaint(tmp_path / "gone.yml") == "No such file or directory"


def test_the_example_is_good_once_its_certificate_is_there(folder):
    copy = folder / "web.yml"
    copy.write_bytes(EXAMPLE.read_bytes())
    Access(copy)
    assert promtool_accepts(copy)


def test_a_hash_is_never_repeated(tmp_path):
    (tmp_path / "web.yml").write_text("basic_auth_users:\n  joe: $2y$10$tooshort")
    assert "tooshort" not in complaint(tmp_path / "web.yml")


KEYS = st.sampled_from(
    ["tls_server_config", "basic_auth_users", "http_server_config", "headers", "cert_file", "key_file", "min_version"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.text(max_size=8) | KEYS
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | SCALARS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150)
@given(DOCUMENTS)
def test_no_document_crashes_the_parser(document):
    import yaml

    parse_or_refuse(yaml.safe_dump(document).encode())


@settings(max_examples=300)
@given(st.binary(max_size=200) | st.text("{}[]:,&*!|>'\"%@`#-? \n\tab~<=0123456789.", max_size=60).map(str.encode))
def test_no_bytes_crash_the_parser(content):
    parse_or_refuse(content)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"a: &a\n  b: *a", b"? {a: 1}\n: 2", b"!!python/object:os.x {}"])
def test_neither_do_documents_made_for_it(content):
    with pytest.raises(WebConfigError):
        parse_web_config(content, Path("web.yml"))


def test_a_file_without_end_is_not_read_to_it():
    with pytest.raises(WebConfigError, match="expected at most 1048576 bytes"):
        Access("/dev/zero")


def parse_or_refuse(content):
    said = "web.yml: "
    try:
        parse_web_config(content, Path("web.yml"))
    except WebConfigError as error:
        said = str(error)
    assert said.startswith("web.yml: ")
    assert "\n" not in said
