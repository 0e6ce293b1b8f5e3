"""What `hypercorn sse_trio.app:app --worker-class trio` serves: the application by the environment's settings.

Importing this module reads the environment; who brings settings of their own imports `sse_trio.application`.
"""

from __future__ import annotations

from sse_trio.application import create_app

__all__ = ["app", "create_app"]

app = create_app(owns_process=True, owns_signals=True)
