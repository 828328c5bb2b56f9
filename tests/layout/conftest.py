"""Makes the profile "thorough" known before it is asked for."""

from __future__ import annotations

import tests.layout.strategies  # noqa: F401
