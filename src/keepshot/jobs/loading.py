"""Loading a model where, and as, a job's spec says."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

from keepshot.assets import AssetStore
from keepshot.jobs.specs import Where
from keepshot.models.loading import LanguageModel, load


def load_as(
    spec: Where, reference: str, store: AssetStore, *, device: str | None = None
) -> LanguageModel:
    """Load a model on the spec's device, in its dtype, with the remote code that it allows.

    Args:
        spec: of any job that loads models.
        reference: the model.
        store: where assets are cached.
        device: in place of the spec's, such as the GPU of one process among several.

    Raises:
        UserError: as `keepshot.models.loading.load` does.
    """
    return load(
        reference,
        store,
        device=device or spec.device,
        dtype=spec.dtype,
        trust_remote_code=spec.trust_remote_code,
    )


@contextmanager
def freeing_fast() -> Generator[None]:
    """Leave what is there now out of garbage collection within the block.

    Modules hold each other in cycles, so a model is freed by collecting; walking through all that
    torch and transformers are would take half a second each time.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
