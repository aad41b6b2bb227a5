"""One thread for each test process: `pytest -n` starts one for every core, and two threads a core starve each other."""

from armor.execution.machine import set_threads

set_threads(1)
