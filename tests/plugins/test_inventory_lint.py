"""Names, domains, misspelt variables and secrets in an inventory."""

from __future__ import annotations

from pathlib import Path

import pytest
from forge.inventory_lint import domain_problems, unknown_variable_problems
from forge.names import name_problems
from forge.problems import Problem, render
from forge.secret_scan import holds_value, is_secret_name, looks_like_value, shape
from forge.specs import read_roles

ROLES = Path(__file__).resolve().parents[2] / "roles"


@pytest.mark.parametrize("name", ["shop", "s", "shop-2", "a" * 21])
def test_names_of_apps(name: str) -> None:
    """Whatever can be a user, a unit and a database."""
    assert name_problems(name) == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Shop",
        "2shop",
        "shop_a",
        "shöp",
        "a" * 22,
        "root",
        "postgres",
        "nginx",
        "forge-x",
        "shop-migrate",
        "shop-lease",
        "user",
        "uploads",
        "dpkg",
    ],
)
def test_names_that_are_taken_or_malformed(name: str) -> None:
    """An app becomes a user, groups, units and folders: it may shadow none."""
    assert len(name_problems(name)) == 1


@pytest.mark.parametrize(
    ("domain", "do"),
    [
        ("shop", "full name"),
        ("Shop.example.com", "shop.example.com"),
        ("shop.example.com.", "final dot"),
        ("bücher.example.com", "xn--bcher-kva.example.com"),
        ("*.example.com", "letters, digits"),
        ("shop.example.com:443", "the port"),
        ("-a.example.com", "letters, digits"),
        (f"{'a' * 64}.example.com", "letters, digits"),
    ],
)
def test_domains(domain: str, do: str) -> None:
    """Each mistake with its own remedy."""
    (problem,) = domain_problems({"shop": {"domain": domain}})
    assert do in problem.do


def test_a_domain_belongs_to_one_app() -> None:
    """Also as an alias, and of the same app."""
    first, second = {"domain": "x.example.com"}, {"domain": "b.example.com", "aliases": ["x.example.com"]}
    (problem,) = domain_problems({"a": first, "b": second})
    assert problem.where == "apps.b.aliases[0]"
    assert "apps.a.domain" in problem.found


def test_variables_of_others_are_left_alone() -> None:
    """Only a role's prefix, or one close to it that names an option, is a slip of the pen."""
    specs = read_roles(ROLES)
    names = ["mine", "team_name", "demo_vault", "vault_control", "http_proxy", "nginx_ipv6", "application_name"]
    assert unknown_variable_problems(names, specs) == []
    assert [problem.where for problem in unknown_variable_problems(["nginx_ipv_6", "nginx_colour"], specs)] == [
        "nginx_colour",
        "nginx_ipv_6",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "hvs." + 24 * "a",
        "s." + 24 * "a",
        "-----BEGIN RSA " + "PRIVATE KEY-----",
        "amqp://u:" + "p@h",
        "ghp_" + 36 * "a",
        "xoxb-" + 12 * "1",
    ],
)
def test_shapes_of_secrets(text: str) -> None:
    """In the middle of other text, too."""
    assert shape(f"x = {text}") is not None


@pytest.mark.parametrize(
    "text",
    [
        "https://h/p",
        "postgresql://user@h/db",
        "postgresql://{{username}}:{{password}}@h/db",
        "s.example.com",
        "hvs.",
        "classes.ClassName",
    ],
)
def test_what_only_looks_like_one(text: str) -> None:
    """Addresses and names."""
    assert shape(text) is None


def test_names_of_secrets() -> None:
    """By their last word."""
    assert [name for name in ("API_KEY", "DB_PASSWORD", "TOKEN", "client_secret") if not is_secret_name(name)] == []
    assert [name for name in ("PUBLIC_KEY", "TOKEN_TTL", "KEYBOARD", "MONKEY") if is_secret_name(name)] == []


def test_flags_and_templates_are_no_secrets() -> None:
    """Also where the command line makes text of a flag."""
    assert not any(map(holds_value, (None, "", True, False, "true", "False", "yes", "{{ lookup('file', 'x') }}")))
    assert all(map(holds_value, ("hunter2", "trueish", 5)))


def test_keys_and_values_are_told_apart() -> None:
    """Where the name of a key belongs."""
    assert not any(map(looks_like_value, ("signing_key", "database_password", "aws.s3-key", "k2")))
    assert all(map(looks_like_value, ("p@ss word", 8 * "x9Y2", 65 * "a")))


def test_no_known_secret_is_in_a_message() -> None:
    """The longer one first, as it may contain the other."""
    text = render([Problem("x", "a", "inner and wrapped inner secret", "b")], "web1", ["inner", "wrapped inner secret"])
    assert "found: ******** and ********\n" in text
