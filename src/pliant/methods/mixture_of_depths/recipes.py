"""Controls of Mixture-of-Depths (arXiv 2409.17016): its forms that do not learn what to select."""

from __future__ import annotations

from typing import Any

REMOVED = "blocks removed"
# Label -> what the control changes.
CONTROLS: dict[str, dict[str, Any]] = {
    "MoD, score order": {},
    "MoD, index order": {"order": "index"},
    "random channels, fresh": {"selection": "random"},
    "random channels, fixed": {"selection": "fixed"},
    "first k channels": {"selection": "first"},
    REMOVED: {"selection": "none"},
}
