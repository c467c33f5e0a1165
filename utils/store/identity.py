"""What things follow from. Equal facts, equal result: nothing else decides what may be reused."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable

from torch import nn

from utils.profile import Profile
from utils.store.files import digest

DEFAULTS = {field.name: field.default for field in dataclasses.fields(Profile)}


def follows_from(profile: Profile, fields: Iterable[str], **more: object) -> dict:
    """The `fields` of `profile` that are not at their default, and `more`, as JSON holds them.

    A setting at its default is left out, so a new one makes no old file another's. (Hence the
    default of a field never changes: the profiles change.)
    """
    chosen = {k: getattr(profile, k) for k in fields if getattr(profile, k) != DEFAULTS[k]}
    return json.loads(json.dumps(chosen | more))


def differences(found: dict, wanted: dict) -> list[str]:
    """One entry for each fact in which two things differ: "lr = 0.1, now 0.2"."""
    default = json.loads(json.dumps({k: DEFAULTS.get(k) for k in sorted(found | wanted)}))
    pairs = {k: (found.get(k, v), wanted.get(k, v)) for k, v in default.items()}
    return [f"{k} = {a!r}, now {b!r}" for k, (a, b) in pairs.items() if a != b]


def fingerprint(facts: object) -> str:
    """16 hex digits that stand for plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def weights_digest(model: nn.Module) -> str:
    """16 hex digits that stand for a network's weights and BN statistics: equal for equal bits."""
    return digest(model.state_dict().values())
