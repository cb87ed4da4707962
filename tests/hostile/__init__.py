"""Hostile peers: every parser and every state machine against bytes that nobody meant well.

`properties.PROPERTIES` are functions from arbitrary bytes to nothing. They raise when the code
under test does anything but give a value or one of its documented errors. Hypothesis runs them
(`test_properties.py`), and so does a fuzzer that is guided by coverage (`fuzz.py`, `scripts/fuzz`).
What needs a connection is played over loopback TCP (`test_hostile_initiators.py`,
`test_hostile_targets.py`).
"""
