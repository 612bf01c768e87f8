from ..support.emulation import EMULATED

# They run in the process that test_launchers.py starts.
collect_ignore = [] if EMULATED else ["launched"]
