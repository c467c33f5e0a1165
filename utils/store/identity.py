"""What things follow from. Equal facts, equal result: nothing else decides what may be reused."""

import hashlib
import json
from collections.abc import Iterable

from torch import nn

from utils.profile import Profile
from utils.store.files import digest


def follows_from(profile: Profile, fields: Iterable[str], **more: object) -> dict:
    """The `fields` of `profile` that are not at their default, and `more`: plain values, as JSON
    holds them.

    A setting at its default is left out, so a new one makes no old file another's. (Hence the
    default of a field never changes: the profiles change.)
    """
    chosen = {name: getattr(profile, name) for name in fields}
    facts = {k: v for k, v in chosen.items() if v != getattr(Profile, k)}
    return json.loads(json.dumps(facts | more))


def differences(found: dict, wanted: dict) -> list[str]:
    """One entry for each fact in which two things differ: "lr = 0.1, now 0.2"."""

    def value(facts: dict, name: str) -> object:
        return facts.get(name, json.loads(json.dumps(getattr(Profile, name, None))))

    pairs = {k: (value(found, k), value(wanted, k)) for k in sorted(found.keys() | wanted.keys())}
    return [f"{k} = {a!r}, now {b!r}" for k, (a, b) in pairs.items() if a != b]


def fingerprint(facts: object) -> str:
    """16 hex digits that stand for plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def weights_digest(model: nn.Module) -> str:
    """16 hex digits that stand for a network's weights and BN statistics: equal for equal bits."""
    return digest(model.state_dict().values())
