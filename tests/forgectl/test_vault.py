"""vault.py against a real server."""

import socket
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import HARD_VALUES, Bao
from forgectl import vault
from forgectl.errors import SecretsError

SECRET = "hunter2-must-never-show"  # pragma: allowlist secret


def fetch(bao: Bao, variables: dict[str, str], secret_id: str | None = None, **changes: Any) -> dict[str, Any]:
    secrets = bao.secrets(**changes)
    return vault.fetch(secrets, bao.role_id, secret_id or bao.secret_id(), secrets.path, variables).values


def failure(bao: Bao, variables: dict[str, str], secret_id: str | None = None, **changes: Any) -> SecretsError:
    with pytest.raises(SecretsError) as caught:
        fetch(bao, variables, secret_id, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    assert caught.value.exit_code == 6
    return caught.value


def test_values_come_back_as_they_are(bao: Bao) -> None:
    bao.put("forge/inbox/app", HARD_VALUES)
    assert fetch(bao, {f"V{n}": key for n, key in enumerate(HARD_VALUES)}) == HARD_VALUES


def test_the_callers_environment_is_ignored(bao: Bao, monkeypatch: pytest.MonkeyPatch) -> None:
    bao.put("forge/inbox/app", {"key": SECRET})
    secret_id = bao.secret_id()
    for name in ("HTTPS_PROXY", "REQUESTS_CA_BUNDLE", "VAULT_TOKEN", "VAULT_ADDR"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(bao, {"A": "key"}, secret_id) == {"key": SECRET}


def test_the_token_is_revoked(bao: Bao) -> None:
    bao.put("forge/inbox/app", {"key": SECRET})
    before = len(bao.client.auth.token.list_accessors()["data"]["keys"])
    fetch(bao, {"A": "key"})
    assert len(bao.client.auth.token.list_accessors()["data"]["keys"]) == before


def test_the_token_is_revoked_when_the_read_fails(bao: Bao) -> None:
    before = len(bao.client.auth.token.list_accessors()["data"]["keys"])
    failure(bao, {}, path="forge/inbox/none")
    assert len(bao.client.auth.token.list_accessors()["data"]["keys"]) == before


def test_wrong_secret_id(bao: Bao) -> None:
    error = failure(bao, {}, secret_id=SECRET)
    assert error.state == "rejected"
    assert "rejected this host's role id or secret id" in str(error)


def test_secret_id_that_is_bound_to_another_address(bao: Bao) -> None:
    bound = {"cidr_list": "192.0.2.0/24", "token_bound_cidrs": "192.0.2.0/24"}
    elsewhere = bao.client.write_data("auth/approle/role/inbox/secret-id", data=bound)["data"]["secret_id"]
    error = failure(bao, {}, secret_id=elsewhere)
    assert error.state == "address"
    assert 'refused the address of this host (source address "127.0.0.1" unauthorized' in str(error)
    assert "secrets_bound_cidrs" in str(error)


def test_secret_id_that_is_used_up_or_expired(bao: Bao) -> None:
    bao.put("forge/inbox/app", {"key": SECRET})
    bao.client.auth.approle.create_or_update_approle("brief", token_policies=["inbox"], secret_id_num_uses=1)
    role_id = bao.client.auth.approle.read_role_id("brief")["data"]["role_id"]
    once = bao.client.auth.approle.generate_secret_id("brief")["data"]["secret_id"]
    secrets = bao.secrets()
    vault.fetch(secrets, role_id, once, secrets.path, {})
    with pytest.raises(SecretsError, match="wrong, expired or used up") as caught:
        vault.fetch(secrets, role_id, once, secrets.path, {})
    assert caught.value.state == "rejected"
    bao.client.auth.approle.create_or_update_approle("brief", secret_id_ttl="1s", secret_id_num_uses=0)
    short = bao.client.auth.approle.generate_secret_id("brief")["data"]["secret_id"]
    vault.fetch(secrets, role_id, short, secrets.path, {})
    time.sleep(1.2)
    with pytest.raises(SecretsError, match="wrong, expired or used up"):
        vault.fetch(secrets, role_id, short, secrets.path, {})


def test_secret_id_with_a_line_break_is_no_header_injection(bao: Bao) -> None:
    assert failure(bao, {}, secret_id=f"{SECRET}\r\nX-Other: 1").state == "rejected"


def test_path_missing_and_path_denied(bao: Bao) -> None:
    missing = failure(bao, {}, path="forge/inbox/none")
    assert (missing.state, "nothing at secret/forge/inbox/none" in str(missing)) == ("incomplete", True)
    denied = failure(bao, {}, path="forge/other/app")
    assert (denied.state, 'path "secret/data/forge/other/app"' in str(denied)) == ("denied", True)


def test_approle_mount_missing(bao: Bao) -> None:
    assert failure(bao, {}, approle_mount="nowhere").state == "denied"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"other": SECRET}, "key key is missing at secret/forge/inbox/app"),
        ({"key": ""}, "key key at secret/forge/inbox/app is empty"),
        ({"key": 5, "other": SECRET}, "is not a string"),
        ({"key": f"{SECRET}\0"}, "holds a NUL"),
        ({"key": SECRET * 6000}, "is longer than the 128 KiB"),
    ],
)
def test_values_that_no_environment_can_carry(bao: Bao, values: dict[str, Any], expected: str) -> None:
    bao.put("forge/inbox/app", values)
    error = failure(bao, {"FORGE_KEY": "key"})
    assert error.state == "incomplete"
    assert expected in str(error)
    assert "FORGE_KEY" in str(error)


def test_sealed(sealed_bao: Bao) -> None:
    error = failure(sealed_bao, {}, secret_id=SECRET)
    assert error.state == "sealed"
    assert "bao operator unseal" in str(error)


def test_down(bao: Bao) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"https://127.0.0.1:{unused.getsockname()[1]}"
    error = failure(bao, {}, address=address)
    assert (error.state, address in str(error)) == ("unreachable", True)


def test_silent_server_is_given_up(bao: Bao, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault, "TIMEOUT_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        error = failure(bao, {}, address=f"https://127.0.0.1:{silent.getsockname()[1]}")
    assert error.state == "unreachable"


def test_certificate_of_another_authority(bao: Bao, sealed_bao: Bao) -> None:
    error = failure(bao, {}, ca_file=str(sealed_bao.ca_file))
    assert (error.state, "not trusted by" in str(error)) == ("untrusted", True)


def test_authority_missing(bao: Bao, tmp_path: Path) -> None:
    error = failure(bao, {}, ca_file=str(tmp_path / "none.pem"))
    assert (error.state, "none.pem" in str(error)) == ("untrusted", True)


def test_wrapping_token_works_once(bao: Bao) -> None:
    token = bao.wrapped()
    with closing(vault.Vault(bao.secrets())) as server:
        assert server.login(bao.role_id, server.unwrap_secret_id(token).value)
        with pytest.raises(SecretsError, match="someone else unwrapped it") as caught:
            server.unwrap_secret_id(token)
    assert caught.value.state == "intercepted"
    assert token not in str(caught.value)


def test_wrapped_thing_that_is_no_secret_id(bao: Bao) -> None:
    token = bao.wrapped("sys/wrapping/wrap")
    with (
        closing(vault.Vault(bao.secrets())) as server,
        pytest.raises(SecretsError, match="found one made at sys/wrapping/wrap"),
    ):
        server.unwrap_secret_id(token)
