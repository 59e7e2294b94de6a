"""The parts `bench-*`: layers of a family against their peers and limits, then the sweep for its dispatch table.

Both grow row by row in the part's file; what is there is not measured again.
"""

from __future__ import annotations

from typing import Any

import torch

from .context import Context, IncompleteError, PartError
from .families import FAMILIES
from .layers import describe, run_layer
from .sweep import run_bucket

LAYER_SECONDS, BUCKET_SECONDS = 45.0, 10.0  # that must be left to begin one
SWEPT_SECONDS = 4.0  # a bucket's, on average


def run(context: Context, family_name: str, column_name: str) -> None:
    family = FAMILIES[family_name]
    column = family.column(column_name)
    layers = context.data.setdefault("layers", {})
    buckets = context.data.setdefault("buckets", {})
    wanted = {describe(*row): row for row in family.rows(column, context.rehearsal)}
    swept = {describe(*row): row for row in family.buckets(column, context.rehearsal)}
    for n, (name, (workload, precision)) in enumerate(wanted.items()):
        if name in layers or context.left() < LAYER_SECONDS * (not context.rehearsal):
            continue
        # So much is kept for the layers to come, and for the sweep, that this one does not take to try choices.
        reserved = LAYER_SECONDS * (len(wanted) - n) + SWEPT_SECONDS * len(swept)
        keep(context, layers, name, run_layer(family, column, workload, precision, context, reserved))
    for name, (workload, precision) in swept.items():
        if name in buckets or context.left() < BUCKET_SECONDS * (not context.rehearsal):
            continue
        keep(context, buckets, name, run_bucket(family, workload, precision, context.device, column.cold))
    missing = len(wanted) + len(swept) - len(layers) - len(buckets)
    if missing:
        raise IncompleteError(
            f"{len(layers)} of {len(wanted)} layers and {len(buckets)} of {len(swept)} buckets fitted in the time; "
            "the next call goes on from here"
        )


def keep(context: Context, done: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    """Unless a contestant broke the process's access to the GPU, which makes all that follow it look inapplicable."""
    try:
        if context.device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        context.data["broken"] = found
        raise PartError(f"{name}: {str(error).splitlines()[0]} (its reasons are in the part's file)") from error
    done[name] = found
    context.save()
