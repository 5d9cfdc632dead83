"""Long loops of faults, each with a short form in the suite. `python -m tests.loops.kill9 --times 50` runs a long one."""
