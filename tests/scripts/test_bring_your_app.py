"""docs/bring-your-app.md, followed literally as far as no host is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from forge.inspection.entry import FILL_IN
from forge_runbook import Place, Runbooks
from forge_shop import PAGE, ROOT, SHOP, control


@pytest.fixture
def page(tmp_path: Path) -> Runbooks:
    """The page, on a control machine with the app beside the project."""
    project = control(tmp_path)
    return Runbooks(ROOT / "docs", {"control": Place(("bash", "-euc"), project)})


def test_from_nothing_to_an_inventory(page: Runbooks, tmp_path: Path) -> None:
    """Nothing of the app is touched, and nothing is left to fill in but what the page says."""
    said = page.follow(PAGE, "1. Ask whether it will run")
    assert "shop.main:app, FastAPI" in said
    page.follow(PAGE, "2. Describe the host")
    said = page.follow(PAGE, "3. Write the entry")
    assert "Secrets to store: signing_key" in said
    written = yaml.safe_load((tmp_path / "project/inventory/production/group_vars/all.yml").read_text())
    assert written["secrets_source"] == "systemd_creds"
    assert written["apps"] == {
        "shop": {
            "domain": "shop.example.com",
            "source": str(tmp_path / "shop"),
            "module": "shop.main:app",
            "settings_prefix": "",
            "health_path": "",
            "ready_path": "/healthz",
            "metrics_path": "",
            "secrets": {"variables": {"SIGNING_KEY": "signing_key"}},
        }
    }
    assert FILL_IN not in str(written)
    assert {file.relative_to(tmp_path / "shop").as_posix() for file in (tmp_path / "shop").rglob("*.*")} == set(SHOP)


def test_the_rest_of_the_page_can_be_followed(page: Runbooks) -> None:
    """Every block that names a place is one that a test on a host can run."""
    sections = {step.section: step.on for step in page.steps(PAGE)}
    assert list(sections) == [
        "1. Ask whether it will run",
        "2. Describe the host",
        "3. Write the entry",
        "4. Provision the host",
        "5. Look",
        "6. Deploy",
        "7. Roll back",
    ]
    playbooks = {word for step in page.steps(PAGE) for word in step.commands.split() if word.endswith(".yml")}
    assert {name for name in playbooks if name.startswith("playbooks/") and not (ROOT / name).is_file()} == set()
