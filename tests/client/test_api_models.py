from __future__ import annotations

import io

import httpx
import openai
import pytest

from heldout.records import Model
from heldout.settings import DEFAULT_MODEL


def add_model(live, name, blobs):
    live.db.add_model(Model(id=name, job_id="ftjob-1", base_model=DEFAULT_MODEL, blobs=blobs, owned_by="heldout"))
    live.blobs.put(f"{blobs}/adapter.safetensors", io.BytesIO(b"weights"))


def test_the_list_has_base_models_aliases_and_fine_tuned_ones(live):
    add_model(live, "ft:m:heldout::abc", "adapters/abc")
    models = {model.id: model for model in live.client.models.list()}
    assert {DEFAULT_MODEL, "gpt-4o-mini", "ft:m:heldout::abc"} <= set(models)
    assert models["gpt-4o-mini"].x_base_model == DEFAULT_MODEL


def test_a_model_is_found_by_its_name_colons_and_all(live):
    add_model(live, "ft:m:heldout::abc:ckpt-step-5", "adapters/abc")
    assert live.client.models.retrieve("ft:m:heldout::abc:ckpt-step-5").owned_by == "heldout"
    assert live.client.models.retrieve(DEFAULT_MODEL).id == DEFAULT_MODEL


@pytest.mark.parametrize("name", ["ft:m:heldout::none", "nothing", "organization/name"])
def test_an_unknown_model_is_a_404(live, name):
    for call in (live.client.models.retrieve, live.client.models.delete):
        with pytest.raises(openai.NotFoundError) as raised:
            call(name)
        assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_an_operators_alias_may_hold_a_slash(start):
    live = start(model_aliases={"team/assistant": DEFAULT_MODEL})
    assert live.client.models.retrieve("team/assistant").id == "team/assistant"
    assert httpx.get(f"{live.url}/v1/models/team/assistant").json()["id"] == "team/assistant"


def test_deleting_a_model_removes_its_bytes(live):
    add_model(live, "ft:m:heldout::abc", "adapters/abc")
    assert live.client.models.delete("ft:m:heldout::abc").deleted
    assert list(live.blobs.keys("adapters")) == []


def test_deleting_a_model_leaves_bytes_that_a_checkpoint_shares(live):
    add_model(live, "ft:m:heldout::abc", "adapters/abc")
    add_model(live, "ft:m:heldout::abc:ckpt-step-5", "adapters/abc/step-5")
    add_model(live, "ft:m:heldout::abc:ckpt-step-9", "adapters/abc-9")
    live.client.models.delete("ft:m:heldout::abc")
    kept = ["adapters/abc-9/adapter.safetensors", "adapters/abc/step-5/adapter.safetensors"]
    assert sorted(live.blobs.keys("adapters")) == kept


def test_a_base_model_cannot_be_deleted(live):
    with pytest.raises(openai.PermissionDeniedError, match="base model") as raised:
        live.client.models.delete(DEFAULT_MODEL)
    assert raised.value.code == "insufficient_permissions"
