"""Lambda by block and kind of module, for a model that is named by reference."""

from __future__ import annotations

from keepshot.blending.parts import check_covers, parts_of_directory
from keepshot.blending.rules import LambdaRule, by_part
from keepshot.jobs.specs import BlendSpec
from keepshot.jobs.write import Locate, find
from keepshot.models.shards import open_checkpoint


def rule_for(spec: BlendSpec, locate: Locate) -> LambdaRule:
    """Return the spec's rule as a function of the tensor's name.

    Raises:
        UserError: if the base's structure is not known, or does not fit the rule.
    """
    assert spec.rule is not None
    assert spec.lam is not None
    base = find(spec.base, locate)
    parts = parts_of_directory(base)
    check_covers(parts, open_checkpoint(base).tensors, base)
    return by_part(spec.rule, spec.lam, parts)
