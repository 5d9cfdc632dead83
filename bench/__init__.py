"""The benchmark: what one request costs in the gateway, beside nginx as a plain reverse proxy, in one run.

    python -m bench [--quick]     runs it (`make bench`); `plan.py` says what is run, and in which order
    python -m bench.report        the table of the last run again, as text or into docs/performance.md
    python -m bench.profile       where the microseconds go

Nothing of the service imports this package. `docs/performance.md` explains the figures.
"""
