"""The chaos run in its shorter form: half a minute, few clients, one seed. `make chaos` is the long one."""

from __future__ import annotations

from chaos import chaos


async def test_the_books_balance_after_half_a_minute_of_chaos() -> None:
    assert await chaos(seconds=25, seed=4, clients=15)
