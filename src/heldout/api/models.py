"""`/v1/models`: the base models, their aliases, and what was trained here."""

from __future__ import annotations

from fastapi import APIRouter

from heldout.api import wire
from heldout.api.deps import BlobsDep, DbDep, SettingsDep
from heldout.engine.catalogue import base_names
from heldout.errors import Forbidden, ModelNotFound
from heldout.records import Model
from heldout.settings import Settings
from heldout.store.blobs import Blobs

router = APIRouter()


@router.get("/v1/models")
def list_models(settings: SettingsDep, db: DbDep) -> wire.Page[wire.ModelObject]:
    jobs = db.jobs_of_models()
    trained = [wire.ModelObject.of(model, jobs.get(model.id)) for model in db.list_models()]
    return wire.Page.of([*_bases(settings).values(), *trained], False)


# `:path`, because a Hugging Face id holds a slash and the server decodes %2F before it routes.
@router.get("/v1/models/{name:path}")
def get_model(name: str, settings: SettingsDep, db: DbDep) -> wire.ModelObject:
    if name.startswith("ft:"):
        return wire.ModelObject.of(db.get_model(name), db.jobs_of_models(name).get(name))
    return _base(name, settings)


@router.delete("/v1/models/{name:path}")
def delete_model(name: str, settings: SettingsDep, db: DbDep, blobs: BlobsDep) -> wire.Deleted:
    if not name.startswith("ft:"):
        _base(name, settings)
        raise Forbidden(f"'{name}' is a base model; only fine-tuned models (ft:…) can be deleted.", param="model")
    _delete_blobs(blobs, db.delete_model(name), kept=db.list_models())
    return wire.Deleted(id=name, object="model")


def _bases(settings: Settings) -> dict[str, wire.ModelObject]:
    aliases = settings.model_aliases
    return {name: wire.ModelObject.of_base(name, aliases.get(name, name)) for name in base_names(aliases)}


def _base(name: str, settings: Settings) -> wire.ModelObject:
    bases = _bases(settings)
    if name not in bases:
        raise ModelNotFound(f"The model '{name}' does not exist. Known here: {', '.join(bases) or 'none'}.")
    return bases[name]


def _delete_blobs(blobs: Blobs, model: Model, kept: list[Model]) -> None:
    # A final model shares its bytes with the checkpoint it came from: what another model needs stays.
    needed = tuple(f"{other.blobs}/" for other in kept)
    for key in list(blobs.keys(model.blobs)):
        if not key.startswith(needed):
            blobs.delete(key)
