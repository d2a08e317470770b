"""A short run of the server's campaign, with the seed of the day."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette", reason="starlette is not installed: pip install 'gemma-edge[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'gemma-edge[serve]'")
pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'gemma-edge[json]'")

from campaigns import server
from campaigns.campaign import Campaign, seed_of_today


def test_the_server_survives_a_few_hostile_requests() -> None:
    campaign = Campaign("server", seed_of_today())
    server.run(campaign, 150)
    assert campaign.exit_code == 0, campaign.summary()
