"""What was done to a network, as plain data that the network carries along: `network.rmprune_facts`."""

from typing import Any

from torch import fx, nn


def facts_of(model: nn.Module) -> dict[str, Any]:
    """The facts noted on a network; empty where there are none."""
    found: dict[str, Any] = getattr(model, "rmprune_facts", {})
    return found


def note(model: nn.Module, **facts: Any) -> None:
    """Adds facts (what JSON can hold) to those of a network, in place; its copies have them too."""
    model.rmprune_facts = facts_of(model) | facts  # type: ignore[assignment]
    if isinstance(model, fx.GraphModule):  # whose copies have nothing else
        model.meta.setdefault("_user_preserved_attributes", {})["rmprune_facts"] = model.rmprune_facts
